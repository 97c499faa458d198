"""Throughput of earlier sessions, and the one-sided gate against it.

Within one process a row is known to a percent; between processes it moves more, so a baseline is made of several fresh
processes and the gate takes its width from how they differ. All rows of a baseline share one estimate of that noise:
five sessions of one row alone say too little for a gate that is asked dozens of times a night.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

import msgspec
import numpy as np

from clipval.errors import InputError
from clipval.throughput import PROTOCOL

SCHEMA = 1
MIN_SESSIONS = 5
FALSE_ALARM = 1e-4  # of one row in one run: 24 rows a night alarm falsely once in a year
FLOOR = 0.03  # less is not called a loss, however quiet the sessions were

OK, REGRESSED, IMPROVED, NO_BASELINE, NOT_COMPARABLE = "ok", "regressed", "improved", "no_baseline", "not_comparable"


class Baseline(msgspec.Struct, frozen=True):
    """Samples/s of each row in each session.

    Attributes:
        key: what must be equal for a comparison: processor or chip, versions, model, threads, protocol.
        rows: `backend/tower/batch/scope` -> one figure per session.
    """

    key: Dict[str, str]
    rows: Dict[str, List[float]]
    schema: int = SCHEMA


class Judgement(NamedTuple):
    """What a row is against the baseline: status, expected samples/s, the bound, and a sentence."""

    status: str
    expected: float
    bound: float
    reason: str


def row_name(backend: str, tower: str, batch_size: int, scope: str) -> str:
    """The name of a row in a baseline."""
    return f"{backend}/{tower}/{batch_size}/{scope}"


def key_of(
    environment: Mapping[str, Any], model: str, threads: Optional[int], backends: Mapping[str, str]
) -> Dict[str, str]:
    """What makes two runs comparable.

    Args:
        environment: of `clipval.environment.describe`; model: hash of the weights; backends: name -> identity,
            which holds version, device and precision, and for OM chip, driver and CANN.
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
        "protocol": str(PROTOCOL),
        **{f"backend {name}": identity for name, identity in backends.items()},
    }


def merge(sessions: Sequence[Baseline]) -> Baseline:
    """One baseline of several sessions of one figure a row.

    Raises:
        InputError: no sessions, or they were not made alike.
    """
    if not sessions:
        raise InputError("baseline: no sessions to merge")
    first = sessions[0]
    for other in sessions[1:]:
        changed = differences(first, other.key)
        if changed or set(other.rows) != set(first.rows):
            raise InputError(f"baseline: sessions differ ({'; '.join(changed) or 'other rows'}); make them in one go")
    return Baseline(first.key, {name: [one.rows[name][0] for one in sessions] for name in first.rows})


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
    logs = [np.log(values) for values in baseline.rows.values() if len(values) > 1]
    degrees = sum(len(one) - 1 for one in logs)
    squares = sum(float(np.square(one - one.mean()).sum()) for one in logs)
    return float(np.sqrt(squares / degrees)) if degrees else float("inf")


def judge(baseline: Baseline, key: Mapping[str, str], name: str, measured: float) -> Judgement:
    """One row against the baseline: one-sided, being faster never fails.

    The bound is the prediction limit of one more session at `FALSE_ALARM`, at least `FLOOR` below the mean.

    Args:
        measured: samples/s of this run.
    """
    from scipy.stats import t

    changed = differences(baseline, key)
    if changed:
        return Judgement(NOT_COMPARABLE, 0.0, 0.0, f"the baseline is of another setting: {changed[0]}")
    values = baseline.rows.get(name, [])
    if len(values) < MIN_SESSIONS:
        return Judgement(NO_BASELINE, 0.0, 0.0, f"{len(values)} sessions of {name}, at least {MIN_SESSIONS} are needed")
    degrees = sum(len(one) - 1 for one in baseline.rows.values())
    width = float(t.ppf(1 - FALSE_ALARM, degrees)) * noise(baseline) * float(np.sqrt(1 + 1 / len(values)))
    expected = float(np.exp(np.log(values).mean()))
    bound = expected * min(1 - FLOOR, float(np.exp(-width)))
    said = f"{measured:.1f} samples/s, baseline {expected:.1f} over {len(values)} sessions, bound {bound:.1f}"
    if not measured >= bound:  # so that NaN is a loss
        return Judgement(REGRESSED, expected, bound, said)
    if measured > expected * expected / bound:
        return Judgement(IMPROVED, expected, bound, f"{said}; faster than before: make a new baseline")
    return Judgement(OK, expected, bound, said)
