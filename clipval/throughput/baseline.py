"""Throughput of earlier sessions, and the one-sided gate against it.

We compare the fifth percentile of the seconds of a call, because other processes shift the median; median and mean have
looser bounds of their own, as a row most of whose calls became slow keeps its fifth percentile.
Within one process a row is known to a percent; between processes it moves more, so a baseline is made of several fresh
processes and the gate takes its width from how they differ, see `clipval.throughput.noise`.

Simulated, 24 rows a night, sessions that differ by 1.5 % (1 %), a second look that differs by other load alone: a night
alarms falsely in 0.5 % (0) of nights; a loss of 10 % of a row is seen in 99.4 % (all) of cases with 5 sessions, in
99.9 % (all) with 10. Where other processes also slow 15 % of the rows, by 4 % on average: 0.5 % (2.5 %) of nights, seen
in 82 % (96 %) of cases with 5 sessions, in 90 % (98 %) with 10.
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
FALSE_ALARM = 3e-4  # of one row in one look; a loss is only believed after a second one
RARE_ALARM = 1e-6  # and as rarely as this where a loss of `REACH` is seen all the same
REACH = 0.05
UNDISTURBED, MEDIAN, MEAN = "undisturbed", "median", "mean"
# Less is not called a loss, however quiet the sessions were. Other processes move a median by 1.4 to 5.3 % (standard
# deviation) and a mean by more, but not for as long as a row is measured again.
FLOORS = {UNDISTURBED: 0.03, MEDIAN: 0.15, MEAN: 0.25}

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

OK, REGRESSED, IMPROVED, NO_BASELINE, NOT_COMPARABLE = "ok", "regressed", "improved", "no_baseline", "not_comparable"
SLOW_MACHINE = "slow_machine"


class Baseline(msgspec.Struct, frozen=True):
    """Undisturbed samples/s of each row in each session; see `clipval.throughput.statistics.Timing`.

    Attributes:
        key: what must be equal for a comparison: processor or chip, versions, model, threads, protocol.
        rows: `backend/tower/batch/scope` -> one figure per session.
        medians, means: the same of the median and the mean of the seconds of a call.
        machine: small matrix products a second at the fastest, see `machine.Pace`; 0 for rows of other devices.
    """

    key: Dict[str, str]
    rows: Dict[str, List[float]]
    machine: float = 0.0
    schema: int = SCHEMA
    medians: Dict[str, List[float]] = {}
    means: Dict[str, List[float]] = {}


class Judgement(NamedTuple):
    """How a row stands against the baseline: status, expected samples/s and the bound where there are any, a sentence.

    Attributes:
        figure: the one that decided, see `FLOORS`.
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
        environment: of `clipval.environment.describe`; model: hash of the weights; backends: name -> identity,
            which holds version, device and precision, and for OM chip, driver and CANN; origins: name -> what else its
            artifacts depend on.
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
    """One baseline of all sessions of several.

    Raises:
        InputError: no sessions, or they were not made alike: other settings, other rows, or on a slower machine.
    """
    if not sessions:
        raise InputError("baseline: no sessions to merge")
    first = sessions[0]
    for other in sessions[1:]:
        changed = differences(first, other.key)
        if changed or set(other.rows) != set(first.rows):
            raise InputError(f"baseline: sessions differ ({'; '.join(changed) or 'other rows'}); make them in one go")
    slow = slow_sessions(sessions)
    if slow:
        raise InputError(f"baseline: the machine was slow in session {slow[0] + 1}; make it when the machine is quiet")

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
    """Indices of the sessions in which the machine never ran at the speed that it had in another."""
    best = max(one.machine for one in sessions)
    return [n for n, one in enumerate(sessions) if one.machine < SETTLED * best]


def save(baseline: Baseline, file: Path) -> None:
    """Write the file at once or not at all."""
    file.absolute().parent.mkdir(parents=True, exist_ok=True)
    store.write(file, msgspec.json.format(msgspec.json.encode(baseline), indent=1))


def load(file: Path) -> Baseline:
    """Read a baseline.

    Raises:
        InputError: missing, damaged, of another schema, or of figures that are not positive numbers.
    """
    try:
        found = msgspec.json.decode(file.read_bytes(), type=Baseline)
    except OSError as error:
        raise InputError(f"baseline {file}: {error.strerror}; make it with clipval baseline --save {file}") from error
    except msgspec.DecodeError as error:
        raise InputError(f"baseline {file}: {error}; make it again with clipval baseline") from error
    figures = [*found.rows.values(), *found.medians.values(), *found.means.values()]
    good = all(values and np.isfinite(values).all() and min(values) > 0 for values in figures)
    if found.schema != SCHEMA or not found.rows or not good:
        raise InputError(f"baseline {file}: schema {found.schema} or its rows cannot be used; make it again")
    return found


