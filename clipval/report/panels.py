"""The panels of the HTML page: plots, and samples behind figures.

Everything comes from the judged figures; nothing is measured or judged again. Missing evidence is left out, so that an
aborted run has a report too.
"""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from clipval.diagnose.locate import EXCESS
from clipval.errors import ClipvalError
from clipval.report import plots
from clipval.report.tables import published_rates, rank, rates
from clipval.report.wording import ORDER, backend, of, part, series
from clipval.results import FAIL, INFO, Figure, Flip, PairedDetail, ParityDetail, RecallDetail
from clipval.retrieval import interval

BLOCK = re.compile(r"\.(\d+)(?:\.|$)")  # of a module's path, as `visual.transformer.resblocks.3.attn`
NEAR = 6  # taps about the start of an error that are shown as a table
THUMBNAIL = 160  # pixels of the longer side
FLIPS = 10


def _nothing(_: str) -> None:
    return None


class Assets(NamedTuple):
    """Access to samples: the file of an image id, the text of a caption id; None for unknown ids."""

    image_path: Callable[[str], Optional[Path]] = _nothing
    caption: Callable[[str], Optional[str]] = _nothing


class Gallery:
    """Thumbnails and captions of samples, each created once."""

    def __init__(self, assets: Assets) -> None:
        self._assets = assets
        self._pictures: Dict[str, str] = {}

    def picture(self, image_id: str) -> str:
        """A thumbnail as a data URI; empty if there is no such image or it cannot be read."""
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
            return ""  # an unreadable picture must not prevent the report
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
    """Per check and backend: gates passed, and how many there are; a gate's verdict is its worst figure's."""
    gates: Dict[str, bool] = {}
    simulated = {part(figure, 1): backend(figure) for figure in figures}
    for figure in figures:
        if figure.verdict != INFO:
            gates[figure.gate] = gates.get(figure.gate, True) and figure.verdict != FAIL
    gates.update(dict.fromkeys(missing, False))
    table: Dict[str, Dict[str, List[bool]]] = {}
    for gate, ok in gates.items():
        check, *rest = gate.split("/")
        name = rest[0] if len(rest) > 1 else "run"  # a gate id of two parts has no backend
        table.setdefault(check, {}).setdefault(name, []).append(ok)
    columns = sorted({name for row in table.values() for name in row}, key=lambda one: (one in ORDER, series(one), one))
    rows = [
        {"check": check, "cells": [{"total": len(row.get(n, ())), "passed": sum(row.get(n, ()))} for n in columns]}
        for check, row in table.items()
    ]
    return {"columns": [simulated.get(name, name) for name in columns], "rows": rows}


class ParityPanel(NamedTuple):
    """Parity of a backend and tower: figure, evidence, whether the gate failed, histogram, worst samples."""

    title: str
    figure: Figure
    detail: ParityDetail
    failed: bool
    svg: str
    worst: List[Any]


def parity_panels(figures: Sequence[Figure], gallery: Gallery) -> List[ParityPanel]:
    """One panel per backend and tower: histogram, percentiles, norms, worst samples."""
    panels: List[ParityPanel] = []
    for figure in of(figures, "parity"):
        detail = figure.detail
        if not isinstance(detail, ParityDetail):
            continue
        tower, name = part(figure, 2), backend(figure)
        label = f"Histogram of cosine distances of {figure.count} {tower} embeddings, {name} against pytorch"
        limit = figure.limit if figure.unit == "cosine" else None
        drawn = any(detail.counts)
        svg = plots.parity(detail.edges, detail.counts, limit, series(part(figure, 1)), label) if drawn else ""
        worst = [(one, gallery.sample(one.id, tower == "text")) for one in detail.worst]
        failed = any(one.verdict == FAIL for one in figures if one.gate == figure.gate)
        panels.append(ParityPanel(f"{name}, {tower}", figure, detail, failed, svg, worst))
    return panels


class LadderPanel(NamedTuple):
    """A diagnosis: what was looked at, its sentence, causes, advice and plot, and the taps about the start."""

    title: str
    finding: Dict[str, Any]
    svg: str
    near: List[Dict[str, Any]]


def ladder_panels(figures: Sequence[Figure]) -> List[LadderPanel]:
    """One panel for each figure with a diagnosis."""
    panels = []
    for figure in figures:
        found = figure.diagnosis
        if not found:
            continue
        rungs = [one for one in found.get("ladder", ()) if one["state"] != "absent"]
        title = f"{backend(figure)}, {part(figure, 2)}"
        start = next((n for n, one in enumerate(rungs) if one["name"] == found["first"]), None)
        near = [] if start is None else rungs[max(0, start - NEAR) : start + NEAR + 1]
        panels.append(LadderPanel(title, found, _ladder(rungs, found, figure, title), near))
    return panels


