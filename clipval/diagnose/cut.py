"""A part of a graph as a separate model: one sample, one input, one output, so that any backend can run it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Dict, List, Mapping, Set, Tuple

import numpy as np

from clipval.diagnose.graph import Graph
from clipval.towers import Tower

INPUT, OUTPUT = "part_input", "part_output"
SAME_IDS = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Part:
    """The nodes from one tensor to another.

    Attributes:
        model: takes `INPUT` [1, *shape of the source], returns `OUTPUT` float32 [1, elements of the target].
        tower: this contract, for opening it with a backend.
        source, target: names of the two tensors in the whole graph; shape: of the target there.
    """

    model: Any
    tower: Tower
    source: str
    target: str
    shape: Tuple[int, ...]


def waists(whole: Graph, tensor: str, floats: Set[str]) -> List[str]:
    """Tensors on every path from the input to a tensor, the nearest first, the graph's input last.

    Args:
        floats: non-integer tensors that depend on the input: only paths of these count.
    """
    source = whole.inputs[0]
    above: Dict[str, str] = {}  # the immediate dominator of each tensor
    depth = {source: 0}

    def meet(a: str, b: str) -> str:
        while a != b:
            if depth[a] >= depth[b]:
                a = above[a]
            else:
                b = above[b]
        return a

    for name in whole.producer:
        if name in floats:
            parents = [one for one in whole.parents(name) if one in depth] or [source]
            above[name] = reduce(meet, parents)
            depth[name] = depth[above[name]] + 1
    found = []
    while tensor != source:
        tensor = above[tensor]
        found.append(tensor)
    return found


def part(whole: Graph, source: str, target: str, values: Mapping[str, np.ndarray]) -> Part:
    """The nodes between two tensors.

    Their other inputs, integers such as positions and shapes, become constants of this sample.

    Args:
        values: the sample's source, target, and all integers that depend on the input.
    """
    from onnx import TensorProto, helper, numpy_helper

    start = values[source]
    integers = {name for name, one in values.items() if one.dtype.kind != "f"}
    frozen = integers - {source} if source not in whole.inputs else set()
    numbers = whole.closure(target, {source, *frozen})
    used = {name for number in numbers for name in whole.nodes[number].inputs}
    dtype = "float32" if start.dtype.kind == "f" else "int64"
    first = [INPUT, "part_shape"]
    held = [numpy_helper.from_array(np.array(start.shape, np.int64), "part_shape")]
    held += [numpy_helper.from_array(values[name], name) for name in sorted(used & frozen)]
    held += [whole.weights[name] for name in sorted(used) if name in whole.weights]
    held.append(numpy_helper.from_array(np.array([1, -1], np.int64), "part_flat"))
    nodes = [
        helper.make_node("Reshape", first, ["part_start"], name="part_start"),
        helper.make_node("Cast", ["part_start"], [source], name="part_dtype", to=_kind(whole, source, start)),
        *(whole.model.graph.node[number] for number in numbers),
        helper.make_node("Cast", [target], ["part_end"], name="part_end", to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["part_end", "part_flat"], [OUTPUT], name=OUTPUT),
    ]
    size = int(values[target].size)
    kind = TensorProto.FLOAT if dtype == "float32" else TensorProto.INT64
    graph = helper.make_graph(
        nodes,
        "part",
        [helper.make_tensor_value_info(INPUT, kind, [1, *start.shape])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [1, size])],
        held,
    )
    model = helper.make_model(graph, opset_imports=whole.model.opset_import, ir_version=whole.model.ir_version)
    tower = Tower("part", INPUT, dtype, tuple(start.shape), OUTPUT, size, "ND", "")
    return Part(model, tower, source, target, tuple(values[target].shape))


def _kind(whole: Graph, name: str, values: np.ndarray) -> int:
    """Element type of a tensor; bfloat16, which numpy lacks, is float32."""
    from onnx import TensorProto

    if name in whole.inputs:
        return whole.input_kind
    if values.dtype == np.float32 and whole.precision == "bf16":
        return int(TensorProto.BFLOAT16)
    kinds = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}
    kinds.update({"int32": TensorProto.INT32, "int64": TensorProto.INT64})
    return int(kinds[str(values.dtype)])


def without_unused_rows(made: Part, start: np.ndarray) -> Tuple[Part, np.ndarray]:
    """A part that takes ids, with only those rows of its tables that these ids read, and the ids renumbered.

    A table of tokens is 100 MB, and one caption reads 77 rows of it. The order of the ids stays, and so does the
    position of the largest, at which CLIP pools. Where ids have another use, part and ids are returned as they are.
    """
    from onnx import ModelProto, TensorProto, numpy_helper

    model, used = ModelProto(), np.unique(start)
    model.CopyFrom(made.model)
    held = {one.name: one for one in model.graph.initializer}
    tables = _tables(model.graph, held) if start.dtype.kind == "i" else set()
    plain = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    if not tables or used[0] < 0 or any(held[name].data_type not in plain for name in tables):
        return made, start
    for name in tables:
        held[name].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held[name])[used], name))
    return replace(made, model=model), np.searchsorted(used, start).astype(start.dtype)


def _tables(graph: Any, held: Mapping[str, Any]) -> Set[str]:
    """Weights of which ids select rows, if all that a part does with its ids is that and pooling; else none."""
    ids, tables, others = {INPUT}, set(), {OUTPUT}
    for node in graph.node:
        axis = next((one.i for one in node.attribute if one.name == "axis"), 0)
        if node.op_type in SAME_IDS and node.input[0] in ids:
            ids.update(node.output)
        elif node.op_type == "Gather" and axis == 0 and node.input[0] in held and node.input[1] in ids:
            tables.add(node.input[0])
        elif node.op_type != "ArgMax":
            others.update(node.input)
    return set() if (ids | tables) & others else tables
