"""Towers of the contract as ONNX files of a few hundred kilobytes, for tests of compiling and running."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, Tuple

import numpy as np

from clipval.towers import Tower

START, END = 49406, 49407


def write(file: Path, tower: Tower, *, opset: int = 14, domain: str = "", recipe: bool = False) -> Path:
    """Write a tower: the same inputs and outputs as the real one, and ArgMax pooling in the text tower.

    Args:
        recipe: as the recipe's own export has it: exp(logit_scale) is a second output with a number for a name, the
            axes of the embedding have names, its length is expanded by a shape, and ArgMax takes int64.
    """
    from onnx import TensorProto, helper, save

    nodes, weights = _image() if tower.dtype == "float32" else _text()
    nodes += [
        helper.make_node("ReduceL2", ["raw"], ["length"], axes=[-1], keepdims=1),
        helper.make_node("Div", ["raw", "length"], [tower.output_name], name="normalise", domain=domain),
    ]
    outputs = [helper.make_tensor_value_info(tower.output_name, TensorProto.FLOAT, ["batch", tower.width])]
    if recipe:
        nodes = [node for node in nodes if node.output[0] != "narrow"]
        for node in nodes:
            node.input[:] = ["text" if name == "narrow" else name for name in node.input]
        nodes[-1].input[1] = "expanded"
        nodes[-1:-1] = [
            helper.make_node("Shape", ["raw"], ["shape"]),
            helper.make_node("Expand", ["length", "shape"], ["expanded"]),
        ]
        nodes.append(helper.make_node("Constant", [], ["1775"], value_float=14.28))
        outputs = [helper.make_tensor_value_info(tower.output_name, TensorProto.FLOAT, ["-1", "axis_1"])]
        outputs.append(helper.make_tensor_value_info("1775", TensorProto.FLOAT, []))
    kind = TensorProto.FLOAT if tower.dtype == "float32" else TensorProto.INT64
    graph = helper.make_graph(
        nodes,
        tower.name,
        [helper.make_tensor_value_info(tower.input_name, kind, ["batch", *tower.row_shape])],
        outputs,
        weights,
    )
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    save(helper.make_model(graph, opset_imports=imports, ir_version=8), str(file))
    return file


def _weights(seed: int, *shape: int) -> Any:
    from onnx import numpy_helper

    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(values, f"weights{seed}")


def _image() -> Tuple[List[Any], List[Any]]:
    from onnx import helper

    pool = helper.make_node("AveragePool", ["image"], ["patches"], kernel_shape=[32, 32], strides=[32, 32])
    flat = helper.make_node("Flatten", ["patches"], ["flat"])
    return [pool, flat, helper.make_node("MatMul", ["flat", "weights1"], ["raw"])], [_weights(1, 147, 512)]


def _text() -> Tuple[List[Any], List[Any]]:
    """The embedding of the largest token's predecessors: the end token is pooled, as in CLIP."""
    from onnx import TensorProto, helper, numpy_helper

    scale = numpy_helper.from_array(np.float32(1e-4), "scale")
    nodes = [
        helper.make_node("Cast", ["text"], ["narrow"], to=TensorProto.INT32),
        helper.make_node("ArgMax", ["narrow"], ["end"], axis=1, keepdims=0),
        helper.make_node("Gather", ["weights2", "end"], ["position"]),
        helper.make_node("Cast", ["text"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "scale"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "weights3"], ["words"]),
        helper.make_node("Add", ["words", "position"], ["raw"]),
    ]
    return nodes, [_weights(2, 77, 512), _weights(3, 77, 512), scale]


def rows(tower: Tower, count: int, seed: int = 0) -> np.ndarray:
    """Inputs of the contract: pixels about zero, or captions of different lengths."""
    rng = np.random.default_rng(seed)
    if tower.dtype == "float32":
        return rng.standard_normal(tower.shape(count)).astype(np.float32)
    found = np.zeros(tower.shape(count), np.int64)
    for row in found:
        words = rng.integers(1, 60)
        row[0], row[1 : 1 + words], row[1 + words] = START, rng.integers(300, 40000, words), END
    return found
