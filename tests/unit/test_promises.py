"""A comparison that was asked for is made, or the run does not pass."""

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
    assert "No such file or directory; make it with clipval baseline --save" in ended.output


def test_a_selection_that_leaves_the_comparison_out_fails(saved, tmp_path):
    ended = run(saved, tmp_path, "-k", "nothing_at_all")
    assert ended.code == 1
    assert "baseline/rows" in ended.output
    assert "FAIL: 0 gates passed, 0 failed, 1 not evaluated" in ended.output
