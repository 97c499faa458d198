"""pytest's side of a run: what `-m` promises, and what a line that is narrowed by anything may still say."""

import sys

import pytest

from clipval import gates, promise
from clipval.gates.parity import PARITY
from clipval.gates.throughput import THROUGHPUT
from tests import small, warm


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("", ["accuracy", "perf"]),
        ("not proof", ["accuracy", "perf"]),
        ("accuracy", ["accuracy"]),
        ("perf", ["perf"]),
        ("accuracy or perf", ["accuracy", "perf"]),
        ("accuracy and not perf", ["accuracy"]),
        ("not accuracy", ["perf"]),
        ("proof", []),
        ("(perf or proof) and not accuracy", ["perf"]),
        ("what is this", ["accuracy", "perf"]),
    ],
)
def test_what_an_expression_selects(expression, wanted):
    assert [gate.kind for gate in (PARITY, THROUGHPUT) if promise.selects(expression, gate)] == wanted
    assert {gate.kind for gate in gates.CATALOGUE} == {"accuracy", "perf"}


RED = """
import subprocess
import sys

import pytest
from clipval.gates import embeddings
from clipval.gates.gate import judge

@pytest.mark.gate(embeddings.VALUES)
def test_values(record, backend_name, tower_name):
    gate = embeddings.VALUES.of(backend_name, tower_name)
    record([judge(gate, "norm", 2.0, "<=", 1, unit="absolute", count=1, because="a reason of its own")])
"""


def run_file(text, tmp_path, *arguments, **variables):
    """A run of one file of gates in a project of its own, on a few scenes."""
    for name in ("conftest.py", "pytest.ini"):
        (tmp_path / name).write_text((small.ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "test_red.py").write_text(text, encoding="utf-8")
    spec = f"--spec={small.write_spec(tmp_path)}"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", spec, *arguments]
    return warm.run(command, small.environment(**variables), tmp_path)


@pytest.mark.parametrize("ci", ["", "true"])
def test_a_failure_is_printed_once_on_ci_too(ci, tmp_path):
    ended = run_file(RED, tmp_path, "--gate=values/pytorch/vision", CI=ci)
    assert ended.returncode == 1
    assert ended.stdout.count("a reason of its own") == 1
    assert "FAILED test_red.py::test_values[pytorch-vision]\n" in ended.stdout
    assert "FAIL values/pytorch/vision: norm is 2, expected <= 1" in ended.stdout


BROKEN = """
import pytest
from clipval.errors import InputError
from clipval.gates import embeddings

@pytest.mark.gate(embeddings.VALUES)
def test_values(record, backend_name, tower_name):
    raise InputError("the cause of both")
"""


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "workers"])
def test_an_error_of_several_gates_is_shown_once(workers, tmp_path):
    ended = run_file(BROKEN, tmp_path, "--gate=values/pytorch", "--junitxml=junit.xml", *workers)
    assert ended.returncode == 1
    failures = ended.stdout[: ended.stdout.index("== clipval ==")]
    assert failures.count("the cause of both") == 1
    assert failures.count("the same error as values/pytorch/") == 1
    assert (tmp_path / "junit.xml").read_text(encoding="utf-8").count("the cause of both") >= 2
