"""pyACL of the simulated host: the calls of the module `acl` that run an OM file, as strict as its C source.

Positional arguments only; sizes, pointers, counts and indexes must be Python's own ints (`numpy.int64` is refused),
paths `str`. Getters give a bare value, other calls a code, alone or after a value. Nothing is freed by anything else.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Tuple

import npu_host
import simulated_acl as core

if "no_ascendcl" in npu_host.faults():
    raise ImportError("libascendcl.so: cannot open shared object file: No such file or directory")

__simulated__ = True
DTYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "uint8": 4, "int64": 9, "float64": 11, "bool": 12}
LONGEST = 127  # characters of a name beside its dims

_handles: Dict[int, Any] = {}  # desc, data set, data buffer, stream or context by its number
_pending: Dict[int, List[Callable[[Any], None]]] = {}  # by stream
_devices: Dict[int, int] = {}


def _parse(call: str, kinds: str, args: Tuple[Any, ...]) -> None:
    """As PyArg_ParseTuple does: `k` wants an int of Python, `i` and `I` what has `__index__`, `s` a str."""
    right = len(args) == len(kinds) and all(
        isinstance(value, str)
        if kind == "s"
        else isinstance(value, int)
        if kind == "k"
        else hasattr(value, "__index__")
        for kind, value in zip(kinds, args)
    )
    if not right:
        raise TypeError(f"acl.{call} args parse failed!")


def _call(name: str, kinds: str, pair: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A call that gives its code, `pair`: after the value, which is 0 where the call failed."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            _parse(name, kinds, args)
            try:
                value, code = function(*args), 0
            except core.AclError as error:
                value, code = 0, error.code
            return (value, code) if pair else code

        return call

    return wrap


def _getter(name: str, kinds: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A call that gives a bare value."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            _parse(name, kinds, args)
            return function(*args)

        return call

    return wrap


def _new(thing: Any) -> int:
    number = id(thing)
    _handles[number] = thing
    return number


def _of(number: int) -> Any:
    if number not in _handles:
        raise core.AclError(100000)
    return _handles[number]


def _destroy(number: int) -> Any:
    found = _of(number)
    del _handles[number]
    return found


def init(*args: Any) -> int:
    """Initialise ACL, with the path of a configuration or without."""
    _parse("init", "s" * len(args[:1]), args)
    try:
        core.init()
        if args:
            core.configure(args[0])
    except core.AclError as error:
        return error.code
    return 0


def finalize() -> int:
    """Finalise ACL."""
    try:
        core.finalize(len(_handles))
    except core.AclError as error:
        return error.code
    return 0


def get_recent_err_msg() -> Optional[str]:
    """Words of this thread's last error, which are forgotten by this call; None where there is none."""
    return core.recent_error() or None


def get_soc_name() -> str:
    """The chip."""
    return npu_host.chip().soc


@_getter("create_data_buffer", "kk")
def create_data_buffer(address: int, size: int) -> int:
    """A note of memory, which is not its owner."""
    return _new([address, size])


@_call("destroy_data_buffer", "k")
def destroy_data_buffer(buffer: int) -> None:
    """Forget the note; the memory stays."""
    _destroy(buffer)


@_getter("get_data_buffer_addr", "k")
def get_data_buffer_addr(buffer: int) -> int:
    """Its address."""
    return int(_handles[buffer][0])


@_getter("get_data_buffer_size_v2", "k")
def get_data_buffer_size_v2(buffer: int) -> int:
    """Its bytes."""
    return int(_handles[buffer][1])


def _set_context(context: int) -> None:
    core.set_context(_of(context))


def _synchronize(stream: int) -> None:
    """Wait for what was launched on a stream; other threads run meanwhile."""
    core.current()
    _of(stream)
    waiting, _pending[stream] = _pending.get(stream, []), []
    for wait in waiting:
        wait(time.sleep)


def _create_stream() -> int:
    core.current()
    return _new(threading.Lock())


def _destroy_context(context: int) -> None:
    core.destroy_context(_destroy(context))


rt = SimpleNamespace(
    set_device=_call("rt.set_device", "i")(core.set_device),
    reset_device=_call("rt.reset_device", "i")(core.reset_device),
    get_device_count=_call("rt.get_device_count", "", pair=True)(npu_host.npus),
    create_context=_call("rt.create_context", "i", pair=True)(lambda device: _new(core.create_context(device))),
    destroy_context=_call("rt.destroy_context", "k")(_destroy_context),
    set_context=_call("rt.set_context", "k")(_set_context),
    create_stream=_call("rt.create_stream", "", pair=True)(_create_stream),
    destroy_stream=_call("rt.destroy_stream", "k")(_destroy),
    synchronize_stream=_call("rt.synchronize_stream", "k")(_synchronize),
    malloc=_call("rt.malloc", "ki", pair=True)(lambda size, policy: core.malloc(size)),
    free=_call("rt.free", "k")(core.free),
    malloc_host=_call("rt.malloc_host", "k", pair=True)(core.malloc_host),
    free_host=_call("rt.free_host", "k")(core.free_host),
    memcpy=_call("rt.memcpy", "kkkki")(
        lambda target, room, source, count, kind: _memcpy(target, room, source, count, kind)
    ),
)


