"""The user's own ONNX files: another exporter, simplified, quantised, fp16, one batch size, more outputs.

They must compute what the tower computes, but need not look like clipval's export: names may differ, tokens may be
int32, pixels float16.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from clipval.errors import InputError, lfs_pointer, one_line, os_cause
from clipval.towers import Tower

# Operators with 8-bit activations; DequantizeLinear without them means that only weights are quantised.
INTEGER = (
    *("QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"),
    *("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm", "QAttention"),
)
WEIGHTS_ONLY = ("DequantizeLinear", "MatMulNBits")
FLOATS = ("tensor(float)", "tensor(float16)")
EMBEDDINGS = {"vision": ("image_embeds",), "text": ("text_embeds",)}  # names of transformers and optimum
START, END = 50, 200  # characters of onnxruntime's message that are shown
SAME = 1e-3  # elements of two unit vectors of one embedding, in fp16
# First bytes of what is given for an ONNX file by mistake, and what to do.
OTHER_FORMS = (
    (b"<", "a page of HTML or XML, probably of a failed download. Download the file again"),
    (b"{", "JSON text. Give the ONNX file next to it"),
    (b"PK\x03\x04", "a checkpoint of PyTorch or a zip archive. Export it, or unpack it"),
    (b"ORTM", "a model in ONNX Runtime's own format. Give the ONNX file that it was made from"),
)


def file(prefix: Path, tower: Tower) -> Path:
    """`PREFIX_vision.onnx` or `PREFIX_text.onnx`.

    Raises:
        InputError: there is no such file.
    """
    found = prefix.with_name(f"{prefix.name}_{tower.name}.onnx")
    if not found.is_file():
        what = "it is a folder" if prefix.is_dir() else "it is a file" if prefix.is_file() else f"no file {found}"
        folder = prefix if prefix.is_dir() else prefix.parent
        there = sorted(path.name for path in folder.glob("*.onnx"))
        listed = f"; {folder} has {', '.join(there[:3])}{', ...' if len(there) > 3 else ''}" if there else ""
        raise InputError(f"--onnx-prefix {prefix}: {what}; expected PREFIX_vision.onnx and PREFIX_text.onnx{listed}")
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
    """The batch size that a file requires; None for any, and for a file that has no such input."""
    graph = _graph(path)
    weights = {tensor.name for tensor in graph.initializer}  # old files list them as inputs too
    shapes = [one.type.tensor_type.shape.dim for one in graph.input if one.name not in weights]
    return next((shape[0].dim_value or None for shape in shapes if shape), None)


class Ports(NamedTuple):
    """Input and output of a file that may be a tower.

    Attributes:
        name, dtype: of the input; batch: rows that it requires, None for any number.
        outputs: names of those that may be the embedding, the likeliest first.
        more: the file has other outputs.
    """

    name: str
    dtype: np.dtype
    batch: Optional[int]
    outputs: Tuple[str, ...]
    more: bool


def ports(path: Path, tower: Tower, inputs: Sequence[Any], outputs: Sequence[Any]) -> Ports:
    """Find the tower's input and embedding among those of a session, each with `name`, `type` and `shape`.

    Raises:
        InputError: the file cannot be this tower; what it may be instead.
    """
    kinds = {"float32": ("float", "float16"), "int64": ("int64", "int32")}[tower.dtype]
    types = {f"tensor({kind})": np.dtype("float32" if kind == "float" else kind) for kind in kinds}
    fits = [one for one in inputs if one.type in types and sized(one.shape[1:], tower.row_shape)]
    wide = [
        one for one in outputs if one.type in FLOATS and len(one.shape) == 2 and sized(one.shape[1:], [tower.width])
    ]
    if len(inputs) != 1 or not fits or not wide:
        wanted = f"takes {' or '.join(kinds)} [batch, {', '.join(map(str, tower.row_shape))}]"
        raise InputError(
            f"ONNX {path}: takes {_listed(inputs)} and gives {_listed(outputs)}; {_instead(tower, inputs, outputs)}. "
            f"The {tower.name} tower {wanted} and gives float [batch, {tower.width}]"
        )
    known = (tower.output_name, *EMBEDDINGS.get(tower.name, ()))
    named = sorted((one.name for one in wide if one.name in known), key=known.index)
    first = fits[0].shape[0]
    batch = first if isinstance(first, int) else None
    found = tuple(named[:1] or (one.name for one in wide))
    return Ports(fits[0].name, types[fits[0].type], batch, found, len(outputs) > 1)


def embedding_of(path: Path, tower: Tower, given: Dict[str, np.ndarray]) -> str:
    """The embedding among outputs of the same width, by what they give for one batch.

    The same vectors with and without unit length are one embedding, and the one of unit length is taken.

    Raises:
        InputError: they differ in direction.
    """
    lengths = {name: np.linalg.norm(np.asarray(rows, np.float64), axis=1) for name, rows in given.items()}
    units = {name: np.asarray(rows, np.float64) / lengths[name][:, None] for name, rows in given.items()}
    first, *others = given
    if not all(np.abs(units[first] - units[name]).max() < SAME for name in others):
        raise InputError(
            f"ONNX {path}: the outputs {', '.join(given)} are each {tower.width} wide and differ, so any may be the "
            f"embedding; name it {tower.output_name}"
        )
    return min(given, key=lambda name: float(np.abs(lengths[name] - 1).max()))


def sized(found: Sequence[object], wanted: Sequence[int]) -> bool:
    """Whether a shape can be the wanted one; symbolic axes fit any size."""
    return len(found) == len(wanted) and all(one == size for one, size in zip(found, wanted) if isinstance(one, int))


def _listed(nodes: Sequence[Any]) -> str:
    shapes = [(one, ", ".join(map(str, one.shape))) for one in nodes]
    listed = [f"{one.name} {one.type[len('tensor(') : -1]} [{shape}]" for one, shape in shapes]
    return " and ".join(listed) or "nothing"


def _instead(tower: Tower, inputs: Sequence[Any], outputs: Sequence[Any]) -> str:
    """What a file may be that is not this tower, and what to do."""
    pictures = [one for one in inputs if len(one.shape) == 4]
    texts = [one for one in inputs if "int" in one.type and len(one.shape) == 2]
    own, other = (pictures, texts) if tower.row_shape[1:] else (texts, pictures)
    if own and other:
        return "it holds both towers; export each to a file of its own"
    if other:
        return "it looks like the other tower, so the two files may be swapped"
    if len(own) == 1 < len(inputs):
        return "export it with one input alone, the others as constants"
    if len(own) > 1:
        return f"export it without {', '.join(one.name for one in own[1:])}"
    if own and "uint8" in own[0].type:
        return "its preprocessing is inside it; export the tower alone"
    if any("bfloat16" in one.type for one in (*inputs, *outputs)):
        return "numpy has no bfloat16; export it with float input and output"
    if own and len(outputs) == 1 and len(outputs[0].shape) == 3:
        return "it gives one vector for each token or patch; export it with its pooling and projection"
    return "it is of another model or size"


@lru_cache(maxsize=None)
def precision(path: Path) -> str:
    """The precision of a file by its operators and weights: `fp32`, `fp16`, `bf16`, `w8a16` or `w8a8`.

    `w8a16` is any file in which only weights have fewer bits.
    """
    from onnx import TensorProto

    graph = _graph(path)
    operators = {node.op_type for node in graph.node}
    if operators & set(INTEGER) and not _wide_activations(graph):
        return "w8a8"
    if operators & {*INTEGER, *WEIGHTS_ONLY}:
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


def _wide_activations(graph: Any) -> bool:
    """Whether activations are quantised to 16 bits alone, by the zero points that give QuantizeLinear its type."""
    from onnx import TensorProto

    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in INTEGER]
    points = [types.get(node.input[2]) if len(node.input) > 2 else None for node in nodes]
    wide = (TensorProto.UINT16, TensorProto.INT16)
    return all(node.op_type == "QuantizeLinear" and point in wide for node, point in zip(nodes, points))


def why_not(path: Path, error: Exception, version: str) -> str:
    """Why onnxruntime does not load a file, and what to do, from the file and from what onnxruntime said."""
    lost = lfs_pointer(path) or _lost_data(path)
    if lost:
        return lost
    said, what = " ".join(str(error).split()), f"Export it again, or use another onnxruntime than {version}"
    if "IR version" in said or "is under development" in said:  # a newer IR or opset than it knows
        what = f"It is newer than onnxruntime {version}; use a newer one, or export it with a lower opset"
    elif "NOT_IMPLEMENTED" in said:
        what = f"onnxruntime {version} lacks this operator for its types; use a newer one"
        if "ArgMax" in said:  # the recipe's own export finds the end token this way
            what = (
                f"onnxruntime {version} has no ArgMax on int64, 1.20 and newer do; or export it with clipval export, "
                "which pools int32 tokens"
            )
    elif "tensor(bfloat16)" in said:
        what = f"onnxruntime {version} lacks this operator in bfloat16 on this provider; export it in fp16 or fp32"
    elif "Type Error" in said and "tensor(float16)" in said and "Cast" in said:
        # known of onnxconverter_common 1.16: its float16 changes what a Cast gives, and not its attribute `to`
        what = "A converter to fp16 left a Cast to another type; convert it again with another tool"
    # it puts the cause last, after its own path
    cause = said if len(said) < 2 * END else f"{said[:START]} ... {said[-END:]}"
    return f"onnxruntime cannot load it ({cause}). {what}"


def _lost_data(path: Path) -> str:
    try:
        return lost_data(path, outside(_graph(path)))
    except InputError:
        return ""


def lost_data(path: Path, wanted: Dict[str, int]) -> str:
    """The message for a file whose weights are in other files that are missing or cut off; "" for any other.

    Args:
        wanted: see `outside`.
    """
    for name, size in sorted(wanted.items()):
        file = path.parent / name
        if Path(name).is_absolute() or ".." in Path(name).parts:  # onnxruntime refuses it too
            return f"its weights are in {name!r}, expected a file in the same folder or below"
        if not file.is_file():
            return f"its weights are in {name}, which is missing; copy it there too"
        if lfs_pointer(file):
            return f"its weights are in {name}: {lfs_pointer(file)}"
        held = file.stat().st_size
        if held < size:
            return f"its weights are in {name}, which is cut off, {held} of {size} bytes; copy it again"
    return ""


def files(path: Path) -> List[Path]:
    """An ONNX file, and those of its weights that are outside it.

    Raises:
        InputError: it is no ONNX file.
    """
    return [path, *(path.parent / name for name in sorted(outside(_graph(path))))]


def outside(graph: Any) -> Dict[str, int]:
    """Files with a graph's weights by name relative to its own file, and the bytes that each must have at least.

    Weights may also be attributes of Constant nodes (optimum's export converts those too).
    """
    ends: Dict[str, int] = {}
    for tensor in _tensors(graph):
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place.get("location"):
            end = int(place.get("offset") or 0) + int(place.get("length") or 0)
            ends[place["location"]] = max(end, ends.get(place["location"], 0))
    return ends


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from [attribute.t] if attribute.HasField("t") else attribute.tensors
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _tensors(inner)


def unreadable(path: Path, error: Exception) -> str:
    """Why a file is no ONNX model: what it is instead, by its first bytes."""
    if lfs_pointer(path):
        return lfs_pointer(path)
    try:
        with open(path, "rb") as stream:
            head = stream.read(64).lstrip()
    except OSError as other:
        return os_cause(other)
    known = (what for start, what in OTHER_FORMS if head.startswith(start))
    return next(known, f"not an ONNX model, damaged or cut off ({one_line(error)}). Copy or export it again")


@lru_cache(maxsize=2)
def _graph(path: Path) -> Any:
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's and the file system's own classes
        raise InputError(f"ONNX {path}: {unreadable(path, error)}") from error
    if not graph.node:
        raise InputError(f"ONNX {path}: it has no operators, so it is empty or cut off. Copy or export it again")
    return graph
