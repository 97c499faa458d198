"""The whole suite on the simulated NPU host: green when all is well, red with a useful sentence for each fault."""

import os
import re
import shutil
from xml.etree import ElementTree

import pytest

from clipval import report
from clipval.report.wording import row_verdict
from tests import simulator, small

pytestmark = pytest.mark.proof


@pytest.fixture
def run(small_spec, copied):
    """Run the suite on the simulated host; its exit code and output.

    Simulated faults sit in the OM files, which their keys know nothing of, so each test compiles its own.
    """
    workdir = copied()

    def run(*arguments, **switches):
        ended = small.run(small_spec, workdir, *arguments, **simulated(**switches))
        return ended.code, ended.output

    return run


def simulated(**switches):
    found = simulator.environment(**switches)
    return {**found, "PYTHONPATH": os.pathsep.join([str(small.ROOT), found["PYTHONPATH"]])}


BOTH = ("-m", "accuracy or perf", "--backends", "pytorch,onnx,om")
NPU = ("-m", "accuracy", "--backends", "om", "--allow-simulated")
SOME = (*NPU, "--gate=values,distinct,parity")  # what a host's fault keeps from any gate, or spoils in one of these


@pytest.mark.idle
def test_green_and_said_to_be_simulated(small_spec, tmp_path):
    """Beside other tests the host is busy, so its rows of throughput may be; nothing else may fail."""
    ended = small.run(small_spec, tmp_path / "work", *BOTH, "--allow-simulated", **simulated())
    busy = {one.gate for one in ended.figures if row_verdict(one) == "BUSY"}
    assert set(ended.red) <= (busy if "PYTEST_XDIST_WORKER" in os.environ else set()), ended.output[-3000:]
    assert ended.code == int(bool(ended.red)), ended.output[-3000:]
    assert {"parity/om/text", "throughput/om/vision/8"} <= {one.gate for one in ended.figures}
    assert all(one.made_by.simulated for one in ended.figures if one.made_by and one.made_by.name == "om")
    assert "simulated" in ended.output


def test_red_where_a_simulated_device_is_not_allowed(run):
    code, output = run("-m", "accuracy", "--backends", "pytorch,onnx,om")
    assert code == 1
    assert "a simulated device passes no gate" in output
    assert "not evaluated" in output


@pytest.mark.parametrize(
    ("generation", "chip"), [("A", "310P3"), ("B-early", "910_9392"), ("B", "310P3"), ("C", "910_9392")]
)
def test_other_chips_and_generations_are_green(run, chip, generation):
    code, output = run(*NPU, chip=chip, generation=generation)
    assert code == 0, output[-3000:]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("wrong_batch", "batch"),
        ("argmax_fp16", "distinct/om/text: inputs with one embedding"),
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
    code, output = run(*SOME, fault=fault)
    assert code == 1, output[-3000:]
    assert words in output


def test_both_runtimes_give_the_same_figures(small_spec, copied):
    found, workdir = {}, copied()
    for runtime in ("aclruntime", "pyacl"):
        ended = small.run(small_spec, workdir, *NPU, "--om-runtime", runtime, **simulated())
        assert ended.code == 0, ended.output[-3000:]
        assert all(runtime in one.made_by.version.lower() for one in ended.figures if one.gate.startswith("parity/om"))
        found[runtime] = {(one.gate, one.metric): one.measured for one in ended.figures}
    assert found["aclruntime"] == found["pyacl"]


def test_the_recipes_own_om_files_are_taken_as_they_are(tmp_path, run):
    """Two outputs, its names, and the batch sizes that are there: 4, which the spec does not have."""
    code, output = run(*NPU, "--batch-sizes", "4", fault="swapped_outputs")
    assert code == 0, output[-3000:]
    assert output.count("OM files give more than the embedding") == 1
    models = tmp_path / "models"
    models.mkdir()
    for file in (tmp_path / "work").rglob("*_bs4.om"):
        shutil.copy(file, models / f"vit_b_32_{file.name}")
    code, output = run(*NPU, "--om-dir", str(models))
    assert code == 0, output[-3000:]


def test_a_device_that_does_not_come_back_ends_the_run(small_spec, copied, tmp_path):
    faults, junit = simulated(fault="device_hangs"), tmp_path / "out" / "junit.xml"
    files = ["--report", str(junit.parent), "--junitxml", str(junit)]
    ended = small.run(small_spec, copied(), *NPU, "--device-timeout", "2", *files, **faults)
    assert ended.code == 1, ended.output[-3000:]
    found = report.load(junit.parent / "report.json")
    assert [len(found.figures), found.verdict] == [len(ended.figures), "fail"]
    assert {path.suffix for path in junit.parent.iterdir()} == {".json", ".md", ".html", ".xml"}
    cases = ElementTree.parse(junit).getroot().findall("*/testcase")
    assert len(cases) == len(found.expected)
    red = {case.get("name") for case in cases if len(case)}
    assert red == {*found.missing, *ended.red}
    assert len(red) > 10
    assert "did not return within 2 s (--device-timeout); npu-smi reports: Ascend910B4" in ended.output
    assert [one.metric for one in ended.figures if one.verdict == "fail"] == ["device call"]


def test_a_busy_npu_is_no_figure(run):
    code, output = run("-m", "perf", "--backends", "om", "--allow-simulated", "--batch-sizes", "8", fault="busy")
    assert code == 1
    assert "is BUSY" in output
    assert "throughput/om/vision/8" in output


def test_two_npus_are_validated_each_by_itself(run):
    code, output = run(*NPU, "--device-id", "0,1")
    assert code == 0, output[-3000:]
    assert re.search(r"^parity om:0 .*vision  minimum cosine", output, re.MULTILINE)
    assert re.search(r"^parity om:1 .*text    minimum cosine", output, re.MULTILINE)
    code, output = run(*NPU, "--device-id", "0,7")
    assert code == 1
    assert "7" in output