def _memcpy(target: int, room: int, source: int, count: int, kind: int) -> None:
    if kind not in range(5):
        raise core.AclError(100000)
    core.memcpy(target, room, source, count)


def _nodes(desc: int, kind: str) -> List[Dict[str, Any]]:
    model = _handles[desc].model
    found: List[Dict[str, Any]] = model.inputs if kind == "input" else model.outputs
    return found


def _dims(kind: str) -> Callable[..., Any]:
    def get(desc: int, number: int) -> Tuple[Dict[str, Any], int]:
        nodes = _nodes(desc, kind)
        if number >= len(nodes):
            return {}, 100000
        one = nodes[number]
        name = one["name"] if len(one["name"]) <= LONGEST else f"acl_modelId_{_handles[desc].number}_{kind}_{number}"
        return {"name": name, "dimCount": len(one["shape"]), "dims": list(one["shape"])}, 0

    return _getter(f"mdl.get_{kind}_dims", "kk")(get)


def _of_node(kind: str, what: str, value: Callable[[Dict[str, Any]], Any]) -> Callable[..., Any]:
    return _getter(f"mdl.get_{kind}_{what}", "kk")(lambda desc, number: value(_nodes(desc, kind)[number]))


def _get_desc(desc: int, number: int) -> None:
    _of(desc).model, _handles[desc].number = core.model(number), number


def _pairs(dataset: int) -> List[Tuple[int, int]]:
    return [tuple(_of(buffer)) for buffer in _of(dataset).buffers]


def _add(*args: Any) -> Tuple[int, int]:
    _parse("mdl.add_dataset_buffer", "kk", args)
    dataset, buffer = args
    if dataset not in _handles or buffer not in _handles:
        return dataset, 100000
    _handles[dataset].buffers.append(buffer)
    return dataset, 0


def _execute_async(number: int, inputs: int, outputs: int, stream: int) -> None:
    _of(stream)
    _pending.setdefault(stream, []).append(core.prepared(number, _pairs(inputs), _pairs(outputs)))


mdl = SimpleNamespace(
    load_from_file=_call("mdl.load_from_file", "s", pair=True)(core.load),
    unload=_call("mdl.unload", "I")(core.unload),
    create_desc=_getter("mdl.create_desc", "")(lambda: _new(SimpleNamespace(model=None, number=0))),
    get_desc=_call("mdl.get_desc", "kI")(_get_desc),
    destroy_desc=_call("mdl.destroy_desc", "k")(_destroy),
    get_num_inputs=_getter("mdl.get_num_inputs", "k")(lambda desc: len(_nodes(desc, "input"))),
    get_num_outputs=_getter("mdl.get_num_outputs", "k")(lambda desc: len(_nodes(desc, "output"))),
    create_dataset=_getter("mdl.create_dataset", "")(lambda: _new(SimpleNamespace(buffers=[]))),
    destroy_dataset=_call("mdl.destroy_dataset", "k")(_destroy),
    add_dataset_buffer=_add,
    get_dataset_num_buffers=_getter("mdl.get_dataset_num_buffers", "k")(lambda dataset: len(_of(dataset).buffers)),
    get_dataset_buffer=_getter("mdl.get_dataset_buffer", "kk")(lambda dataset, n: _of(dataset).buffers[n]),
    execute=_call("mdl.execute", "Ikk")(lambda number, a, b: core.execute(number, _pairs(a), _pairs(b))),
    execute_async=_call("mdl.execute_async", "Ikkk")(_execute_async),
)
for _kind in ("input", "output"):
    setattr(mdl, f"get_{_kind}_dims", _dims(_kind))
    setattr(mdl, f"get_{_kind}_name_by_index", _of_node(_kind, "name_by_index", lambda one: one["name"]))
    setattr(mdl, f"get_{_kind}_size_by_index", _of_node(_kind, "size_by_index", core.size_of))
    setattr(mdl, f"get_{_kind}_data_type", _of_node(_kind, "data_type", lambda one: DTYPES[one["dtype"]]))
    setattr(mdl, f"get_{_kind}_format", _of_node(_kind, "format", lambda one: one["format"]))


def _bytes_to_ptr(*args: Any) -> int:
    """Where the bytes lie; it keeps no reference, so the caller must."""
    if len(args) != 1 or not isinstance(args[0], bytes):
        raise ValueError("acl.util.bytes_to_ptr: expected bytes")
    return ctypes.cast(ctypes.c_char_p(args[0]), ctypes.c_void_p).value or 0


util = SimpleNamespace(
    bytes_to_ptr=_bytes_to_ptr,
    ptr_to_bytes=_getter("util.ptr_to_bytes", "kk")(lambda address, size: ctypes.string_at(address, size)),
)


@atexit.register
def _static_destructors() -> None:
    if core.ready():
        finalize()


def _in_child() -> None:
    """A forked child has the same destructors, and what they call is no longer there."""
    if core.ready() and sys.modules.get("simulated_acl") is core:
        library = ctypes.CDLL(None)
        atexit.unregister(_static_destructors)
        core.leak_sessions()
        library.on_exit(library.abort, None)


os.register_at_fork(after_in_child=_in_child)
