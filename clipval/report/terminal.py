"""The terminal summary: verdict, the recipe's tables, parity, what failed and why, what was not validated."""

from __future__ import annotations

import textwrap
from typing import Dict, List, Sequence

from clipval.report.causes import Cause, broken, causes, near
from clipval.report.run import UNPROMISED, Run
from clipval.report.tables import rates, recall_table, throughput_table
from clipval.report.wording import added, backend, difference, name, of, part, row_verdict, simulated, word
from clipval.results import FAIL, INFO, PASS, Figure, columns, number, wanted

WIDTH = 99
RED = 40  # lines at most
CAUSES, ERRORS, NEAR, LISTED = (
    8,
    2,
    2,
    6,
)  # entries at most: what failed, errors, figures near a bound, gates not evaluated


def summary(run: Run, verbose: bool = False) -> str:
    """The summary of a run for a terminal: at most 25 lines if green, 40 if red.

    Args:
        verbose: every gate, instead of the tables.
    """
    if not (run.figures or run.expected or run.failures) and run.left_out:
        return verdict(run)  # a selection of other tests
    tables = _every_gate(run.figures) if verbose else [*_recall(run.figures), *_throughput(run.figures)]
    head = [verdict(run) + _assumed(run), *tables, *([] if verbose else _parity(run.figures)), *_failed(run)]
    tail = [] if run.verdict == FAIL else _near(run.figures)
    tail += [f"not validated: {line}" for line in run.not_validated[:NEAR]]
    if len(run.not_validated) > NEAR:
        tail[-1] += f"; and {len(run.not_validated) - NEAR} more, see the report"
    tail += [f"advice: {line}" for line in run.advice]
    tail += _again(run)
    return "\n".join([*head, *_missing(run, RED - len(head) - len(tail)), *tail])


def _assumed(run: Run) -> str:
    """What was assumed about the weights, to be shown after the verdict that depends on it."""
    said = [line.partition(";")[0] for line in run.not_validated if " assumed: " in line]
    return "".join(f"; {line}" for line in said)


def verdict(run: Run) -> str:
    """The verdict with its counts, and what part of the whole run it does not cover."""
    gates = {one.gate for one in run.figures if one.verdict != INFO}
    failed = {one.gate for one in run.figures if one.verdict == FAIL}
    by = ", ".join(run.narrowed_by)
    said = f"{len(run.left_out)} left out by {by}" if run.left_out else ""
    said += " and not judged" if said and by.startswith("--gate") else ""
    fake = "; on a simulated device, not on hardware" if any(map(simulated, run.figures)) else ""
    if said and run.verdict == PASS:
        evaluated = {one.gate for one in run.figures}
        whole = len(evaluated | set(run.left_out))
        judged = f"PASS of {len(evaluated)} of {whole} gates" if evaluated else "no gate was evaluated"
        return f"{judged}; {said}{fake}"
    missing = f", {len(run.missing)} not evaluated" if run.missing else ""
    missing += f" (run with {by})" if missing and by else ""
    passed = gates - failed - set(run.missing)
    counts = f"{run.verdict.upper()}: {len(passed)} gates passed, {len(failed)} failed{missing}"
    return (f"{counts}; {said}" if said else counts) + fake


def _recall(figures: Sequence[Figure]) -> List[str]:
    table = recall_table(figures)
    if not table.rows:
        return []
    rows = [["recall, hit rate", *table.columns, *table.published]]
    for metric, found, published in table.rows:
        cells = ["" if one is None else f"{number(one.measured, 'share')}{_mark(one)}" for one in found]
        rows.append([metric, *cells, *published])
    return columns(rows, right=range(1, len(rows[0])))


def _mark(figure: Figure) -> str:
    return " FAIL" if figure.verdict == FAIL else ""


def _throughput(figures: Sequence[Figure]) -> List[str]:
    """Samples/s by batch size, with two header lines; a star marks what is not VALID."""
    table = throughput_table(figures)
    if not table.rows:
        return []
    heads = [(tower, "published" if name.startswith("published") else name) for tower, name in table.columns]
    towers = [tower if n == 0 or heads[n - 1][0] != tower else "" for n, (tower, _) in enumerate(heads)]
    rows = [["samples/s", *towers], ["batch size", *(name for _, name in heads)]]
    for size, cells in table.rows:
        rows.append([str(size), *(_short(cells[column]) for column in table.columns)])
    doubtful: Dict[str, int] = {}
    for one in rates(figures):
        if one.verdict != "VALID":
            doubtful[one.verdict] = doubtful.get(one.verdict, 0) + 1
    notes = ["* not VALID: " + ", ".join(f"{count} {verdict}" for verdict, count in doubtful.items())] * bool(doubtful)
    notes += sorted({name.replace("published", "published:", 1) for _, name in table.columns if "published" in name})
    return [*columns(rows, right=range(len(rows[0]))), *(["; ".join(notes)] if notes else [])]


