"""Where a candidate diverges: the excess of each tap over its noise, and which taps only pass an error on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

# Clean candidates were measured at 1.2 times the noise at most (docs/diagnose.md), on CPUs and the simulated NPU. A
# device sums and rounds in other places than its twin, so three times that is allowed.
EXCESS = 4.0
FLOOR = {
    "fp32": 1e-6,
    "fp16": 2.0**-12,
    "bf16": 2.0**-9,
}  # minimum noise of any tap: half a rounding of its values


@dataclass(frozen=True)
class Rung:
    """One tap of the ladder, compared.

    Attributes:
        name: for display, of this rung alone.
        error: relative L2 distance of the candidate's tensor from the truth; None if it has no such tensor.
        noise: error expected from the precision: the distance of the twin, or of the float32 model.
        error_in: the largest error of the taps that it is computed from; None for none.
        parents: names of those taps.
        pytorch: the float32 PyTorch model's own distance from the truth; None if PyTorch was not run.
        tensor, node, op: the candidate's tensor and the node that computes it; empty if there is none.
        module: path of the PyTorch module.
        local: error of this part alone, run on the candidate's own inputs, over the noise of the part; None if it was
        not run alone. Noise of earlier parts does not hide it.
    """

    name: str
    error: Optional[float]
    noise: float
    error_in: Optional[float] = None
    parents: Tuple[str, ...] = ()
    pytorch: Optional[float] = None
    tensor: str = ""
    node: str = ""
    op: str = ""
    module: str = ""
    local: Optional[float] = None

    @property
    def excess(self) -> Optional[float]:
        """Error over noise; 1 is expected from the precision."""
        return None if self.error is None else self.error / self.noise

    @property
    def growth(self) -> Optional[float]:
        """Error of the output over error of the input."""
        return self.error / self.error_in if self.error is not None and self.error_in else None

    @property
    def good(self) -> bool:
        """Whether it is within the noise, as a whole and alone."""
        return self.excess is not None and self.excess <= EXCESS and (self.local is None or self.local <= EXCESS)


def numbered(names: Sequence[str]) -> List[str]:
    """Names of which none occurs twice: the second `attn (bmm)` becomes `attn (bmm) #2`."""
    seen: Dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return found


def compared_inputs(good: Mapping[str, Optional[bool]], parents: Mapping[str, Sequence[str]]) -> Dict[str, List[str]]:
    """Of each tensor, the compared ones that it is computed from: those that were not compared are seen through.

    Args:
        good, parents: see `suspects`; parents come before what is computed from them.
    """
    found: Dict[str, List[str]] = {}
    for name in parents:
        above = [[one] if good.get(one) is not None else found.get(one, []) for one in parents[name]]
        found[name] = list(dict.fromkeys(one for group in above for one in group))
    return found


def suspects(good: Mapping[str, Optional[bool]], parents: Mapping[str, Sequence[str]], output: str) -> List[str]:
    """Where the error of the output starts: bad tensors that lead to it and whose known inputs are all good.

    Args:
        good: tensor -> whether it is within its noise; None if it was not compared, then its own inputs count.
        parents: tensor -> what it is computed from, in order of computation.

    Returns:
        in the order of `good`; empty if the output is good, or if it is bad and nothing before it is.
    """
    known = compared_inputs(good, parents)
    start, rest, leading = [], [output], set()
    while rest:
        name = rest.pop()
        if name in leading or good.get(name) is True:
            continue
        leading.add(name)
        inputs = known.get(name, [])
        worse = [one for one in inputs if good[one] is False]
        if good.get(name) is False and not worse:
            start.append(name)
        rest += worse if good.get(name) is not None else inputs
    order = {name: number for number, name in enumerate(good)}
    return sorted(start, key=lambda name: order[name])
