"""Wording of figures in every report: names, numbers and verdicts, and aligned columns."""

from __future__ import annotations

from typing import Iterable, List, Optional

from clipval import backends
from clipval.results import FAIL, PASS, Figure, ThroughputDetail

ORDER = backends.names()  # a backend keeps its place and colour in every run


def part(figure: Figure, n: int) -> str:
    """The n-th part of a gate id; empty if it has fewer."""
    parts = figure.gate.split("/")
    return parts[n] if n < len(parts) else ""


def of(figures: Iterable[Figure], check: str) -> List[Figure]:
    """The figures of one check."""
    return [figure for figure in figures if part(figure, 0) == check]


def backend(figure: Figure) -> str:
    """The backend's name, marked if it is simulated."""
    return part(figure, 1) + (" (simulated)" if simulated(figure) else "")


def series(name: str) -> int:
    """Colour and marker of a backend."""
    return ORDER.index(name) if name in ORDER else len(ORDER)


def distance(was: Optional[float], now: Optional[float], unit: str, count: int) -> str:
    """How far `now` is from `was`: percentage points and items for a share, percent for a rate."""
    if was is None or now is None:
        return ""
    if unit == "share":
        items = f", {round((now - was) * count):+,d}" if count else ""
        return f"{100 * (now - was):+.2f} pt{items}"
    if unit == "samples/s":
        return f"{100 * (now / was - 1):+.1f} %" if was else ""
    return f"{now - was:+.2g}"


def difference(figure: Figure) -> str:
    """How far a figure is from its reference."""
    return distance(figure.reference, figure.measured, figure.unit, figure.count)


def row_verdict(figure: Figure) -> str:
    """The verdict of a throughput row: VALID, NOISY, ...; empty for any other figure."""
    return figure.detail.row.decided.verdict if isinstance(figure.detail, ThroughputDetail) else ""


def simulated(figure: Figure) -> bool:
    """Whether the figure is from a simulated device."""
    return figure.made_by is not None and figure.made_by.simulated


def name(figure: Figure) -> str:
    """A figure's name: its gate, and its metric unless the gate implies it."""
    said = part(figure, 2)
    return figure.gate if said and figure.metric.startswith(said) else f"{figure.gate} {figure.metric}"


def added(figure: Figure) -> List[str]:
    """Lines below a failed figure's message: its diagnosis."""
    return figure.message.splitlines()[1:]


def word(figure: Figure) -> str:
    """The verdict as shown, or a row's own; marked if it is simulated."""
    verdict = {PASS: "pass", FAIL: "FAIL"}.get(figure.verdict, row_verdict(figure) or figure.verdict)
    return f"{verdict} simulated" if simulated(figure) else verdict


def cell(value: object) -> str:
    """Text escaped for a Markdown table cell."""
    text = "" if value is None else str(value)
    for plain, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'"), ("\r", " "), ("\n", " ")):
        text = text.replace(plain, escaped)
    return text
