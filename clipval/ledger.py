"""What a run promised and what it did: the gates that must be evaluated, the figures that came, the verdict."""

from __future__ import annotations

import ast
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Sequence

from clipval import environment
from clipval.chain import Chain
from clipval.evidence import detail, row_verdict
from clipval.gates import ACCURACY, PERF
from clipval.report import Run
from clipval.results import FAIL, INFO, PASS, Figure, append
from clipval.throughput.baseline import IMPROVED

KEPT_RUNS = 20


def kinds(expression: str) -> List[str]:
    """Of `accuracy` and `perf`, those that a `-m` expression selects; an expression we cannot read selects both."""
    if not expression.strip():
        return [ACCURACY, PERF]
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError:
        return [ACCURACY, PERF]
    return [kind for kind in (ACCURACY, PERF) if _selects(tree, kind)]


def _selects(node: ast.AST, kind: str) -> bool:
    if isinstance(node, ast.BoolOp):
        parts = [_selects(part, kind) for part in node.values]
        return all(parts) if isinstance(node.op, ast.And) else any(parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _selects(node.operand, kind)
    return node.id == kind if isinstance(node, ast.Name) else True


@dataclass
class Ledger:
    """One run's account.

    Attributes:
        expected: gate ids that must be evaluated; file: JSON lines that figures are appended to as they come.
        notes: more of what was not validated.
        failures: one entry per failed test: its class (`model`, `environment`, `input`, `perf`), name and message.
    """

    expected: List[str]
    file: Path
    notes: List[str] = field(default_factory=list)
    figures: List[Figure] = field(default_factory=list)
    failures: List[Dict[str, str]] = field(default_factory=list)
    started: float = field(default_factory=time.time)

    def add(self, figures: Sequence[Figure]) -> None:
        """Keep figures and put them on the disk at once."""
        if figures:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            append(self.file, list(figures))
            self.figures.extend(figures)

    @property
    def missing(self) -> List[str]:
        """Promised gates of which no figure came."""
        evaluated = {figure.gate for figure in self.figures}
        return [gate for gate in self.expected if gate not in evaluated]

    def run(self, chain: Chain) -> Run:
        """The whole account as a report takes it."""
        spec = chain.spec
        described = {
            "name": spec.name,
            "title": spec.title,
            "model": Path(spec.model.name).stem,
            "pretrained": Path(spec.model.pretrained).name,
            "data": spec.data.name,
            "images": spec.data.images,
            "captions": spec.data.captions,
        }
        options = {name: str(value) for name, value in vars(chain.settings).items() if value not in (None, (), "")}
        return Run(
            title=spec.title,
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self.started)),
            seconds=time.time() - self.started,
            spec=described,
            options=options,
            environment=environment.describe(),
            verdict=FAIL if self.failed else PASS,
            figures=self.figures,
            expected=self.expected,
            missing=self.missing,
            not_validated=[*chain.not_validated(), *self.notes, *self._not_gated()],
            failures=self.failures,
            advice=self._advice(),
        )

    def _not_gated(self) -> List[str]:
        verdicts = Counter(row_verdict(figure) for figure in self.figures if figure.verdict == INFO)
        verdicts.pop("", None)
        said = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
        return [f"throughput: rows ({said}) gate nothing; name --backends to gate them"] if said else []

    def _advice(self) -> List[str]:
        standings = [(figure.gate, detail(figure, "baseline", "status")) for figure in self.figures]
        faster = [gate for gate, status in standings if status == IMPROVED]
        return [f"faster than the baseline: {len(faster)} rows, as {faster[0]}; make a new one"] if faster else []

    @property
    def failed(self) -> bool:
        return bool(self.missing or self.failures or any(figure.verdict == FAIL for figure in self.figures))


def results_file(workdir: Path) -> Path:
    """A new results file below the work directory; of old runs the newest `KEPT_RUNS` are kept."""
    runs = workdir / "runs"
    for old in sorted(runs.glob("*.jsonl"))[:-KEPT_RUNS]:
        old.unlink()
    return runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.jsonl"
