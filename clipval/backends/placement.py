"""Which operators of an ONNX Runtime session run on which execution provider. Imports no runtime.

A session takes the name of a provider that cannot compute its operators, and computes them on the CPU without a word.
Two witnesses: the session's own graph assignment (ONNX Runtime 1.24 on), which names the operators inside a subgraph
that a provider compiled whole, and the profile of one run, in which such a subgraph is one event, but which tells the
types and shapes of what each operator gave.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence

from clipval.backends.providers import CPU

RECORD = "session.record_ep_graph_assignment_info"  # session option that keeps the assignment
# They make, move and compute shapes. Providers leave them on the host on purpose, where shapes are needed to start
# kernels (CUDA's: GetCpuPreferredNodes). On anything but a few integers they are work of the model like any other.
SHAPE_OPERATORS = frozenset(
    (
        *("Shape", "Size", "Range", "Constant", "ConstantOfShape", "Identity", "Cast", "Equal", "Where"),
        *("Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Reshape", "Expand", "Add", "Sub", "Mul", "Div", "Mod"),
    )
)
INTEGERS = ("int64", "int32", "bool")


class Placement(NamedTuple):
    """Where a session computes.

    Attributes:
        operators: provider -> operator -> how many of them.
        strayed: operator -> how many compute on the CPU, those on shapes left out; empty for a session on the CPU.
        witness: `graph assignment` or `profile`.
    """

    operators: Dict[str, Dict[str, int]]
    strayed: Dict[str, int]
    witness: str

    def beyond(self, allowed: Iterable[str]) -> Dict[str, int]:
        """Strayed operators that nobody allowed."""
        names = set(allowed)
        return {name: count for name, count in self.strayed.items() if name not in names}


def of(assigned: Optional[Sequence[Any]], events: Sequence[Dict[str, Any]] = ()) -> Placement:
    """Where a session computes, by its witnesses.

    Args:
        assigned: what `get_provider_graph_assignment_info` gives, subgraphs of nodes; None before ONNX Runtime 1.24.
        events: of the profile of one run; none for a session that is asked to compute on the CPU.
    """
    ran = [event["args"] for event in events if event.get("cat") == "Node" and "provider" in event.get("args", {})]
    profiled = Counter((one["provider"], one["op_name"]) for one in ran)
    nodes = Counter((graph.ep_name, node.op_type) for graph in assigned or () for node in graph.get_nodes())
    counted = nodes if assigned is not None else profiled
    found: Dict[str, Dict[str, int]] = {}
    for (provider, operator), count in sorted(counted.items()):
        found.setdefault(provider, {})[operator] = count
    strayed = {}
    if ran:
        outside = Counter(one["op_name"] for one in ran if one["provider"] == CPU and not _of_shapes(one))
        outside |= Counter({op: n for (ep, op), n in nodes.items() if ep == CPU and op not in SHAPE_OPERATORS})
        strayed = dict(sorted(outside.items()))
    return Placement(found, strayed, "profile" if assigned is None else "graph assignment")


def _of_shapes(ran: Dict[str, Any]) -> bool:
    """An operator of the list that gave scalars or vectors of integers only."""
    given: List[Dict[str, List[int]]] = ran.get("output_type_shape", [])
    small = [kind in INTEGERS and len(shape) <= 1 for one in given for kind, shape in one.items()]
    return ran["op_name"] in SHAPE_OPERATORS and bool(small) and all(small)
