"""Throughput gates: a row computed what it claims, is VALID, and is not slower than required."""

from __future__ import annotations

from pathlib import Path
from typing import List, Optional, Sequence

from clipval.backends import Identity
from clipval.gates.gate import PERF, Gate, judge
from clipval.results import FAIL, INFO, PASS, Figure, PublishedRate, ThroughputDetail
from clipval.spec import Spec
from clipval.throughput.baseline import IMPROVED, MEAN, MEDIAN, OK, Judgement
from clipval.throughput.row import EXECUTE, Row
from clipval.throughput.statistics import PROTOCOL, Timing
from clipval.throughput.verdict import BAD_OUTPUT, FAULTS, VALID

THROUGHPUT = Gate("throughput", PERF, ("backend_name", "tower_name", "batch_size"))
BASELINE = Gate("baseline/rows", PERF, (), lambda plan: plan.baseline)


def row(found: Row, *, spec: Spec, required: bool) -> List[Figure]:
    """The figures of one row, with the published floor and the baseline if they apply.

    Args:
        required: the backend was named, so anything but VALID fails; otherwise the row is informational.
    """
    where, decided = found.made_by, found.decided
    gate = THROUGHPUT.of(where.name, found.tower, found.batch_size)
    curve = _published(spec, found)
    failed = decided.verdict in FAULTS or (required and decided.verdict != VALID)
    first = Figure(
        gate=gate,
        metric=f"samples/s ({found.scope})",
        unit="samples/s",
        measured=decided.timing.samples_per_second,
        count=decided.timing.rounds,
        verdict=FAIL if failed else PASS if required else INFO,
        failure=("model" if decided.verdict == BAD_OUTPUT else "perf") if failed else "",
        message=f"{gate}: the row is {decided.verdict}, expected VALID: {decided.reason}. Made by {where}"
        if failed
        else "",
        because=decided.reason if failed else "",
        made_by=where,
        detail=ThroughputDetail(found, PROTOCOL, curve),
    )
    floor = _floor(first, decided.timing, curve, spec, where) if found.scope == EXECUTE else []
    against = [] if found.standing is None else [_against(first, decided.timing, found.standing, where)]
    return [first, *floor, *against]


def _against(first: Figure, found: Timing, earlier: Judgement, where: Identity) -> Figure:
    lost = earlier.status not in (OK, IMPROVED)
    measured = {MEDIAN: found.samples_per_second, MEAN: found.samples_per_second_mean}
    return Figure(
        gate=first.gate,
        metric=f"{earlier.figure} samples/s against the baseline",
        unit=first.unit,
        measured=measured.get(earlier.figure, found.undisturbed),
        count=first.count,
        reference=earlier.expected,
        limit=earlier.bound,
        bound=">=",
        verdict=FAIL if lost else PASS,
        failure="perf" if lost else "",
        message=f"{first.gate}: {earlier.status}: {earlier.reason}. Made by {where}" if lost else "",
        because=earlier.reason if lost else "",
        made_by=where,
    )


def baseline_rows(wanted: Sequence[str], measured: Sequence[str], file: Path) -> List[Figure]:
    """This run measures every row of the baseline: a row that is missing or renamed fails."""
    lost = sorted(set(wanted) - set(measured))
    return [
        judge(
            BASELINE.of(),
            "baseline rows that were not measured",
            len(lost),
            "<=",
            0,
            unit="rows",
            count=len(wanted),
            worst=", ".join(lost[:5]),
            because=f"measure them (--backends, --batch-sizes), or record a new baseline in place of {file}",
            failure="perf",
        )
    ]


def _published(spec: Spec, found: Row) -> Optional[PublishedRate]:
    for curve in spec.throughput.published:
        if curve.tower == found.tower and found.batch_size in curve.fps:
            same_chip = found.made_by.device.split(":")[0] == curve.chip and not found.made_by.simulated
            return PublishedRate(curve.chip, float(curve.fps[found.batch_size]), curve.source, same_chip)
    return None


def _floor(first: Figure, found: Timing, curve: Optional[PublishedRate], spec: Spec, where: Identity) -> List[Figure]:
    """On the chip that a figure was published for, a share of it is the floor; being faster never fails."""
    if curve is None or not curve.same_chip:
        return []
    floor = judge(
        first.gate,
        "share of the published samples/s",
        found.samples_per_second_mean / curve.samples_per_second,
        ">=",
        spec.throughput.floor,
        unit="ratio",
        count=found.rounds,
        where=where,
        reference=1.0,
        source=curve.source,
        worst=f"{found.samples_per_second_mean:.0f} of {curve.samples_per_second:g} samples/s",
        because=spec.throughput.because,
        failure="perf",
    )
    return [floor]