def _ladder(rungs: Sequence[Dict[str, Any]], found: Dict[str, Any], figure: Figure, title: str) -> str:
    if not rungs:
        return ""
    taps = []
    for one in rungs:
        block = BLOCK.search(one["module"] or one["name"])
        first, broken = one["name"] == found["first"], one["state"] == "not finite"
        taps.append(plots.Tap(one["error"], broken, one["noise"], one["pytorch"], block[1] if block else "", first))
    start = f", the error starts at {found['first']}" if found["first"] else ""
    label = f"Relative error of {len(taps)} tensors over depth, {title} against pytorch{start}"
    precision = found["precision"]
    cost = "what fp32 costs" if precision == "fp32" else f"its twin in {precision}"
    return plots.ladder(taps, EXCESS, cost, series(part(figure, 1)), label)


def recall_panels(figures: Sequence[Figure]) -> List[Dict[str, Any]]:
    """One plot per direction: each recall minus its reference, with tolerance, interval, other published figures."""
    panels = []
    found = [one for one in of(figures, "recall") if one.measured is not None and one.reference is not None]
    found.sort(key=lambda one: (*rank(one), series(part(one, 1))))
    for direction in dict.fromkeys(rank(one)[0] for one in found):
        rows = [_recall_row(one) for one in found if rank(one)[0] == direction]
        title = direction.replace("_recall", "").replace("_", " ")
        label = f"{title}: " + "; ".join(f"{row.name} {row.note}, {row.difference:+.2f} points" for row in rows)
        panels.append({"title": title, "svg": plots.recall(rows, label)})
    return panels


def _ends(figure: Figure) -> Tuple[float, float]:
    """The Wilson 95 % interval of a recall figure; the figure itself if there is none."""
    share = figure.measured or 0.0
    if not figure.count or not 0 <= share <= 1:
        return share, share
    return interval(round(share * figure.count), figure.count)


def _recall_row(figure: Figure) -> plots.RecallRow:
    assert figure.measured is not None and figure.reference is not None
    base = figure.reference
    low, high = _ends(figure)
    others = [one.value for one in figure.detail.published] if isinstance(figure.detail, RecallDetail) else []
    return plots.RecallRow(
        name=f"R@{rank(figure)[1]} {backend(figure)}",
        note=f"{figure.measured:.4f} {'+' if figure.measured > base else ''}"
        f"{round((figure.measured - base) * figure.count)}".replace("-", "\N{MINUS SIGN}"),
        series=series(part(figure, 1)),
        difference=100 * (figure.measured - base),
        low=100 * (low - base),
        high=100 * (high - base),
        within=100 * figure.limit if figure.bound == "within" and figure.limit is not None else None,
        failed=figure.verdict == FAIL,
        published=tuple(100 * (value - base) for value in others if value != base),
    )


def throughput_panels(figures: Sequence[Figure]) -> List[Dict[str, Any]]:
    """One plot per tower: samples/s over batch size for every backend and clock, with the published curves."""
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


class PairedPanel(NamedTuple):
    """A paired comparison: figure, evidence, whether the queries are images, and the flips."""

    title: str
    figure: Figure
    detail: PairedDetail
    by_image: bool
    flips: List[Any]
    left_out: int


def paired_panels(figures: Sequence[Figure], gallery: Gallery) -> List[PairedPanel]:
    """One panel per paired comparison: gains, losses, p value, and the flipped queries with what was retrieved."""
    panels = []
    for figure in of(figures, "paired"):
        if isinstance(figure.detail, PairedDetail):
            by_image = part(figure, 2).startswith("text_retrieval")  # queries are images, answers captions
            flips = figure.detail.flips
            shown = [_flip(one, by_image, gallery) for one in flips[:FLIPS]]
            title = f"{backend(figure)}, {part(figure, 2).replace('_', ' ')}"
            panels.append(PairedPanel(title, figure, figure.detail, by_image, shown, len(flips) - len(shown)))
    return panels


def _flip(flip: Flip, by_image: bool, gallery: Gallery) -> Dict[str, Any]:
    """A flip with its query and answers as samples, and whether each answer is right."""
    query = gallery.sample(flip.id, not by_image)
    samples = [gallery.sample(one, by_image) for one in flip.retrieved]
    answers = [{**one, "right": one["image"] == query["image"]} for one in samples]
    return {"flip": flip, "query": query, "answers": answers}
