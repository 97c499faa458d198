"""The account of a run as files: report.json for programs, report.md for a ticket, report.html for a person.

A report holds what was judged and shows it; it judges nothing. `compare` sets two runs side by side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Sequence, Tuple

import msgspec

from clipval import evidence, store
from clipval.errors import InputError
from clipval.evidence import Assets as Assets
from clipval.results import FAIL, INFO, PASS, Figure

SCHEMA = 1
TEMPLATES = Path(__file__).parent / "templates"
UNPROMISED = "unpromised"  # class of the failure of a figure that no test promised
COLUMNS = 99  # of the terminal table
NAMED = 10  # missing gates that the terminal table names
JSON, MARKDOWN, HTML = "report.json", "report.md", "report.html"


class Run(msgspec.Struct, kw_only=True):
    """One run.

    Attributes:
        schema: version of this form.
        title: what was validated; started: ISO time; seconds: how long it took.
        spec: name, title, model, weights, data set and counts; options: what the run was asked to do.
        environment: versions, machine, device, git commit.
        verdict: `pass` or `fail`.
        figures: every judged figure, in the order they came.
        expected: gates that the run promised; missing: those of them that were not evaluated.
        left_out: gates of the whole run that it was narrowed by; narrowed_by: the options that did so.
        not_validated: what the run says nothing about, one line each.
        failures: one entry a failed test: `class`, `test`, `message`.
        advice: what to do though nothing failed, one line each.
    """

    schema: int = SCHEMA
    title: str = ""
    started: str = ""
    seconds: float = 0
    spec: Dict[str, Any] = {}
    options: Dict[str, Any] = {}
    environment: Dict[str, Any] = {}
    verdict: str = FAIL
    figures: List[Figure] = []
    expected: List[str] = []
    missing: List[str] = []
    left_out: List[str] = []
    narrowed_by: List[str] = []
    not_validated: List[str] = []
    failures: List[Dict[str, str]] = []
    advice: List[str] = []


class _Head(msgspec.Struct):
    """What tells a report from another file, and its version."""

    schema: int
    figures: List[Any]


class _Both(NamedTuple):
    """A figure in two runs."""

    name: str
    was: Figure
    now: Figure


def write(folder: Path, run: Run, assets: Assets) -> List[Path]:
    """Write report.json, report.md and report.html; a reader sees the old file or the whole new one.

    Args:
        assets: how pictures and captions of samples are found; `Assets()` shows none.

    Raises:
        InputError: the folder cannot be written.
    """
    texts: Dict[str, Callable[[], str]] = {
        JSON: lambda: _encode(run),
        MARKDOWN: lambda: markdown(run),
        HTML: lambda: page(run, assets),
    }
    written = []
    for name, make in texts.items():  # the figures first: they are safe before anything is drawn of them
        path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            store.write(path, make().encode())
        except OSError as error:
            raise InputError(f"report {path}: cannot be written ({error.strerror or error})") from error
        written.append(path)
    return written


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


def _encode(run: Run) -> str:
    return msgspec.json.format(msgspec.json.encode(run, enc_hook=_plain), indent=1).decode() + "\n"


def _plain(value: Any) -> Any:
    """A numpy value as Python's own; anything else as its text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def markdown(run: Run) -> str:
    """report.md: verdict, failures, the recipe's two tables, every figure, environment."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        finalize=_cell,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    return _render(environment, "report.md.j2", run, {})


def page(run: Run, assets: Assets) -> str:
    """report.html: one file that needs no network and no script."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True, autoescape=True
    )
    gallery = evidence.Gallery(assets)
    more = {
        "glance": evidence.glance(run.figures, run.missing),
        "parity": evidence.parity_panels(run.figures, gallery),
        "recall_plots": evidence.recall_panels(run.figures),
        "throughput_plots": evidence.throughput_panels(run.figures),
        "paired": evidence.paired_panels(run.figures, gallery),
    }
    return _render(environment, "report.html.j2", run, more)


def _render(environment: Any, template: str, run: Run, more: Dict[str, Any]) -> str:
    for word in (evidence.number, evidence.wanted, evidence.difference, evidence.backend):
        environment.filters[word.__name__] = word
    environment.filters["tidy"] = _tidy
    failed = [figure for figure in run.figures if figure.verdict == FAIL]
    told = {line for figure in failed for line in figure.message.splitlines()}
    gates = {figure.gate for figure in run.figures if figure.verdict != INFO}
    text: str = environment.get_template(template).render(
        run=run,
        failed=failed,
        # a failed gate is told by its figures; what is left is what broke outside of any
        broken=[one for one in run.failures if set(one.get("message", "").splitlines()) - told],
        gates=len(gates | set(run.missing)),
        passed=len(gates - {figure.gate for figure in failed}),
        simulated=sorted({evidence.backend(one) for one in run.figures if one.context.get("simulated")}),
        recall=evidence.recall_table(run.figures),
        rates=evidence.rates(run.figures),
        throughput=evidence.throughput_table(run.figures),
        sources=_sources(run.figures),
        surroundings=_flat({**run.environment, "options": run.options, "backends": _backends(run.figures)}),
        **more,
    )
    return text


