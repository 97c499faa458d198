"""One judged figure, and the JSON lines file that figures are appended to as they come."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, List, Optional

import msgspec

from clipval.errors import InputError

SCHEMA = 1
PASS, FAIL, INFO = "pass", "fail", "info"


class Figure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One figure with its context and its verdict.

    Attributes:
        gate: the check it belongs to, `parity/onnx/vision` or `throughput/onnx/vision/8`; see `clipval.gates`.
        metric: what was measured; unit: `cosine`, `share`, `samples/s`, `absolute`, ...
        measured: the value; None where there is none.
        count: samples, queries or rounds it was taken over.
        reference: what it is compared with; source: where that is from.
        limit: the bound that decided, with `bound` saying how: `>=`, `<=`, `within`.
        verdict: `pass`, `fail`, or `info` for a figure that decides nothing.
        failure: class of failure: `model` (wrong numbers), `environment`, `input`, `usage`, `perf`.
        message: the sentence that the failed test shows.
        context: backend, device, precision, batch size, versions.
        detail: what a report draws: worst samples, flips, percentiles, raw series.
        diagnosis: of a failed figure, where the candidate diverges: `clipval.diagnose.finding.Finding.detail`.
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
    failure: str = ""
    message: str = ""
    context: Dict[str, Any] = {}
    detail: Dict[str, Any] = {}
    diagnosis: Dict[str, Any] = {}
    schema: int = SCHEMA


def to_json(figure: Figure) -> str:
    """One figure as a line of JSON."""
    return msgspec.json.encode(figure).decode()


def from_json(text: str) -> Figure:
    """The figure of a line that `to_json` made."""
    return msgspec.json.decode(text, type=Figure)


def append(path: Path, figures: List[Figure]) -> None:
    """Append figures as JSON lines and push them to the disk, so that a crash loses at most the running check."""
    with open(path, "ab") as stream:
        for figure in figures:
            stream.write(msgspec.json.encode(figure) + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path) -> List[Figure]:
    """Figures of a JSON lines file; a last line that a crash cut off is dropped.

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
