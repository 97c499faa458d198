"""Several processes on one work directory build each artifact once and find the same figures."""

import subprocess
from collections import Counter

import pytest

from clipval import results
from tests import small

pytestmark = pytest.mark.proof


def builds(log):
    return Counter(log.read_text(encoding="utf-8").split())


def figures(found):
    return {(one.gate, one.metric): one.measured for one in found}


def test_two_suites_at_once(small_spec, tmp_path):
    workdir, log = tmp_path / "work", tmp_path / "log"
    variables = small.environment(CLIPVAL_BUILD_LOG=str(log))
    command = small.command(small_spec, workdir, "--threads=1", "-m", "accuracy")
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(command, cwd=small.ROOT, env=variables, **quiet) for _ in range(2)]
    for process in both:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output[-3000:]
    assert set(builds(log).values()) == {1}
    one, other = (results.read(file) for file in sorted((workdir / "runs").glob("*.jsonl")))
    assert figures(one) == figures(other)


def test_four_workers(small_spec, clean, tmp_path):
    workdir, log = tmp_path / "work", tmp_path / "log"
    ended = small.run(small_spec, workdir, "-m", "accuracy", "-n", "4", CLIPVAL_BUILD_LOG=str(log))
    assert ended.code == 0, ended.output[-3000:]
    assert set(builds(log).values()) == {1}
    alone = small.run(small_spec, workdir, "-m", "accuracy")
    assert figures(ended.figures) == figures(alone.figures)


def test_perf_is_not_measured_by_several_workers(small_spec, clean):
    ended = small.run(small_spec, clean, "-m", "perf", "-n", "2")
    assert ended.code == 4
    assert "throughput cannot be measured by several workers at once" in ended.output
