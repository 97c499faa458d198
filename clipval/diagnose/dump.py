"""Dump files of an Ascend NPU, read without CANN: tensors and statistics of the operators of one inference.

A tensor file is a little-endian uint64 (length of the header), the header (protobuf `toolkit.dump.DumpData`), then the
raw bytes of inputs, outputs, buffers and workspaces in that order. Sources: hicann runtime 681ef76
(`dfx/adump/proto/dump_task.proto`, `aicpu_schedule/core/dfx/dump_task.cpp`), msprobe 8ff00da
(`dump_parse/big_dump_data.py`). No real file was available: the reader is strict,
so that another layout is rejected instead of misread.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np

from clipval.diagnose import wire
from clipval.diagnose.layouts import FORMATS, plain
from clipval.errors import InputError

# `data_type` of the proto; neither ACL's numbers nor the graph engine's, which `original_op` has.
DTYPES = {1: "float32", 2: "float16", 3: "int8", 4: "uint8", 5: "int16", 6: "uint16", 7: "int32", 8: "int64"}
DTYPES.update({9: "uint32", 10: "uint64", 11: "bool", 12: "float64", 27: "bfloat16"})
UNSET = 4294967295  # of original_op.output_index
MAPPING = "mapping.csv"


@dataclass(frozen=True)
class Tensor:
    """One input or output of an operator, as described by the file.

    Attributes:
        dtype: numpy name, or `bfloat16`; form: one of `clipval.diagnose.layouts.FORMATS`.
        shape: as stored; original: the model's, empty if unknown.
        size: bytes; held: whether they are in the file (an output without an address has none).
        origin: the ONNX node that this output belongs to according to a fusion, empty for none; origin_output: its
        output.
    """

    dtype: str
    form: str
    shape: Tuple[int, ...]
    original: Tuple[int, ...]
    size: int
    held: bool
    origin: str = ""
    origin_output: Optional[int] = None


@dataclass(frozen=True)
class Operator:
    """One dumped operator. `values` reads an output."""

    file: Path
    name: str
    kind: str
    inputs: Tuple[Tensor, ...]
    outputs: Tuple[Tensor, ...]
    start: int = 0
    short: int = 0

    def values(self, output: int) -> np.ndarray:
        """An output in row-major order and the model's shape; bfloat16 as float32.

        Raises:
            InputError: the file ends before it, or its shape and layout are inconsistent.
        """
        wanted = self.outputs[output]
        before = [*self.inputs, *self.outputs[:output]]
        at = self.start + sum(one.size for one in before if one.held)
        with open(self.file, "rb") as stream:
            stream.seek(at)
            raw = stream.read(wanted.size) if wanted.held else b""
        try:
            return plain(_array(raw, wanted), wanted.form, wanted.original)
        except (InputError, ValueError) as error:
            raise InputError(f"dump {self.file}: output {output} of {self.name}: {error}") from None


@dataclass
class Dump:
    """The content of a dump folder.

    Attributes:
        operators: by name, from the tensor files; statistics: by name of the operator, one row per tensor.
        notes: problems of the dump or of single files, one sentence each.
    """

    folder: Path
    operators: Dict[str, Operator] = field(default_factory=dict)
    statistics: Dict[str, List[Statistic]] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)


@dataclass(frozen=True)
class Statistic:
    """A row of a statistics file; missing figures are None."""

    side: str
    index: int
    shape: Tuple[int, ...]
    dtype: str
    largest: Optional[float]
    least: Optional[float]
    nan: Optional[float]
    infinite: Optional[float]


def read(folder: Path) -> Dump:
    """Every dump file below a folder.

    Raises:
        InputError: there is no such folder, it holds no dump, or a file is not a dump file.
    """
    if not folder.is_dir():
        raise InputError(f"dump {folder}: no such folder; give the dump_path of acl.json, or a folder below it")
    found = Dump(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MAPPING)
    for path in files:
        if path.suffix == ".csv":
            name = statistics_name(path)
            found.statistics[name] = statistics(path)
        elif path.suffix not in (".json", ".log", ".txt"):
            _add(found, path)
    if not found.operators and not found.statistics:
        raise InputError(
            f"dump {folder}: no dump file in it. Nothing was dumped: dump_list names another model (the OM's file name "
            f"up to its last dot) or layer, or it ran in a container, where CANN does not support dumping"
        )
    return found


def _add(found: Dump, path: Path) -> None:
    one = operator(path)
    if one.short:
        found.notes.append(
            f"{path.name} is {one.short} bytes short: the dump's queue or the disk was full; its last tensors are left "
            f"out"
        )
    if one.name in found.operators:
        found.notes.append(f"{one.name} has several files (slices, or several inferences); the first is used")
        return
    found.operators[one.name] = one


def operator(path: Path) -> Operator:
    """One tensor file, its header checked against its length.

    Raises:
        InputError: it is not a dump file, or has an unknown layout.
    """
    length = path.stat().st_size
    with open(path, "rb") as stream:
        head = stream.read(8)
        size = int.from_bytes(head, "little")
        if len(head) < 8 or size == 0 or 8 + size > length:
            raise InputError(f"dump {path}: not a dump file, or truncated within its header ({length} bytes)")
        raw = stream.read(size)
    try:
        header = wire.fields(raw)
        inputs = [_tensor(wire.fields(one), 5, 6, 8) for one in header.get(4, [])]
        outputs = [_tensor(wire.fields(one), 6, 7, 9) for one in header.get(3, [])]
        rest = sum(wire.number(wire.fields(one).get(3, [])) for number in (5, 8) for one in header.get(number, []))
        name = wire.text(header.get(6, []))
    except (wire.WireError, AttributeError, TypeError) as error:
        raise InputError(f"dump {path}: its header is not a DumpData ({error})") from None
    if not name or not (inputs or outputs):
        raise InputError(f"dump {path}: its header has no operator, or no tensor of it")
    return _placed(path, name, inputs, outputs, rest, length - 8 - size, 8 + size)


def _placed(
    path: Path, name: str, inputs: List[Tensor], outputs: List[Tensor], rest: int, there: int, start: int
) -> Operator:
    """The operator with the tensors whose bytes are in the file; those without an address may have none."""
    kind = _full_name(path).split(".")[0]
    told = sum(one.size for one in (*inputs, *outputs))
    if there == told + rest or there == told:
        inputs, outputs = [replace(one, held=True) for one in inputs], [replace(one, held=True) for one in outputs]
        return Operator(path, name, kind, tuple(inputs), tuple(outputs), start)
    addressed = sum(one.size for one in (*inputs, *outputs) if one.held)
    if there in (addressed + rest, addressed):
        return Operator(path, name, kind, tuple(inputs), tuple(outputs), start)
    if there > told + rest:
        raise InputError(f"dump {path}: {there} bytes of tensors, its header describes {told + rest}: unknown layout")
    return Operator(path, name, kind, *_cut(inputs, outputs, there), start=start, short=told + rest - there)


def _cut(inputs: List[Tensor], outputs: List[Tensor], there: int) -> Tuple[Tuple[Tensor, ...], Tuple[Tensor, ...]]:
    """The complete tensors of a truncated file."""
    found: List[Tensor] = []
    for one in (*inputs, *outputs):
        there -= one.size
        found.append(replace(one, held=there >= 0))
    return tuple(found[: len(inputs)]), tuple(found[len(inputs) :])


def _tensor(found: Dict[int, List[Any]], size: int, original: int, address: int) -> Tensor:
    """A tensor's description; OpInput and OpOutput number their fields differently."""
    kind, form = wire.number(found.get(1, [])), wire.number(found.get(2, []))
    if kind not in DTYPES:
        raise wire.WireError(f"unknown data type {kind}")
    origin = wire.fields(found[4][-1]) if size == 6 and found.get(4) else {}
    index = wire.number(origin.get(2, []), UNSET)
    return Tensor(
        dtype=DTYPES[kind],
        form=FORMATS.get(form, f"number {form}"),
        shape=_shape(found.get(3, [])),
        original=_shape(found.get(original, [])),
        size=wire.number(found.get(size, [])),
        held=wire.number(found.get(address, [])) != 0,
        origin=wire.text(origin.get(1, [])),
        origin_output=None if index == UNSET else index,
    )


