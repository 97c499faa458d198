"""The result of a diagnosis: one sentence, its evidence, and the ladder."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Dict, List, Tuple

from clipval.diagnose.locate import Rung
from clipval.results import columns

NONE, INPUT, DIVERGENCE = "no excess", "not numerics", "divergence"


@dataclass(frozen=True)
class Finding:
    """Where a candidate diverges.

    Attributes:
        verdict: `NONE`, `INPUT` (something other than arithmetic differs) or `DIVERGENCE`.
        candidate: what was diagnosed, and its backend.
        sentence: the answer: where, how far, whether it starts there, in which precision, what to try.
        module: path of the PyTorch module; node: name of the ONNX node; operator: of the OM. Empty if unknown.
        causes: differences found there, one sentence each.
        advice: what to try, one sentence each.
        ladder: every compared tap, in order of computation.
        first: name of the rung where the excess starts; empty for none.
        samples: how many were used.
        precision: `fp32`, `fp16` or `bf16`, whose noise the ladder has; empty if nothing was compared.
        keep: ONNX nodes with an excess of their own, in an OM that was compiled from them.
        material: `clipval.diagnose.bundle.Material`; None if no tensor is wrong.
    """

    verdict: str
    candidate: str
    sentence: str
    module: str = ""
    node: str = ""
    operator: str = ""
    causes: Tuple[str, ...] = ()
    advice: Tuple[str, ...] = ()
    ladder: Tuple[Rung, ...] = ()
    first: str = ""
    samples: int = 0
    precision: str = ""
    keep: Tuple[str, ...] = ()
    material: Any = field(default=None, repr=False, compare=False)

    @property
    def found(self) -> bool:
        """Whether something is wrong."""
        return self.verdict != NONE

    def lines(self) -> List[str]:
        """The sentence, then one line per cause and per piece of advice."""
        seen = [f"seen: {one}" for one in self.causes]
        return [self.sentence, *seen, *(f"try: {one}" for one in self.advice)]

    def detail(self) -> Dict[str, Any]:
        """For reports: plain values only.

        A rung has its excess and its `state`: `compared`, `absent` without a tensor, or `not finite`, whose error is
        None, since JSON has no infinity.
        """
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "material"}
        return {**plain, "ladder": [_plain(rung) for rung in self.ladder]}


def _plain(rung: Rung) -> Dict[str, Any]:
    state = "absent" if rung.error is None else "compared" if math.isfinite(rung.error) else "not finite"
    whole = {**asdict(rung), "excess": rung.excess, "state": state}
    return {name: None if isinstance(one, float) and not math.isfinite(one) else one for name, one in whole.items()}


def table(finding: Finding, count: int = 0) -> List[str]:
    """The ladder for a terminal: error, noise and excess in order of computation, the first excess marked.

    Args:
        count: rungs to show before and after the first excess; 0 shows all.
    """
    rungs = [rung for rung in finding.ladder if rung.error is not None]
    at = next((n for n, rung in enumerate(rungs) if rung.name == finding.first), None)
    if count and at is not None:
        rungs = rungs[max(0, at - count) : at + count + 1]
    rows = [["", "error", "noise", "excess", "growth", "tap"]]
    for rung in rungs:
        growth = "" if rung.growth is None else f"{rung.growth:.2g}"
        figures = [f"{rung.error:.2e}", f"{rung.noise:.2e}", f"{rung.excess:.3g}", growth]
        rows.append([">>" if rung.name == finding.first else "", *figures, rung.name])
    return columns(rows, right=range(1, 5))
