"""The part of a graph in which an error starts: its PyTorch operators, its ONNX nodes, and the differences."""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import TYPE_CHECKING, Any, Dict, List, Sequence, Tuple

import numpy as np

from clipval.diagnose import evaluate, explain, folded
from clipval.diagnose.graph import NARROW
from clipval.diagnose.taps import Tap

if TYPE_CHECKING:
    from clipval.diagnose.ladder import Ladder

SHOWN = 3


class Part:
    """Everything between good tensors and the first bad one.

    Attributes:
        taps: PyTorch's results in it, ending with the first bad one that has a counterpart.
        region: numbers of the ONNX nodes in it.
    """

    def __init__(self, ladder: Ladder, numbers: Sequence[int]) -> None:
        self.ladder = ladder
        self.numbers = list(numbers)
        self.taps: List[Tap] = [ladder.recorded.taps[n] for n in numbers]
        good = {ladder.tensors[n] for n, rung in ladder.rungs.items() if rung.good and n in ladder.tensors}
        self.tensor = ladder.rungs[self.numbers[-1]].tensor
        self.known = [n for n in ladder.rungs if ladder.rungs[n].good]
        self.region = ladder.graph.between(self.tensor, good)
        if ladder.rungs[self.numbers[-1]].error == float("inf"):
            self.tensor, self.taps = self._first_broken(), self.taps[:1]
            self.region = ladder.graph.between(self.tensor, good)

    def _first_broken(self) -> str:
        """The first tensor of the region with NaN or Inf; -Inf, as in masks, does not count."""
        graph, made = self.ladder.graph, {name for n in self.region for name in self.ladder.graph.nodes[n].outputs}
        for name, values in evaluate.tensors(graph, self.ladder.recorded.rows):
            if name in made and values.dtype.kind == "f" and (np.isnan(values) | np.isposinf(values)).any():
                return name
        return self.tensor

    @classmethod
    def of(cls, ladder: Ladder, first: int) -> Part:
        """The part that ends at a tap; results without a counterpart in the graph are included.

        Results of weights alone are not, since optimisers compute these beforehand, nor is what a good result is
        computed from.
        """
        found, rest, taps = {first}, [first], ladder.recorded.taps
        right = {one for n, rung in ladder.rungs.items() if rung.good for one in taps[n].parents}
        while rest:
            for n in taps[rest.pop()].parents:
                lacks = n in ladder.rungs and ladder.rungs[n].error is None
                if lacks and n not in found | right and not taps[n].fixed:
                    found.add(n)
                    rest.append(n)
        return cls(ladder, sorted(found))

    @property
    def graph_node(self) -> str:
        """Name of the node that computes the bad tensor; of a weight the first that takes it."""
        return self.ladder.graph.around(self.tensor).name

    @property
    def blamed(self) -> Tap:
        """The first result without a counterpart, else the bad one."""
        return self.taps[0]

    @property
    def module(self) -> str:
        if self.folded.module:
            return self.folded.module
        if self.blamed.fixed and not self.region:  # computed before, from its own weights and its parent's
            return self.blamed.module.rpartition(".")[0]
        if self.blamed.fixed and self.unlike:  # e.g. the query of an attention pool, which its norm takes first
            return self.unlike[0].rpartition(".")[0]
        if self.left_out:
            levels = itertools.takewhile(
                lambda level: len(set(level)) == 1, zip(*(p.split(".") for p in self.left_out))
            )
            return ".".join(level[0] for level in levels)
        if self._constants:
            return self._constants[0][0]
        if self._rounded:
            return self._rounded[0]
        return self.blamed.module

    @cached_property
    def _constants(self) -> List[Tuple[str, str]]:
        return explain.constants(self.ladder.graph, self.region, self.taps, self.ladder.recorded)

    @cached_property
    def _rounded(self) -> List[str]:
        """Modules whose good result the region only rounds: it is cast to 16 bits and back at once."""
        graph, ladder = self.ladder.graph, self.ladder
        modules = {ladder.tensors[n]: ladder.recorded.taps[n].module for n in self.known}
        casts = [graph.nodes[n] for n in self.region if graph.nodes[n].attributes.get("to") in NARROW]
        return [
            modules[node.inputs[0]]
            for node in casts
            if graph.precision == "fp32"
            and node.inputs[0] in modules
            and all(graph.nodes[n].op == "Cast" for n in graph.consumers.get(node.outputs[0], ()))
        ]

    @cached_property
    def folded(self) -> folded.Folded:
        """See `clipval.diagnose.folded.differing`."""
        return folded.differing(self.ladder.graph, self.region, self.numbers, self.ladder.recorded)

    @cached_property
    def unlike(self) -> List[str]:
        """Parameters that differ in the graph."""
        return self._weights[1]

    @cached_property
    def _weights(self) -> Tuple[List[str], List[str]]:
        ladder = self.ladder
        return explain.weights(ladder.graph, self.region, self.taps, ladder.recorded, self.folded.names)

    @cached_property
    def left_out(self) -> List[str]:
        """Modules of the part that the graph has neither a result nor a weight of, the outermost ones."""
        recorded, rungs = self.ladder.recorded, self.ladder.rungs
        found: List[str] = []
        for path in dict.fromkeys(tap.module for tap in self.taps):
            outer = ""
            while path and not explain.held(self.ladder.graph, recorded.parameters(path), self.region):
                inside = [n for n in rungs if f"{recorded.taps[n].module}.".startswith(f"{path}.")]
                if any(rungs[n].good for n in inside) or any(name.startswith(f"{path}.") for name in self.unlike):
                    break
                outer, path = path, path.rpartition(".")[0]
            found += [outer] if outer and outer not in found else []
        return found if self.blamed.module.startswith(tuple(found)) else []

    @property
    def operators(self) -> str:
        """PyTorch's operators from first to last, with their modules if these differ."""
        told = [
            tap.op if tap.module == self.module else f"{tap.op} of {tap.module or 'the tower'}" for tap in self.taps
        ]
        words = list(dict.fromkeys(told))
        return ", ".join(words) if len(words) <= SHOWN else f"{words[0]} to {words[-1]}, {len(words)} operators"

    @property
    def nodes(self) -> str:
        """The ONNX nodes; with adjacent nodes if no module is known."""
        graph = self.ladder.graph
        if not self.region:
            return f"weights {self.tensor} of {graph.around(self.tensor).op} {graph.around(self.tensor).name}"
        named = [graph.nodes[n] for n in self.region if graph.nodes[n].op not in ("Constant", "Shape", "Identity")]
        said = [f"{node.op} {node.name}" for node in named]
        text = f"nodes {said[0]} to {said[-1]} ({len(said)} nodes)" if len(said) > SHOWN else f"node {', '.join(said)}"
        if graph.named or not named:
            return text
        before = [graph.node_of(name) for name in named[0].inputs if name in graph.producer and name in graph.moving]
        after = [node for node in graph.nodes if self.tensor in node.inputs]
        around = [f"after {node.op} {node.name}" for node in before] + [
            f"before {node.op} {node.name}" for node in after
        ]
        return f"{text} ({', '.join(around[:4])})"

    def values(self) -> np.ndarray:
        """The bad tensor."""
        rows = self.ladder.recorded.rows
        held = self.ladder.graph.constant(self.tensor)
        return (
            held
            if held is not None
            else next(found for name, found in evaluate.tensors(self.ladder.graph, rows) if name == self.tensor)
        )

    @property
    def precision(self) -> str:
        return explain.precision(self.ladder.graph, self.region, self._dtype)

    @property
    def _dtype(self) -> Any:
        return self.values().dtype

    def causes(self) -> List[str]:
        """The differences found, the most certain first."""
        graph, recorded = self.ladder.graph, self.ladder.recorded
        if self.left_out:
            return [f"nothing of {' and '.join(self.left_out)} is in the graph"]
        if self.folded.causes:
            return self.folded.causes
        if not self.region:
            return [
                f"{self.tensor} was computed beforehand from weights of {self.module}, one of which is not PyTorch's"
            ]
        said = [one for _, one in self._constants]
        said += self._weights[0]
        said += explain.missing(self.ladder, self.numbers[: len(self.taps)], self.region)
        said += explain.casts(graph, self.region, {self.ladder.tensors[n]: recorded.taps[n].name for n in self.known})
        known: Dict[int, Tap] = {n: recorded.taps[n] for n in self.known}
        return said + explain.values(np.asarray(self.values(), np.float32), self.ladder, self.numbers[-1], known)

    def advice(self, causes: Sequence[str]) -> List[str]:
        """What to do about it."""
        text = " ".join(causes)
        if "65504" in text or "NaN" in text:
            return [f"keep these operators in fp32 (--keep-dtype with {self.graph_node})"]
        if "fp16" in self.precision or "bf16" in self.precision:
            return ["export or convert this operator in fp32", "another --precision-mode"]
        if "differs from" in text or "folded into" in text or "is nowhere" in text or "transposed" in text:
            return ["export again from the weights under test; nothing may edit the graph's weights afterwards"]
        return ["export again with clipval export, without an optimiser in between, and diagnose that file"]
