"""fp16 and bf16 arithmetic for ONNX Runtime: weights rounded, and results of operators rounded on the way."""

from __future__ import annotations

from typing import Any, Dict, List

import numpy as np
from onnx import TensorProto, helper, numpy_helper

ROUNDED = ("MatMul", "Gemm", "Conv", "Add", "Sub", "Mul", "Div", "Softmax", "LayerNormalization", "ReduceMean", "Sqrt")
LARGEST = 65504.0  # an NPU in saturation mode clamps to it where fp16 would overflow
LOW, HIGH = "simulated_low", "simulated_high"


def round_model(model: Any, mode: str, kept: Any = ()) -> None:
    """Compute as a precision mode of atc does; integers stay what they are.

    What is in `kept`, names of nodes or `OpType::<type>`, keeps its precision. `cube_fp16in_fp32out` rounds
    weights only; a mode with bf16 in its name rounds to bfloat16.
    """
    if mode in ("force_fp32", "must_keep_origin_dtype", "origin"):
        return
    kind = TensorProto.BFLOAT16 if "bf16" in mode or "bfloat16" in mode else TensorProto.FLOAT16
    own = {node.name for node in model.graph.node if {node.name, f"OpType::{node.op_type}"} & set(kept)}
    spared = {name for node in model.graph.node if node.name in own for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.name not in spared:
            _round(tensor, kind)
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                _round(attribute.t, kind)
    if mode != "cube_fp16in_fp32out":
        _round_results(model, kind, own)


def _round(tensor: Any, kind: int) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        exact = np.array(numpy_helper.to_array(tensor))
        if kind == TensorProto.BFLOAT16:  # the upper half of a float32, rounded
            values = ((exact.view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)
        else:
            values = np.clip(exact, -LARGEST, LARGEST).astype(np.float16).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values.reshape(exact.shape), tensor.name))


def _round_results(model: Any, kind: int, own: Any = ()) -> None:
    """After each arithmetic operator: clamp, to 16 bits and back."""
    kinds = _kinds(model)
    bounds = [numpy_helper.from_array(np.float32(value), name) for name, value in ((LOW, -LARGEST), (HIGH, LARGEST))]
    model.graph.initializer.extend(bounds)
    nodes: List[Any] = []
    for node in model.graph.node:
        nodes.append(node)
        name = node.output[0]
        if node.name not in own and node.op_type in ROUNDED and kinds.get(name) == TensorProto.FLOAT:
            node.output[0] = f"{name}_exact"
            clip = helper.make_node("Clip", [f"{name}_exact", LOW, HIGH], [f"{name}_clamped"])
            half = helper.make_node("Cast", [f"{name}_clamped"], [f"{name}_half"], to=kind)
            back = helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT)
            nodes += [clip, half, back]
    _replace(model, nodes)


def _kinds(model: Any) -> Dict[str, int]:
    values = (*model.graph.value_info, *model.graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def damage(model: Any) -> None:
    """Halve the weights of one matrix of the middle block, as a compiler with a fault would."""
    used = [node for node in model.graph.node if node.name.endswith("resblocks.1/mlp/c_fc/MatMul")]
    for tensor in model.graph.initializer:
        if any(tensor.name in node.input for node in used):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / 2, tensor.name))


def collapse_argmax(model: Any) -> None:
    """Compare token ids as fp16: 49406 and 49407 both become 49408, and the first of them wins."""
    nodes: List[Any] = []
    for number, node in enumerate(model.graph.node):
        if node.op_type == "ArgMax":
            half, wide = f"argmax_half_{number}", f"argmax_wide_{number}"
            nodes.append(helper.make_node("Cast", [node.input[0]], [half], to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("Cast", [half], [wide], to=TensorProto.FLOAT))
            node.input[0] = wide
        nodes.append(node)
    _replace(model, nodes)


def half_outputs(model: Any) -> None:
    """`--output_type=FP16`: outputs leave as float16."""
    nodes = list(model.graph.node)
    for output in model.graph.output:
        name = output.name
        for node in nodes:
            node.output[:] = [f"{name}_wide" if one == name else one for one in node.output]
            node.input[:] = [f"{name}_wide" if one == name else one for one in node.input]
        nodes.append(helper.make_node("Cast", [f"{name}_wide"], [name], to=TensorProto.FLOAT16))
        output.type.tensor_type.elem_type = TensorProto.FLOAT16
    _replace(model, nodes)


def _replace(model: Any, nodes: List[Any]) -> None:
    del model.graph.node[:]
    model.graph.node.extend(nodes)
