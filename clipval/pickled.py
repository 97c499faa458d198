"""The tensors in a pickle that torch or TorchScript wrote. Nothing that the pickle names is imported or called.

An unpickler makes objects by calling what the pickle names. Here every name gives a class of this module that keeps
what it is given and computes nothing, so optimizers, arguments and numpy scalars beside the weights do no harm.
"""

from __future__ import annotations

import copy
import io
import pickle
import zipfile
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, Callable, Dict, Iterator, Mapping, Tuple

if TYPE_CHECKING:
    import torch

LEGACY_HEADER = 3  # pickles before the object in files before torch 1.6: magic number, protocol, sizes of the system
TENSORS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor", "_rebuild_npu_tensor")
FIRSTS = ("_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_device_tensor_from_cpu_tensor", "Size")
DTYPES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "QInt8Storage": "int8",
    "QUInt8Storage": "uint8",
    "QInt32Storage": "int32",
    "UntypedStorage": "uint8",
}


class Inert:
    """An object of a class that was not imported: keeps its state and does nothing.

    Has every method that an unpickler calls on objects.

    Attributes:
        origin: the class that the pickle names; state: the object's attributes by name.
    """

    origin = ""
    state: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        own = state[0] if isinstance(state, tuple) and state else state  # the second half is that of __slots__
        self.state = own if isinstance(own, dict) else {}

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return Inert()

    def __setitem__(self, *_: Any) -> None:
        pass

    def append(self, *_: Any) -> None:
        pass

    extend = add = append


class _Mapping(Inert, dict):  # type: ignore[type-arg]
    """An OrderedDict, without the attributes that the pickle gives it."""

    def __init__(self, *given: Any, **named: Any) -> None:
        dict.__init__(self, *given, **named)

    __setitem__ = dict.__setitem__


class _First(Inert):
    """A function that returns its first argument, as the one that makes a Parameter of a tensor."""

    def __new__(cls, first: Any, *_: Any, **__: Any) -> Any:
        return first


class _Rebuilt(Inert):
    """`torch._tensor._rebuild_from_type_v2` of a function, a class, the function's arguments and a state."""

    def __new__(cls, function: Any, _: Any, arguments: Any, *__: Any) -> Any:
        return function(*arguments)


class _Storage(Inert):
    """Where numbers of a dtype are: `read` gives all bytes; `offset` counts elements."""

    def __init__(self, dtype: str, read: Callable[[], bytearray], offset: int = 0) -> None:
        self.dtype, self.read, self.offset = dtype, read, offset


class Stored(Inert):
    """A tensor that is read when asked for; takes the arguments of `torch._utils._rebuild_tensor_v2` and its kin."""

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> None:
        kind = more[2] if len(more) > 2 and isinstance(more[2], type) else None  # a dtype: _rebuild_tensor_v3
        self.dtype = getattr(kind, "origin", "").rpartition(".")[2] or storage.dtype
        self._place = storage, offset, shape, strides

    def tensor(self) -> torch.Tensor:
        """The tensor, on the CPU. Damaged files raise exceptions of any class."""
        import torch

        storage, offset, shape, strides = self._place
        dtype = getattr(torch, self.dtype)
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"a tensor of {self.dtype}")
        content = storage.read()
        flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return flat.as_strided(shape, strides, storage.offset + offset)


