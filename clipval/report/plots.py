"""The plots of a report: inline SVG with the page's colours, for light and dark mode.

Numbers in, markup out, the same bytes for the same numbers; knows nothing about figures or gates. The only module that
uses matplotlib.
"""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

WIDTH = 400  # of a plot, in CSS pixels; 90 % of a phone's width
# matplotlib needs colours, the page has names for them: each placeholder is replaced after drawing.
INK, MUTED, GRID, BAND, BAD, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
SERIES = ("#070701", "#070702", "#070703", "#070704", "#070705", "#070706")
MARKERS = ("o", "s", "^", "D", "v", "P")
NAMES: Dict[str, str] = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    BAND: "var(--band)",
    BAD: "var(--bad)",
    PAPER: "var(--paper)",
    **{colour: f"var(--series-{n})" for n, colour in enumerate(SERIES, 1)},
}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "clipval",
    "text.parse_math": False,  # a $ in a name does not start a formula
    "font.size": 12.5,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
}


class RecallRow(NamedTuple):
    """One line of the recall plot; numbers are percentage points from the reference.

    Attributes:
        name: left label; note: right label, the full figure; series: colour and marker, from 0.
        difference: measured minus reference; low, high: its confidence interval.
        within: half the width of the tolerance band; None if not gated.
        published: other published figures.
    """

    name: str
    note: str
    series: int
    difference: float
    low: float
    high: float
    within: Optional[float]
    failed: bool
    published: Tuple[float, ...] = ()


class Curve(NamedTuple):
    """One curve of the throughput plot.

    Attributes:
        series: colour and marker, from 0; None draws it as a published curve.
        points: batch size, samples/s, lower and upper end of the interval, whether the row is valid.
        dashed: for another clock of the same backend.
    """

    name: str
    series: Optional[int]
    points: Sequence[Tuple[int, float, float, float, bool]]
    dashed: bool = False


class Tap(NamedTuple):
    """One step of the ladder plot; every error is relative, and None where there is none.

    Attributes:
        error: of the candidate; broken: it is not a number or infinite.
        twin: what the precision costs there; pytorch: the float32 model's own error.
        block: number of the block that it is in; empty outside of blocks.
        first: the error starts here.
    """

    error: Optional[float]
    broken: bool
    twin: Optional[float]
    pytorch: Optional[float]
    block: str = ""
    first: bool = False


def parity(edges: Sequence[float], counts: Sequence[float], limit: Optional[float], series: int, label: str) -> str:
    """Histogram of cosine distances, with the bound.

    The count axis is logarithmic, so that one bad sample among thousands is visible.

    Args:
        edges: bin edges, -log10(1 - cosine), ascending; counts: one fewer.
        limit: smallest allowed cosine; series: colour, from 0; label: text for screen readers.
    """
    with _style():
        figure, axes = _axes(190)
        bound = None if limit is None or limit >= 1 else math.log10(1 - limit)
        filled = [n for n, count in enumerate(counts) if count]
        for n in filled:
            left, width = -edges[n + 1], edges[n + 1] - edges[n]
            beyond = bound is not None and left >= bound - width / 2
            axes.bar(left, counts[n], width * 0.92, align="edge", color=BAD if beyond else SERIES[series % len(SERIES)])
        drawn = [-edges[n] for n in filled] + [-edges[n + 1] for n in filled] + ([] if bound is None else [bound])
        low, high = math.floor(min(drawn) - 0.2), math.ceil(max(drawn) + 0.6)
        top = max([1.0, *counts])
        axes.set(xlim=(low, high), yscale="log", ylim=(0.6, top * 3))
        if bound is not None:
            axes.axvspan(bound, high, color=BAD, alpha=0.09, linewidth=0)
            axes.axvline(bound, color=BAD, linewidth=1.3, dashes=(4, 2))
            axes.annotate("bound ", (bound, 1), xycoords=("data", "axes fraction"), ha="right", va="top", color=BAD)
        _decades(axes, low, high)
        _counts(axes, top)
        axes.grid(axis="y")
        axes.set(xlabel="1 − cosine with PyTorch, left is closer", ylabel="samples")
        return _svg(figure, label)


