"""Shared by the unit tests: the small architecture with seeded weights, and the artifacts of the default."""

import os

import pytest

from clipval import model, weights
from clipval.spec import FOLDER
from clipval.towers import towers

CONFIG = str(FOLDER / "shapes-vit.json")


@pytest.fixture(scope="session")
def seeded():
    """The embedded default's architecture with random weights."""
    return model.load(CONFIG, weights.find_weights(CONFIG, weights.RANDOM), towers())


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A work directory for the artifacts of the embedded default, one for all files of tests and workers of xdist."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "built"
