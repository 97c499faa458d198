"""The user's own ONNX files: another exporter, simplified, quantised, fp16, one batch size, more outputs.

They must compute what the tower computes, but need not look like clipval's export: names may differ, tokens may be
int32, pixels float16.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Optional, Sequence, Tuple

from clipval.errors import InputError, lfs_pointer, one_line
from clipval.towers import Tower

# Operators with 8-bit activations; DequantizeLinear without them means that only weights are quantised.
INTEGER = (
    *("QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"),
    *("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm", "QAttention"),
)
WEIGHTS_ONLY = ("DequantizeLinear", "MatMulNBits")


def file(prefix: Path, tower: Tower) -> Path:
    """`PREFIX_vision.onnx` or `PREFIX_text.onnx`.

    Raises:
        InputError: there is no such file.
    """
    found = prefix.with_name(f"{prefix.name}_{tower.name}.onnx")
    if not found.is_file():
        raise InputError(f"--onnx-prefix {prefix}: no file {found}; expected PREFIX_vision.onnx and PREFIX_text.onnx")
    return found


def sizes(prefix: Path, towers: Sequence[Tower]) -> Optional[Tuple[int, ...]]:
    """The batch size that the files were exported with; None if they take any.

    Raises:
        InputError: the two towers have different ones.
    """
    found = {batch for tower in towers if (batch := batch_size(file(prefix, tower))) is not None}
    if len(found) > 1:
        raise InputError(f"--onnx-prefix {prefix}: towers of batch sizes {sorted(found)}, expected one for both")
    return tuple(found) or None


@lru_cache(maxsize=None)
def batch_size(path: Path) -> Optional[int]:
    """The batch size that a file requires; None for any."""
    first = _graph(path).input[0].type.tensor_type.shape.dim[0]
    return first.dim_value or None


@lru_cache(maxsize=None)
def precision(path: Path) -> str:
    """The precision of a file by its operators and weights: `fp32`, `fp16`, `bf16`, `w8a16` or `w8a8`.

    `w8a16` is any file in which only weights have fewer bits.
    """
    from onnx import TensorProto

    graph = _graph(path)
    operators = {node.op_type for node in graph.node}
    if operators & set(INTEGER):
        return "w8a8"
    if operators & set(WEIGHTS_ONLY):
        return "w8a16"
    elements = {"fp32": 0, "fp16": 0, "bf16": 0}
    names = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
    for tensor in graph.initializer:
        if tensor.data_type in names:
            size = 1
            for edge in tensor.dims:
                size *= edge
            elements[names[tensor.data_type]] += size
    return max(elements, key=lambda name: elements[name])


def why_not(path: Path, error: Exception, version: str) -> str:
    """Why onnxruntime does not load a file, and what to do, from the file and from what onnxruntime said."""
    lost = lfs_pointer(path) or _lost_data(path)
    if lost:
        return lost
    said, what = str(error), "Export it again"
    if "NOT_IMPLEMENTED" in said:
        what = f"onnxruntime {version} lacks this operator for its types; use a newer one"
        if "ArgMax" in said:  # the recipe's own export finds the end token this way
            what = (
                f"onnxruntime {version} has no ArgMax on int64, 1.20 and newer do; or export it with clipval export, "
                "which pools int32 tokens"
            )
    elif "Type Error" in said and "float16" in said and "Cast" in said:
        # known of onnxconverter_common 1.16: its float16 changes what a Cast gives, and not its attribute `to`
        what = "A converter to fp16 left a Cast to another type; convert it again with another tool"
    return f"onnxruntime cannot load it ({one_line(error)}). {what}"


def _lost_data(path: Path) -> str:
    """The message for a file whose weights are in other files that are not next to it; "" for any other."""
    try:
        graph = _graph(path)
    except InputError:
        return ""
    names = {entry.value for one in graph.initializer for entry in one.external_data if entry.key == "location"}
    lost = sorted(name for name in names if not (path.parent / name).is_file())
    return f"its weights are in {lost[0]}, which is missing; copy it there too" if lost else ""


@lru_cache(maxsize=2)
def _graph(path: Path) -> Any:
    import onnx

    try:
        return onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's and the file system's own classes
        cause = lfs_pointer(path) or f"not a valid model ({one_line(error)})"
        raise InputError(f"ONNX {path}: {cause}") from error
