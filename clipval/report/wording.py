"""How figures are worded in every report: their names, numbers and verdicts, and columns of a terminal."""

from __future__ import annotations

from typing import Any, Iterable, List, Optional, Sequence

from clipval import backends
from clipval.results import FAIL, PASS, Figure, ThroughputDetail

ORDER = backends.names()  # a backend keeps its place and colour whichever others a run has


def part(figure: Figure, n: int) -> str:
    """The n-th part of a gate id; empty where it has fewer."""
    parts = figure.gate.split("/")
    return parts[n] if n < len(parts) else ""


def of(figures: Iterable[Figure], check: str) -> List[Figure]:
    """The figures of one check."""
    return [figure for figure in figures if part(figure, 0) == check]


def backend(figure: Figure) -> str:
    """The backend's name, with what must always stand beside it."""
    return part(figure, 1) + (" (simulated)" if simulated(figure) else "")


def series(name: str) -> int:
    """Colour and marker of a backend."""
    return ORDER.index(name) if name in ORDER else len(ORDER)


def distance(was: Optional[float], now: Optional[float], unit: str, count: int) -> str:
    """How far `now` is from `was`: points and items of a share, percent of a rate."""
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
    """Whether a row of throughput can be believed: VALID, NOISY, ...; empty for any other figure."""
    return figure.detail.row.decided.verdict if isinstance(figure.detail, ThroughputDetail) else ""


def simulated(figure: Figure) -> bool:
    """The figure was made by a simulated device."""
    return figure.made_by is not None and figure.made_by.simulated


def name(figure: Figure) -> str:
    """A figure's name: its gate, and its metric where the gate does not say it."""
    said = part(figure, 2)
    return figure.gate if said and figure.metric.startswith(said) else f"{figure.gate} {figure.metric}"


def added(figure: Figure) -> List[str]:
    """What stands below the sentence of a figure that failed: a diagnosis."""
    return figure.message.splitlines()[1:]


def word(figure: Figure) -> str:
    """The verdict as it is shown, with what must always stand beside it."""
    verdict = {PASS: "pass", FAIL: "FAIL"}.get(figure.verdict, row_verdict(figure) or figure.verdict)
    return f"{verdict} simulated" if simulated(figure) else verdict


def cell(value: Any) -> str:
    """Text that stays in its Markdown table cell and is not taken for markup."""
    text = "" if value is None else str(value)
    for plain, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'"), ("\r", " "), ("\n", " ")):
        text = text.replace(plain, escaped)
    return text


def columns(rows: Sequence[Sequence[str]], right: Iterable[int] = (), between: str = "  ") -> List[str]:
    """Rows of text in columns of equal width; those of `right` end, the others begin at the same place."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    ends = set(right)
    lines = []
    for row in rows:
        cells = [text.rjust(widths[n]) if n in ends else text.ljust(widths[n]) for n, text in enumerate(row)]
        lines.append(between.join(cells).rstrip() if between == "  " else between.join(cells))
    return lines
