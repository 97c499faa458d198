"""The recipe's two tables, recall by backend and throughput by batch size, with the published columns."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from clipval.report.wording import backend, of, part, series
from clipval.results import Figure, RecallDetail, ThroughputDetail, number
from clipval.throughput.row import EXECUTE, INFERENCE, Judged, Row
from clipval.towers import TOWER_NAMES


class RecallRow(NamedTuple):
    """One metric: a figure or None per backend, a text per published column."""

    metric: str
    figures: List[Optional[Figure]]
    published: List[str]


class RecallTable(NamedTuple):
    """Names of the backends, names of the published columns, and one row per metric."""

    columns: List[str]
    published: List[str]
    rows: List[RecallRow]


def rank(figure: Figure) -> Tuple[str, int]:
    """Sort key of `image_retrieval_recall@10`: direction, then k."""
    name, _, k = part(figure, 2).partition("@")
    return name, int(k) if k.isdigit() else 0


def recall_table(figures: Sequence[Figure]) -> RecallTable:
    """The recipe's first table: metric by backend, with the published columns."""
    found = sorted(of(figures, "recall"), key=lambda one: series(part(one, 1)))
    columns = list(dict.fromkeys(backend(one) for one in found))
    metrics = list(dict.fromkeys(part(one, 2) for one in sorted(found, key=rank)))
    cells = {(part(one, 2), backend(one)): one for one in found}
    published = _published_recall(found)
    rows = [
        RecallRow(
            metric,
            [cells.get((metric, name)) for name in columns],
            [known.get(metric, "") for known in published.values()],
        )
        for metric in metrics
    ]
    return RecallTable(columns, list(published), rows)


def _published_recall(found: Sequence[Figure]) -> Dict[str, Dict[str, str]]:
    """Published column -> metric -> value; references shared by backends share a column."""
    own: Dict[str, Dict[str, str]] = {}
    others: Dict[str, Dict[str, str]] = {}
    for figure in found:
        metric = part(figure, 2)
        if figure.reference is not None:
            own.setdefault(part(figure, 1), {})[metric] = number(figure.reference, "share")
        for one in figure.detail.published if isinstance(figure.detail, RecallDetail) else ():
            name = f"published {one.backend}" if one.backend else one.source
            others.setdefault(name, {})[metric] = number(one.value, "share")
    shared: Dict[Tuple[Tuple[str, str], ...], List[str]] = {}
    for name, values in own.items():
        stated = {pair for known in others.values() for pair in known.items()}
        if values.items() - stated:
            shared.setdefault(tuple(sorted(values.items())), []).append(name)
    return {**{f"reference of {', '.join(names)}": dict(values) for values, names in shared.items()}, **others}


class Rate(NamedTuple):
    """A throughput figure of one clock: value and interval in samples/s, with its row and figure."""

    name: str
    tower: str
    size: int
    value: float
    low: float
    high: float
    judged: Judged
    row: Row
    figure: Figure

    @property
    def verdict(self) -> str:
        return self.judged.verdict


def rates(figures: Sequence[Figure]) -> List[Rate]:
    """Every measured rate, separately for the device's and the host's clock; the last one if a row was repeated."""
    found: Dict[Tuple[str, str, int], Rate] = {}
    for figure in sorted(of(figures, "throughput"), key=lambda one: series(part(one, 1))):
        if not isinstance(figure.detail, ThroughputDetail):
            continue  # the same row with another bound
        row = figure.detail.row
        for scope in (INFERENCE, EXECUTE):
            if scope in row.clocks:
                one = _rate(figure, row, scope)
                found[one.name, one.tower, one.size] = one
    return list(found.values())


def _rate(figure: Figure, row: Row, scope: str) -> Rate:
    """Published curves use means on the device's clock; the interval is the median's."""
    judged = row.clocks[scope]
    timing = judged.timing
    if scope == EXECUTE:
        value = low = high = timing.samples_per_second_mean
    else:
        value, (low, high) = timing.samples_per_second, timing.interval
    name = backend(figure) + ("" if scope == INFERENCE else f" {scope}")
    return Rate(name, row.tower, row.batch_size, value, low, high, judged, row, figure)


def published_rates(figures: Sequence[Figure]) -> Dict[Tuple[str, str], Dict[int, float]]:
    """Tower and name of a published curve -> batch size -> samples/s; the name says if it is from another machine."""
    curves: Dict[Tuple[str, str], Dict[int, float]] = {}
    rows = [(one, one.detail) for one in of(figures, "throughput") if isinstance(one.detail, ThroughputDetail)]
    chips = {detail.row.made_by.device.partition(":")[0] for _, detail in rows if not detail.row.made_by.simulated}
    for _, detail in rows:
        known, row = detail.published, detail.row
        if known is not None:
            name = f"published {known.chip}" + ("" if known.chip in chips else ", another machine")
            curves.setdefault((row.tower, name), {})[row.batch_size] = known.samples_per_second
    return curves


class ThroughputTable(NamedTuple):
    """Tower and name of each column, and one row per batch size: the size, and each column's text."""

    columns: List[Tuple[str, str]]
    rows: List[Tuple[int, Dict[Tuple[str, str], str]]]


def throughput_table(figures: Sequence[Figure]) -> ThroughputTable:
    """The recipe's second table: batch size by tower and backend, with the published columns."""
    measured, curves = rates(figures), published_rates(figures)
    towers = [*TOWER_NAMES, *sorted({one.tower for one in measured} - set(TOWER_NAMES))]
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
        rows.append((size, texts))
    return ThroughputTable(columns, rows)


def _rate_text(rate: Rate) -> str:
    flag = f" {rate.verdict}" if rate.verdict not in ("", "VALID") else ""
    return number(rate.value, "samples/s") + flag