def _shape(values: List[Any]) -> Tuple[int, ...]:
    return tuple(wire.integers(wire.fields(values[-1]).get(1, []))) if values else ()


def _array(raw: bytes, wanted: Tensor) -> np.ndarray:
    """The bytes as an array of the stored shape; a larger buffer is cut."""
    narrow = wanted.dtype == "bfloat16"
    dtype = np.dtype("uint16" if narrow else wanted.dtype)
    count = int(np.prod(wanted.shape, dtype=np.int64))
    if len(raw) < count * dtype.itemsize:
        raise InputError(f"has {len(raw)} bytes, shape {list(wanted.shape)} takes {count * dtype.itemsize}")
    values = np.frombuffer(raw, dtype, count).reshape(wanted.shape)
    return (values.astype(np.uint32) << 16).view(np.float32) if narrow else values


def _full_name(path: Path) -> str:
    """The name of a file, or the one that `mapping.csv` has for a file whose name was too long and became a hash."""
    name, mapping = path.stem if path.suffix == ".csv" else path.name, path.parent / MAPPING
    if not name.isdigit() or not mapping.is_file():
        return name
    with open(mapping, encoding="utf-8", newline="") as stream:
        known = {row[0].split(".")[0]: row[1] for row in csv.reader(stream) if len(row) > 1}
    return Path(known.get(name, name)).name


def statistics_name(path: Path) -> str:
    """Operator of a statistics file `<type>.<name>.<task>.<stream>.<time>.csv`; `mapping.csv` resolves hashes."""
    name = _full_name(path)
    parts = name.split(".")
    return parts[1] if len(parts) > 2 else name


def statistics(path: Path) -> List[Statistic]:
    """Rows of a statistics file, read by column title, since writers choose and order columns differently.

    Raises:
        InputError: it lacks columns that every writer has.
    """
    with open(path, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    titles = set(rows[0]) if rows else set()
    if not {"Input/Output", "Index", "Shape"} <= titles:
        raise InputError(f"dump {path}: columns {', '.join(sorted(map(str, titles))) or 'none'}; not a statistics file")
    return [
        Statistic(
            side=row["Input/Output"],
            index=int(row["Index"]),
            shape=() if row["Shape"] == "-" else tuple(int(one) for one in row["Shape"].split("x")),
            dtype=row.get("Data Type") or "",
            largest=_figure(row, "Max Value"),
            least=_figure(row, "Min Value"),
            nan=_figure(row, "Nan Count"),
            infinite=_sum(_figure(row, "Negative Inf Count"), _figure(row, "Positive Inf Count")),
        )
        for row in rows
    ]


def _figure(row: Dict[str, str], title: str) -> Optional[float]:
    try:
        return float(row.get(title) or "NA")
    except ValueError:
        return None


def _sum(*values: Optional[float]) -> Optional[float]:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def outputs(dump: Dump) -> Iterator[Tuple[Operator, int]]:
    """Every readable output, operator by operator."""
    for one in dump.operators.values():
        for number, tensor in enumerate(one.outputs):
            if tensor.held:
                yield one, number
