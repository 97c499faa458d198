"""The data of one run, for reports and report.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping

import msgspec

from clipval.errors import InputError
from clipval.report.wording import backend
from clipval.results import FAIL, Figure

SCHEMA = 2
JSON = "report.json"
UNPROMISED = "unpromised"  # failure class of a figure that no test promised


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
    """The fields that identify a report and its version."""

    schema: int
    figures: List[Any]


class Run(msgspec.Struct, kw_only=True):
    """One run.

    Attributes:
        schema: version of this format.
        title: what was validated; started: ISO time; seconds: duration.
        spec: names and counts of what was validated; options: the run's options.
        environment: versions, machine, device, git commit.
        verdict: `pass` or `fail`.
        figures: every judged figure, in order of evaluation.
        expected: gates that the run promised; missing: those that were not evaluated.
        left_out: gates of the whole run that were left out; narrowed_by: the options that did so.
        not_validated: what the run did not validate, one line each.
        failures: one entry per failed test; again: the command line, to be narrowed with `--gate=ID`.
        advice: recommendations although nothing failed, one line each.
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
    """The backends: name -> version, device, precision; all of them if they differ within a run."""
    made: Dict[str, Dict[str, None]] = {}
    for figure in figures:
        where = figure.made_by
        if where is not None:
            made.setdefault(backend(figure), {})[f"{where.version}, {where.device}, {where.precision}"] = None
    return {name: " / ".join(texts) for name, texts in made.items()}


def flat(table: Mapping[str, object], above: str = "") -> Dict[str, str]:
    """Flatten nested tables, joining the keys of each level; values as text."""
    found: Dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{above}{key} "))
        else:
            found[f"{above}{key}"] = "none" if value is None else str(value)
    return found
