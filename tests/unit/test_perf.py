"""The gates of throughput: what fails a row, what only says something, and what never fails."""

from pathlib import Path

import numpy as np
import pytest

from clipval import evidence, perf, spec, throughput
from clipval.backends import Identity
from clipval.baseline import Judgement
from clipval.towers import VISION

SPEC = spec.load("vit-b-32-flickr30k")
HOST = Identity("onnx", "1", "cpu", "fp32")
NPU = Identity("om", "1", "Ascend910B4:0", "force_fp16")


def judged(verdict="VALID", reason="", scope="inference", per_second=300.0):
    row = throughput.summarise(np.full(20, 8 / per_second), 8, scope)
    other = throughput.summarise(np.full(20, 16 / per_second), 8, "inference")
    return {"inference": (other, "VALID", ""), scope: (row, verdict, reason)}


def figures(found, where=HOST, *, required=True, earlier=None):
    return perf.row(found, where, VISION, 8, spec=SPEC, required=required, more={}, earlier=earlier)


@pytest.mark.parametrize("verdict", ["NOISY", "THROTTLED", "BUSY", "INSUFFICIENT", "BAD_OUTPUT"])
def test_a_row_that_is_not_valid_fails_where_it_is_required(verdict):
    (found,) = figures(judged(verdict, "why"))
    assert found.verdict == "fail"
    assert f"throughput/onnx/vision/8: the row is {verdict}, expected VALID: why" in found.message
    (found,) = figures(judged(verdict, "why"), required=False)
    assert found.verdict == ("fail" if verdict == "BAD_OUTPUT" else "info")


def test_a_valid_row_is_shown_with_its_published_figure_and_passes_where_it_is_required():
    (found,) = figures(judged(), required=False)
    assert found.verdict == "info"
    (found,) = figures(judged())
    assert (found.verdict, found.unit) == ("pass", "samples/s")
    assert found.measured == pytest.approx(300)
    assert found.detail["published"]["fps"] == 285
    assert not found.detail["published"]["same_chip"]


@pytest.mark.parametrize(("per_second", "verdict"), [(285, "pass"), (5000, "pass"), (257, "pass"), (256, "fail")])
def test_the_published_floor_holds_on_its_chip_and_faster_never_fails(per_second, verdict):
    first, floor = figures(judged(scope="execute", per_second=per_second), NPU)
    assert first.detail["inference"]["samples_per_second"] == pytest.approx(per_second / 2)
    assert floor.verdict == verdict
    assert floor.limit == SPEC.throughput.floor


@pytest.mark.parametrize("where", [NPU._replace(device="Ascend310P3:0"), NPU._replace(simulated=True)])
def test_no_floor_on_another_or_a_simulated_chip(where):
    assert len(figures(judged(scope="execute", per_second=1), where)) == 1


@pytest.mark.parametrize(
    ("status", "verdict"),
    [("ok", "pass"), ("improved", "pass"), ("regressed", "fail"), ("slow_machine", "fail")],
)
def test_the_baseline_decides(status, verdict):
    _, found = figures(judged(), earlier=Judgement(status, 310.0, 290.0, "because"))
    assert found.verdict == verdict
    assert ("because" in found.message) == (verdict == "fail")


@pytest.mark.parametrize("status", ["no_baseline", "not_comparable"])
def test_without_a_comparison_there_is_no_bound(status):
    _, found = figures(judged(), earlier=Judgement(status, None, None, "because"))
    assert (found.verdict, found.reference, found.limit) == ("fail", None, None)
    assert evidence.wanted(found) == ""
    assert f"{status}: because" in found.message


def test_a_row_that_vanished_fails():
    file = Path("b.json")
    (good,) = perf.baseline_rows(["onnx/text/1"], ["onnx/text/1", "onnx/text/8"], file)
    (bad,) = perf.baseline_rows(["onnx/text/1", "om/text/1"], ["onnx/text/1"], file)
    assert (good.verdict, bad.verdict) == ("pass", "fail")
    assert "om/text/1" in bad.message


def test_operations_are_shares_of_the_hosts_peak_only():
    config = {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
        "text_cfg": {"context_length": 77, "width": 512, "layers": 12},
    }
    found = perf.operations(config, VISION, 100.0, 8.82e12)
    assert found["flops_per_second"] == pytest.approx(8.82e11, rel=2e-3)
    assert found["peak_share"] == pytest.approx(0.1, rel=2e-3)
    assert perf.operations(config, VISION, 100.0, None)["peak_share"] is None
    assert HOST.on_host
    assert not NPU.on_host
    assert not HOST._replace(device="CUDAExecutionProvider").on_host