def _tidy(text: str) -> str:
    """Signs as they are printed: the terminal's are ASCII."""
    for plain, printed in ((">=", "≥"), ("<=", "≤"), ("+-", "±"), (" - ", " \N{MINUS SIGN} ")):
        text = text.replace(plain, printed)
    return text


def _cell(value: Any) -> Any:
    """Text that stays in its Markdown table cell and is not taken for markup."""
    text = "" if value is None else str(value)
    for plain, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'"), ("\r", " "), ("\n", " ")):
        text = text.replace(plain, escaped)
    return text


def _sources(figures: Iterable[Figure]) -> List[str]:
    """Where references and published figures are from, each once."""
    found: Dict[str, None] = {}
    for figure in figures:
        published = evidence.detail(figure, "published")
        entries = published if isinstance(published, list) else [published or {}]
        found.update(dict.fromkeys([figure.source, *(str(one.get("source", "")) for one in entries)]))
    return [source for source in found if source]


def _backends(figures: Iterable[Figure]) -> Dict[str, str]:
    """What made the figures: name -> version, device, precision; all of them where they differ within a run."""
    made: Dict[str, Dict[str, None]] = {}
    for figure in (one for one in figures if evidence.part(one, 2)):
        parts = [str(figure.context.get(key, "")) for key in ("version", "device", "precision")]
        made.setdefault(evidence.backend(figure), {})[", ".join(part for part in parts if part)] = None
    return {name: " / ".join(texts) for name, texts in made.items()}


def _flat(table: Dict[str, Any], above: str = "") -> Dict[str, str]:
    found: Dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found.update(_flat(value, f"{above}{key} "))
        else:
            found[f"{above}{key}"] = "none" if value is None else str(value)
    return found


def summary_table(run: Run) -> str:
    """The table for a terminal: check, measured, reference, difference, verdict.

    One line a gate that passed, with its first figure; every figure that failed, and every one of throughput.
    """
    rows = [("check", "measured", "reference", "difference", "verdict")]
    for one in _in_short(run.figures):
        measured = evidence.number(one.measured, one.unit)
        rows.append((_name(one), measured, evidence.wanted(one), evidence.difference(one), _word(one)))
    rows += [(gate, "", "", "", "MISSING") for gate in run.missing[:NAMED]]
    if len(run.missing) > NAMED:
        rows.append((f"... and {len(run.missing) - NAMED} more gates", "", "", "", "MISSING"))
    lines = _aligned(rows)
    lines += [one["message"] for one in run.failures if one["class"] == UNPROMISED]
    lines += [f"not validated: {line}" for line in run.not_validated]
    lines += [f"advice: {line}" for line in run.advice]
    return "\n".join([*lines, _verdict(run) + _assumed(run)])


def _verdict(run: Run) -> str:
    """The verdict with its counts, and what of the whole run it is not about."""
    gates = {one.gate for one in run.figures if one.verdict != INFO}
    failed = {one.gate for one in run.figures if one.verdict == FAIL}
    passed = len(gates - failed)
    by = ", ".join(run.narrowed_by)
    said = f"{len(run.left_out)} left out by {by}" if run.left_out else ""
    said += " and not judged" if said and by.startswith("--gate") else ""
    if said and run.verdict == PASS:
        evaluated = {one.gate for one in run.figures}
        whole = len(evaluated | set(run.left_out))
        return f"PASS of {len(evaluated)} of {whole} gates; {said}" if evaluated else f"no gate was evaluated; {said}"
    missing = f", {len(run.missing)} not evaluated" if run.missing else ""
    missing += f" (run with {by})" if missing and by else ""
    counts = f"{run.verdict.upper()}: {passed} gates passed, {len(failed)} failed{missing}"
    return f"{counts}; {said}" if said else counts


def _assumed(run: Run) -> str:
    """What nothing stated of the weights and was assumed, behind the verdict that rests on it."""
    said = [line.partition(";")[0] for line in run.not_validated if " assumed: " in line]
    return "".join(f"; {line}" for line in said)


