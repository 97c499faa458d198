"""What lies under aclruntime and pyACL of the simulated host: devices, contexts, memory, models, words of errors.

As strict as the public headers and documents of AscendCL: every call but the first few needs a context that is current
in its thread, a model runs in the context that loaded it, memory of the device is counted, and addresses of the device
cannot be read by the host.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

import npu_host
import numpy as np
import simulated_dump

SLACK = 64  # bytes by which a buffer may be too small
TAG = 1 << 62  # of a device's address, so that reading it on the host is a fault
NEVER, READY, FINALIZED = range(3)
UNINITIALIZED, REPEATED, REPEATED_FINALIZE = 100001, 100002, 100037
NO_DEVICE, NO_CONTEXT, OTHER_CONTEXT, BAD_PARAMETER = 107001, 107002, 107004, 107000
NO_MEMORY, NO_MODEL, BAD_FILE, OTHER_CHIP, NO_SUCH_MODEL, TOO_SMALL = 207001, 145002, 145006, 500002, 145003, 145000


class AclError(Exception):
    """A call of ACL returned `code`; its words are kept for `recent_error`."""

    def __init__(self, code: int, words: str = "") -> None:
        super().__init__(code, words)
        self.code = code
        _thread.words = words


class _Thread(threading.local):
    """What each thread has of its own."""

    context: Optional[Context] = None
    words = ""


class Context:
    """A context of a device."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.alive = True


class Model:
    """A loaded model: what its header says, and its session of ONNX Runtime."""

    def __init__(self, path: str, context: Context, header: Dict[str, Any], session: Any, memory: List[int]) -> None:
        self.path = path
        self.context = context
        self.inputs: List[Dict[str, Any]] = header["inputs"]
        self.outputs: List[Dict[str, Any]] = header["outputs"]
        self.session: Any = session
        self.memory = memory
        self.runs = 0
        self.dumper = simulated_dump.of(_process.dump_config, path)


class _Process:
    """ACL's state of this process."""

    def __init__(self) -> None:
        self.state = NEVER
        self.owner = 0
        self.next_model = 1
        self.dump_config = ""
        self.contexts: Set[Context] = set()
        self.defaults: Dict[int, Context] = {}
        self.memory: Dict[int, Tuple[Any, int]] = {}  # address without its tag -> array, device
        self.host: Dict[int, Any] = {}
        self.models: Dict[int, Model] = {}


_process = _Process()
_thread = _Thread()
_lock = threading.RLock()


def stamp(code: str) -> str:
    """How a line of `aclGetRecentErrMsg` starts."""
    return f"{code}: [PID: {os.getpid()}] {time.strftime('%Y-%m-%d-%H:%M:%S')}.000.000 "


def recent_error() -> str:
    """Words of this thread's last error, which are forgotten by this call."""
    words, _thread.words = _thread.words, ""
    return words


def init() -> None:
    """Initialise ACL, once in a process."""
    if "hdc_init" in npu_host.faults():
        raise AclError(507899, stamp("EL0003") + "The argument is invalid.Reason: HDC init failed, ret = 25")
    if _process.state != NEVER:
        raise AclError(REPEATED)
    _process.state, _process.owner = READY, os.getpid()


def finalize(handles: int = 0) -> None:
    """Finalise ACL, once in a process.

    Args:
        handles: of pyACL's objects that were not destroyed.
    """
    if _process.state == FINALIZED:
        raise AclError(REPEATED_FINALIZE)
    _ready()
    _process.state = FINALIZED
    if npu_host.switch("FINALIZED"):
        with open(npu_host.switch("FINALIZED"), "a", encoding="utf-8") as stream:
            leaked = f"{device_bytes()} bytes, {len(_process.models)} models, {len(_process.host)} host buffers"
            leaked += f", {handles} handles" if handles else ""
            stream.write(f"{os.getpid()} {leaked}\n")


def ready() -> bool:
    """ACL is initialised and not yet finalised."""
    return _process.state == READY


def _ready() -> None:
    if _process.owner not in (0, os.getpid()):  # a device's driver hangs or crashes here
        os.write(2, b"simulated ACL: called in a forked child\n")
        os.abort()
    if _process.state != READY:
        raise AclError(UNINITIALIZED)


def device_bytes(device: Optional[int] = None) -> int:
    """Bytes in use on a device, or on all."""
    return sum(array.nbytes for array, where in _process.memory.values() if device in (None, where))


def current() -> Context:
    """The context of this thread."""
    _ready()
    found = _thread.context
    if found is None or not found.alive:
        raise AclError(NO_CONTEXT, stamp("EE9999") + "ctx is NULL![FUNC:Api][FILE:api_c.cc]")
    return found


