"""Comparison of two runs."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Sequence

from clipval.report.run import Run, flat, made_by
from clipval.report.wording import cell, distance, name, word
from clipval.results import Figure, columns, number


class _Both(NamedTuple):
    """A figure in two runs."""

    name: str
    was: Figure
    now: Figure


def compare(a: Run, b: Run) -> str:
    """Compare two runs in Markdown that is readable in a terminal: changed verdicts, figures gone and new, then all.

    Args:
        a: the earlier run; b: the later one.
    """
    was, now = _by_name(a), _by_name(b)
    both = [_Both(name, was[name], now[name]) for name in was if name in now]
    changed = [one for one in both if word(one.was) != word(one.now)]
    lines = ["# Comparison", "", f"- before: {_described(a)}", f"- after: {_described(b)}"]
    lines += ["", "## Verdicts that changed", "", *(_changes(changed) if changed else ["none"])]
    if changed:
        lines += ["", *(f"- {one.now.message}" for one in changed if one.now.message)]
    gone = [
        f"- {name}" + (": promised and not evaluated" if one.gate in b.missing else "")
        for name, one in was.items()
        if name not in now
    ]
    came = [f"- {name}: {word(one)}" for name, one in now.items() if name not in was]
    lines += ["", "## Figures no longer present", "", *(gone or ["none"])]
    lines += ["", "## New figures", "", *(came or ["none"])]
    lines += ["", f"## Figures in both: {len(both)}", "", *(_changes(both) if both else ["none"])]
    lines += ["", "## Other differences", "", *(_surroundings(a, b) or ["nothing"])]
    return "\n".join(lines) + "\n"


def _by_name(run: Run) -> Dict[str, Figure]:
    """Figures by name; the last one if a row was measured again."""
    return {name(one): one for one in run.figures}


def _described(run: Run) -> str:
    return f"{run.verdict.upper()}, {run.title}, {run.started}, {len(run.figures)} figures"


def _changes(changes: Sequence[_Both]) -> List[str]:
    rows: List[Sequence[str]] = [("figure", "before", "after", "difference", "verdict")]
    for figure, was, now in changes:
        verdict = word(now) if word(was) == word(now) else f"{word(was)} -> {word(now)}"
        values = [number(one.measured, one.unit) for one in (was, now)]
        rows.append((cell(figure), *values, _moved(was, now), verdict))
    widths = [max(3, *(len(row[n]) for row in rows)) for n in range(5)]
    rule = [":" + "-" * (width - 1) if n in (0, 4) else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    rows.insert(1, rule)
    return [f"| {line} |" for line in columns(rows, right=(1, 2, 3), between=" | ")]


def _moved(was: Figure, now: Figure) -> str:
    if was.measured == now.measured:
        return "="
    count = now.count if now.count == was.count else 0  # items of different sets are not comparable
    return distance(was.measured, now.measured, now.unit, count)


def _surroundings(a: Run, b: Run) -> List[str]:
    first, second = (
        flat({"spec": run.spec, "options": run.options, **run.environment, "backend": made_by(run.figures)})
        for run in (a, b)
    )
    keys = dict.fromkeys([*first, *second])
    return [
        f"- {key}: {first.get(key, 'none')} -> {second.get(key, 'none')}"
        for key in keys
        if first.get(key) != second.get(key)
    ]