def _in_short(figures: Sequence[Figure]) -> List[Figure]:
    told = {one.gate for one in figures if one.verdict == FAIL}
    shown: List[Figure] = []
    for one in figures:
        if one.verdict == INFO and not evidence.row_verdict(one):
            continue
        if one.verdict == FAIL or evidence.part(one, 0) == "throughput" or one.gate not in told:
            shown.append(one)
            told.add(one.gate)
    return shown


def _aligned(rows: Sequence[Tuple[str, ...]]) -> List[str]:
    """Rows in columns; the first gives way where the line would be too long."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    widths[0] = min(widths[0], COLUMNS - sum(widths[1:]) - 2 * (len(widths) - 1))
    lines = []
    for first, *rest, last in rows:
        shown = first if len(first) <= widths[0] else first[: widths[0] - 2] + ".."
        middle = [text.rjust(width) for text, width in zip(rest, widths[1:])]
        lines.append("  ".join([shown.ljust(widths[0]), *middle, last]).rstrip())
    return lines


def _name(figure: Figure) -> str:
    """A figure's name: its gate, and its metric where the gate does not say it."""
    said = evidence.part(figure, 2)
    return figure.gate if said and figure.metric.startswith(said) else f"{figure.gate} {figure.metric}"


def _word(figure: Figure) -> str:
    """The verdict as it is shown, with what must always stand beside it."""
    verdict = {PASS: "pass", FAIL: "FAIL"}.get(figure.verdict, evidence.row_verdict(figure) or figure.verdict)
    return f"{verdict} simulated" if figure.context.get("simulated") else verdict


def compare(a: Run, b: Run) -> str:
    """Two runs as Markdown that reads well in a terminal: changed verdicts first, then what came and went, then all.

    Args:
        a: the earlier run; b: the later one.
    """
    was, now = _by_name(a), _by_name(b)
    both = [_Both(name, was[name], now[name]) for name in was if name in now]
    changed = [one for one in both if _word(one.was) != _word(one.now)]
    lines = ["# Comparison", "", f"- before: {_described(a)}", f"- after: {_described(b)}"]
    lines += ["", "## Verdicts that changed", "", *(_changes(changed) if changed else ["none"])]
    if changed:
        lines += ["", *(f"- {one.now.message}" for one in changed if one.now.message)]
    gone = [
        f"- {name}" + (": promised and not evaluated" if one.gate in b.missing else "")
        for name, one in was.items()
        if name not in now
    ]
    came = [f"- {name}: {_word(one)}" for name, one in now.items() if name not in was]
    lines += ["", "## Figures that vanished", "", *(gone or ["none"])]
    lines += ["", "## Figures that appeared", "", *(came or ["none"])]
    lines += ["", f"## Figures in both: {len(both)}", "", *(_changes(both) if both else ["none"])]
    lines += ["", "## What else differs", "", *(_surroundings(a, b) or ["nothing"])]
    return "\n".join(lines) + "\n"


def _by_name(run: Run) -> Dict[str, Figure]:
    """Figures by name; of a row that was measured twice the last."""
    return {_name(one): one for one in run.figures}


def _described(run: Run) -> str:
    return f"{run.verdict.upper()}, {run.title}, {run.started}, {len(run.figures)} figures"


def _changes(changes: Sequence[_Both]) -> List[str]:
    rows = [("figure", "before", "after", "difference", "verdict")]
    for name, was, now in changes:
        verdict = _word(now) if _word(was) == _word(now) else f"{_word(was)} -> {_word(now)}"
        values = [evidence.number(one.measured, one.unit) for one in (was, now)]
        rows.append((_cell(name), *values, _moved(was, now), verdict))
    widths = [max(len(row[n]) for row in rows) for n in range(5)]
    lines = []
    for row in rows:
        middle = [text.rjust(width) for text, width in zip(row[1:4], widths[1:4])]
        lines.append("| " + " | ".join([row[0].ljust(widths[0]), *middle, row[4].ljust(widths[4])]) + " |")
    rule = [
        ":" + "-" * (widths[0] - 1),
        *("-" * (width - 1) + ":" for width in widths[1:4]),
        ":" + "-" * (widths[4] - 1),
    ]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return lines


def _moved(was: Figure, now: Figure) -> str:
    if was.measured == now.measured:
        return "="
    count = now.count if now.count == was.count else 0  # items of different sets are not comparable
    return evidence.distance(was.measured, now.measured, now.unit, count)


def _surroundings(a: Run, b: Run) -> List[str]:
    first, second = (
        _flat({"spec": run.spec, "options": run.options, **run.environment, "backend": _backends(run.figures)})
        for run in (a, b)
    )
    keys = dict.fromkeys([*first, *second])
    return [
        f"- {key}: {first.get(key, 'none')} -> {second.get(key, 'none')}"
        for key in keys
        if first.get(key) != second.get(key)
    ]
