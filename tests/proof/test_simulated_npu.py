"""The whole suite on the simulated NPU host: green when all is well, red with a useful sentence for each fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import simulator

pytestmark = pytest.mark.proof
ROOT = Path(__file__).parents[2]
SPECS = ROOT / "clipval" / "specs"


@pytest.fixture(scope="module")
def spec_file(tmp_path_factory):
    """The embedded default on 48 images and two batch sizes, without figures of recall."""
    text = (SPECS / "shapes.toml").read_text(encoding="utf-8")
    for name in ("shapes-vit.json", "shapes-vit.pt"):
        text = text.replace(f'"{name}"', f'"{SPECS / name}"')
    head, _, rest = text.partition("[[references]]")
    bounds = rest[rest.index("[[parity]]") : rest.index("[throughput]")]
    head = head.replace("images = 1000", "images = 48").replace("captions = 5000", "captions = 240")
    head = "\n".join(line for line in head.splitlines() if "captions_sha256" not in line)
    file = tmp_path_factory.mktemp("spec") / "small.toml"
    file.write_text(f"{head}\n{bounds}\n[throughput]\nbatch_sizes = [1, 8]\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def run(spec_file, tmp_path_factory):
    """Run the suite in a process of its own on the simulated host; its exit code and output.

    Simulated faults sit in the OM files, which their keys know nothing of, so each run has its own work directory.
    """

    def run(*arguments, **switches):
        workdir = tmp_path_factory.mktemp("work")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--spec={spec_file}"]
        command += [f"--workdir={workdir}", "--threads=1", "--perf-min-time=0.1", "--perf-noise=10", *arguments]
        # a run inside an xdist worker would take itself for one, and measure nothing
        outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        variables = {**outside, "OMP_NUM_THREADS": "1", **simulator.environment(**switches)}
        done = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False
        )
        return done.returncode, done.stdout + done.stderr

    return run


BOTH = ("-m", "accuracy or perf", "--backends", "pytorch,onnx,om")
NPU = ("-m", "accuracy", "--backends", "om", "--allow-simulated")


def test_green_and_said_to_be_simulated(run):
    code, output = run(*BOTH, "--allow-simulated")
    lines = [line for line in output.splitlines() if "throughput/om" in line and "BUSY" not in line]
    assert code == 0 or "is BUSY" in output, output[-3000:]  # other tests may keep the host busy, nothing else may fail
    assert output.count("is BUSY") == output.count("FAILED tests")
    assert lines or "BUSY" in output
    assert "simulated" in output


def test_red_where_a_simulated_device_is_not_allowed(run):
    code, output = run("-m", "accuracy", "--backends", "pytorch,onnx,om")
    assert code == 1
    assert "a simulated device passes no gate" in output
    assert "not evaluated" in output


@pytest.mark.parametrize("chip", ["310P3", "910_9392"])
@pytest.mark.parametrize("generation", ["A", "C"])
def test_other_chips_and_generations_are_green(run, chip, generation):
    code, output = run(*NPU, chip=chip, generation=generation)
    assert code == 0, output[-3000:]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("wrong_batch", "batch"),
        ("argmax_fp16", "distinct/om/text: inputs with one embedding"),
        ("extra_output", "output"),
        ("swapped_outputs", "output"),
        ("truncated_om", "load"),
        ("device_lost", "om backend"),
        ("atc_E10001", "E10001"),
        ("atc_E10016", "E10016"),
        ("atc_E16002", "E16002"),
        ("atc_E19010", "E19010"),
        ("atc_E40000", "E40000"),
        ("atc_lies", "atc"),
        ("no_hal", "libascend_hal"),
        ("no_set_env", "set_env.sh"),
        ("no_ascendcl", "set_env.sh"),
        ("driver_mismatch", "507033"),
        ("no_npu", "NPU"),
    ],
)
def test_faults_are_red_and_named(run, fault, words):
    code, output = run(*NPU, fault=fault)
    assert code == 1, output[-3000:]
    assert words in output


def test_a_busy_npu_is_no_figure(run):
    code, output = run("-m", "perf", "--backends", "om", "--allow-simulated", "--batch-sizes", "8", fault="busy")
    assert code == 1
    assert "is BUSY" in output
    assert "throughput/om/vision/8" in output
