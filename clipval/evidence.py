"""What a report shows of figures: their wording, tables as the recipe has them, plots, and the samples behind them.

Everything comes from the figures as they were judged; nothing is measured or judged again. Details that a figure
lacks are left out, so that a run that broke half way has a report too.
"""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from clipval import backends, plots
from clipval.errors import ClipvalError
from clipval.results import FAIL, INFO, Figure

TOWERS = ("vision", "text")
COLOURED = backends.names()  # a backend keeps its colour whichever others a run has
THUMBNAIL = 160  # pixels of the longer side
FLIPS = 10


def _nothing(_: str) -> Any:
    return None


class Assets(NamedTuple):
    """How a report gets at the samples: the file of an image id, the text of a caption id, None for unknown ids."""

    image_path: Callable[[str], Optional[Path]] = _nothing
    caption: Callable[[str], Optional[str]] = _nothing


def part(figure: Figure, n: int) -> str:
    """The n-th part of a gate id; empty where it has fewer."""
    parts = figure.gate.split("/")
    return parts[n] if n < len(parts) else ""


def of(figures: Iterable[Figure], check: str) -> List[Figure]:
    """The figures of one check."""
    return [figure for figure in figures if part(figure, 0) == check]


def backend(figure: Figure) -> str:
    """The backend's name, with what must always stand beside it."""
    simulated = " (simulated)" if figure.context.get("simulated") else ""
    return part(figure, 1) + simulated


def number(value: Optional[float], unit: str) -> str:
    """A value in its unit, with as many digits as tell it from a bound that it is near to: of a rate at least three."""
    if value is None or not math.isfinite(value):
        return "none"
    if unit == "cosine":
        return f"1 - {1 - value:.1e}" if value > 0.99 else f"{value:.6f}"
    if unit == "share":
        return f"{value:.4f}"
    if unit in ("samples/s", "ms"):
        whole = value >= 1000 or (value >= 100 and value == round(value))
        return f"{value:,.0f}" if whole else f"{value:.1f}" if value >= 10 else f"{value:.3g}"
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.3g}"


def wanted(figure: Figure) -> str:
    """What a figure is held to: `>= 0.95`, `0.8830 +- 0.005`; its reference where nothing is held."""
    if figure.bound == "within" and figure.limit is not None:
        return f"{number(figure.reference, figure.unit)} +- {figure.limit:g}"
    if figure.bound and figure.limit is not None:
        return f"{figure.bound} {number(figure.limit, figure.unit)}"
    return "" if figure.reference is None else number(figure.reference, figure.unit)


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


def detail(figure: Figure, *keys: str) -> Any:
    """A value inside a figure's detail, by one key a level; None where any level is missing."""
    found: Any = figure.detail
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def row_verdict(figure: Figure) -> str:
    """What a row of throughput is worth: VALID, NOISY, ...; empty for any other figure."""
    return str(detail(figure, "verdict") or "") if part(figure, 0) == "throughput" else ""


class Gallery:
    """Small pictures and captions of samples, each made once."""

    def __init__(self, assets: Assets) -> None:
        self._assets = assets
        self._pictures: Dict[str, str] = {}

    def picture(self, image_id: str) -> str:
        """A thumbnail as a data URI; empty where there is no such image or it cannot be read."""
        if image_id not in self._pictures:
            self._pictures[image_id] = self._draw(image_id)
        return self._pictures[image_id]

    def _draw(self, image_id: str) -> str:
        from PIL import Image

        try:
            path = self._assets.image_path(image_id)
            if path is None:
                return ""
            with Image.open(path) as opened:
                small = opened.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            stream = io.BytesIO()
            small.save(stream, "JPEG", quality=80)
        except (ClipvalError, OSError, ValueError, Image.DecompressionBombError):
            return ""  # evidence that cannot be shown must not take the report with it
        return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()

    def sample(self, name: str, is_caption: bool) -> Dict[str, Any]:
        """An image with its first caption, or a caption with its image."""
        image = name.rpartition("_")[0] if is_caption else name
        caption = name if is_caption else f"{name}_0"
        try:
            text = self._assets.caption(caption)
        except ClipvalError:
            text = None
        return {"id": name, "image": image, "picture": self.picture(image), "caption": text or ""}