def _short(text: str) -> str:
    value, _, flag = text.partition(" ")
    return f"{value}*" if flag else value


def _parity(figures: Sequence[Figure]) -> List[str]:
    """One line per backend and tower: the worst cosine and the largest difference, each with its bound."""
    gates: Dict[str, List[Figure]] = {}
    for one in of(figures, "parity"):
        gates.setdefault(one.gate, []).append(one)
    rows = []
    for found in gates.values():
        first = found[0]
        shown = [first, *found[1:][-1:]]
        cells = [f"{one.metric} {number(one.measured, one.unit)} ({wanted(one)})" for one in shown]
        failed = "FAIL" if any(one.verdict == FAIL for one in found) else ""
        rows.append([f"parity {backend(first)} {part(first, 2)}", *[*cells, ""][:2], failed])
    return columns(rows) if rows else []


def _failed(run: Run) -> List[str]:
    """What failed, grouped by cause, and errors that are not figures."""
    lines: List[str] = []
    found, errors = causes(run.figures), broken(run)
    for n, one in enumerate(found):
        if len(lines) >= CAUSES:
            lines.append(f"... and {len(found) - n} more gates failed; -v shows all")
            break
        lines += _cause(one)
    for kind, message, hit in errors[:ERRORS]:
        if kind == UNPROMISED:
            lines.append(message)
        else:
            more = f" and {len(hit) - 1} more" if len(hit) > 1 else ""
            lines.append(f"{kind}: {hit[0]}{more}: {message.splitlines()[0] if message else 'no message'}")
    return lines if len(errors) <= ERRORS else [*lines, f"... and {len(errors) - ERRORS} more errors, see above"]


def _missing(run: Run, room: int) -> List[str]:
    """Gates promised but not evaluated, without those that an error names; in `room` lines, at least two."""
    named = {gate for one in broken(run) for gate in one.hit}
    lost = [gate for gate in run.missing if gate not in named]
    lines = textwrap.wrap(", ".join(lost), WIDTH - 15, break_long_words=False, break_on_hyphens=False)
    shown = lines[: min(max(room, 2), LISTED)]
    rest = len(lost) - sum(len(line.rstrip(",").split(", ")) for line in shown)
    if rest:
        shown[-1] += f" and {rest} more"
    return [f"{' ' * 15 if n else 'not evaluated: '}{line}" for n, line in enumerate(shown)]


def _cause(cause: Cause) -> List[str]:
    """A line for the cause, and one for what follows from it."""
    first = cause.figures[0]
    more = f"; {len(cause.figures) - 1} more of its figures" if len(cause.figures) > 1 else ""
    worst = f" ({first.worst.split(', ')[0]})" if first.worst else ""
    if row_verdict(first) and not first.bound:
        said = f"{row_verdict(first)}: {first.because}"
    elif first.measured is None and not first.bound and first.message:  # an event, such as a device call that hangs
        said = first.message
    else:
        said = f"{first.metric} is {number(first.measured, first.unit)}, expected {wanted(first)}{worst}{more}"
    follow = list(dict.fromkeys(one.gate for one in cause.consequences))
    shown = ", ".join(follow[:2]) + (f" and {len(follow) - 2} more" if len(follow) > 2 else "")
    below = [f"     {line}" for one in cause.figures for line in added(one)]
    return [f"FAIL {cause.gate}: {said}", *below, *([f"     therefore also {shown}"] if follow else [])]


def _near(figures: Sequence[Figure]) -> List[str]:
    found = near(figures)
    lines = [f"near its bound: {name(one)} is {number(one.measured, one.unit)} ({wanted(one)})" for one in found]
    return lines if len(lines) <= NEAR else [*lines[: NEAR - 1], f"near their bounds: {len(lines) - NEAR + 1} more; -v"]


def _again(run: Run) -> List[str]:
    """The command that judges only the causes."""
    gates = [one.gate for one in causes(run.figures)]
    gates += [gate for one in broken(run) for gate in one.hit if gate in run.expected]
    few = list(dict.fromkeys(gates))[:3]
    return [f"to judge them alone: {run.again} --gate={','.join(few)}"] if few and run.again else []


def _every_gate(figures: Sequence[Figure]) -> List[str]:
    """Every gated figure, and every row of throughput."""
    rows = [["gate", "metric", "measured", "held to", "difference", "verdict"]]
    for one in figures:
        if one.verdict != INFO or row_verdict(one):
            shown = number(one.measured, one.unit), wanted(one), difference(one), word(one)
            rows.append([one.gate, "" if name(one) == one.gate else one.metric, *shown])
    return columns(rows, right=(2, 3, 4)) if len(rows) > 1 else []
