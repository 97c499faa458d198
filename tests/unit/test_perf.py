"""The gates of throughput: what fails a row, what only says something, and what never fails."""

from pathlib import Path

import numpy as np
import pytest

from clipval import spec
from clipval.backends import Identity
from clipval.gates import throughput as perf
from clipval.results import wanted
from clipval.throughput.baseline import Judgement
from clipval.throughput.row import Judged, Row
from clipval.throughput.statistics import summarise
from clipval.throughput.timing import WarmUp

SPEC = spec.load("vit-b-32-flickr30k")
HOST = Identity("onnx", "1", "cpu", "fp32")
NPU = Identity("om", "1", "Ascend910B4:0", "force_fp16")


def judged(verdict="VALID", reason="", scope="inference", per_second=300.0):
    row = summarise(np.full(20, 8 / per_second), 8, scope)
    other = summarise(np.full(20, 16 / per_second), 8, "inference")
    return {"inference": Judged(other, "VALID", ""), scope: Judged(row, verdict, reason)}


def figures(found, where=HOST, *, required=True, earlier=None):
    warm = WarmUp(3, 1.0, 0.1, True)
    made = {"made_by": where, "tower": "vision", "batch_size": 8, "warm_up": warm, "attempts": 1}
    return perf.row(Row(clocks=found, standing=earlier, **made), spec=SPEC, required=required)


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
    assert found.detail.published.samples_per_second == 285
    assert not found.detail.published.same_chip


@pytest.mark.parametrize(("per_second", "verdict"), [(285, "pass"), (5000, "pass"), (257, "pass"), (256, "fail")])
def test_the_published_floor_holds_on_its_chip_and_faster_never_fails(per_second, verdict):
    first, floor = figures(judged(scope="execute", per_second=per_second), NPU)
    assert first.detail.row.clocks["inference"].timing.samples_per_second == pytest.approx(per_second / 2)
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
    assert wanted(found) == ""
    assert f"{status}: because" in found.message


def test_a_row_that_vanished_fails():
    file = Path("b.json")
    (good,) = perf.baseline_rows(["onnx/text/1"], ["onnx/text/1", "onnx/text/8"], file)
    (bad,) = perf.baseline_rows(["onnx/text/1", "om/text/1"], ["onnx/text/1"], file)
    assert (good.verdict, bad.verdict) == ("pass", "fail")
    assert "om/text/1" in bad.message