def set_device(device: int) -> None:
    """Open a device; its default context becomes current in this thread."""
    _ready()
    if "driver_mismatch" in npu_host.faults():
        raise AclError(507033, stamp("EL0005") + f"open device {device} failed, runtime result = 507033.")
    if not 0 <= device < npu_host.npus():
        raise AclError(
            NO_DEVICE,
            f"{stamp('EE1001')}The argument is invalid.Reason: rtSetDevice execute failed, the deviceId is invalid, "
            f"input device:{device}, valid device range is [0, {npu_host.npus()})\n"
            "        Solution: 1.Check the input parameter range of the function.\n"
            f"        open device {device} failed, runtime result = 107001.[FUNC:ReportCallError]",
        )
    if device not in _process.defaults:
        _process.defaults[device] = _new(device)
    _thread.context = _process.defaults[device]
    npu_host.note_user(device)


def reset_device(device: int) -> None:
    """Close a device; its default context ends."""
    _ready()
    found = _process.defaults.pop(device, None)
    if found is not None:
        _end(found)


def create_context(device: int) -> Context:
    """A context of its own, current in this thread."""
    _ready()
    if not 0 <= device < npu_host.npus():
        raise AclError(NO_DEVICE, stamp("EE1001") + f"invalid device {device}")
    _thread.context = _new(device)
    return _thread.context


def destroy_context(context: Context) -> None:
    """End a context."""
    _ready()
    if context not in _process.contexts:
        raise AclError(NO_CONTEXT, stamp("EE9999") + "destroy context: not a context")
    _end(context)


def set_context(context: Context) -> None:
    """Make a context current in this thread."""
    _ready()
    if context not in _process.contexts:
        raise AclError(NO_CONTEXT, stamp("EE9999") + "set current context: context is destroyed or null")
    _thread.context = context


def _new(device: int) -> Context:
    context = Context(device)
    _process.contexts.add(context)
    return context


def _end(context: Context) -> None:
    context.alive = False
    _process.contexts.discard(context)


def malloc(size: int) -> int:
    """Memory of the current context's device; its address is no address of the host."""
    context = current()
    if size <= 0:
        raise AclError(100000)
    with _lock:
        if device_bytes(context.device) + size > npu_host.device_memory():
            raise AclError(NO_MEMORY, stamp("EL0004") + "Failed to allocate memory. Reason: out of memory")
        array = np.full(size, 0xCD, np.uint8)
        address = int(array.ctypes.data)
        _process.memory[address] = (array, context.device)
    return address | TAG


def free(address: int) -> None:
    """Give memory of a device back."""
    current()
    with _lock:
        if not address & TAG or (address & ~TAG) not in _process.memory:
            raise AclError(BAD_PARAMETER, stamp("EE9999") + "rtFree of unknown memory")
        _process.memory.pop(address & ~TAG)[0].fill(0xDD)


def malloc_host(size: int) -> int:
    """Pinned memory of the host, which needs a context too."""
    current()
    array = np.full(size, 0xAB, np.uint8)
    address = int(array.ctypes.data)
    _process.host[address] = array
    return address


def free_host(address: int) -> None:
    """Give pinned memory back."""
    _ready()
    if _process.host.pop(address, None) is None:
        raise AclError(BAD_PARAMETER, stamp("EE9999") + "rtFreeHost of unknown memory")


def memcpy(target: int, room: int, source: int, count: int) -> None:
    """Copy between host and device; the pointers say which way."""
    current()
    if count > room:
        raise AclError(BAD_PARAMETER, stamp("EE1001") + "rtMemcpy: count > destMax")
    for address in (target, source):
        if address & TAG and device_of(address, count) is None:
            raise AclError(BAD_PARAMETER, stamp("EE9999") + "rtMemcpy: outside of the allocation")
    ctypes.memmove(target & ~TAG, source & ~TAG, count)


def device_of(address: int, count: int) -> Optional[int]:
    """The device whose memory holds `count` bytes from an address; None for none."""
    plain = address & ~TAG
    if not address & TAG:
        return None
    with _lock:
        for start, (array, device) in _process.memory.items():
            if start <= plain and plain + count <= start + array.nbytes:
                return device
    return None


def configure(config: str) -> None:
    """The file that goes to aclInit, which takes the first one only."""
    if _process.next_model == 1:
        _process.dump_config = config


