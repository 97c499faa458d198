"""A backend is one file and one line: a fourth one goes through every gate, report, baseline and command."""

import json
import subprocess
import sys

import pytest

from tests import small

pytestmark = pytest.mark.proof
BOUNDS = """
[[parity]]
backend = "fourth"
precision = "fp32"
cosine_min = 0.9999999
cosine_mean = 0.99999995
max_abs = 2e-5
norm = 1e-5
invariance = 1e-5
because = "the same graph in fp32"

[throughput]"""
# The host may be busy with other tests, which is not what is looked at here.
COMMAND = """
import sys, tests.fourth
from clipval import cli
from clipval.throughput.machine import HostLoad, Pace
HostLoad.busy, Pace.now = lambda self: "", lambda self: 1.0
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    file = small.write_spec(tmp_path_factory.mktemp("spec"))
    file.write_text(file.read_text(encoding="utf-8").replace("\n[throughput]", BOUNDS), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def run(spec, tmp_path_factory):
    """A run of every gate, of accuracy and of throughput against a baseline, and its report."""
    folder = tmp_path_factory.mktemp("run")
    chosen = ["--backends=fourth", "--batch-sizes=8", "--perf-max-time=1"]
    model = [f"--spec={spec}", f"--workdir={folder / 'work'}", "--threads=1", "--perf-min-time=0.1", "--perf-noise=10"]
    clipval("bench", *model, *chosen, f"--save={folder / 'base.json'}")
    base = json.loads((folder / "base.json").read_text(encoding="utf-8"))
    # five sessions of a hundredth of the speed, so that no row is slower
    base["rows"] = {
        name: [figures[0] * (1 + n / 1000) / 100 for n in range(5)] for name, figures in base["rows"].items()
    }
    (folder / "base.json").write_text(json.dumps(base), encoding="utf-8")
    kinds = ["-m", "accuracy or perf", f"--report={folder / 'report'}", f"--baseline={folder / 'base.json'}"]
    return folder, small.run(spec, folder / "work", "-p", "tests.fourth", *chosen, *kinds)


def clipval(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        cwd=small.ROOT, env=small.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def test_every_gate_judges_it(run):
    _, ended = run
    judged = {one.gate: one for one in ended.figures}
    checks = ("values", "distinct", "invariance", "parity")
    assert {f"{check}/fourth/{tower}" for check in checks for tower in ("vision", "text")} <= set(judged)
    assert {"recall/fourth/image_retrieval_recall@5", "paired/fourth/text_retrieval_recall@5"} <= set(judged)
    assert {gate for gate in ended.red if not gate.startswith("throughput/")} == set(), ended.output[-3000:]
    row = judged["throughput/fourth/text/8"]  # a busy machine may spoil it
    assert row.measured > 0
    assert row.made_by.precision == "as written"
    against = [one for one in ended.figures if one.gate == row.gate and "against the baseline" in one.metric]
    assert [one.verdict for one in against] == ["pass"]
    assert judged["baseline/rows"].verdict == "pass"


def test_the_report_shows_it(run):
    folder, ended = run
    assert "fourth: not listed" not in ended.output
    for name in ("report.html", "report.md"):
        assert "fourth" in (folder / "report" / name).read_text(encoding="utf-8")


def test_commands_take_it(spec, run, tmp_path):
    work = run[0] / "work"
    (file,) = work.glob("fourth/*/text_bs8.fourth")
    (texts,) = work.glob("prepared/*/texts")
    said = clipval("embed", "--spec", spec, "--model", file, "--input", texts, "--output", tmp_path)
    assert "300 embeddings of the text tower by fourth" in said
    assert len(list((tmp_path / "text_embed_bs8").iterdir())) == 300
    options = ["--batch-sizes", "8", "--perf-min-time", "0.05", "--perf-max-time", "0.1", "--device-id", "0,1"]
    said = clipval("bench", "--spec", spec, "--workdir", work, *options, "--backends", "fourth")
    assert "fourth:0/vision/8/inference" in said
    assert "fourth:1/text/8/inference" in said


def test_a_backend_that_cannot_be_looked_into_is_not_diagnosed(spec, run):
    given = [f"--spec={spec}", f"--workdir={run[0] / 'work'}", "--backend=fourth", "--tower=text"]
    assert "its inner tensors are not accessible" in clipval("diagnose", *given, code=2)
