"""Factors that an exporter or optimiser has multiplied into a layer's weights: a batch norm's, a layer scale's.

The graph then has neither the layer's weights nor the factor as such, so both are told apart by the product.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Iterator, List, Optional, Sequence, Set, Tuple

import numpy as np

from clipval.diagnose.graph import Graph
from clipval.diagnose.taps import Recorded, Tap, relative

LAYERS = ("convolution", "addmm", "mm")
SCALED = 1e-3  # relative distance up to which weights are PyTorch's times one factor for each output
SAME = 1e-5  # of two products of the same float32 numbers


@dataclass
class Folded:
    """What was found in layers with a factor folded in.

    Attributes:
        module: the module whose numbers differ; empty for none. causes: how.
        names: constants that are such products, or sums after them; they are no parameters of PyTorch's.
    """

    module: str = ""
    causes: List[str] = field(default_factory=list)
    names: Set[str] = field(default_factory=set)

    def add(self, module: str, cause: str) -> None:
        """Note a difference; the first one tells the module."""
        self.module = self.module or module
        self.causes.append(cause)


@dataclass(frozen=True)
class Factor:
    """What PyTorch multiplies a layer's outputs by next: of a module, [outputs], with what it adds."""

    module: str
    scale: np.ndarray
    shift: np.ndarray


def differing(graph: Graph, region: Sequence[int], numbers: Sequence[int], recorded: Recorded) -> Folded:
    """What differs in the layers of a region that a factor was folded into.

    Args:
        region: numbers of the nodes to search.
        numbers: of the taps that the region computes.
    """
    found = Folded()
    for n in numbers:
        tap = recorded.taps[n]
        weight, factor = recorded.parameters(tap.module).get(f"{tap.module}.weight"), _factor(recorded, n)
        if tap.op not in LAYERS or weight is None or factor is None:
            continue
        for held, name in _held(graph, region, weight):
            said = _compared(held, name, weight, factor, tap)
            if said is None:
                continue
            found.names.add(name)
            if said:
                found.add(factor.module if said.startswith("the factor") else tap.module, said)
            _shift(
                graph, [number for number in region if name in graph.nodes[number].inputs], tap, factor, recorded, found
            )
    return found


def hidden(graph: Graph, tensor: str, number: int, recorded: Recorded) -> bool:
    """Whether a tensor is not the layer's result, although of its node: a factor is folded in, or a later node adds
    the bias (SkipLayerNormalization, BiasGelu)."""
    tap = recorded.taps[number]
    if tap.op not in LAYERS or tensor not in graph.producer:
        return False
    own = recorded.parameters(tap.module)
    weight, factor = own.get(f"{tap.module}.weight"), _factor(recorded, number)
    if weight is not None and factor is not None:
        held = _held(graph, [graph.producer[tensor]], weight)
        if any(_compared(values, name, weight, factor, tap) is not None for values, name in held):
            return True
    biases = [one for name, one in own.items() if name.endswith("bias")]
    takers = [graph.nodes[n] for n in graph.consumers.get(tensor, ())]
    later = [graph.constant(name) for node in takers if node.op not in ("Add", "Sum") for name in node.inputs]
    return any(np.array_equal(one, held) for held in later if held is not None for one in biases)


def _factor(recorded: Recorded, number: int) -> Optional[Factor]:
    """The factor of the only operator that takes a layer's result, if it has one."""
    takers = [tap for tap in recorded.taps if number in tap.parents]
    if len(takers) != 1:
        return None
    module = takers[0].module
    own = {
        name.rpartition(".")[2]: one
        for name, one in recorded.parameters(module).items()
        if "." not in name[len(module) + 1 :]
    }
    if "batch_norm" in takers[0].op:
        mean, variance = (recorded.setting(module, name) for name in ("running_mean", "running_var"))
        if mean is None or variance is None:
            return None
        mean, variance = mean.detach().numpy(), variance.detach().numpy()
        scale = own.get("weight", 1.0) / np.sqrt(variance + recorded.setting(module, "eps"))
        return Factor(module, scale, own.get("bias", 0.0) - mean * scale)
    if takers[0].op in ("mul", "mul_"):
        width = recorded.taps[number].truth.shape
        fitting = [one.ravel() for one in own.values() if one.size in width and one.size > 1]
        return Factor(module, fitting[0], np.zeros_like(fitting[0])) if len(fitting) == 1 else None
    return None