def _decades(axes: Any, low: int, high: int) -> None:
    step = max(1, math.ceil((high - low) / 7))
    ticks = [n for n in range(low, high + 1) if n % step == 0]
    axes.set_xticks(ticks, ["≤1e-16" if n <= -16 else "1" if n == 0 else f"1e{n}" for n in ticks])


def _counts(axes: Any, top: float) -> None:
    ticks = [10**n for n in range(int(math.log10(top)) + 1)]
    axes.set_yticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()


def recall(rows: Sequence[RecallRow], label: str) -> str:
    """Measured recall minus its reference: dots with intervals on tolerance bands, one row per figure."""
    with _style():
        figure, axes = _axes(48 + 24 * len(rows))
        # a distant figure is drawn at the edge, so that the other bands stay visible
        reach = [1.5 * (row.within or 0) for row in rows]
        reach += [abs(end) for row in rows if not row.failed for end in (row.low, row.high)]
        far = min(1.08 * max([0.5, *reach]), 4.0)
        for y, row in enumerate(rows):
            colour = BAD if row.failed else SERIES[row.series % len(SERIES)]
            if row.within is not None:
                axes.barh(y, 2 * row.within, 0.8, left=-row.within, color=BAND, linewidth=0)
            if row.low < far and row.high > -far:
                axes.hlines(y, max(row.low, -far), min(row.high, far), color=colour, linewidth=1.4)
            _spots(axes, row, y, far, colour)
            axes.text(1.02, y, row.note, transform=axes.get_yaxis_transform(), va="center", color=INK)
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set(xlim=(-far, far), ylim=(len(rows) - 0.4, -0.6), xlabel="points from the reference")
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        return _svg(figure, label)


def _spots(axes: Any, row: RecallRow, y: int, far: float, colour: str) -> None:
    for other in row.published:
        if abs(other) <= far:
            axes.plot(other, y, "d", color=MUTED, markersize=5, fillstyle="none", linestyle="none")
    off = abs(row.difference) > far
    marker = (">" if row.difference > 0 else "<") if off else MARKERS[row.series % len(MARKERS)]
    place = math.copysign(0.97 * far, row.difference) if off else row.difference
    axes.plot(place, y, marker, color=colour, markersize=7, clip_on=False, zorder=5)


