"""An ONNX graph for diagnosis: nodes with names and module paths, and parts of it as separate models.

In `clipval.diagnose` only this module, `twin`, `cut`, `bundle` and `evaluate` import onnx.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple

import numpy as np

from clipval.errors import InputError, one_line
from clipval.export import name_nodes

SEGMENT_BYTES = 64 << 20  # most weights passed to the runtime at a time
SEGMENT_NODES = 200
SCOPES = "pkg.torch.onnx.name_scopes"  # of the dynamo exporter: a list of paths, the operator's own name last
FLOATS = (1, 10, 11, 16)  # onnx.TensorProto.FLOAT, FLOAT16, DOUBLE and BFLOAT16
NARROW = {10: "fp16", 16: "bf16"}  # onnx.TensorProto.FLOAT16 and BFLOAT16
# Operators without values of their own, or whose values are a weight's.
PLAIN = ("Constant", "ConstantOfShape", "DequantizeLinear", "Shape", "Size")
# Operators that only change the shape, order, dtype or position of their input's values.
SAME_VALUES = ("Cast", "Dropout", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True)
class Node:
    """One node: name, operator, module path from the exporter (empty for none), and tensors.

    `inputs` includes those of its subgraphs; `attributes` are numbers, strings and lists of them.
    """

    name: str
    op: str
    module: str
    inputs: Tuple[str, ...]
    outputs: Tuple[str, ...]
    attributes: Dict[str, Any]


class Graph:
    """A loaded ONNX file.

    Attributes:
        file: the file it was read from.
        nodes: in order of computation.
        inputs, outputs: names of the graph's own.
        producer: tensor -> index of the node that computes it; consumers: tensor -> indices of those that use it.
        moving: tensors that depend on the graph's input; the others are constants and their shapes.
        measured: shapes among `moving`.
        settled: results that are computed from weights and shapes alone, e.g. the query of an attention pool.
        opset: of the default domain.
        batch: the only batch size that the input takes, 0 for any; input_kind: its element type (of onnx).
        precision: `fp32`, or `fp16` or `bf16` if the graph computes in it.
    """

    def __init__(self, file: Path, model: Any) -> None:
        self.file = file
        self.model = model
        self.nodes = [_node(node) for node in model.graph.node]
        self.weights: Dict[str, Any] = {one.name: one for one in model.graph.initializer}
        self.inputs = [one.name for one in model.graph.input if one.name not in self.weights]
        self.outputs = [one.name for one in model.graph.output]
        first = next(one.type.tensor_type for one in model.graph.input if one.name in self.inputs)
        self.batch = int(first.shape.dim[0].dim_value) if first.shape.dim else 0
        self.input_kind = int(first.elem_type)
        self.producer = {name: n for n, node in enumerate(self.nodes) for name in node.outputs if name}
        self.consumers: Dict[str, List[int]] = {}
        for number, node in enumerate(self.nodes):
            for name in node.inputs:
                self.consumers.setdefault(name, []).append(number)
        self.moving = self._moving()
        self.measured = self._measured()
        self.settled = self._settled()
        self.opset = max([one.version for one in model.opset_import if one.domain in ("", "ai.onnx")], default=0)
        self.precision = self._precision()

    def _moving(self) -> Set[str]:
        found = set(self.inputs)
        for node in self.nodes:
            # shapes depend only on the input's shape
            if node.op not in ("Shape", "Size", "ConstantOfShape") and found & set(node.inputs):
                found.update(name for name in node.outputs if name)
        return found

    def _measured(self) -> Set[str]:
        """Results that are the shape of a tensor that depends on the input."""
        shapes = [node for node in self.nodes if node.op in ("Shape", "Size") and self.moving & set(node.inputs)]
        return {name for node in shapes for name in node.outputs}

    def _settled(self) -> Set[str]:
        weights = {name for name, one in self.weights.items() if _floats(one)}
        found: Set[str] = set()
        for node, written in zip(self.nodes, self.model.graph.node):
            inputs = set(node.inputs)
            made = found & inputs or (weights & inputs and node.op not in SAME_VALUES)
            if made and node.op not in PLAIN:
                found.update(name for name in node.outputs if name)
            elif weights & inputs or any(_floats(one.t) for one in written.attribute):
                weights.update(node.outputs)
        return found - self.moving

    def _precision(self) -> str:
        from onnx import TensorProto

        held = [one.data_type for one in self.weights.values() if np.prod(one.dims) > 1]
        for kind, name in ((TensorProto.FLOAT16, "fp16"), (TensorProto.BFLOAT16, "bf16")):
            if 2 * held.count(kind) > len(held):
                return name
        return "fp32"

    def node_of(self, tensor: str) -> Node:
        """The node that computes a tensor."""
        return self.nodes[self.producer[tensor]]

    def around(self, tensor: str) -> Node:
        """The node that computes a tensor; for a weight the first one that takes it."""
        return self.nodes[self.producer[tensor] if tensor in self.producer else self.consumers[tensor][0]]

    @cached_property
    def named(self) -> bool:
        """Whether most computing nodes have their module's path."""
        found = [
            bool(node.module) for node in self.nodes if node.op in ("MatMul", "Gemm", "Conv", "LayerNormalization")
        ]
        return 2 * sum(found) > len(found)

    def leaves(self, tensor: str, module: str) -> bool:
        """Whether this tensor is used outside a module, i.e. is an output of the module."""
        others = [self.nodes[number].module for number in self.consumers.get(tensor, ())]
        return any(other != module and not other.startswith(f"{module}.") for other in others)

    def parents(self, tensor: str) -> List[str]:
        """Tensors that this one is computed from directly and that depend on the graph's input."""
        if tensor not in self.producer:
            return []
        return [name for name in self.node_of(tensor).inputs if name in self.moving]

    def between(self, tensor: str, known: Iterable[str]) -> List[int]:
        """Indices of the nodes that compute a tensor from known ones, in order."""
        stop, found, rest = set(known) - {tensor}, set(), [tensor]
        while rest:
            name = rest.pop()
            number = self.producer.get(name)
            if number is None or number in found:
                continue
            found.add(number)
            inputs = self.nodes[number].inputs
            rest += [one for one in inputs if (one in self.moving or one in self.settled) and one not in stop]
        return sorted(found)

    def closure(self, tensor: str, given: Iterable[str]) -> List[int]:
        """Indices of all nodes that compute a tensor from given ones, including constants and shapes, in order."""
        stop, found, rest = set(given) - {tensor}, set(), [tensor]
        while rest:
            number = self.producer.get(rest.pop())
            if number is not None and number not in found:
                found.add(number)
                rest += [name for name in self.nodes[number].inputs if name not in stop]
        return sorted(found)

    def constant(self, tensor: str) -> Optional[np.ndarray]:
        """A weight or constant as an array; None for a computed tensor."""
        from onnx import numpy_helper

        if tensor in self.weights:
            return numpy_helper.to_array(self.weights[tensor])
        number = self.producer.get(tensor)
        if number is None:
            return None
        node = self.nodes[number]
        if node.op == "Constant":
            held = self.model.graph.node[number].attribute[0]
            return numpy_helper.to_array(held.t) if held.HasField("t") else np.asarray(node.attributes.get(held.name))
        if node.op in (*SAME_VALUES, "Sqrt", "QuantizeLinear", "DequantizeLinear") and node.inputs:
            return self.constant(node.inputs[0]) if node.inputs[0] not in self.moving else None
        return None

    def segments(self) -> List[List[int]]:
        """Consecutive groups of nodes with limited weights, in order."""
        found: List[List[int]] = [[]]
        size = 0
        for number, node in enumerate(self.nodes):
            weight = sum(_bytes(self.weights[name]) for name in set(node.inputs) if name in self.weights)
            if found[-1] and (size + weight > SEGMENT_BYTES or len(found[-1]) >= SEGMENT_NODES):
                found.append([])
                size = 0
            found[-1].append(number)
            size += weight
        return found

    def root(self, tensor: str) -> str:
        """The tensor that a tensor is a reshaped or reordered copy of; itself if it is computed."""
        while tensor in self.producer:
            node = self.node_of(tensor)
            narrow = node.op == "Cast" and node.attributes.get("to") not in (None, self._float)
            if node.op not in SAME_VALUES or narrow or not node.inputs or node.inputs[0] not in self.moving:
                return tensor
            tensor = node.inputs[0]
        return tensor

    @property
    def _float(self) -> int:
        from onnx import TensorProto

        kinds = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
        return int(kinds[self.precision])

    def cut(self, numbers: Sequence[int], fed: Mapping[str, Tuple[int, Sequence[int]]], wanted: Iterable[str]) -> Any:
        """A separate model of some nodes.

        Args:
            fed: its inputs: onnx element type and shape.
            wanted: its outputs.
        """
        from onnx import helper

        used = {name for number in numbers for name in self.nodes[number].inputs}
        graph = helper.make_graph(
            [self.model.graph.node[number] for number in numbers],
            "segment",
            [helper.make_tensor_value_info(name, kind, list(shape)) for name, (kind, shape) in fed.items()],
            [helper.make_empty_tensor_value_info(name) for name in wanted],
            [self.weights[name] for name in sorted(used) if name in self.weights],
        )
        return helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)


