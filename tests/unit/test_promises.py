"""What was asked for is done, or found at the start to be impossible: comparisons, files to write, timing, gates."""

import os
import subprocess
import sys

import pytest

from clipval.throughput import baseline
from tests import small


@pytest.fixture
def saved(tmp_path):
    file = tmp_path / "b.json"
    baseline.save(baseline.Baseline({}, {"onnx/text/8/inference": [100.0] * 5}), file)
    return file


def run(file, tmp_path, *arguments):
    return small.run("shapes", tmp_path / "work", f"--baseline={file}", *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "accuracy"], "--baseline compares throughput, which -m leaves out; add perf to it"),
        (["-m", "perf", "-n", "2"], "throughput cannot be measured by several workers at once"),
        (["-n", "2"], "throughput cannot be measured by several workers at once"),
    ],
)
def test_a_run_without_throughput_takes_no_baseline(arguments, said, saved, tmp_path):
    ended = run(saved, tmp_path, *arguments)
    assert ended.code == 4
    assert said in ended.output


def test_a_baseline_is_read_before_anything_is_measured(tmp_path):
    ended = run(tmp_path / "none.json", tmp_path, "-m", "perf")
    assert ended.code == 4
    assert "No such file or directory; record it with clipval baseline --save" in ended.output


def test_a_selection_that_leaves_the_comparison_out_fails(saved, tmp_path):
    ended = run(saved, tmp_path, "-k", "nothing_at_all")
    assert ended.code == 1
    assert "baseline/rows" in ended.output
    assert "FAIL: 0 gates passed, 0 failed, 1 not evaluated" in ended.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "accuracy", "--report={taken}/report"], "--report {taken}/report/report.json: cannot be written"),
        (["-m", "accuracy", "--junitxml={taken}/junit.xml"], "--junitxml {taken}/junit.xml: cannot be written"),
        (
            ["-m", "perf", "--benchmark-histogram={taken}/plot"],
            "--benchmark-histogram {taken}/plot.svg: cannot be written",
        ),
        (
            ["-m", "perf", "--benchmark-save=x", "--benchmark-storage=file://{taken}/kept"],
            "--benchmark-storage {taken}/kept/new.json: cannot be written",
        ),
        (["-m", "perf", "--benchmark-json={taken}/perf.json"], "{taken}/perf.json"),
        (["-m", "perf", "--benchmark-disable"], "--benchmark-disable: this run promises throughput, which would not"),
        (["-m", "perf", "-p", "no:benchmark"], "throughput needs pytest-benchmark, which is not loaded"),
        (["--benchmark-only"], "--benchmark-only skips the accuracy gates"),
        (["--gate=parity/onx/text"], "not a gate of this run; did you mean parity/onnx/text"),
        (
            ["--gate=recall", "-m", "perf"],
            "--gate recall: not a gate of this run; it has e.g. throughput/",
        ),
    ],
)
def test_what_cannot_be_done_is_said_at_the_start(arguments, said, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("mine", encoding="utf-8")
    ended = small.run("shapes", tmp_path / "work", *(one.format(taken=taken) for one in arguments))
    assert ended.code == 4, ended.output[-2000:]
    assert said.format(taken=taken) in ended.output
    assert taken.read_text(encoding="utf-8") == "mine"


def test_a_folder_of_data_is_not_taken_for_the_tests(tmp_path):
    """pytest takes the value of an option it does not know yet for a path of tests, and another root with it."""
    ended = small.run(
        "shapes", tmp_path / "work", "-m", "accuracy", "--data-dir", str(tmp_path), "--collect-only", "-q"
    )
    assert ended.code == 0, ended.output[-2000:]
    assert "tests/acceptance/test_parity.py::test_parity[onnx-text]" in ended.output


def test_other_projects_keep_their_own_options(tmp_path):
    """Where no conftest.py uses clipval, a run neither has its options nor imports it."""
    (tmp_path / "conftest.py").write_text(
        "import sys\ndef pytest_addoption(parser):\n    parser.addoption('--spec', '--data-dir', type=int)\n"
        "def pytest_unconfigure():\n    assert 'clipval.options' not in sys.modules\n",
        encoding="utf-8",
    )
    (tmp_path / "test_it.py").write_text("def test(pytestconfig):\n    assert pytestconfig.option.spec == 3\n")
    plugins = ["-p", "no:clipval-options", "-p", "clipval.entry", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plugins, "--spec", "3"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables = {**outside, "PYTHONPATH": str(small.ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
