"""Workers and whole runs of `embed --devices` killed at random moments, by SIGKILL."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from clipval import embeddings
from clipval.shards import files
from clipval.towers import VISION
from tests import small
from tests.simulator import tiny

pytestmark = pytest.mark.proof
SAMPLES, SHARDS, RUNS = 1500, 30, 4
SEED = random.SystemRandom().randrange(10**6)


def workers_of(pid):
    """Processes that a run has spawned, by the system's own list."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


def complete(folder):
    return {path.name for path in folder.glob("*-of-*") if not path.name.endswith(".building")}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc to find workers by")
def test_killed_at_random(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for n, row in enumerate(tiny.rows(VISION, SAMPLES)):
        np.save(images / f"{n}.npy", row[None])
    model = tiny.write(tmp_path / "b_vision.onnx", VISION)
    given = [sys.executable, "-m", "clipval", "embed", "--model", str(model), "--input", str(images), "--threads=1"]
    given += ["--batch-size=4", "--output", str(tmp_path)]
    environment = small.environment()
    assert subprocess.run([*given, "--output-dirname=one"], env=environment, check=False).returncode == 0
    many, rng, killed = tmp_path / "many", random.Random(SEED), 0
    command = [*given, "--output-dirname=many", f"--shards={SHARDS}", "--devices=0,1,2"]
    for turn in range(RUNS):
        before = complete(many)
        run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        ends = time.monotonic() + rng.uniform(2, 5)
        while time.monotonic() < ends and run.poll() is None:
            time.sleep(rng.uniform(0.3, 1.0))
            alive = workers_of(run.pid)
            if alive:
                os.kill(rng.choice(alive), signal.SIGKILL)
                killed += 1
        left = workers_of(run.pid)
        run.kill()
        said = run.communicate()[1]
        assert "Traceback" not in said, f"seed {SEED}\n{said}"
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in left):
            assert time.monotonic() < deadline, f"seed {SEED}: workers outlive their run"
            time.sleep(0.05)
        assert before <= complete(many), f"seed {SEED}: turn {turn} lost a shard"
    last = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert last.returncode == 0, f"seed {SEED}\n{last.stderr}"
    assert killed, f"seed {SEED}: every run ended before a worker was killed"
    wanted, found = embeddings.read(tmp_path / "one"), files.read_any(many)
    assert found.ids == wanted.ids
    assert found.values.tobytes() == wanted.values.tobytes()
    assert set(os.listdir(many)) - {".lock"} == {*complete(many), files.INDEX}
