"""What a run promised and what it did: the gates to evaluate, the figures recorded, the verdict."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from clipval import backends, datasets, environment
from clipval.chain import Chain
from clipval.report import UNPROMISED, Failure, Run, Subject
from clipval.report.wording import row_verdict
from clipval.results import FAIL, INFO, PASS, Figure, ThroughputDetail, append
from clipval.throughput.baseline import IMPROVED

KEPT_RUNS = 20


@dataclass
class Account:
    """The record of one run.

    Attributes:
        promised: gate ids of the whole run, if no test is left out; file: JSON Lines that figures are appended to.
        deliberate: the user asked for part of the run (`-k`, a path) and named no backends, so gates that are left
        out are reported and do not fail. Otherwise everything promised must be evaluated.
        narrowed_by: what leaves tests out, for the verdict line, e.g. `-k 'text'`.
        selected: gate ids of the tests that were collected and not deselected; None until that is known.
        always: gates that nothing leaves out: the comparison with a given baseline.
        chosen: gate ids of `--gate`, the only ones judged; None without it.
        least: number of figures that a gate must have; one if not listed.
        again: the command line of this run, to be narrowed with `--gate`.
        notes: further lines on what was not validated.
        failures: one entry per failed test.
    """

    promised: List[str]
    file: Path
    deliberate: bool = False
    narrowed_by: List[str] = field(default_factory=list)
    selected: Optional[List[str]] = None
    always: List[str] = field(default_factory=list)
    chosen: Optional[List[str]] = None
    least: Dict[str, int] = field(default_factory=dict)
    again: str = ""
    notes: List[str] = field(default_factory=list)
    figures: List[Figure] = field(default_factory=list)
    failures: List[Failure] = field(default_factory=list)
    started: float = field(default_factory=time.time)

    def add(self, figures: Sequence[Figure]) -> None:
        """Record figures and write them to disk at once."""
        if figures:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            append(self.file, list(figures))
            self.figures.extend(figures)

    @property
    def left_out(self) -> List[str]:
        """Gates of the whole run that the user left out, by `--gate` or, if no backends were named, by a selection."""
        kept = set(self.promised if self.chosen is None else self.chosen)
        if self.deliberate and self.selected is not None:
            kept &= {*self.selected, *self.always}
        return [gate for gate in self.promised if gate not in kept]

    @property
    def expected(self) -> List[str]:
        """Gates that must be evaluated: the promised ones that were not left out, and those of the user's own tests."""
        left = set(self.left_out)
        return list(dict.fromkeys([*(gate for gate in self.promised if gate not in left), *(self.selected or ())]))

    @property
    def missing(self) -> List[str]:
        """Expected gates without a figure, or without all of them."""
        found = Counter(figure.gate for figure in self.figures)
        return [gate for gate in self.expected if found[gate] < self.least.get(gate, 1)]

    @property
    def unexpected(self) -> List[str]:
        """Gates with a figure that no test promised."""
        expected = set(self.expected)
        return list(dict.fromkeys(figure.gate for figure in self.figures if figure.gate not in expected))

    @property
    def failed(self) -> bool:
        wrong = self.missing or self.unexpected or self.failures
        return bool(wrong or any(figure.verdict == FAIL for figure in self.figures))

    def run(self, chain: Chain) -> Run:
        """The whole record, for a report."""
        spec = chain.spec
        model, weights = Path(spec.model.name).stem, Path(spec.model.pretrained).name
        subject = Subject(spec.name, model, weights, spec.data.name, spec.data.images, spec.data.captions)
        options = {name: str(value) for name, value in vars(chain.settings).items() if value not in (None, (), "")}
        return Run(
            title=spec.title,
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self.started)),
            seconds=time.time() - self.started,
            spec=subject,
            options=options,
            environment=environment.describe(),
            verdict=FAIL if self.failed else PASS,
            figures=self.figures,
            expected=self.expected,
            missing=self.missing,
            left_out=self.left_out,
            narrowed_by=self.narrowed_by if self.left_out or self.missing else [],
            not_validated=[*_not_validated(chain), *self.notes, *self._not_gated()],
            failures=[*self.failures, *self._unexpected()],
            advice=[*self._advice(), *chain.pool.notes],
            again=self.again,
        )

    def _unexpected(self) -> List[Failure]:
        message = "a figure for a gate that no test promised; name the gate with @pytest.mark.gate on the test"
        return [Failure(UNPROMISED, gate, f"{gate}: {message}") for gate in self.unexpected]

    def _not_gated(self) -> List[str]:
        verdicts = Counter(row_verdict(figure) for figure in self.figures if figure.verdict == INFO)
        verdicts.pop("", None)
        said = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
        return [f"throughput: rows ({said}) are not gated; name --backends to gate them"] if said else []

    def _advice(self) -> List[str]:
        rows = [(one.gate, one.detail.row) for one in self.figures if isinstance(one.detail, ThroughputDetail)]
        faster = [gate for gate, row in rows if row.standing is not None and row.standing.status == IMPROVED]
        said = f"{len(faster)} rows are faster than the baseline (e.g. {faster[0]})" if faster else ""
        return [f"{said}; consider recording a new one"] if faster else []


def _not_validated(chain: Chain) -> List[str]:
    """What a run does not validate by its options, one line each."""
    listed = {backends.base_name(name) for name in chain.settings.validated}
    left = [f"{name}: not listed in --backends" for name in backends.names() if name not in listed]
    left += chain.subject.left_out
    left += chain.subject.assumed(chain.weights) if "weights" in vars(chain) else []
    if chain.subject.drawn(chain.settings.data_dir) and not datasets.draws(chain.spec.data.kind):
        left.append(f"data: drawn scenes replace {chain.spec.data.name}, since no --data-dir was given")
    return left


def results_file(workdir: Path) -> Path:
    """A new results file below the work directory; of earlier runs the last `KEPT_RUNS` are kept."""
    runs = workdir / "runs"
    for old in sorted(runs.glob("*.jsonl"))[:-KEPT_RUNS]:
        old.unlink()
    return runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.jsonl"


class Message:
    """A failure's text, which pytest prints once: its short summary would repeat a plain string, on CI in full.

    Args:
        shown: what the terminal gets instead, if it has shown the text already.
    """

    def __init__(self, text: str, shown: str = "") -> None:
        self.text, self.shown = text, shown or text

    def __str__(self) -> str:
        return self.text

    def toterminal(self, out: Any) -> None:
        out.line(self.shown)
