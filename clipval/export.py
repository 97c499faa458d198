"""Tower -> ONNX with one input, one output and a dynamic batch. The only module that imports onnx."""

from __future__ import annotations

import inspect
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List

import numpy as np

from clipval import environment
from clipval.backends import given
from clipval.errors import InputError, UsageError
from clipval.model import Model, encoder
from clipval.towers import TEXT, VISION, Tower

# 14 is the lowest that torch 2's exporter supports (scaled_dot_product_attention), and keeps LayerNormalization
# decomposed as in the recipe's opset 11 graphs, which atc is known to compile. ATC documents ONNX opsets 11 to 18.
OPSET = 14
OPSETS = range(14, 19)
BATCH = "batch"
LARGE = 1 << 16  # elements of a weight from which on it counts for memory
ALIGNMENT = 4096  # bytes: the page size, so that a runtime can map each tensor


def export(model: Model, tower: Tower, file: Path, *, opset: int = OPSET, metadata: Dict[str, str]) -> None:
    """Write one tower as ONNX.

    The graph normalises its output, as the recipe's does; `clipval.normalized` in the file's metadata says so.

    Args:
        file: written; its folder must exist.
        opset: 14 to 18.
        metadata: more properties for the file: hash of the weights, model name, versions.

    Raises:
        UsageError: the opset is out of range.
        InputError: the exporter failed or its graph breaks the contract.
    """
    import torch

    if opset not in OPSETS:
        raise UsageError(
            f"opset {opset}: torch 2 exports this model from {OPSETS[0]} on, and ATC takes up to {OPSETS[-1]}"
        )
    example = torch.from_numpy(example_rows(tower, 2))
    options: Dict[str, Any] = {}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False  # TorchScript's graphs are the ones that atc and onnxruntime 1.19 take
    with warnings.catch_warnings(), _without_fused_attention(), tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        warnings.simplefilter("ignore")
        traced = Path(scratch) / file.name
        environment.release_memory()
        with _other_tower_on_disk(model.module, tower, Path(scratch)):
            torch.onnx.export(
                encoder(model, tower),
                (example,),
                str(traced),
                input_names=[tower.input_name],
                output_names=[tower.output_name],
                dynamic_axes={tower.input_name: {0: BATCH}, tower.output_name: {0: BATCH}},
                opset_version=opset,
                **options,
            )
            environment.release_memory()
            _finish(traced, file, tower, {**_logits(model), **metadata})
            environment.release_memory()
    check(file, tower)
    environment.release_memory()


@contextmanager
def _other_tower_on_disk(module: Any, tower: Tower, folder: Path) -> Iterator[None]:
    """Keep the large weights of the other tower in a file; the exporter needs room for three copies of this one's."""
    import torch

    named = [(name.startswith("visual."), one) for name, one in module.named_parameters()]
    others = [one for is_vision, one in named if is_vision != (tower.name == "vision")]
    moved = [one for one in others if one.numel() >= LARGE and one.dtype == torch.float32 and one.is_contiguous()]
    shapes = [one.shape for one in moved]
    with open(folder / "other-tower", "wb+") as stream:
        for one in moved:
            stream.write(memoryview(one.detach().numpy()).cast("B"))
        for one in moved:
            one.data = torch.empty(0)
        try:
            yield
        finally:
            stream.seek(0)
            for one, shape in zip(moved, shapes):
                one.data = torch.empty(shape)  # aligned as torch does it, on which the last bits may depend
                room = memoryview(one.detach().numpy()).cast("B")
                if stream.readinto(room) != len(room):  # type: ignore[attr-defined]
                    raise OSError(f"{stream.name}: cut short")


def origin(model: str, weights: str) -> Dict[str, str]:
    """Metadata of a file: model name, sha256 of the weights, and the library versions."""
    versions = str(environment.library_versions())
    return {"clipval.weights": weights, "clipval.model": model, "clipval.versions": versions}


def _logits(model: Model) -> Dict[str, str]:
    """Scale and bias of logits, cosine * scale + bias, which the embeddings do not contain."""
    scale, bias = model.module.logit_scale.exp().item(), getattr(model.module, "logit_bias", None)
    return {"clipval.logit_scale": repr(scale), **({} if bias is None else {"clipval.logit_bias": repr(bias.item())})}


