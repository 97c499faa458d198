"""What failed, by its cause: a recall that is off because its embeddings are is no second finding."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Sequence

from clipval.backends import REFERENCE
from clipval.report.run import Run
from clipval.report.wording import part
from clipval.results import FAIL, Figure

OF_ALL = ("data", REFERENCE)  # what fails of the data or the reference is wrong for every backend


class Cause(NamedTuple):
    """A gate that failed for itself: its failed figures, and those of the gates that failed because of it."""

    gate: str
    figures: List[Figure]
    consequences: List[Figure]


class Broken(NamedTuple):
    """An error that is no figure: its class, its sentence, and the gates or tests that it hit."""

    kind: str
    message: str
    hit: List[str]


def causes(figures: Sequence[Figure]) -> List[Cause]:
    """The gates that failed, those that others explain under the first one that does."""
    failed: Dict[str, List[Figure]] = {}
    for figure in figures:
        if figure.verdict == FAIL:
            failed.setdefault(figure.gate, []).append(figure)
    from clipval.gates import CATALOGUE  # late: to read and compare reports takes nothing of what gates import

    after = {gate.check: gate.after for gate in CATALOGUE}
    explained = {gate: _cause(gate, after.get(gate.split("/")[0], ()), list(failed)) for gate in failed}
    return [
        Cause(gate, own, [one for other in failed if explained[other] == gate for one in failed[other]])
        for gate, own in failed.items()
        if not explained[gate]
    ]


def _cause(gate: str, after: Sequence[str], failed: Sequence[str]) -> str:
    """The failed gate that explains this one; empty for one that stands for itself.

    Args:
        after: checks that explain it where they failed of the same backend, of the data or of the reference.
    """
    for other in failed:
        check, of = f"{other}/".split("/")[:2]
        if check in after and of in (f"{gate}/".split("/")[1], *OF_ALL):
            return other
    return ""


def broken(run: Run) -> List[Broken]:
    """Errors that are not told by a failed figure, each once with all that it hit."""
    told = {figure.gate for figure in run.figures if figure.verdict == FAIL}
    found: Dict[str, Broken] = {}
    for one in run.failures:
        if one.gate not in told:
            found.setdefault(one.message, Broken(one.kind, one.message, [])).hit.append(one.gate or one.test)
    return list(found.values())


def near(figures: Sequence[Figure]) -> List[Figure]:
    """Figures that passed within a tenth of what their bound leaves them: the nearest of each gate, in order."""
    found: Dict[str, Figure] = {}
    for figure in figures:
        close = figure.verdict != FAIL and part(figure, 0) != "throughput" and _used(figure) > 0.9
        if close and (figure.gate not in found or _used(figure) > _used(found[figure.gate])):
            found[figure.gate] = figure
    return list(found.values())


def _used(figure: Figure) -> float:
    """The share of what the bound leaves that a figure has used up; 0 where nothing is left or held."""
    if figure.measured is None or figure.limit is None:
        return 0.0
    measured, limit = figure.measured, figure.limit
    if figure.bound == "within":
        return abs(measured - (figure.reference or 0.0)) / limit if limit else 0.0
    if figure.bound == "<=":
        return measured / limit if limit > 0 else 0.0
    if figure.unit == "cosine":
        return (1 - measured) / (1 - limit) if limit < 1 else 0.0
    return limit / measured if measured > 0 and limit > 0 else 0.0