def glance(figures: Sequence[Figure], missing: Sequence[str]) -> Dict[str, Any]:
    """Check by backend: how many gates passed, of how many; a gate is as good as its worst figure."""
    gates: Dict[str, bool] = {}
    simulated = {part(figure, 1): backend(figure) for figure in figures}
    for figure in figures:
        if figure.verdict != INFO:
            gates[figure.gate] = gates.get(figure.gate, True) and figure.verdict != FAIL
    gates.update(dict.fromkeys(missing, False))
    table: Dict[str, Dict[str, List[bool]]] = {}
    for gate, ok in gates.items():
        check, *rest = gate.split("/")
        name = rest[0] if len(rest) > 1 else "run"  # a gate of two parts is about no backend
        table.setdefault(check, {}).setdefault(name, []).append(ok)
    columns = sorted(
        {name for row in table.values() for name in row}, key=lambda one: (one in COLOURED, series(one), one)
    )
    rows = [
        {"check": check, "cells": [{"total": len(row.get(n, ())), "passed": sum(row.get(n, ()))} for n in columns]}
        for check, row in table.items()
    ]
    return {"columns": [simulated.get(name, name) for name in columns], "rows": rows}


def parity_panels(figures: Sequence[Figure], gallery: Gallery) -> List[Dict[str, Any]]:
    """One panel a backend and tower: histogram, percentiles, norms, worst samples."""
    panels = []
    for figure in of(figures, "parity"):
        if not figure.detail:
            continue
        tower, name = part(figure, 2), backend(figure)
        edges, counts = detail(figure, "histogram", "edges"), detail(figure, "histogram", "counts")
        limit = figure.limit if figure.unit == "cosine" else None
        label = f"Histogram of cosine distances of {figure.count} {tower} embeddings, {name} against pytorch"
        worst = detail(figure, "worst") or []
        panels.append(
            {
                "figure": figure,
                "title": f"{name}, {tower}",
                "failed": any(one.verdict == FAIL for one in figures if one.gate == figure.gate),
                "svg": plots.parity(edges, counts, limit, series(part(figure, 1)), label) if any(counts or ()) else "",
                "percentiles": sorted(
                    (detail(figure, "cosine_percentiles") or {}).items(), key=lambda one: float(one[0])
                ),
                "mean": detail(figure, "cosine_mean"),
                "norms": detail(figure, "norms"),
                "relative": detail(figure, "relative_error"),
                "worst": [{**one, **gallery.sample(str(one.get("id")), tower == "text")} for one in worst],
            }
        )
    return panels


def _rank(figure: Figure) -> Tuple[str, int]:
    """Sort key of `image_retrieval_recall@10`: direction, then k."""
    name, _, k = part(figure, 2).partition("@")
    return name, int(k) if k.isdigit() else 0


def recall_panels(figures: Sequence[Figure]) -> List[Dict[str, Any]]:
    """One plot a direction: every recall less its reference, with tolerance band, interval, other published figures."""
    panels = []
    found = [one for one in of(figures, "recall") if one.measured is not None and one.reference is not None]
    found.sort(key=lambda one: (*_rank(one), series(part(one, 1))))
    for direction in dict.fromkeys(_rank(one)[0] for one in found):
        rows = [_recall_row(one) for one in found if _rank(one)[0] == direction]
        title = direction.replace("_recall", "").replace("_", " ")
        label = f"{title}: " + "; ".join(f"{row.name} {row.note}, {row.difference:+.2f} points" for row in rows)
        panels.append({"title": title, "svg": plots.recall(rows, label)})
    return panels


def interval(figure: Figure) -> Tuple[float, float]:
    """Wilson 95 % interval of a recall figure, at its own k: the detail has only that of the gated one."""
    from scipy.stats import binomtest

    share = figure.measured or 0.0
    if not figure.count or not 0 <= share <= 1:
        return share, share
    ends = binomtest(round(share * figure.count), figure.count).proportion_ci(0.95, "wilson")
    return float(ends.low), float(ends.high)


def _recall_row(figure: Figure) -> plots.RecallRow:
    assert figure.measured is not None and figure.reference is not None
    base = figure.reference
    low, high = interval(figure)
    others = [one.get("value") for one in detail(figure, "published") or []]
    return plots.RecallRow(
        name=f"R@{_rank(figure)[1]} {backend(figure)}",
        note=f"{figure.measured:.4f} {'+' if figure.measured > base else ''}"
        f"{round((figure.measured - base) * figure.count)}".replace("-", "\N{MINUS SIGN}"),
        series=series(part(figure, 1)),
        difference=100 * (figure.measured - base),
        low=100 * (low - base),
        high=100 * (high - base),
        within=100 * figure.limit if figure.bound == "within" and figure.limit is not None else None,
        failed=figure.verdict == FAIL,
        published=tuple(100 * (value - base) for value in others if value is not None and value != base),
    )


