"""The embedded default cut down to a few scenes, and the real suite run on it in a process of its own."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Dict, List, NamedTuple

from clipval import results
from clipval.chain import Chain
from clipval.datasets import shapes
from clipval.options import Settings
from clipval.throughput import baseline
from clipval.throughput.rows import baseline_key
from tests import warm

ROOT = Path(__file__).parents[1]
SPECS = ROOT / "clipval" / "specs"
IMAGES = 60  # 60 and 300 are no multiples of the batch of 8, so the last batch is a partial one
RECALL = {1: 280 / 300, 5: 1.0}  # 280 of 300 and 56 of 60: in both directions the same share
REFERENCE = """
[[references]]
metric = "{direction}_retrieval_recall@{k}"
backend = "pytorch"
value = {value}
count = {count}
within = 0.005
source = "measured on the first {images} scenes"
"""


# preexec_fn of a child that is to be interrupted: a shell's background job is born deaf to Ctrl-C
hear_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)


class Run(NamedTuple):
    """What a run of the suite ended with."""

    code: int
    output: str
    figures: List[results.Figure]

    @property
    def red(self) -> List[str]:
        """Gates with a failed figure."""
        return sorted({figure.gate for figure in self.figures if figure.verdict == "fail"})


def write_spec(folder: Path) -> Path:
    """A spec file of `IMAGES` scenes with the shipped tolerances and checkpoint."""
    text = (SPECS / "shapes.toml").read_text(encoding="utf-8")
    for name in ("shapes-vit.json", "shapes-vit.pt", "shapes-golden.npz"):
        text = text.replace(f'"{name}"', f'"{SPECS / name}"')
    head, _, rest = text.partition("[[references]]")
    drawn = zip(shapes._ids(IMAGES), shapes.scenes(shapes.SEED_TEST, IMAGES))
    captions = "".join(f"{number}\t{one}\n" for number, (_, made) in drawn for one in made)
    lines = [line for line in head.splitlines() if not line.startswith("captions_sha256")]
    head = "\n".join(lines).replace("images = 1001", f"images = {IMAGES}")
    digest = f'captions_sha256 = "{hashlib.sha256(captions.encode()).hexdigest()}"'
    head = head.replace("captions = 5005", f"captions = {5 * IMAGES}\n{digest}")
    counts = {"image": 5 * IMAGES, "text": IMAGES}
    references = "".join(
        REFERENCE.format(direction=name, count=n, images=IMAGES, k=k, value=value)
        for name, n in counts.items()
        for k, value in RECALL.items()
    )
    bounds = rest[rest.index("[[parity]]") : rest.index("[throughput]")]
    file = folder / "small.toml"
    file.write_text(f"{head}\n{references}\n{bounds}\n[throughput]\nbatch_sizes = [1, 8]\n", encoding="utf-8")
    return file


def baseline_of(found: Run, spec: Path, workdir: Path) -> baseline.Baseline:
    """A baseline of several sessions, all of them like the rows of one run with one thread."""
    rows = [one.detail.row for one in found.figures if isinstance(one.detail, results.ThroughputDetail)]
    key = baseline_key(Chain(Settings(spec=str(spec), workdir=workdir, threads=1)), {"onnx": str(rows[-1].made_by)})
    key.update(OMP_NUM_THREADS=environment()["OMP_NUM_THREADS"])
    timings = {f"onnx/{one.tower}/{one.batch_size}/inference": one.clocks["inference"].timing for one in rows}

    def sessions(figure: str) -> Dict[str, List[float]]:
        return {name: [getattr(one, figure)] * baseline.MIN_SESSIONS for name, one in timings.items()}

    medians, means = sessions("samples_per_second"), sessions("samples_per_second_mean")
    return baseline.Baseline(key, sessions("undisturbed"), medians=medians, means=means)


def command(spec: Path, workdir: Path, *arguments: str) -> List[str]:
    """The command line of a run."""
    fixed = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.faults.planted"]
    fixed += ["--perf-min-time=0.1", "--perf-noise=10", "--probe-seed=7"]  # figures of two runs are compared
    return [*fixed, f"--spec={spec}", f"--workdir={workdir}", *arguments]


def environment(**variables: str) -> Dict[str, str]:
    """Variables of a run; one inside an xdist worker would take itself for a worker, and measure nothing."""
    foreign = ("PYTEST_XDIST", "PYTEST_ADDOPTS")
    outside = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**outside, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}


def run(spec: Path, workdir: Path, *arguments: str, **variables: str) -> Run:
    """Run the suite to its end, in a process of its own."""
    known = set((workdir / "runs").glob("*.jsonl"))
    done = warm.run(command(spec, workdir, "--threads=1", *arguments), environment(**variables))
    files = sorted(set((workdir / "runs").glob("*.jsonl")) - known)
    return Run(done.returncode, done.stdout + done.stderr, [one for file in files for one in results.read(file)])
