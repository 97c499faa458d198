"""Shared by the proofs: the small spec, and a work directory that a clean run has filled."""

import os
import shutil

import pytest
from filelock import FileLock

from tests import small


@pytest.fixture(scope="session")
def small_spec(tmp_path_factory):
    """The spec file of the small data set."""
    return small.write_spec(tmp_path_factory.mktemp("spec"))


@pytest.fixture(scope="session")
def clean(small_spec, tmp_path_factory):
    """A clean run, made once, also by several workers of xdist: its work directory and what it ended with."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "clipval-clean"
    with FileLock(str(shared) + ".lock"):
        if not shared.exists():
            made = tmp_path_factory.mktemp("clean") / "work"
            ended = small.run(small_spec, made, "-m", "accuracy")
            assert ended.code == 0, ended.output[-3000:]
            shutil.copytree(made, shared)
    return shared


@pytest.fixture
def copied(clean, tmp_path):
    """Links the clean work directory, without its runs and some kinds of artifacts.

    A run writes new files and renames them; what it overwrites in place, e.g. damaged arrays, it has made itself.
    """

    def copy(*without):
        made = tmp_path / "work"
        shutil.copytree(clean, made, copy_function=os.link, ignore=shutil.ignore_patterns("runs", "*.lock", *without))
        return made

    return copy


@pytest.fixture
def workdir(copied):
    """A copy of the clean work directory, without what faults damage while it is made."""
    return copied("prepared", "onnx")