def _held(graph: Graph, region: Sequence[int], weight: np.ndarray) -> Iterator[Tuple[np.ndarray, str]]:
    """Constants of the region as large as a layer's weights: [outputs, inputs of each], and their names."""
    rows = weight.reshape(len(weight), -1)
    for number in region:
        for name in graph.nodes[number].inputs:
            held = None if name in graph.moving else graph.constant(name)
            if held is None or held.size != weight.size or held.dtype.kind != "f":
                continue
            flat = np.asarray(held, np.float32)
            if held.ndim == 2 and held.shape != rows.shape:
                flat = flat.T
            elif held.ndim == 2 and rows.shape[0] == rows.shape[1]:
                flat = min((flat, flat.T), key=lambda one: _residual(one, rows))
            yield flat.reshape(rows.shape), name


def _residual(held: np.ndarray, rows: np.ndarray) -> float:
    """Distance of weights from PyTorch's times the factors that fit best, one for each output."""
    return relative(held, _fit(held, rows)[:, None] * rows)


def _fit(held: np.ndarray, rows: np.ndarray) -> np.ndarray:
    fitted: np.ndarray = (held * rows).sum(axis=1) / np.maximum((rows * rows).sum(axis=1), 1e-30)
    return fitted


def _compared(held: np.ndarray, name: str, weight: np.ndarray, factor: Factor, tap: Tap) -> Optional[str]:
    """How weights differ from PyTorch's times the factor; empty if they do not, None if nothing is folded in."""
    rows = weight.reshape(len(weight), -1)
    product = factor.scale[:, None] * rows
    off, plain = relative(held, product), relative(held, rows)
    fitted, left = _fit(held, rows), _residual(held, rows)
    moved = left > SCALED and relative(np.sort(held, axis=1), np.sort(product, axis=1)) <= SAME
    if plain <= SAME or (off > 0.5 * plain and left > SCALED and not moved):
        return None
    if off <= SAME:
        return ""
    if left <= SCALED:
        ratio = float(np.linalg.norm(fitted) / max(1e-30, float(np.linalg.norm(factor.scale))))
        most = f", {ratio:.3g} times as long" if abs(ratio - 1) > 0.02 else ""
        far = relative(fitted, factor.scale)
        return f"the factor of {factor.module}, folded into {name}, is {far:.2g} (relative) off{most}"
    how = f"{name} is {tap.module}.weight with the factor of {factor.module} folded in"
    order = ": the same values in another order, shifted or transposed" if moved else ""
    return f"{how}, and differs from that by {off:.2g} (relative){order}"


def _shift(graph: Graph, nodes: Sequence[int], tap: Tap, factor: Factor, recorded: Recorded, found: Folded) -> None:
    """What the layer's own node adds, compared with the bias times the factor and what the factor's module adds."""
    bias = recorded.parameters(tap.module).get(f"{tap.module}.bias", np.zeros_like(factor.scale))
    wanted = bias * factor.scale + factor.shift
    for name in {name for number in nodes for name in graph.nodes[number].inputs if name not in graph.moving}:
        held = graph.constant(name)
        if held is None or held.size != wanted.size or held.dtype.kind != "f":
            continue
        found.names.add(name)
        off = relative(np.asarray(held, np.float32).ravel(), wanted)
        if off > SAME and not found.causes:  # of wrong weights the sum is wrong, too
            who = factor.module if np.any(factor.shift) else tap.module
            found.add(who, f"what {who} adds, folded into {name}, is {off:.2g} (relative) off")