def _finish(traced: Path, file: Path, tower: Tower, metadata: Dict[str, str]) -> None:
    """Add the metadata, and merge the weights that the exporter wrote to many files into one."""
    import onnx

    graph = onnx.load(str(traced), load_external_data=False)
    name_nodes(graph)
    _fix_output_shape(graph, tower)
    for name, value in {**metadata, "clipval.normalized": "true", "clipval.tower": tower.name}.items():
        entry = graph.metadata_props.add()
        entry.key, entry.value = name, value
    outside = [tensor for tensor in graph.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        _gather(outside, traced.parent, file.with_name(f"{file.name}.data"))
    onnx.save(graph, str(file))


def name_nodes(model: Any) -> int:
    """Name unnamed nodes as the graph engine would, `<op_type>_<k>`; returns how many there were.

    `k` counts unnamed nodes (GE `parser/onnx/onnx_parser.cc`, UpdateNodeNameAndOpType), so an OM compiled from the
    unchanged file has the same names.
    """
    taken = {node.name for node in model.graph.node}
    count = 0
    for node in model.graph.node:
        if not node.name:
            name = f"{node.op_type}_{count}"
            node.name = name if name not in taken else f"{name}_unnamed"
            count += 1
    return count


def _gather(tensors: List[Any], folder: Path, data: Path) -> None:
    """Copy external tensors into one file and update their locations.

    torch writes one file per tensor if a model exceeds protobuf's 2 GiB. Each is deleted once it is copied, so that
    only one tensor at a time is on the disk twice.
    """
    from onnx.external_data_helper import set_external_data

    with open(data, "wb") as gathered:
        for tensor in tensors:
            part = folder / next(entry.value for entry in tensor.external_data if entry.key == "location")
            gathered.seek(-(-gathered.tell() // ALIGNMENT) * ALIGNMENT)
            offset = gathered.tell()
            with open(part, "rb") as stream:
                shutil.copyfileobj(stream, gathered, 1 << 24)
            length = gathered.tell() - offset
            part.unlink()
            tensor.raw_data = b""  # `set_external_data` requires the field; the bytes are in the file
            set_external_data(tensor, data.name, offset, length)
            tensor.ClearField("raw_data")


def data_files(file: Path) -> List[Path]:
    """Files with the external data of an ONNX file, in order.

    Raises:
        InputError: the file cannot be read, or one of them is missing or cut off.
    """
    import onnx

    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:
        raise _unreadable(file, error) from error
    names = given.outside(model.graph)
    lost = given.lost_data(file, names)
    if lost:
        raise InputError(f"ONNX {file}: {lost}")
    return [file.parent / name for name in sorted(names)]


def copy(file: Path, target: Path) -> None:
    """Copy an ONNX file with its external data, which is renamed with it if it is one file."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    outside = data_files(file)
    if not outside:
        shutil.copyfile(file, target)
        return
    model = onnx.load(str(file), load_external_data=False)
    for part in outside:
        name = f"{target.name}.data" if len(outside) == 1 else f"{target.name}.{part.name}"
        shutil.copyfile(part, target.with_name(name))
        for tensor in model.graph.initializer:
            for entry in tensor.external_data if uses_external_data(tensor) else ():
                if entry.key == "location" and entry.value == part.name:
                    entry.value = name
    onnx.save(model, str(target))


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """Stop torch from fusing the attention of the vision tower, which no ONNX opset can express.

    torch 2.1 and 2.2 have no switch for it (`torch.backends.mha`), but do not use it while gradients are recorded.
    """
    import torch

    switch: Any = getattr(torch.backends, "mha", None)
    if switch is None:
        with torch.enable_grad():  # type: ignore[no-untyped-call]
            yield
        return
    before = switch.get_fastpath_enabled()
    switch.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        switch.set_fastpath_enabled(before)


def example_rows(tower: Tower, count: int) -> np.ndarray:
    """Inputs of the right shape, dtype and range; the token ids are in every vocabulary."""
    if tower.dtype == "float32":
        return np.zeros(tower.shape(count), np.float32)
    rows = np.zeros(tower.shape(count), np.int64)
    rows[:, :3] = (2, 1, 3)  # start, a word and the highest id, where CLIP pools
    return rows


def check(file: Path, tower: Tower) -> None:
    """Check a file against the contract: onnx.checker, names, dtypes, shapes, opset, and ArgMax on int32.

    Raises:
        InputError: what breaks the contract, with found and expected.
    """
    import onnx

    try:
        onnx.checker.check_model(str(file))
        graph = onnx.load(str(file), load_external_data=False).graph
    except Exception as error:  # protobuf's, onnx's and the file system's own classes
        raise _unreadable(file, error) from error
    kinds = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
    found = [_describe(value) for value in (*graph.input, *graph.output)]
    wanted = [
        (tower.input_name, kinds[tower.dtype], [BATCH, *tower.row_shape]),
        (tower.output_name, onnx.TensorProto.FLOAT, [BATCH, tower.width]),
    ]
    if found != wanted or len(graph.output) != 1:
        raise InputError(f"ONNX {file}: inputs and outputs are {found}, the {tower.name} tower needs {wanted}")
    _check_argmax(file, graph)


def _unreadable(file: Path, error: Exception) -> InputError:
    """Why an ONNX file cannot be read, and if possible what it is instead."""
    if not file.is_file():
        what = "it is a folder; give the file" if file.is_dir() else "no such file"
        return InputError(f"ONNX {file}: {what}")
    return InputError(f"ONNX {file}: {given.unreadable(file, error)}")


def read_metadata(file: Path) -> Dict[str, str]:
    """Properties of an ONNX file: `clipval.weights`, `clipval.normalized`, ...

    Raises:
        InputError: the file cannot be read.
    """
    import onnx

    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:
        raise _unreadable(file, error) from error
    opset = max(entry.version for entry in model.opset_import)
    return {**{entry.key: entry.value for entry in model.metadata_props}, "opset": str(opset)}


def tower_of(file: Path) -> Tower:
    """The tower in an ONNX file, with the file's own sizes.

    Raises:
        InputError: the file cannot be read, or its input or output is neither tower's.
    """
    import onnx
    import onnx.shape_inference

    read_metadata(file)
    model = onnx.load(str(file), load_external_data=False)
    name, _, shape = _describe(model.graph.input[0])
    tower = next((tower for tower in (VISION, TEXT) if tower.input_name == name), None)
    if tower is None:
        raise InputError(
            f"ONNX {file}: input is {name!r}, expected {VISION.input_name!r} or {TEXT.input_name!r}; "
            "validate files of other exporters with --onnx-prefix or compare"
        )
    # torch's normalize expands by a shape of its own, whose values must be followed; newer onnx does so unasked
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    widths = [_width(found.graph, tower) for found in (model, inferred)]
    width = next((width for width in widths if width), None)
    if width is None:
        raise InputError(f"ONNX {file}: has no output {tower.output_name!r} of a known width")
    return replace(tower, row_shape=tuple(shape[1:]), width=width)


def _width(graph: Any, tower: Tower) -> int:
    """Width of the embedding output; 0 if there is none or the axis is symbolic."""
    shapes = [shape for name, _, shape in map(_describe, graph.output) if name == tower.output_name]
    return shapes[0][-1] if shapes and shapes[0] and isinstance(shapes[0][-1], int) else 0


def operations(file: Path) -> float:
    """Floating-point operations of the matrix products and convolutions of one sample, a multiply-add counted as two.

    Products whose shapes cannot be inferred are left out, so this is a lower bound.
    """
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        for first in value.type.tensor_type.shape.dim[:1]:  # the recipe's second output is a scalar
            first.dim_value = 1
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    shapes.update({tensor.name: list(tensor.dims) for tensor in graph.initializer})
    total = 0.0
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            weights, out = (shapes.get(name) or [0] for name in (node.input[1], node.output[0]))
            transposed = any(one.name == "transB" and one.i for one in node.attribute)
            summed = weights[1:] if node.op_type == "Conv" or transposed else weights[-2:-1]
            total += 2.0 * float(np.prod(out)) * float(np.prod(summed))
    return total


def _describe(value: Any) -> Any:
    shape: List[Any] = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
    return value.name, value.type.tensor_type.elem_type, shape


def _fix_output_shape(model: Any, tower: Tower) -> None:
    """Set widths that the exporter left symbolic from the contract."""
    (output,) = model.graph.output
    axes = output.type.tensor_type.shape.dim
    axes[0].dim_param = BATCH
    axes[1].dim_value = tower.width


def _check_argmax(file: Path, graph: Any) -> None:
    import onnx

    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type != "ArgMax":
            continue
        source = producers.get(node.input[0])
        kind = next((a.i for a in source.attribute if a.name == "to"), None) if source is not None else None
        if source is None or source.op_type != "Cast" or kind != onnx.TensorProto.INT32:
            raise InputError(f"ONNX {file}: ArgMax {node.name} must take tokens cast to int32")
