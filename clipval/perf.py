"""The gates of throughput: a row computed what it claims, is worth believing, and is no slower than it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from clipval.backends import Identity
from clipval.baseline import IMPROVED, OK, Judgement
from clipval.gates import context, judge
from clipval.results import FAIL, INFO, PASS, Figure
from clipval.spec import Spec
from clipval.throughput import BAD_OUTPUT, PROTOCOL, VALID, Judged, as_dict, flops_per_sample
from clipval.towers import Tower

BASELINE_ROWS = "baseline/rows"


def row(
    judged: Judged,
    where: Identity,
    tower: Tower,
    batch_size: int,
    *,
    spec: Spec,
    required: bool,
    more: Dict[str, Any],
    earlier: Optional[Judgement] = None,
) -> List[Figure]:
    """One row of throughput, with the published floor and the baseline where they apply.

    Args:
        judged: scope -> (Throughput, verdict, reason); the device's own clock decides where there is one.
        required: the backend was named, so that anything but VALID fails; a row of another run is information.
        more: kept with the row: warm-up, cold start, end to end, threads, operations a second, the machine's speed.
        earlier: how the row stands against the baseline, where one was given.
    """
    gate = f"throughput/{where.name}/{tower.name}/{batch_size}"
    scope = "execute" if "execute" in judged else "inference"
    found, verdict, reason = judged[scope]
    detail = {**as_dict(found), "verdict": verdict, "reason": reason, "protocol": PROTOCOL, **more}
    if scope == "execute":
        other, other_verdict, other_reason = judged["inference"]
        detail["inference"] = {**as_dict(other), "verdict": other_verdict, "reason": other_reason}
    curve = _published(spec, where, tower, batch_size)
    if curve:
        detail["published"] = curve
    if earlier is not None:
        detail["baseline"] = {"status": earlier.status, "expected": earlier.expected, "reason": earlier.reason}
    failed = verdict == BAD_OUTPUT or (required and verdict != VALID)
    first = Figure(
        gate=gate,
        metric=f"samples/s ({scope})",
        unit="samples/s",
        measured=found.samples_per_second,
        count=found.rounds,
        verdict=FAIL if failed else PASS if required else INFO,
        failure=("model" if verdict == BAD_OUTPUT else "perf") if failed else "",
        message=f"{gate}: the row is {verdict}, expected VALID: {reason}. Made by {where}" if failed else "",
        context=context(where, batch_size=batch_size, scope=scope),
        detail=detail,
    )
    floor = _floor(first, found, curve, spec, where)
    return [first, *floor, *([_against(first, found.undisturbed, earlier, where)] if earlier is not None else [])]


def operations(
    config: Dict[str, Any], tower: Tower, samples_per_second: float, peak: Optional[float]
) -> Dict[str, Any]:
    """Floating-point operations a second that a speed implies, and their share of the machine's peak.

    Args:
        config: open_clip's config of the model; peak: FLOP/s of this machine's matrix product, None on another device.
    """
    flops = flops_per_sample(config, tower.name)
    implied = flops * samples_per_second if flops else None
    return {"flops_per_second": implied, "peak_share": implied / peak if implied and peak else None}


def _against(first: Figure, undisturbed: float, earlier: Judgement, where: Identity) -> Figure:
    lost = earlier.status not in (OK, IMPROVED)
    return Figure(
        gate=first.gate,
        metric="undisturbed samples/s against the baseline",
        unit=first.unit,
        measured=undisturbed,
        count=first.count,
        reference=earlier.expected,
        limit=earlier.bound,
        bound=">=",
        verdict=FAIL if lost else PASS,
        failure="perf" if lost else "",
        message=f"{first.gate}: {earlier.status}: {earlier.reason}. Made by {where}" if lost else "",
        context=first.context,
    )


def baseline_rows(wanted: Sequence[str], measured: Sequence[str], file: Path) -> List[Figure]:
    """Every row of the baseline is measured by this run: a row that vanished or was renamed is not a pass."""
    lost = sorted(set(wanted) - set(measured))
    where = Identity("baseline", str(file), "file", "samples/s")
    return [
        judge(
            BASELINE_ROWS,
            "rows of the baseline that are not measured",
            len(lost),
            "<=",
            0,
            unit="rows",
            count=len(wanted),
            where=where,
            worst=", ".join(lost[:5]),
            because="measure them (--backends, --batch-sizes), or make a new baseline",
            failure="perf",
        )
    ]


def _published(spec: Spec, where: Identity, tower: Tower, batch_size: int) -> Dict[str, Any]:
    for curve in spec.throughput.published:
        if curve.tower == tower.name and batch_size in curve.fps:
            return {
                "chip": curve.chip,
                "fps": curve.fps[batch_size],
                "source": curve.source,
                "same_chip": where.device.split(":")[0] == curve.chip and not where.simulated,
            }
    return {}


def _floor(first: Figure, found: Any, curve: Dict[str, Any], spec: Spec, where: Identity) -> List[Figure]:
    """On the chip that a figure was published for, a share of it is a floor; being faster never fails."""
    if not curve or not curve["same_chip"] or found.scope != "execute":
        return []
    floor = judge(
        first.gate,
        "share of the published samples/s",
        found.samples_per_second_mean / curve["fps"],
        ">=",
        spec.throughput.floor,
        unit="ratio",
        count=found.rounds,
        where=where,
        reference=1.0,
        source=curve["source"],
        worst=f"{found.samples_per_second_mean:.0f} of {curve['fps']:g} samples/s",
        because=spec.throughput.because,
        failure="perf",
    )
    return [floor]