def series(name: str) -> int:
    """Colour and marker of a backend."""
    return COLOURED.index(name) if name in COLOURED else len(COLOURED)


def recall_table(figures: Sequence[Figure]) -> Dict[str, Any]:
    """The recipe's first table: metric by backend, beside the published columns.

    Returns:
        columns: names of the backends; published: names of the published columns; rows: metric, one figure or None
        a backend, one text a published column.
    """
    found = sorted(of(figures, "recall"), key=lambda one: series(part(one, 1)))
    columns = list(dict.fromkeys(backend(one) for one in found))
    metrics = list(dict.fromkeys(part(one, 2) for one in sorted(found, key=_rank)))
    cells = {(part(one, 2), backend(one)): one for one in found}
    published = _published_recall(found)
    rows = [
        {
            "metric": metric,
            "figures": [cells.get((metric, name)) for name in columns],
            "published": [known.get(metric, "") for known in published.values()],
        }
        for metric in metrics
    ]
    return {"columns": columns, "published": list(published), "rows": rows}


def _published_recall(found: Sequence[Figure]) -> Dict[str, Dict[str, str]]:
    """Published column -> metric -> value; references that backends have in common share a column."""
    own: Dict[str, Dict[str, str]] = {}
    others: Dict[str, Dict[str, str]] = {}
    for figure in found:
        metric = part(figure, 2)
        if figure.reference is not None:
            own.setdefault(part(figure, 1), {})[metric] = number(figure.reference, "share")
        for one in detail(figure, "published") or []:
            name = f"published {one['backend']}" if one.get("backend") else str(one.get("source", "published"))
            others.setdefault(name, {})[metric] = number(one.get("value"), "share")
    shared: Dict[Tuple[Tuple[str, str], ...], List[str]] = {}
    for name, values in own.items():
        stated = {pair for known in others.values() for pair in known.items()}
        if values.items() - stated:
            shared.setdefault(tuple(sorted(values.items())), []).append(name)
    return {**{f"reference of {', '.join(names)}": dict(values) for values, names in shared.items()}, **others}


class Rate(NamedTuple):
    """A throughput figure of one clock."""

    name: str
    tower: str
    size: int
    value: float
    low: float
    high: float
    verdict: str
    figure: Figure
    clock: Dict[str, Any]


def rates(figures: Sequence[Figure]) -> List[Rate]:
    """Every measured rate, the device's own clock apart from the host's; of a repeated row the last."""
    found: Dict[Tuple[str, str, int], Rate] = {}
    rows = [one for one in of(figures, "throughput") if one.unit == "samples/s"]
    measured = {one.gate for one in rows if detail(one, "samples_per_second")}
    for figure in sorted(rows, key=lambda one: series(part(one, 1))):
        size = str(figure.context.get("batch_size") or part(figure, 3))
        if not size.isdigit() or (figure.gate in measured and not detail(figure, "samples_per_second")):
            continue  # no row, or the same row again, held to another bound
        for scope, clock in _clocks(figure):
            # published curves are made of means, and of the device's clock; the interval is the median's
            mean = clock.get("samples_per_second_mean") if scope == "execute" else None
            value = mean or clock.get("samples_per_second")
            if value:
                name = backend(figure) + ("" if scope == "inference" else f" {scope}")
                low, high = (value, value) if mean else clock.get("interval") or (value, value)
                verdict = str(clock.get("verdict") or detail(figure, "verdict") or "")
                rate = Rate(name, part(figure, 2), int(size), value, low, high, verdict, figure, clock)
                found[rate.name, rate.tower, rate.size] = rate
    return list(found.values())


def _clocks(figure: Figure) -> List[Tuple[str, Dict[str, Any]]]:
    """Scopes that a row was timed in: the one that decides, and those beside it in its detail."""
    first = str(detail(figure, "scope") or figure.context.get("scope") or "inference")
    others = [(name, detail(figure, name)) for name in ("inference", "execute") if name != first]
    clocks = [(first, {"samples_per_second": figure.measured, **figure.detail})]
    return sorted(clocks + [(name, clock) for name, clock in others if isinstance(clock, dict)], reverse=True)


