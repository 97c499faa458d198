"""A run that is killed at any moment leaves nothing that the next one would use."""

import errno
import os
import random
import signal
import subprocess
import time

import pytest

from clipval import report, results, store
from tests import small

pytestmark = pytest.mark.proof
KILLS = 10
SEED = random.SystemRandom().randrange(10**6)


def figures(run):
    return {(one.gate, one.metric): one.measured for one in run.figures}


def start(spec, workdir, **variables):
    command = small.command(spec, workdir, "--threads=1", "-m", "accuracy")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=small.ROOT, env=small.environment(**variables), **quiet)


def test_killed_at_random_moments(small_spec, tmp_path):
    undisturbed = tmp_path / "undisturbed"
    started = time.monotonic()
    wanted = small.run(small_spec, undisturbed, "-m", "accuracy")
    length = time.monotonic() - started
    assert wanted.code == 0, wanted.output[-3000:]
    workdir, rng = tmp_path / "killed", random.Random(SEED)
    for _ in range(KILLS):
        process = start(small_spec, workdir)
        time.sleep(rng.uniform(0.3, 1.0) * length)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for file in (workdir / "runs").glob("*.jsonl"):
            results.read(file)  # what was finished is there and can be read
    ended = small.run(small_spec, workdir, "-m", "accuracy")
    assert ended.code == 0, f"seed {SEED}\n{ended.output[-3000:]}"
    assert figures(ended) == figures(wanted), f"seed {SEED}"
    left = list(workdir.rglob("*.building"))
    assert not left, f"seed {SEED}: {left}"


@pytest.mark.parametrize("narrowed", [[], ["tests/acceptance/test_throughput.py"]], ids=["all", "narrowed"])
def test_ctrl_c_while_throughput_is_measured(narrowed, small_spec, workdir):
    perf = ["--threads=1", "-m", "perf", "--perf-min-time=3", "--perf-max-time=3", *narrowed]
    command = small.command(small_spec, workdir, *perf)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(
        command, cwd=small.ROOT, env=small.environment(), preexec_fn=small.hear_interrupts, **pipes
    )
    wait_for_a_row(workdir)  # so that all libraries are loaded: some lose an interrupt while they are imported
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output[-3000:]
    assert "KeyboardInterrupt" in output
    assert "not evaluated" in output  # of a selection too: what it selected
    assert "FAIL: " in output
    assert "PASS: " not in output
    (file,) = (workdir / "runs").glob("*.jsonl")
    kept = {one.gate for one in results.read(file)}
    assert len(kept) == 1, "what was finished is on disk, what was interrupted is not"


def test_a_reference_that_is_killed_goes_on_where_it_stopped(small_spec, tmp_path, clean):
    """PyTorch's embeddings are the longest part of an accuracy run at full size."""
    workdir = tmp_path / "work"
    killed = small.run(small_spec, workdir, "-m", "accuracy", CLIPVAL_KILLED_BEFORE="3")  # the second of the text's
    assert killed.code == 128 + signal.SIGKILL, killed.output[-3000:]
    (half,) = (workdir / "reference").glob("*.building")
    kept = {path.name: path.stat().st_ino for path in half.glob("*-of-*")}
    assert len(kept) == 1
    ended = small.run(small_spec, workdir, "-m", "accuracy")
    assert ended.code == 0, ended.output[-3000:]
    whole = half.with_suffix("")
    assert {name: (whole / name).stat().st_ino for name in kept} == kept
    assert len(list(whole.glob("*-of-*"))) > 1
    for part in whole.glob("*-of-*"):
        (same,) = (clean / "reference").glob(f"*/{part.name}/values.npy")
        assert (part / "values.npy").read_bytes() == same.read_bytes()


def wait_for_a_row(workdir):
    """Until the first finished row of a run is on disk."""
    deadline = time.monotonic() + 120
    while not any(file.stat().st_size for file in (workdir / "runs").glob("*.jsonl")):
        assert time.monotonic() < deadline, "no row was finished in two minutes"
        time.sleep(0.1)


@pytest.mark.parametrize("kind", ["prepared", "onnx", "reference"])
def test_a_disk_that_fills_up(kind, small_spec, workdir, monkeypatch):
    """The build of one kind of artifact meets a full disk half-way; the next run makes it again."""
    if kind == "reference":
        for folder in (workdir / "reference").iterdir():
            if folder.is_dir():
                (folder / "manifest.json").unlink()
    full = small.run(small_spec, workdir, "-m", "accuracy", CLIPVAL_DISK_FULL=kind)
    assert full.code == (4 if kind == "prepared" else 1)  # data are prepared before the first gate
    assert "disk full; free some space" in full.output
    assert "Traceback" not in full.output
    assert os.strerror(errno.ENOSPC) not in full.output
    again = small.run(small_spec, workdir, "-m", "accuracy")
    assert again.code == 0, again.output[-3000:]
    for folder in (workdir / kind).iterdir():
        assert not folder.is_dir() or store.files(folder)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="this system has no limit on a file's size")
@pytest.mark.parametrize(("kind", "kilobytes"), [("prepared", 300), ("onnx", 1200)])
def test_writes_that_stop_half_way(kind, kilobytes, small_spec, workdir):
    """The system itself cuts a file off, inside numpy, torch or onnx; nothing of it is used."""
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, kilobytes * 1024))

    if kind == "onnx":
        assert small.run(small_spec, workdir, "-m", "accuracy", "-k", "prepared").code == 0
    command = small.command(small_spec, workdir, "--threads=1", "-m", "accuracy")
    more = {"capture_output": True, "text": True, "timeout": 600, "check": False, "preexec_fn": limit}
    cut = subprocess.run(command, cwd=small.ROOT, env=small.environment(), **more)
    assert cut.returncode == (4 if kind == "prepared" else 1), cut.stdout[-3000:]
    assert "give another --workdir" in cut.stdout + cut.stderr
    assert "Traceback" not in cut.stdout + cut.stderr
    assert not list((workdir / kind).rglob(store.MANIFEST))  # what the next run goes on with is no artifact
    again = small.run(small_spec, workdir, "-m", "accuracy")
    assert again.code == 0, again.output[-3000:]


KILLER = """
import os, signal

ended = 0

def pytest_runtest_logfinish():
    global ended
    ended += 1
    if ended == 6:
        os.kill(os.getpid(), getattr(signal, os.environ["KILL_WITH"]))
"""


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", 137), ("SIGTERM", 143)])
def test_a_run_that_something_kills_has_its_report(small_spec, tmp_path, name, code):
    """The out-of-memory killer, or CI that cancels a job: what was judged before is kept."""
    (tmp_path / "killer.py").write_text(KILLER, encoding="utf-8")
    variables = {"KILL_WITH": name, "PYTHONPATH": os.pathsep.join([str(small.ROOT), str(tmp_path)])}
    options = ["-p", "killer", "-m", "accuracy", "--report", str(tmp_path / "out")]
    ended = small.run(small_spec, tmp_path / "work", *options, **variables)
    assert ended.code == code, ended.output[-3000:]
    found = report.load(tmp_path / "out" / "report.json")
    assert [len(found.figures), found.verdict] == [len(ended.figures), "fail"]
    assert found.missing
    assert f"error: session: the run was ended by {name} before its verdict" in ended.output
