"""One run as reports take it, and as report.json holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Iterable, List

import msgspec

from clipval.errors import InputError
from clipval.report.wording import backend
from clipval.results import FAIL, Figure

SCHEMA = 2
JSON = "report.json"
UNPROMISED = "unpromised"  # class of the failure of a figure that no test promised


class Failure(msgspec.Struct, frozen=True):
    """A test that failed: class of failure (`model`, `environment`, `input`, `perf`, `error`), name, message, gate."""

    kind: str
    test: str
    message: str
    gate: str = ""


class Subject(msgspec.Struct, frozen=True):
    """What was validated: names of spec, model, weights and data set, and how many images and captions."""

    name: str = ""
    model: str = ""
    pretrained: str = ""
    data: str = ""
    images: int = 0
    captions: int = 0


class _Head(msgspec.Struct):
    """What tells a report from another file, and its version."""

    schema: int
    figures: List[Any]


class Run(msgspec.Struct, kw_only=True):
    """One run.

    Attributes:
        schema: version of this form.
        title: what was validated; started: ISO time; seconds: how long it took.
        spec: what that is in names and counts; options: what the run was asked to do.
        environment: versions, machine, device, git commit.
        verdict: `pass` or `fail`.
        figures: every judged figure, in the order they came.
        expected: gates that the run promised; missing: those of them that were not evaluated.
        left_out: gates of the whole run that it was narrowed by; narrowed_by: the options that did so.
        not_validated: what the run says nothing about, one line each.
        failures: one entry a failed test; again: the command line, which `--gate=ID` narrows.
        advice: what to do though nothing failed, one line each.
    """

    schema: int = SCHEMA
    title: str = ""
    started: str = ""
    seconds: float = 0
    spec: Subject = Subject()
    options: Dict[str, Any] = {}
    environment: Dict[str, Any] = {}
    verdict: str = FAIL
    figures: List[Figure] = []
    expected: List[str] = []
    missing: List[str] = []
    left_out: List[str] = []
    narrowed_by: List[str] = []
    not_validated: List[str] = []
    failures: List[Failure] = []
    again: str = ""
    advice: List[str] = []


def load(path: Path) -> Run:
    """The run of a report.json.

    Raises:
        InputError: there is no such file, it is damaged, or it is of another schema.
    """
    try:
        content = path.read_bytes()
        head = msgspec.json.decode(content, type=_Head)
        if head.schema != SCHEMA:
            raise InputError(f"report {path}: schema {head.schema}, this clipval reads {SCHEMA}; compare with its own")
        return msgspec.json.decode(content, type=Run)
    except OSError as error:
        raise InputError(f"report {path}: {error.strerror or error}; expected a {JSON} of --report DIR") from error
    except msgspec.DecodeError as error:
        raise InputError(f"report {path}: {error}; expected a {JSON} of --report DIR") from error


def made_by(figures: Iterable[Figure]) -> Dict[str, str]:
    """What made the figures: name -> version, device, precision; all of them where they differ within a run."""
    made: Dict[str, Dict[str, None]] = {}
    for figure in figures:
        where = figure.made_by
        if where is not None:
            made.setdefault(backend(figure), {})[f"{where.version}, {where.device}, {where.precision}"] = None
    return {name: " / ".join(texts) for name, texts in made.items()}


def flat(table: Dict[str, Any], above: str = "") -> Dict[str, str]:
    """A table of tables with the keys of each level in one, as text."""
    found: Dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{above}{key} "))
        else:
            found[f"{above}{key}"] = "none" if value is None else str(value)
    return found