def widened(model: Any, names: Sequence[str], ending: str) -> Any:
    """Add float32 copies of some results to a model, named with `ending`."""
    from onnx import TensorProto, helper

    for name in names:
        model.graph.node.append(helper.make_node("Cast", [name], [f"{name}{ending}"], to=TensorProto.FLOAT))
        model.graph.output.append(helper.make_empty_tensor_value_info(f"{name}{ending}"))
    return model


def load(file: Path) -> Graph:
    """Read an ONNX file; its functions are inlined, unnamed nodes get a name, unused ones are left out.

    Raises:
        InputError: it cannot be read.
    """
    import onnx

    try:
        model = onnx.load(str(file))
        if model.functions:
            from onnx import inliner

            model = inliner.inline_local_functions(model)
    except Exception as error:  # protobuf's, onnx's and the file system's own classes
        raise InputError(f"ONNX {file}: cannot be read ({one_line(error)}). Give another file") from error
    name_nodes(model)
    _remove_unused(model)
    return Graph(file, model)


def _remove_unused(model: Any) -> None:
    """Remove nodes that no output depends on: what they compute would pass as the counterpart of a tap."""
    used, kept = {one.name for one in model.graph.output}, []
    for node in reversed(model.graph.node):
        if used & set(node.output):
            kept.append(node)
            used.update(_node(node).inputs)
    if len(kept) < len(model.graph.node):
        del model.graph.node[:]
        model.graph.node.extend(reversed(kept))


