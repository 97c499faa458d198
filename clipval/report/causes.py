"""Failures grouped by cause: wrong recall caused by wrong embeddings is not a second finding."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Sequence

from clipval.backends import REFERENCE
from clipval.report.run import Run
from clipval.report.wording import part
from clipval.results import FAIL, Figure

OF_ALL = ("data", REFERENCE)  # a failure of the data or the reference affects every backend


class Cause(NamedTuple):
    """A gate that no other failure explains: its failed figures, and those of the gates that failed because of it."""

    gate: str
    figures: List[Figure]
    consequences: List[Figure]


class Broken(NamedTuple):
    """An error that is not a figure: its class, its message, and the affected gates or tests."""

    kind: str
    message: str
    hit: List[str]


def causes(figures: Sequence[Figure]) -> List[Cause]:
    """The failed gates; those explained by others are under the first one that explains them."""
    failed: Dict[str, List[Figure]] = {}
    for figure in figures:
        if figure.verdict == FAIL:
            failed.setdefault(figure.gate, []).append(figure)
    from clipval.gates import CATALOGUE  # late: reading and comparing reports does not need the gates' imports

    after = {gate.check: gate.after for gate in CATALOGUE}
    explained = {gate: _cause(gate, after.get(gate.split("/")[0], ()), list(failed)) for gate in failed}
    return [
        Cause(gate, own, [one for other in failed if explained[other] == gate for one in failed[other]])
        for gate, own in failed.items()
        if not explained[gate]
    ]


def _cause(gate: str, after: Sequence[str], failed: Sequence[str]) -> str:
    """The failed gate that explains this one; empty if there is none.

    Args:
        after: checks that explain it if they failed for the same backend, the data or the reference.
    """
    for other in failed:
        check, of = f"{other}/".split("/")[:2]
        if check in after and of in (f"{gate}/".split("/")[1], *OF_ALL):
            return other
    return ""


def broken(run: Run) -> List[Broken]:
    """Errors other than failed figures, each once with everything it affected."""
    told = {figure.gate for figure in run.figures if figure.verdict == FAIL}
    found: Dict[str, Broken] = {}
    for one in run.failures:
        if one.gate not in told:
            found.setdefault(one.message, Broken(one.kind, one.message, [])).hit.append(one.gate or one.test)
    return list(found.values())


def near(figures: Sequence[Figure]) -> List[Figure]:
    """Figures that passed by less than a tenth of their margin: the nearest of each gate, in order."""
    found: Dict[str, Figure] = {}
    for figure in figures:
        close = figure.verdict != FAIL and part(figure, 0) != "throughput" and _used(figure) > 0.9
        if close and (figure.gate not in found or _used(figure) > _used(found[figure.gate])):
            found[figure.gate] = figure
    return list(found.values())


def _used(figure: Figure) -> float:
    """The share of its margin that a figure has used up; 0 if there is no margin or bound."""
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
