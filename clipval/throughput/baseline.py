"""Throughput of earlier sessions, and the one-sided comparison with it.

We compare the fifth percentile of the call time, because other processes shift the median; median and mean have looser
bounds of their own, since a row can keep its fifth percentile although most of its calls became slow.
Within one process a row repeats to a percent; between processes it varies more, so a baseline consists of several new
processes, and their scatter determines the width of the bound, see `clipval.throughput.noise`.

Simulated: 24 rows per night, sessions that differ by 1.5 % (1 %), a repeated measurement that differs only by other
load. False alarms in 0.5 % (0) of nights; a regression of 10 % in one row is detected in 99.4 % (all) of cases with 5
sessions, 99.9 % (all) with 10. If other processes also slow 15 % of the rows, by 4 % on average: false alarms in 0.5 %
(2.5 %) of nights, detected in 82 % (96 %) of cases with 5 sessions, 90 % (98 %) with 10.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence

import msgspec
import numpy as np

from clipval import store
from clipval.errors import InputError
from clipval.throughput import noise
from clipval.throughput.machine import SETTLED
from clipval.throughput.statistics import PROTOCOL, Timing

SCHEMA = 1
MIN_SESSIONS = 5
FALSE_ALARM = 3e-4  # of one row in one measurement; a regression must be confirmed by a second one
RARE_ALARM = 1e-6  # used instead if a regression of `REACH` is still detected
REACH = 0.05
UNDISTURBED, MEDIAN, MEAN = "undisturbed", "median", "mean"
# Smaller changes are no regression, however quiet the sessions were. Other processes shift a median by 1.4 to 5.3 %
# (standard deviation) and a mean by more, but not for as long as repeated measurements take.
FLOORS = {UNDISTURBED: 0.03, MEDIAN: 0.15, MEAN: 0.25}

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

OK, REGRESSED, IMPROVED, NO_BASELINE, NOT_COMPARABLE = "ok", "regressed", "improved", "no_baseline", "not_comparable"
SLOW_MACHINE = "slow_machine"


class Baseline(msgspec.Struct, frozen=True):
    """Undisturbed samples/s of each row in each session; see `clipval.throughput.statistics.Timing`.

    Attributes:
        key: what must be equal for a comparison: CPU or chip, versions, model, threads, protocol.
        rows: `backend/tower/batch/scope` -> one figure per session.
        medians, means: the same by the median and the mean of the call time.
        machine: most small matrix products per second, see `machine.Pace`; 0 for rows of other devices.
    """

    key: Dict[str, str]
    rows: Dict[str, List[float]]
    machine: float = 0.0
    schema: int = SCHEMA
    medians: Dict[str, List[float]] = {}
    means: Dict[str, List[float]] = {}


class Judgement(NamedTuple):
    """A row compared with the baseline: status, expected samples/s and bound (None if there are none), and a sentence.

    Attributes:
        figure: the one that decided, a key of `FLOORS`.
    """

    status: str
    expected: Optional[float]
    bound: Optional[float]
    reason: str
    figure: str = UNDISTURBED


def row_name(backend: str, tower: str, batch_size: int, scope: str) -> str:
    """The name of a row in a baseline."""
    return f"{backend}/{tower}/{batch_size}/{scope}"


def key_of(
    environment: Mapping[str, Any],
    model: str,
    threads: Optional[int],
    backends: Mapping[str, str],
    origins: Optional[Mapping[str, str]] = None,
) -> Dict[str, str]:
    """What makes two runs comparable.

    Args:
        environment: from `clipval.environment.describe`; model: hash of the weights; backends: name -> identity, with
            version, device and precision, and for OM chip, driver and CANN; origins: name -> what else its artifacts
            depend on.
    """
    packages = environment["packages"]
    versions = {name: packages.get(name, "absent") for name in ("torch", "onnxruntime", "numpy")}
    return {
        "cpu": str(environment["cpu"]),
        "cores": str(environment["usable_cores"]),
        "python": ".".join(str(environment["python"]).split(".")[:2]),
        **versions,
        "model": model,
        "threads": str(threads),
        **{name: str(environment.get("variables", {}).get(name, "unset")) for name in THREAD_VARIABLES},
        "protocol": str(PROTOCOL),
        **{name: origin for name, origin in (origins or {}).items() if origin},
        **{f"backend {name}": identity for name, identity in backends.items()},
    }


def merge(sessions: Sequence[Baseline]) -> Baseline:
    """Merge baselines into one with all their sessions.

    Raises:
        InputError: no sessions, or they differ in settings, in rows, or in the speed of the machine.
    """
    if not sessions:
        raise InputError("baseline: no sessions to merge")
    first = sessions[0]
    for other in sessions[1:]:
        changed = differences(first, other.key)
        if changed or set(other.rows) != set(first.rows):
            raise InputError(f"baseline: sessions differ ({'; '.join(changed) or 'other rows'}); record them in one go")
    slow = slow_sessions(sessions)
    if slow:
        raise InputError(f"baseline: the machine was slow in session {slow[0] + 1}; record it when the machine is idle")

    def together(figures: Callable[[Baseline], Dict[str, List[float]]]) -> Dict[str, List[float]]:
        return {name: [value for one in sessions for value in figures(one).get(name, [])] for name in figures(first)}

    return Baseline(
        first.key,
        together(lambda one: one.rows),
        max(one.machine for one in sessions),
        medians=together(lambda one: one.medians),
        means=together(lambda one: one.means),
    )


def slow_sessions(sessions: Sequence[Baseline]) -> List[int]:
    """Indices of the sessions in which the machine never reached the speed of the others."""
    best = max(one.machine for one in sessions)
    return [n for n, one in enumerate(sessions) if one.machine < SETTLED * best]


def save(baseline: Baseline, file: Path) -> None:
    """Write the file atomically."""
    file.absolute().parent.mkdir(parents=True, exist_ok=True)
    store.write(file, msgspec.json.format(msgspec.json.encode(baseline), indent=1))


def load(file: Path) -> Baseline:
    """Read a baseline.

    Raises:
        InputError: missing, damaged, of another schema, or with figures that are not positive numbers.
    """
    try:
        found = msgspec.json.decode(file.read_bytes(), type=Baseline)
    except OSError as error:
        raise InputError(f"baseline {file}: {error.strerror}; record it with clipval baseline --save {file}") from error
    except msgspec.DecodeError as error:
        raise InputError(f"baseline {file}: {error}; record it again with clipval baseline") from error
    figures = [*found.rows.values(), *found.medians.values(), *found.means.values()]
    good = all(values and np.isfinite(values).all() and min(values) > 0 for values in figures)
    if found.schema != SCHEMA or not found.rows or not good:
        raise InputError(f"baseline {file}: schema {found.schema} or unusable rows; record it again")
    return found


def differences(baseline: Baseline, key: Mapping[str, str]) -> List[str]:
    """Which parts of a run's key differ from the baseline's, one line each."""
    return [
        f"{name}: baseline {baseline.key.get(name, 'none')}, now {value}"
        for name, value in key.items()
        if baseline.key.get(name) != value
    ]


def on_slow_machine(found: Judgement, share: float) -> Judgement:
    """If the machine itself was slow, a row below its bound is not comparable: no regression, but no pass either.

    Args:
        share: the machine's highest speed during the measurement, as a share of its speed at the time of the baseline;
            see `machine.Pace`.
    """
    if found.status != REGRESSED or share >= SETTLED:
        return found
    why = f"the machine itself reached only {share:.0%} of its speed; run again when it is idle"
    return found._replace(status=SLOW_MACHINE, reason=f"{why} ({found.reason})")


def on_busy_host(found: Judgement, busy: str) -> Judgement:
    """If other processes kept the host busy, a lower median or mean alone is no regression, but no pass either.

    Args:
        busy: what kept the host busy; empty for nothing.
    """
    if found.status != REGRESSED or found.figure == UNDISTURBED or not busy:
        return found
    return found._replace(status=SLOW_MACHINE, reason=f"{busy}; run again when the host is idle ({found.reason})")


def judge(
    baseline: Baseline, key: Mapping[str, str], name: str, measured: float, figure: str = UNDISTURBED
) -> Judgement:
    """Compare one figure of a row with the baseline: one-sided, being faster never fails.

    The bound is the prediction limit of one more session at `FALSE_ALARM`, or `REACH` below the median if that is lower
    and not below the limit at `RARE_ALARM`; in any case at least the figure's floor below the median.

    Args:
        measured: samples/s of this run; figure: a key of `FLOORS`.
    """
    from scipy.stats import t

    changed = differences(baseline, key)
    if changed:
        return Judgement(NOT_COMPARABLE, None, None, f"the baseline is of another setting: {changed[0]}")
    rows = {UNDISTURBED: baseline.rows, MEDIAN: baseline.medians, MEAN: baseline.means}[figure]
    values = rows.get(name, [])
    if len(values) < MIN_SESSIONS:
        return Judgement(NO_BASELINE, None, None, f"{len(values)} sessions of {name}, at least {MIN_SESSIONS} required")
    deviation, degrees = noise.of_row(rows, name)
    spread = deviation * np.sqrt(1 + np.pi / 2 / len(values))  # pi / 2: variance of a median relative to a mean
    near, far = t.ppf([1 - FALSE_ALARM, 1 - RARE_ALARM], degrees) * spread
    width = np.clip(-np.log(1 - REACH), near, far)
    expected = float(np.median(values))
    bound = expected * min(1 - FLOORS[figure], float(np.exp(-width)))
    what = "undisturbed samples/s" if figure == UNDISTURBED else f"samples/s by the {figure} of the calls"
    said = f"{measured:.1f} {what}, baseline {expected:.1f} over {len(values)} sessions, bound {bound:.1f}"
    if not measured >= bound:  # so that NaN fails
        return Judgement(REGRESSED, expected, bound, said, figure)
    if measured > expected * expected / bound and figure == UNDISTURBED:
        return Judgement(IMPROVED, expected, bound, f"{said}; faster than before: consider recording a new baseline")
    return Judgement(OK, expected, bound, said, figure)


def standing(
    baseline: Baseline, key: Mapping[str, str], names: Mapping[str, str], timings: Mapping[str, Timing]
) -> Judgement:
    """Compare a row with the baseline by the clock that decides, the device's own if there is one.

    Args:
        names: scope -> the row's name in a baseline; timings: scope -> what was measured.
    """
    lost = [name for scope, name in names.items() if name in baseline.rows and scope not in timings]
    if lost:
        return Judgement(NO_BASELINE, None, None, f"{lost[0]} of the baseline was not measured")
    scope = next(scope for scope in names if scope in timings)
    timing = timings[scope]
    first = judge(baseline, key, names[scope], timing.undisturbed)
    if first.status not in (OK, IMPROVED):
        return first
    # most calls may be slow while the fastest 5 % are unchanged
    others = {MEDIAN: timing.samples_per_second, MEAN: timing.samples_per_second_mean}
    found = [judge(baseline, key, names[scope], measured, figure) for figure, measured in others.items()]
    return next((one for one in found if one.status == REGRESSED), first)