def _node(node: Any) -> Node:
    inside = [name for one in node.attribute for graph in _graphs(one) for name in _outer(graph)]
    attributes = {one.name: _attribute(one) for one in node.attribute}
    return Node(
        name=node.name,
        op=node.op_type,
        module=module_path(node),
        inputs=tuple(dict.fromkeys([*(name for name in node.input if name), *inside])),
        outputs=tuple(node.output),
        attributes={name: value for name, value in attributes.items() if value is not None},
    )


def module_path(node: Any) -> str:
    """The module of a node according to its exporter: `visual.transformer.resblocks.3.attn`; empty for none.

    TorchScript's exporter writes `/visual/transformer/resblocks.3/attn/MatMul_1`, and `/blocks/blocks.3/attn` if blocks
    is a Sequential; dynamo's has a property with all scopes.
    """
    for entry in getattr(node, "metadata_props", ()):
        if entry.key == SCOPES:
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError):
                break
            return _clip(scopes[-2]) if len(scopes) > 1 else ""
    if not node.name.startswith("/"):
        return ""
    parts: List[str] = []
    for one in node.name.strip("/").split("/")[:-1]:
        if parts and one.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(one)
    return _clip(".".join(parts))


def _clip(path: str) -> str:
    """Remove `clip`, the name of the open_clip model in clipval's encoder."""
    return re.sub(r"^clip(\.|$)", "", path)


def _attribute(one: Any) -> Any:
    from onnx import AttributeProto, helper

    if one.type in (AttributeProto.INT, AttributeProto.INTS, AttributeProto.FLOAT, AttributeProto.FLOATS):
        return helper.get_attribute_value(one)
    if one.type == AttributeProto.STRING:
        return one.s.decode("utf-8", "replace")
    return None


def _graphs(attribute: Any) -> List[Any]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _outer(graph: Any) -> List[str]:
    """Tensors that a subgraph takes from its outer scope."""
    own = {one.name for one in (*graph.input, *graph.initializer)} | {name for n in graph.node for name in n.output}
    used = [name for node in graph.node for name in node.input if name]
    used += [name for node in graph.node for one in node.attribute for inner in _graphs(one) for name in _outer(inner)]
    return [name for name in used if name not in own]


def _floats(tensor: Any) -> bool:
    return tensor.data_type in FLOATS and np.prod(tensor.dims) > 1


def _bytes(tensor: Any) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64)) * 4
