"""What a diagnosis ends with: one sentence for a person, what it rests on, and the ladder."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Tuple

from clipval.diagnose.locate import Rung

NONE, INPUT, DIVERGENCE = "no excess", "not numerics", "divergence"


@dataclass(frozen=True)
class Finding:
    """The answer to where a candidate diverges.

    Attributes:
        verdict: `NONE`, `INPUT` (something else than arithmetic differs) or `DIVERGENCE`.
        candidate: what was looked at, with what made it.
        sentence: the answer; where, in what, whether it starts there, computed in what, what to try.
        module: path of the PyTorch module; node: name of the ONNX node; operator: of the OM. Empty where unknown.
        causes: what was seen to differ there, one sentence each.
        advice: what to try, one sentence each.
        ladder: every tap that was compared, in the order of the computation.
        first: name of the rung where the excess starts; empty for none.
        samples: how many were looked at.
        precision: `fp32`, `fp16` or `bf16`: whose cost the noise of the ladder is; empty where nothing was compared.
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

    @property
    def found(self) -> bool:
        """Something is wrong."""
        return self.verdict != NONE

    def lines(self) -> List[str]:
        """The sentence, then one line a cause and a piece of advice."""
        seen = [f"seen: {one}" for one in self.causes]
        return [self.sentence, *seen, *(f"try: {one}" for one in self.advice)]

    def detail(self) -> Dict[str, Any]:
        """For a report: plain values only.

        A rung has its excess and its `state`: `compared`, `absent` for one without a tensor, or `not finite`, where an
        error that is no number is None, as JSON has no infinity.
        """
        return {**asdict(self), "ladder": [_plain(rung) for rung in self.ladder]}


def _plain(rung: Rung) -> Dict[str, Any]:
    state = "absent" if rung.error is None else "compared" if math.isfinite(rung.error) else "not finite"
    whole = {**asdict(rung), "excess": rung.excess, "state": state}
    return {name: None if isinstance(one, float) and not math.isfinite(one) else one for name, one in whole.items()}


def table(finding: Finding, count: int = 0) -> List[str]:
    """The ladder for a terminal: error, noise and excess by depth, the first excess marked.

    Args:
        count: rungs before and after the first excess that are shown; 0 shows all.
    """
    rungs = [rung for rung in finding.ladder if rung.error is not None]
    at = next((n for n, rung in enumerate(rungs) if rung.name == finding.first), None)
    if count and at is not None:
        rungs = rungs[max(0, at - count) : at + count + 1]
    lines = [f"{'':2}{'error':>9} {'noise':>9} {'excess':>8} {'growth':>8}  tap"]
    for rung in rungs:
        mark = ">>" if rung.name == finding.first else "  "
        growth = "" if rung.growth is None else f"{rung.growth:8.2g}"
        lines.append(f"{mark}{rung.error:9.2e} {rung.noise:9.2e} {rung.excess:8.3g} {growth:>8}  {rung.name}")
    return lines