class _Unpickler(pickle.Unpickler):
    """Gives stand-ins for everything that a pickle names; `stored` makes the storage of a persistent id."""

    def __init__(self, stream: IO[bytes], stored: Callable[[Any], Any]) -> None:
        super().__init__(stream, encoding="utf-8", errors="replace")
        self._stored = stored

    def find_class(self, module: str, name: str) -> Any:
        base: Any = {"OrderedDict": _Mapping, "_rebuild_from_type_v2": _Rebuilt}.get(name, Inert)
        if name in TENSORS:
            base = Stored
        elif name in FIRSTS or module == "torch.jit._pickle":
            base = _First
        known = module.split(".")[0] in ("collections", "torch", "torch_npu")
        # one of its own, so that nothing which a pickle does to a class outlasts it
        return type("Inert", (base if known else Inert,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return self._stored(pid)


def read(file: Path) -> Any:
    """The object in a file of `torch.save` or in a TorchScript archive; its tensors are `Stored`.

    Damaged files raise exceptions of any class.
    """
    archive = zipfile.ZipFile(file)  # closed with the last tensor that may be read from it
    name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
    folder = name[: -len("data.pkl")]
    order = f"{folder}byteorder"
    if order in archive.namelist() and _record(archive, order) == b"big":
        raise pickle.UnpicklingError("written by a big-endian machine")
    head = io.BytesIO(_record(archive, name))

    @lru_cache(maxsize=1)  # neighbouring tensors may share a storage
    def content(key: str) -> bytearray:
        return _record(archive, f"{folder}data/{key}")

    def stored(pid: Any) -> _Storage:
        _, kind, key, *_ = pid
        return _Storage(_dtype(kind), lambda: content(key))

    return _Unpickler(head, stored).load()


def _record(archive: zipfile.ZipFile, name: str) -> bytearray:
    about = copy.copy(archive.getinfo(name))
    if not about.CRC:  # torch.serialization.set_crc32_options(False): not stated
        about.CRC = None  # type: ignore[assignment]
    found = bytearray(about.file_size)
    with archive.open(about) as stream:
        _fill(found, stream)
    return found


def read_legacy(file: Path) -> Any:
    """The object in a file of `torch.save` before 1.6; see `read`."""
    import torch

    places: Dict[str, Tuple[int, int]] = {}
    sizes: Dict[str, int] = {}

    @lru_cache(maxsize=1)
    def content(key: str) -> bytearray:
        start, size = places[key]
        found = bytearray(size)
        with open(file, "rb") as stream:
            stream.seek(start)
            _fill(found, stream)
        return found

    def stored(pid: Any) -> Any:
        if pid[0] == "module":  # a class with its source
            return pid[1]
        _, kind, key, _, _, view = pid
        dtype = _dtype(kind)
        sizes[key] = getattr(torch, dtype).itemsize
        return _Storage(dtype, lambda: content(key), view[1] if view else 0)

    with open(file, "rb") as stream:
        for _ in range(LEGACY_HEADER):
            _Unpickler(stream, stored).load()
        held, keys = _Unpickler(stream, stored).load(), _Unpickler(stream, stored).load()
        for key in keys:
            count = int.from_bytes(stream.read(8), "little")
            places[key] = stream.tell(), count * sizes[key]
            stream.seek(count * sizes[key], 1)
    return held


def _fill(found: bytearray, stream: IO[bytes]) -> None:
    view, done = memoryview(found), 0
    while done < len(found):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"a tensor ends after {done} of {len(found)} bytes")
        done += count


def _dtype(kind: Any) -> str:
    name = getattr(kind, "origin", "").rpartition(".")[2]
    if name not in DTYPES:
        raise pickle.UnpicklingError(f"a storage of {name or kind!r}")
    return DTYPES[name]


def of_module(held: Inert) -> Dict[str, Stored]:
    """Tensors of a pickled torch.nn.Module, or of TorchScript's, by their names in its state_dict."""
    return dict(_walk(held, "", ()))


def _walk(held: Inert, prefix: str, above: Tuple[int, ...]) -> Iterator[Tuple[str, Stored]]:
    parts = [held.state]
    if isinstance(held.state.get("_modules"), dict):
        parts = [held.state.get(name) or {} for name in ("_parameters", "_buffers", "_modules")]
    for part in parts:
        for name, value in part.items():
            if isinstance(value, Stored):
                yield f"{prefix}{name}", value
            elif isinstance(value, Inert) and id(value) not in above:
                yield from _walk(value, f"{prefix}{name}.", (*above, id(value)))
