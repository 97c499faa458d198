"""The noise of a precision: the same graph with weights and every result rounded to 16 bits and back, on the CPU.

fp16 clamps at 65504, like an NPU in saturation mode (which aclruntime sets), whereas plain fp16 overflows.
"""

from __future__ import annotations

from typing import Any, List, Set

import numpy as np

LARGEST = 65504.0
PRECISIONS = ("fp16", "bf16")
INTEGERS = ("Shape", "Size", "ArgMax", "ArgMin", "NonZero", "Constant", "ConstantOfShape", "Range")


class Twin:
    """Changes parts of a graph so that they compute in `precision`; see `clipval.diagnose.evaluate.tensors`.

    Args:
        precision: `fp16` or `bf16`.
        floats: names of float32 tensors; rounding anything else would change what the graph does.
    """

    def __init__(self, precision: str, floats: Set[str]) -> None:
        self.precision = precision
        self.floats = floats

    def __call__(self, model: Any) -> Any:
        from onnx import TensorProto, helper, numpy_helper

        kind = TensorProto.FLOAT16 if self.precision == "fp16" else TensorProto.BFLOAT16
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                exact = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(rounded(exact, self.precision), tensor.name))
        bounds = [helper.make_node("Constant", [], [f"twin{sign}"], value_float=sign * LARGEST) for sign in (-1, 1)]
        nodes: List[Any] = bounds
        for node in model.graph.node:
            nodes.append(node)
            for place, name in enumerate(node.output):
                if name in self.floats and node.op_type not in INTEGERS:
                    node.output[place] = f"{name}:exact"
                    clip = helper.make_node("Clip", [f"{name}:exact", "twin-1", "twin1"], [f"{name}:clamped"])
                    half = helper.make_node("Cast", [f"{name}:clamped"], [f"{name}:half"], to=kind)
                    nodes += [clip, half, helper.make_node("Cast", [f"{name}:half"], [name], to=TensorProto.FLOAT)]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        return model


def overflows(truth: np.ndarray, precision: str) -> bool:
    """Whether values are beyond fp16's range, which is a fault of its own, not rounding noise."""
    finite = truth[np.isfinite(truth)]
    return precision == "fp16" and bool(finite.size) and float(np.abs(finite).max()) > LARGEST


def rounded(values: np.ndarray, precision: str) -> np.ndarray:
    """float32 values rounded to fp16 (clamped) or bf16, as float32."""
    if precision == "fp16":
        return np.asarray(np.clip(values, -LARGEST, LARGEST), np.float16).astype(np.float32)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    kept = ((bits + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isfinite(values), kept, values).astype(np.float32).reshape(values.shape)