def load(path: str) -> int:
    """Load an OM file in the current context; its id."""
    import onnxruntime

    context = current()
    try:
        header, model = npu_host.read_om(path)
    except OSError:
        raise AclError(NO_MODEL, f"{stamp('E13000')}Path[{path}] is empty. Reason: No such file or directory") from None
    except (ValueError, KeyError):
        raise AclError(
            BAD_FILE, _load_words("E19999", "Inner Error!\n        file_size is not model_len", BAD_FILE)
        ) from None
    if header["soc"] != npu_host.chip().soc:
        raise AclError(OTHER_CHIP, _load_words("EE1002", "soc version mismatch", OTHER_CHIP))
    try:
        memory = [malloc(len(model))]
    except AclError:
        words = "Failed to allocate memory. Possible Cause: Available memory is insufficient."
        raise AclError(NO_MEMORY, _load_words("EL0004", words, NO_MEMORY)) from None
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    # Whole-graph optimisers drop casts to fp16 and back, which are the point of this model.
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    number, _process.next_model = _process.next_model, _process.next_model + 1
    _process.models[number] = Model(path, context, header, session, memory)
    return number


def _load_words(code: str, words: str, number: int) -> str:
    trace = "        TraceBack (most recent call last):\n        load model from file failed, ge result = "
    return f"{stamp(code)}{words}\n{trace}{number}[FUNC:ReportCallError]"


def model(number: int) -> Model:
    """A loaded model by its id."""
    _ready()
    if number not in _process.models:
        raise AclError(NO_SUCH_MODEL, stamp("E19999") + f"model id {number} is unknown")
    return _process.models[number]


def unload(number: int) -> None:
    """Unload a model, in a context."""
    found = model(number)
    current()
    for address in found.memory:
        free(address)
    del _process.models[number]


def execute(number: int, inputs: List[Tuple[int, int]], outputs: List[Tuple[int, int]]) -> None:
    """Run a model on buffers of (address, bytes), holding Python's lock while the device is waited for."""
    prepared(number, inputs, outputs)(ctypes.PyDLL(None).sleep)


def prepared(number: int, inputs: List[Tuple[int, int]], outputs: List[Tuple[int, int]]) -> Callable[[Any], None]:
    """Launch a model on buffers of (address, bytes); what is returned waits for the device, by a sleep given to it.

    A buffer may be larger than what the model takes, or smaller by up to 64 bytes, and nobody looks at what is in it.
    """
    found = model(number)
    context = current()
    if context is not found.context:
        raise AclError(OTHER_CONTEXT, stamp("EE9999") + "model not in current context")
    if (len(inputs), len(outputs)) != (len(found.inputs), len(found.outputs)):
        raise AclError(TOO_SMALL, stamp("E13025") + "Input or output number is not that of the model")
    for (_, room), one in [*zip(inputs, found.inputs), *zip(outputs, found.outputs)]:
        if room + SLACK < size_of(one):
            raise AclError(TOO_SMALL, stamp("E19999") + f"size {room} of a buffer is smaller than {size_of(one)}")

    def wait(sleep: Any) -> None:
        _faults(found, sleep)
        for (address, room), one in [*zip(inputs, found.inputs), *zip(outputs, found.outputs)]:
            if device_of(address, min(room, size_of(one))) != context.device:
                raise AclError(507011, stamp("EZ9999") + "MTE DDR address out of range: not of this device")
        feeds = {one["name"]: _read(address, room, one) for (address, room), one in zip(inputs, found.inputs)}
        if found.dumper:
            found.dumper.run(feeds)
        for (address, room), one, values in zip(outputs, found.outputs, found.session.run(None, feeds)):
            whole = np.ascontiguousarray(values.astype(one["dtype"]))
            ctypes.memmove(address & ~TAG, whole.ctypes.data, min(room, size_of(one)))

    return wait


def _read(address: int, room: int, one: Dict[str, Any]) -> np.ndarray:
    memory = ctypes.string_at(address & ~TAG, min(room, size_of(one))).ljust(size_of(one), b"\0")
    return np.frombuffer(memory, one["dtype"]).reshape(one["shape"])


def _faults(found: Model, sleep: Any) -> None:
    found.runs += 1
    faults = npu_host.faults()
    if found.runs <= int(npu_host.switch("LOSE_AFTER", "3")):
        return
    if "device_hangs" in faults:
        sleep(3600)
    for fault, code, words in (
        ("device_lost", 507011, "an aicore error exception, core id is 0"),
        ("aicpu_error", 507018, "an aicpu exception, the op is ArgMax"),
    ):
        if fault in faults:
            raise AclError(
                code,
                f"{stamp('EZ9999')}Inner Error!\n        The error from device(chipId:0, dieId:0), there is {words}\n"
                f"        TraceBack: rtStreamSynchronize execute failed, reason=[the model stream execute failed] "
                f"result = {code}",
            )


def leak_sessions() -> None:
    """In a forked child: ONNX Runtime's destructors, which no device has, would wait for threads that are not there."""
    for found in _process.models.values():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(found.session))


def size_of(one: Dict[str, Any]) -> int:
    """Bytes of an input or output."""
    return int(np.dtype(one["dtype"]).itemsize * math.prod(one["shape"]))