def throughput(curves: Sequence[Curve], label: str) -> str:
    """Samples per second over batch size, both logarithmic; a row that is not VALID has a hollow marker."""
    with _style():
        columns = (
            2 if 2 * max(len(curve.name) for curve in curves) < 46 else 1
        )  # of the legend, by the width of the names
        figure, axes = _axes(215 + 19 * -(-len(curves) // columns))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for curve in curves:
            _curve(axes, curve)
        sizes = sorted({point[0] for curve in curves for point in curve.points})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        _rates(axes)
        axes.grid(True)
        axes.set(xlabel="batch size", ylabel="samples/s")
        figure.legend(
            loc="outside upper left", ncols=columns, frameon=False, fontsize=11.5, handlelength=2.2, columnspacing=1
        )
        return _svg(figure, label)


def _curve(axes: Any, curve: Curve) -> None:
    series = curve.series
    colour = MUTED if series is None else SERIES[series % len(SERIES)]
    marker = "" if series is None else MARKERS[series % len(MARKERS)]
    style = (0, (1, 1.5)) if series is None else (0, (5, 2)) if curve.dashed else "-"
    points = sorted(curve.points)
    sizes, rates = [point[0] for point in points], [point[1] for point in points]
    marker = marker or ("_" if len(points) == 1 else "")  # a single point has no line
    axes.plot(sizes, rates, marker=marker, color=colour, linestyle=style, linewidth=1.7, markersize=6, label=curve.name)
    for size, rate, low, high, valid in points:
        if high > low > 0:
            axes.vlines(size, low, high, color=colour, linewidth=1.2)
        if not valid:
            axes.plot(size, rate, marker or "o", color=colour, markerfacecolor=PAPER, markersize=6, zorder=5)


def _rates(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.0f}" if rate >= 1 else f"{rate:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())


def ladder(taps: Sequence[Tap], limit: float, twin: str, series: int, label: str) -> str:
    """Error over depth of a candidate, its twin and PyTorch; the place where the error starts is marked.

    Args:
        taps: in the order of computation; limit: times the twin's error up to which there is no excess.
        twin: name of the twin's curve.
    """
    with _style():
        figure, axes = _axes(270)
        axes.set_yscale("log")
        known = [one for tap in taps for one in (tap.error, tap.twin, tap.pytorch) if one]
        low, high = 0.5 * min(known, default=1e-8), 3 * max([*known, limit * max(tap.twin or 0 for tap in taps)])
        depth = range(len(taps))
        cost = [tap.twin or math.nan for tap in taps]
        axes.fill_between(
            depth, low, [limit * one for one in cost], color=BAND, linewidth=0, label=f"no excess, up to {limit:g}×"
        )
        axes.plot(depth, cost, color=MUTED, linestyle=(0, (5, 2)), linewidth=1.3, label=twin)
        if any(tap.pytorch for tap in taps):
            own = [tap.pytorch or math.nan for tap in taps]
            axes.plot(depth, own, color=MUTED, linestyle=(0, (1, 1.5)), linewidth=1.3, label="PyTorch, fp32")
        colour = SERIES[series % len(SERIES)]
        # a log scale has no zero, and nothing that is not finite: these are on the lower and the upper edge
        errors = [high if tap.broken else math.nan if tap.error is None else max(tap.error, low) for tap in taps]
        axes.plot(depth, errors, ".-", color=colour, linewidth=1.2, markersize=5, label="candidate", clip_on=False)
        _not_finite(axes, [n for n, tap in enumerate(taps) if tap.broken], len(taps), high, colour)
        for at, tap in enumerate(taps):
            if tap.first:
                axes.axvline(at, color=BAD, linewidth=1.3, dashes=(4, 2))
                axes.plot(at, errors[at], "D", color=BAD, markersize=7, zorder=5, label="starts here", clip_on=False)
        _blocks(axes, taps)
        axes.set(ylim=(low, high), xlabel="block", ylabel="relative error")
        _powers(axes, low, high)
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=11.5, handlelength=2, columnspacing=1)
        return _svg(figure, label)


def _not_finite(axes: Any, places: Sequence[int], count: int, top: float, colour: str) -> None:
    """Words at the upper edge where errors are not finite, on the side with more room."""
    if places:
        side = "right" if 2 * places[0] > count else "left"
        shift = -9 if side == "right" else 9
        axes.annotate(
            "NaN or Inf", (places[0], top), (shift, -6), textcoords="offset points", ha=side, va="top", color=colour
        )


def _powers(axes: Any, low: float, high: float) -> None:
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    ticks = list(range(first, last + 1, max(1, math.ceil((last - first) / 6))))
    axes.set_yticks([10.0**n for n in ticks], [f"1e{n}" for n in ticks])
    axes.set_yticks([], minor=True)


def _blocks(axes: Any, taps: Sequence[Tap]) -> None:
    """A tick where a block begins; where there are many, not at each."""
    starts = [n for n, tap in enumerate(taps) if tap.block and (n == 0 or taps[n - 1].block != tap.block)]
    starts = starts[:: max(1, math.ceil(len(starts) / 13))]
    axes.set_xticks(starts, [taps[n].block for n in starts])
    axes.set_xticks([], minor=True)


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _axes(height: int) -> Tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any, label: str) -> str:
    """The drawing as markup for a page: no namespaces or metadata, ids unique to the plot, the page's colours."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    text = text[text.index(">", text.index("<svg")) + 1 :]
    # matplotlib's style sheet would apply to the whole page; the page has its own
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub("|".join(NAMES), lambda found: NAMES[found[0]], text.replace("xlink:href", "href"))
    text = _own_ids(text, hashlib.sha256((label + text).encode()).hexdigest()[:8])
    return f'<svg class="plot" role="img" aria-label="{html.escape(label)}" viewBox="{box[1]}">{text.strip()}'


def _own_ids(text: str, prefix: str) -> str:
    """Drop unused ids and prefix the others, since several drawings share a page."""
    used: List[str] = re.findall(r'(?:url\(#|href="#)([^")]+)', text)

    def rename(found: Any) -> str:
        return f' id="{prefix}-{found[1]}"' if found[1] in used else ""

    text = re.sub(r' id="([^"]+)"', rename, text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", text)
