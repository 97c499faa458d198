"""Contexts and tensors of the simulated aclruntime, by generation; see `aclruntime` beside this file."""

from __future__ import annotations

import ctypes
import enum
import math
import weakref
from typing import Any, Dict, List, Tuple

import npu_host
import numpy as np
import simulated_acl as acl

GENERATION = npu_host.switch("GENERATION", "B")
ONE_CONTEXT = GENERATION in ("A", "B-early")
HOST = -1
FAILED, INVALID, NO_MEMORY = -1, 1, 2
NAMES = {
    FAILED: "ACL: general failure",
    INVALID: "ACL: invalid parameter",
    NO_MEMORY: "ACL: memory allocation fail",
    acl.UNINITIALIZED: "ACL is not initialized",
}
FORMATS = {"f": "float32", "e": "float16", "d": "float64", "l": "int64", "i": "int32", "h": "int16", "b": "int8",
           "L": "uint64", "I": "uint32", "H": "uint16", "B": "uint8", "?": "bool"}  # fmt: skip


class dtype(enum.IntEnum):  # the real name
    """ACL's data type ids."""

    float32 = 0
    float16 = 1
    int8 = 2
    int32 = 3
    uint8 = 4
    int16 = 6
    uint16 = 7
    uint32 = 8
    int64 = 9
    uint64 = 10
    double = 11
    bool = 12

    def __str__(self) -> str:
        return f"dtype.{self.name}"


class Devices:
    """The binding's own book of contexts: device -> index -> context."""

    def __init__(self) -> None:
        self.initialised = False
        self.log_level = 2
        self.contexts: Dict[int, Dict[int, acl.Context]] = {}
        self.next_index: Dict[int, int] = {}
        self.sessions: weakref.WeakSet[Any] = weakref.WeakSet()


devices = Devices()


def say(line: str) -> None:
    """C's stdio: on file descriptor 1, and kept back where that is a file."""
    ctypes.CDLL(None).puts(line.encode())


def error(line: str) -> None:
    say(f"[error] {line}" if GENERATION == "C" else f"[ERROR] {line}")


def plain(line: str) -> None:
    say(f"[error] {line}" if GENERATION == "C" else line)


def info(line: str) -> None:
    if devices.log_level <= 2:
        say(f"[info] {line}" if GENERATION == "C" else f"[INFO] {line}")


def recent() -> None:
    words = acl.recent_error()
    say(f"[error] [ACL ERROR] {words}" if GENERATION == "C" else words)


def failure(code: int) -> RuntimeError:
    return RuntimeError(f"[{code}][{NAMES.get(code, 'Error code unknown')}] ")


def _initialise() -> None:
    if devices.initialised:
        return
    try:
        acl.init()
    except acl.AclError as failed:
        recent()
        error("acl init failed")
        plain(f"DeviceManager InitDevices failed. ret={failed.code}")
        return
    info("acl init success")
    devices.initialised = True


def create_context(device: int) -> Tuple[int, int]:
    """What ACL returns, and the index of a new context."""
    _initialise()
    try:
        if device not in devices.contexts:
            acl.set_device(device)
            info(f"open device {device} success")
            devices.contexts[device] = {}
            devices.next_index[device] = 0
        context = acl.create_context(device)
    except acl.AclError as failed:
        recent()
        error(f"acl open device {device} failed")
        plain(f"{'SetDevice' if ONE_CONTEXT else 'CreateContext'} failed. ret={failed.code}")
        return failed.code, 0
    index = devices.next_index[device]
    devices.next_index[device] += 1
    devices.contexts[device][index] = context
    return 0, index


def set_context(device: int, index: int = 0) -> int:
    if ONE_CONTEXT and device not in devices.contexts:
        return create_context(device)[0]
    if index not in devices.contexts.get(device, {}):
        error(f"SetContext failed: device {device} is not set or context {index} is not created.")
        plain(f"SetContext failed. ret={INVALID}")
        return INVALID
    try:
        acl.set_context(devices.contexts[device][index])
    except acl.AclError as failed:
        recent()
        error("acl set curcontext failed")
        return failed.code
    return 0


