"""A judged figure, its evidence and wording, and the JSON Lines file that figures are appended to as they come."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Union

import msgspec

from clipval.backends import Identity
from clipval.errors import InputError
from clipval.throughput.row import Row

SCHEMA = 2
PASS, FAIL, INFO = "pass", "fail", "info"


class Worst(msgspec.Struct, frozen=True):
    """A sample that is far from the reference; None stands for NaN."""

    id: str
    cosine: Optional[float]
    max_abs: Optional[float]


class ParityDetail(msgspec.Struct, frozen=True, tag="parity"):
    """How far a tower's embeddings are from the reference's.

    Attributes:
        percentiles: percentile -> cosine; mean: of the cosines; relative_error: the largest of any sample's vector.
        edges, counts: histogram of -log10(1 - cosine), one count fewer than edges.
        smallest_norm, largest_norm: before normalisation; worst: the samples with the lowest cosine, worst first.
    """

    percentiles: Dict[str, Optional[float]]
    mean: Optional[float]
    relative_error: Optional[float]
    edges: List[float]
    counts: List[int]
    smallest_norm: Optional[float]
    largest_norm: Optional[float]
    worst: List[Worst]


class Published(msgspec.Struct, frozen=True):
    """A published recall of this model: its value, its source, and the backend if known."""

    value: float
    source: str
    backend: str = ""


class RecallDetail(msgspec.Struct, frozen=True, tag="recall"):
    """Every published figure of this model for one recall metric."""

    published: List[Published] = []


class Flip(msgspec.Struct, frozen=True):
    """A query whose hit was gained or lost: its rank for both, the margin, and what was retrieved."""

    id: str
    was: int
    now: int
    margin: Optional[float] = None
    retrieved: List[str] = []


class PairedDetail(msgspec.Struct, frozen=True, tag="paired"):
    """Recall against PyTorch's query by query: queries gained and lost, McNemar's p value, the flips."""

    gains: int
    losses: int
    p_value: float
    flips: List[Flip] = []


class PublishedRate(msgspec.Struct, frozen=True):
    """A published throughput: chip, samples/s, source, and whether this row was measured on that chip."""

    chip: str
    samples_per_second: float
    source: str
    same_chip: bool


class ThroughputDetail(msgspec.Struct, frozen=True, tag="throughput"):
    """A row of throughput with the published figure."""

    row: Row
    protocol: int
    published: Optional[PublishedRate] = None


class ProbeDetail(msgspec.Struct, frozen=True, tag="probe"):
    """The seed that a probe's inputs were drawn from."""

    seed: int


class PlacementDetail(msgspec.Struct, frozen=True, tag="placement"):
    """Where a runtime computes: provider -> operator -> count, operators that fell back to the CPU, and the source."""

    operators: Dict[str, Dict[str, int]]
    strayed: Dict[str, int]
    witness: str


Detail = Union[ParityDetail, RecallDetail, PairedDetail, ThroughputDetail, ProbeDetail, PlacementDetail]


class Figure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One figure with what made it and its verdict.

    Attributes:
        gate: the check it belongs to, `parity/onnx/vision` or `throughput/onnx/vision/8`; see `clipval.gates`.
        metric: what was measured; unit: `cosine`, `share`, `samples/s`, `absolute`, ...
        measured: the value; None if there is none.
        count: number of samples, queries or rounds.
        reference: what it is compared with; source: where that is from.
        limit, bound: the limit and its kind, `>=`, `<=` or `within`; because: the reason for the limit.
        verdict: `pass`, `fail`, or `info` for a figure that is not gated.
        failure: class of failure: `model` (wrong numbers), `environment`, `input`, `usage`, `perf`.
        worst: the samples that decided, as text; message: what the failed test shows.
        made_by: the backend; None for a figure of files or data. detail: what a report draws.
        diagnosis: for a failed figure, where the candidate diverges: `clipval.diagnose.finding.Finding.detail`.
    """

    gate: str
    metric: str
    unit: str
    verdict: str
    measured: Optional[float] = None
    count: int = 0
    reference: Optional[float] = None
    source: str = ""
    bound: str = ""
    limit: Optional[float] = None
    because: str = ""
    failure: str = ""
    worst: str = ""
    message: str = ""
    made_by: Optional[Identity] = None
    detail: Optional[Detail] = None
    diagnosis: Dict[str, Any] = {}
    schema: int = SCHEMA


def number(value: Optional[float], unit: str) -> str:
    """A value in its unit, with enough digits to tell it from a bound nearby: at least three for a rate."""
    if value is None or not math.isfinite(value):
        return "none"
    if unit == "cosine" and value > 0.99:
        return "1" if value == 1 else f"1 {'-' if value < 1 else '+'} {abs(1 - value):.2g}"
    if unit in ("cosine", "share"):
        return f"{value:.6f}" if unit == "cosine" else f"{value:.4f}"
    if unit in ("samples/s", "ms"):
        whole = value >= 1000 or (value >= 100 and value == round(value))
        return f"{value:,.0f}" if whole else f"{value:.1f}" if value >= 10 else f"{value:.3g}"
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.3g}"


def wanted(figure: Figure) -> str:
    """What is expected of a figure, `>= 0.95` or `0.8830 +- 0.005`; its reference if it is not gated."""
    if figure.bound == "within" and figure.limit is not None:
        return f"{number(figure.reference, figure.unit)} +- {figure.limit:g}"
    if figure.bound and figure.limit is not None:
        return f"{figure.bound} {number(figure.limit, figure.unit)}"
    return "" if figure.reference is None else number(figure.reference, figure.unit)


def columns(
    rows: Sequence[Sequence[str]], right: Iterable[int] = (), between: str = "  ", least: Sequence[int] = ()
) -> List[str]:
    """Rows of text in aligned columns.

    Args:
        right: columns that are right-aligned.
        least: minimum widths, for rows that are printed one by one.
    """
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    widths = [max(width, one) for width, one in itertools.zip_longest(widths, least, fillvalue=0)]
    ends = set(right)
    lines = []
    for row in rows:
        cells = [text.rjust(widths[n]) if n in ends else text.ljust(widths[n]) for n, text in enumerate(row)]
        lines.append(between.join(cells).rstrip() if between == "  " else between.join(cells))
    return lines


def to_json(figure: Figure) -> str:
    """One figure as a line of JSON."""
    return msgspec.json.encode(figure).decode()


def from_json(text: str) -> Figure:
    """The figure of a line written by `to_json`."""
    return msgspec.json.decode(text, type=Figure)


def append(path: Path, figures: List[Figure]) -> None:
    """Append figures as JSON lines and flush them to disk, so that a crash loses at most the running check."""
    with open(path, "ab") as stream:
        for figure in figures:
            stream.write(msgspec.json.encode(figure) + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path) -> List[Figure]:
    """Figures of a JSON Lines file; a last line truncated by a crash is dropped.

    Raises:
        InputError: another line is damaged or of another schema.
    """
    lines = path.read_bytes().split(b"\n")
    figures = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            figures.append(msgspec.json.decode(line, type=Figure))
        except msgspec.DecodeError as error:
            if number == len(lines):
                break
            raise InputError(f"results {path}, line {number}: {error}") from error
    return figures
