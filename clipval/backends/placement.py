"""Which operators of an ONNX Runtime session run on which execution provider. Imports no runtime.

A session accepts a provider that cannot compute its operators, and silently computes them on the CPU. Two sources show
it: the session's graph assignment (ONNX Runtime 1.24 on), which names the operators inside a subgraph that a provider
compiled as a whole, and the profile of one run, in which such a subgraph is one event, but which has the types and
shapes of each operator's outputs.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence

from clipval.backends.providers import CPU

RECORD = "session.record_ep_graph_assignment_info"  # session option that records the assignment
# They produce, move and compute shapes. Providers leave them on the host on purpose, where shapes are needed to launch
# kernels (CUDA's: GetCpuPreferredNodes). On anything but a few integers they count as operators of the model.
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
        operators: provider -> operator -> count.
        strayed: operator -> count on the CPU, without shape operators; empty for a session on the CPU.
        witness: `graph assignment` or `profile`.
    """

    operators: Dict[str, Dict[str, int]]
    strayed: Dict[str, int]
    witness: str

    def beyond(self, allowed: Iterable[str]) -> Dict[str, int]:
        """Strayed operators that were not allowed."""
        names = set(allowed)
        return {name: count for name, count in self.strayed.items() if name not in names}


def of(assigned: Optional[Sequence[Any]], events: Sequence[Dict[str, Any]] = ()) -> Placement:
    """Where a session computes, by both sources.

    Args:
        assigned: subgraphs of nodes from `get_provider_graph_assignment_info`; None before ONNX Runtime 1.24.
        events: of the profile of one run; none for a session on the CPU.
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
    """Whether it is an operator of the list that returned only integer scalars or vectors."""
    given: List[Dict[str, List[int]]] = ran.get("output_type_shape", [])
    small = [kind in INTEGERS and len(shape) <= 1 for one in given for kind, shape in one.items()]
    return ran["op_name"] in SHAPE_OPERATORS and bool(small) and all(small)