class Buffer:
    """Memory of the host or of a device, given back by its destructor."""

    def __init__(self, size: int, device: int = HOST, index: int = 0) -> None:
        self.size, self.device, self.index = size, device, index
        self.address = 0

    def allocate(self) -> int:
        if self.device != HOST:
            code = set_context(self.device, self.index)
            if code:
                plain(f"TensorBuffer::TensorBufferMalloc failed. ret={code}")
                return code
        return self.allocate_here()

    def allocate_here(self) -> int:
        """In the context of this thread, whichever that is."""
        try:
            self.address = acl.malloc(self.size) if self.device != HOST else acl.malloc_host(self.size)
        except acl.AclError as failed:
            recent()
            plain(f"[{failed.code}][Error code unknown] Malloc ptrData failed.")
            plain(f"MemoryHelper::MxbsMalloc failed. ret={NO_MEMORY}")
            return NO_MEMORY
        return 0

    def __del__(self) -> None:
        if not self.address:
            return
        if self.device != HOST:
            set_context(self.device, self.index)
        try:
            acl.free(self.address) if self.device != HOST else acl.free_host(self.address)
        except acl.AclError as failed:
            recent()
            plain(f"[{failed.code}][Error code unknown] Free ptrData failed.")


class Tensor:
    """A copy of a buffer's memory. Takes no notice of strides, and knows few formats."""

    def __init__(self, buffer: Any) -> None:
        view = memoryview(buffer)
        name = FORMATS.get(view.format or "B", "uint8")  # an unknown format, 'q' too, is taken for bytes
        size = int(np.dtype(name).itemsize * math.prod(view.shape or ()))
        self._hold(Buffer(size), name, list(view.shape or ()))
        code = self._buffer.allocate()
        if code:
            plain(f"TensorBaseMalloc failed. ret={code}")
            raise failure(code)
        ctypes.memmove(self._buffer.address, _memory(buffer, size), size)

    def _hold(self, buffer: Buffer, name: str, shape: List[int]) -> None:
        self._buffer, self._numpy, self.shape = buffer, np.dtype(name), shape
        self.dtype = dtype["double" if name == "float64" else name]

    @property
    def device(self) -> int:
        """The device, or -1 for the host."""
        return self._buffer.device

    @property
    def type(self) -> str:
        """Where it is."""
        return "host" if self._buffer.device == HOST else "npu"

    def to_device(self, device_id: int) -> None:
        """Copy to a device, in place; in context 0 of the device, whoever made that."""
        if self.device == device_id:
            return
        if not 0 <= device_id < npu_host.npus():
            plain(f"deviceId({device_id}) is bigger than deviceCount({npu_host.npus()})")
            raise RuntimeError("[1004][Invalid parameter] ")
        self._move(Buffer(self._buffer.size, device_id))

    def to_host(self) -> None:
        """Copy to the host, in place."""
        if self.device != HOST:
            self._move(Buffer(self._buffer.size))

    def _move(self, target: Buffer) -> None:
        code = target.allocate()
        if code:
            plain(f"TensorBuffer::TensorBufferMalloc failed. ret={code}")
            raise failure(code)
        source = self._buffer
        device = source if source.device != HOST else target
        code = set_context(device.device, device.index)
        if code:
            raise failure(code)
        acl.memcpy(target.address, target.size, source.address, source.size)
        self._buffer = target

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self.device != HOST:
            raise RuntimeError("tensor is in npu. can't convert to numpy array")
        memory = ctypes.string_at(self._buffer.address, self._buffer.size)
        found = np.frombuffer(memory, self._numpy).reshape(self.shape)
        return found if dtype is None else found.astype(dtype)


def _memory(buffer: Any, size: int) -> bytes:
    """`size` bytes from where the buffer starts, whatever its strides; no further than its owner's memory."""
    array = np.asarray(buffer)
    start = array.__array_interface__["data"][0]
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    room = owner.__array_interface__["data"][0] + owner.nbytes - start
    return ctypes.string_at(start, min(size, room)).ljust(size, b"\0")


class BaseTensor:
    """A pointer and a number of bytes; what it points to must stay alive until the run is over."""

    def __init__(self, buf: int, size: int) -> None:
        self.buf = buf
        self.size = size