def differences(baseline: Baseline, key: Mapping[str, str]) -> List[str]:
    """Which parts of a run's key differ from the baseline's, one line each."""
    return [
        f"{name}: baseline {baseline.key.get(name, 'none')}, now {value}"
        for name, value in key.items()
        if baseline.key.get(name) != value
    ]


def on_slow_machine(found: Judgement, share: float) -> Judgement:
    """A loss that the machine itself shows too is no loss of the model: no comparison, and no pass.

    Args:
        share: most of the speed that the machine had when the baseline was made, while the row was measured; see
            `machine.Pace`.
    """
    if found.status != REGRESSED or share >= SETTLED:
        return found
    why = f"the machine itself ran at {share:.0%} of its speed at best; run again when it is quiet"
    return found._replace(status=SLOW_MACHINE, reason=f"{why} ({found.reason})")


def on_busy_host(found: Judgement, busy: str) -> Judgement:
    """A loss of the median or the mean alone, while other processes kept the host busy, is no comparison, and no pass.

    Args:
        busy: what kept the host busy, empty for nothing.
    """
    if found.status != REGRESSED or found.figure == UNDISTURBED or not busy:
        return found
    return found._replace(status=SLOW_MACHINE, reason=f"{busy}; run again when the host is idle ({found.reason})")


def judge(
    baseline: Baseline, key: Mapping[str, str], name: str, measured: float, figure: str = UNDISTURBED
) -> Judgement:
    """One figure of a row against the baseline: one-sided, being faster never fails.

    The bound is the prediction limit of one more session at `FALSE_ALARM`, or `REACH` below the median where that is
    further and not beyond the limit at `RARE_ALARM`; at least the figure's floor below the median.

    Args:
        measured: samples/s of this run; figure: what it is made of, see `FLOORS`.
    """
    from scipy.stats import t

    changed = differences(baseline, key)
    if changed:
        return Judgement(NOT_COMPARABLE, None, None, f"the baseline is of another setting: {changed[0]}")
    rows = {UNDISTURBED: baseline.rows, MEDIAN: baseline.medians, MEAN: baseline.means}[figure]
    values = rows.get(name, [])
    if len(values) < MIN_SESSIONS:
        return Judgement(
            NO_BASELINE, None, None, f"{len(values)} sessions of {name}, at least {MIN_SESSIONS} are needed"
        )
    deviation, degrees = noise.of_row(rows, name)
    spread = deviation * np.sqrt(1 + np.pi / 2 / len(values))  # pi / 2: a median is that much less sure than a mean
    near, far = t.ppf([1 - FALSE_ALARM, 1 - RARE_ALARM], degrees) * spread
    width = np.clip(-np.log(1 - REACH), near, far)
    expected = float(np.median(values))
    bound = expected * min(1 - FLOORS[figure], float(np.exp(-width)))
    what = "undisturbed samples/s" if figure == UNDISTURBED else f"samples/s by the {figure} of the calls"
    said = f"{measured:.1f} {what}, baseline {expected:.1f} over {len(values)} sessions, bound {bound:.1f}"
    if not measured >= bound:  # so that NaN is a loss
        return Judgement(REGRESSED, expected, bound, said, figure)
    if measured > expected * expected / bound and figure == UNDISTURBED:
        return Judgement(IMPROVED, expected, bound, f"{said}; faster than before: make a new baseline")
    return Judgement(OK, expected, bound, said, figure)


def standing(
    baseline: Baseline, key: Mapping[str, str], names: Mapping[str, str], timings: Mapping[str, Timing]
) -> Judgement:
    """A row against the baseline by the clock that decides, the device's own where there is one.

    Args:
        names: scope -> the row's name in a baseline; timings: scope -> what was measured.
    """
    lost = [name for scope, name in names.items() if name in baseline.rows and scope not in timings]
    if lost:
        return Judgement(NO_BASELINE, None, None, f"{lost[0]} of the baseline is not measured any more")
    scope = next(scope for scope in names if scope in timings)
    timing = timings[scope]
    first = judge(baseline, key, names[scope], timing.undisturbed)
    if first.status not in (OK, IMPROVED):
        return first
    # most calls may be slow while the fastest in twenty are what they were
    others = {MEDIAN: timing.samples_per_second, MEAN: timing.samples_per_second_mean}
    found = [judge(baseline, key, names[scope], measured, figure) for figure, measured in others.items()]
    return next((one for one in found if one.status == REGRESSED), first)