def published_rates(figures: Sequence[Figure]) -> Dict[Tuple[str, str], Dict[int, float]]:
    """Tower and name of a published curve -> batch size -> samples/s; the name says when it is another machine's."""
    curves: Dict[Tuple[str, str], Dict[int, float]] = {}
    real = [one.context for one in of(figures, "throughput") if not one.context.get("simulated")]
    chips = {str(one.get("device", "")).partition(":")[0] for one in real}
    for figure in of(figures, "throughput"):
        known, size = detail(figure, "published"), figure.context.get("batch_size") or part(figure, 3)
        if isinstance(known, dict) and known.get("fps") and str(size).isdigit():
            chip = str(known.get("chip", "unknown chip"))
            name = f"published {chip}" + ("" if chip in chips else ", another machine")
            curves.setdefault((part(figure, 2), name), {})[int(size)] = known["fps"]
    return curves


def throughput_table(figures: Sequence[Figure]) -> Dict[str, Any]:
    """The recipe's second table: batch size by tower and backend, beside the published columns.

    Returns:
        columns: tower and name; rows: batch size, and the text of each column.
    """
    measured, curves = rates(figures), published_rates(figures)
    towers = [*TOWERS, *sorted({one.tower for one in measured} - set(TOWERS))]
    columns: List[Tuple[str, str]] = []
    for tower in towers:
        columns += dict.fromkeys((tower, one.name) for one in measured if one.tower == tower)
        columns += [key for key in curves if key[0] == tower]
    cells = {((one.tower, one.name), one.size): one for one in measured}
    rows = []
    for size in sorted({one.size for one in measured}):
        texts = {}
        for column in columns:
            rate, known = cells.get((column, size)), curves.get(column, {}).get(size)
            texts[column] = _rate_text(rate) if rate else number(known, "samples/s") if known else ""
        rows.append({"size": size, "cells": texts})
    return {"columns": columns, "rows": rows}


def _rate_text(rate: Rate) -> str:
    flag = f" {rate.verdict}" if rate.verdict not in ("", "VALID") else ""
    return number(rate.value, "samples/s") + flag


def throughput_panels(figures: Sequence[Figure]) -> List[Dict[str, Any]]:
    """One plot a tower: rate over batch size of every backend and clock, with the published curves."""
    measured, known = rates(figures), published_rates(figures)
    panels = []
    for tower in dict.fromkeys(one.tower for one in measured):
        curves = []
        for name in dict.fromkeys(one.name for one in measured if one.tower == tower):
            mine = [one for one in measured if (one.tower, one.name) == (tower, name)]
            points = [(one.size, one.value, one.low, one.high, one.verdict in ("", "VALID")) for one in mine]
            dashed = name != backend(mine[0].figure)
            curves.append(plots.Curve(name, series(part(mine[0].figure, 1)), points, dashed))
        for (owner, name), values in known.items():
            if owner == tower:
                curves.append(plots.Curve(name, None, [(n, fps, fps, fps, True) for n, fps in values.items()]))
        said = "; ".join(f"{one.name} {', '.join(f'{p[0]}: {p[1]:.4g}' for p in sorted(one.points))}" for one in curves)
        label = f"Samples per second over batch size, {tower} tower: {said}"
        panels.append({"tower": tower, "svg": plots.throughput(curves, label)})
    return panels


def paired_panels(figures: Sequence[Figure], gallery: Gallery) -> List[Dict[str, Any]]:
    """One panel a paired comparison: gains, losses, p value, and the flipped queries with what came instead."""
    panels = []
    for figure in of(figures, "paired"):
        by_image = part(figure, 2).startswith("text_retrieval")  # its queries are images, its answers captions
        flips = [_flip(one, by_image, gallery) for one in (detail(figure, "flips") or [])[:FLIPS]]
        panels.append(
            {
                "figure": figure,
                "title": f"{backend(figure)}, {part(figure, 2).replace('_', ' ')}",
                "by_image": by_image,
                "gains": detail(figure, "gains"),
                "losses": detail(figure, "losses"),
                "p_value": detail(figure, "p_value"),
                "flips": flips,
                "left_out": len(detail(figure, "flips") or []) - len(flips),
            }
        )
    return panels


def _flip(flip: Dict[str, Any], by_image: bool, gallery: Gallery) -> Dict[str, Any]:
    query = gallery.sample(str(flip.get("id")), not by_image)
    answers = [gallery.sample(str(one), by_image) for one in flip.get("retrieved") or []]
    return {**flip, "query": query, "retrieved": [{**one, "right": one["image"] == query["image"]} for one in answers]}
