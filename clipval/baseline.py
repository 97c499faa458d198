"""Throughput of earlier sessions, and the one-sided gate against it.

Compared is what the machine does undisturbed, the fifth percentile of the seconds of a call: neighbours move a median.
Within one process a row is known to a percent; between processes it moves more, so a baseline is made of several fresh
processes and the gate takes its width from how they differ. Five sessions of one row alone say too little for a gate
that is asked dozens of times a night, so rows that scatter alike share one estimate of their noise; where they do not,
each row's own variance is drawn towards the common one (Smyth 2004, Linear models and empirical Bayes methods).
A neighbour that slows a few rows of one session down would widen all bounds. It shows on the slow side alone, so a
figure counts as at most `OUTLIER` standard deviations below its row's median (Huber), by the pairs of all rows (Shamos
1976), or `MIRROR` times as far below as the row's fastest is above.

Simulated, 24 rows a night, sessions that differ by 1.5 % (1 %), a second look that differs by neighbours alone: a night
alarms falsely in 0.5 % (0) of nights; a loss of 10 % of a row is seen in 99.4 % (all) of cases with 5 sessions, in
99.9 % (all) with 10. Where neighbours also slow 15 % of the rows, by 4 % on average: 0.5 % (2.5 %) of nights, seen in
82 % (96 %) of cases with 5 sessions, in 90 % (98 %) with 10.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import msgspec
import numpy as np

from clipval.errors import InputError
from clipval.machine import SETTLED
from clipval.throughput import PROTOCOL

SCHEMA = 1
MIN_SESSIONS = 5
FALSE_ALARM = 3e-4  # of one row in one look; a loss is only believed after a second one
RARE_ALARM = 1e-6  # and as rarely as this where a loss of `REACH` is seen all the same
REACH = 0.05
FLOOR = 0.03  # less is not called a loss, however quiet the sessions were
OUTLIER = 3.0
MIRROR = 2.0
SHAMOS = 0.9539  # median distance of two normal values, in standard deviations
ALIKE = 1e-3  # Bartlett's p below this: rows do not share one noise
LEAST_NOISE = 1e-4  # standard deviation of a row whose sessions agree to the last digit

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

OK, REGRESSED, IMPROVED, NO_BASELINE, NOT_COMPARABLE = "ok", "regressed", "improved", "no_baseline", "not_comparable"
SLOW_MACHINE = "slow_machine"


class Baseline(msgspec.Struct, frozen=True):
    """Undisturbed samples/s of each row in each session; see `clipval.throughput.Throughput`.

    Attributes:
        key: what must be equal for a comparison: processor or chip, versions, model, threads, protocol.
        rows: `backend/tower/batch/scope` -> one figure per session.
        machine: small matrix products a second at the fastest, see `machine.Pace`; 0 for rows of other devices.
    """

    key: Dict[str, str]
    rows: Dict[str, List[float]]
    machine: float = 0.0
    schema: int = SCHEMA


class Judgement(NamedTuple):
    """What a row is against the baseline: status, expected samples/s and the bound where there are any, a sentence."""

    status: str
    expected: Optional[float]
    bound: Optional[float]
    reason: str


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
    rows = {name: [value for one in sessions for value in one.rows[name]] for name in first.rows}
    return Baseline(first.key, rows, max(one.machine for one in sessions))


def slow_sessions(sessions: Sequence[Baseline]) -> List[int]:
    """Indices of the sessions in which the machine never ran at the speed that it had in another."""
    best = max(one.machine for one in sessions)
    return [n for n, one in enumerate(sessions) if one.machine < SETTLED * best]


def save(baseline: Baseline, file: Path) -> None:
    """Write the file at once or not at all."""
    file.absolute().parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(file.name + ".new")
    scratch.write_bytes(msgspec.json.format(msgspec.json.encode(baseline), indent=1))
    os.replace(str(scratch), str(file))


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
    good = all(values and np.isfinite(values).all() and min(values) > 0 for values in found.rows.values())
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


def noise(baseline: Baseline) -> float:
    """Standard deviation of log samples/s between sessions, pooled over all rows."""
    variances, degrees = _variances(_logs(baseline))
    return float(np.sqrt(np.average(variances, weights=degrees))) if len(degrees) else float("inf")


def _logs(baseline: Baseline) -> Dict[str, np.ndarray]:
    """Log samples/s of the rows that have several sessions, slow outliers drawn in."""
    logs = {name: np.log(values) for name, values in baseline.rows.items() if len(values) > 1}
    pairs = [np.abs(np.subtract.outer(one, one))[np.triu_indices(len(one), 1)] for one in logs.values()]
    reach = OUTLIER * float(np.median(np.concatenate(pairs))) / SHAMOS if pairs else 0.0
    middles = {name: float(np.median(one)) for name, one in logs.items()}
    lows = {name: middles[name] - max(reach, MIRROR * float(one.max() - middles[name])) for name, one in logs.items()}
    return {name: np.maximum(one, lows[name]) for name, one in logs.items()}


def _variances(logs: Dict[str, np.ndarray]) -> Tuple[np.ndarray, np.ndarray]:
    """Variance between sessions of each row, and its degrees of freedom."""
    return np.array([one.var(ddof=1) for one in logs.values()]), np.array([len(one) - 1 for one in logs.values()])


def row_noise(baseline: Baseline, name: str) -> Tuple[float, float]:
    """Standard deviation of one row's log samples/s between sessions, and its degrees of freedom.

    Args:
        name: a row of at least two sessions.
    """
    every_row = _logs(baseline)
    variances, degrees = _variances(every_row)
    everything = float(degrees.sum())
    strength, common = _prior(np.maximum(variances, LEAST_NOISE**2), degrees)
    if np.isinf(strength):
        return noise(baseline), everything
    logs = every_row[name]
    own = len(logs) - 1
    variance = (strength * common + own * float(logs.var(ddof=1))) / (strength + own)
    return float(np.sqrt(variance)), min(strength + own, everything)


def _prior(variances: np.ndarray, degrees: np.ndarray) -> Tuple[float, float]:
    """Degrees of freedom and value of the variance that rows are drawn towards: Smyth 2004, section 6.2.

    Infinite degrees where nothing says that rows differ: by Bartlett's test, which needs no more than the variances.
    """
    from scipy.optimize import brentq
    from scipy.special import digamma, polygamma
    from scipy.stats import chi2

    count, total = len(variances), float(degrees.sum())
    pooled = float(np.average(variances, weights=degrees))
    if count < 3:
        return float("inf"), pooled
    spread = total * np.log(pooled) - float((degrees * np.log(variances)).sum())
    correction = 1 + (float((1 / degrees).sum()) - 1 / total) / (3 * (count - 1))
    logs = np.log(variances) - digamma(degrees / 2) + np.log(degrees / 2)
    excess = float(logs.var(ddof=1) - polygamma(1, degrees / 2).mean())
    if chi2.sf(spread / correction, count - 1) >= ALIKE or excess <= 1e-3:
        return float("inf"), pooled
    strength = 2 * float(brentq(lambda half: polygamma(1, half) - excess, 1e-3, 1e4))
    return strength, float(np.exp(logs.mean() + digamma(strength / 2) - np.log(strength / 2)))


def on_slow_machine(found: Judgement, share: float) -> Judgement:
    """A loss that the machine itself shows too says nothing of the model: no comparison, and no pass.

    Args:
        share: most of the speed that the machine had when the baseline was made, while the row was measured; see
            `machine.Pace`.
    """
    if found.status != REGRESSED or share >= SETTLED:
        return found
    why = (
        f"the machine itself ran at {share:.0%} of its speed at best, neighbours or clocks; run again when it is quiet"
    )
    return found._replace(status=SLOW_MACHINE, reason=f"{why} ({found.reason})")


def judge(baseline: Baseline, key: Mapping[str, str], name: str, measured: float) -> Judgement:
    """One row against the baseline: one-sided, being faster never fails.

    The bound is the prediction limit of one more session at `FALSE_ALARM`, or `REACH` below the median where that is
    further and not beyond the limit at `RARE_ALARM`; at least `FLOOR` below the median.

    Args:
        measured: undisturbed samples/s of this run.
    """
    from scipy.stats import t

    changed = differences(baseline, key)
    if changed:
        return Judgement(NOT_COMPARABLE, None, None, f"the baseline is of another setting: {changed[0]}")
    values = baseline.rows.get(name, [])
    if len(values) < MIN_SESSIONS:
        return Judgement(
            NO_BASELINE, None, None, f"{len(values)} sessions of {name}, at least {MIN_SESSIONS} are needed"
        )
    deviation, degrees = row_noise(baseline, name)
    spread = deviation * np.sqrt(1 + np.pi / 2 / len(values))  # pi / 2: a median is that much less sure than a mean
    near, far = t.ppf([1 - FALSE_ALARM, 1 - RARE_ALARM], degrees) * spread
    width = np.clip(-np.log(1 - REACH), near, far)
    expected = float(np.median(values))
    bound = expected * min(1 - FLOOR, float(np.exp(-width)))
    said = (
        f"{measured:.1f} undisturbed samples/s, baseline {expected:.1f} over {len(values)} sessions, bound {bound:.1f}"
    )
    if not measured >= bound:  # so that NaN is a loss
        return Judgement(REGRESSED, expected, bound, said)
    if measured > expected * expected / bound:
        return Judgement(IMPROVED, expected, bound, f"{said}; faster than before: make a new baseline")
    return Judgement(OK, expected, bound, said)
