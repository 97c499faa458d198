"""aclruntime of the simulated host: generation A, B or C of the interface, quirks included, over ONNX Runtime."""

from __future__ import annotations

import ctypes
import enum
import math
import os
import threading
import time
from types import SimpleNamespace
from typing import Any, Dict, List

import npu_host
import numpy as np

if "no_ascendcl" in npu_host.faults():
    raise ImportError("libascendcl.so: cannot open shared object file: No such file or directory")

__simulated__ = True
GENERATION = npu_host.switch("GENERATION", "B")
__version__ = {"A": "0.0.1", "B": "0.0.2", "C": "0.0.3"}[GENERATION]
HOST = -1
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


class _Process:
    """ACL's state of this process: initialised once, finalised once."""

    finalized = False


class session_options:  # the real name
    """Options of a session."""

    def __init__(self) -> None:
        self.loop = 1
        self.log_level = 2
        self.acl_json_path = ""


class Tensor:
    """A copy of a buffer's memory. Takes no notice of strides, and knows few formats."""

    def __init__(self, buffer: Any) -> None:
        view = memoryview(buffer)
        name = FORMATS.get(view.format or "B", "uint8")  # an unknown format, 'q' too, is taken for bytes
        self.dtype = dtype["double" if name == "float64" else name]
        self._numpy = np.dtype(name)
        self.shape = list(view.shape or ())
        self.type = "host"
        self.device = HOST
        self._bytes = _memory(buffer, self._numpy.itemsize * math.prod(self.shape))

    def to_device(self, device_id: int) -> None:
        """Copy to a device, in place."""
        if not 0 <= device_id < npu_host.npus():
            raise RuntimeError("[107001][ACL: invalid device id]")
        self.type, self.device = "npu", device_id

    def to_host(self) -> None:
        """Copy to the host, in place."""
        self.type, self.device = "host", HOST

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self.device != HOST:
            raise RuntimeError("tensor is in npu, please transfer to host first")
        found = np.frombuffer(self._bytes, self._numpy).reshape(self.shape)
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
    """A pointer and a number of bytes."""

    def __init__(self, buf: int, size: int) -> None:
        self.buf = buf
        self.size = size


class InferenceSession:
    """One loaded OM. All three arguments are required, by position."""

    def __init__(self, model_path: str, device_id: int, options: session_options, /) -> None:
        if not isinstance(model_path, str) or not isinstance(options, session_options):
            raise TypeError("__init__(): incompatible constructor arguments.")
        if _Process.finalized:
            raise RuntimeError("[100001][ACL: uninitialize]")
        if "driver_mismatch" in npu_host.faults():
            _print("[ERROR] acl set device failed, ret is 507033")
            raise RuntimeError("[507033][ACL: device setup failed]")
        if not 0 <= device_id < npu_host.npus():
            _print(f"[ERROR] acl open device {device_id} failed, error code is 107001")
            raise RuntimeError("[1][ACL: invalid parameter]")
        self._load(model_path)
        npu_host.note_user(device_id)
        self._device, self._loop = device_id, options.loop
        self._thread = threading.get_ident()
        self._zero = time.monotonic() - float(npu_host.switch("AGE_SECONDS", "0"))
        self._times: List[Any] = []
        self._runs = 0
        if options.log_level <= 2:
            _print(f"[INFO] load model {model_path} success")

    def _load(self, path: str) -> None:
        import onnxruntime

        try:
            self._header, model = npu_host.read_om(path)
            if self._header["soc"] != npu_host.chip().soc:
                raise ValueError("of another chip")
        except (OSError, ValueError, KeyError):
            _print(f"[ERROR] load model from file failed, model file is {path}")
            raise RuntimeError("[1][ACL: invalid parameter]") from None
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        # Whole-graph optimisers drop casts to fp16 and back, which are the point of this model.
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self._onnx: Any = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])

    def get_inputs(self) -> List[Any]:
        """Descriptions of the inputs, under their ONNX names."""
        self._alive()
        return [_desc(one) for one in self._header["inputs"]]

    def get_outputs(self) -> List[Any]:
        """Descriptions of the outputs, under `producer:index:onnx_name`."""
        self._alive()
        return [_desc(one) for one in self._header["outputs"]]

    def options(self) -> session_options:
        """The options."""
        return session_options()

    def set_staticbatch(self) -> None:
        """Nothing to set in a static model."""

    def run(self, outnames: Any, feeds: Any, /) -> List[Tensor]:
        """Run on tensors that are on the device; compares byte counts, and nothing else."""
        self._alive()
        if not isinstance(outnames, list) or not all(isinstance(name, str) for name in outnames):
            raise TypeError("run(): incompatible function arguments.")
        names = [one["name"] for one in self._header["outputs"]]
        for name in outnames:
            if name not in names:
                raise RuntimeError(f"[1][ACL: invalid parameter] output {name} not found")
        buffers = [self._bytes(one) for one in self._ordered(feeds)]
        self._faults()
        outputs = self._execute({one["name"]: buffer for one, buffer in zip(self._described(buffers), buffers)})
        return [self._out(outputs[names.index(name)]) for name in outnames]

    def _ordered(self, feeds: Any) -> List[Any]:
        if isinstance(feeds, dict):
            if not all(isinstance(one, Tensor) for one in feeds.values()):
                raise TypeError("run(): incompatible function arguments.")
            return [feeds[one["name"]] for one in self._header["inputs"]]
        if not isinstance(feeds, list) or not all(isinstance(one, (Tensor, BaseTensor)) for one in feeds):
            raise TypeError("run(): incompatible function arguments.")
        if GENERATION == "A" and threading.get_ident() != self._thread:
            raise RuntimeError("[107002][ACL: context is null]")
        return feeds

    def _bytes(self, feed: Any) -> bytes:
        if isinstance(feed, BaseTensor):
            return ctypes.string_at(feed.buf, feed.size)
        if feed.device != self._device:
            raise RuntimeError("[1][ACL: invalid parameter] tensor is not on the device")
        found: bytes = feed._bytes
        return found

    def _described(self, buffers: List[bytes]) -> List[Dict[str, Any]]:
        inputs: List[Dict[str, Any]] = self._header["inputs"]
        if len(inputs) != len(buffers):
            raise RuntimeError(f"[1][ACL: invalid parameter] {len(buffers)} inputs, need {len(inputs)}")
        for number, (one, buffer) in enumerate(zip(inputs, buffers)):
            if len(buffer) != _size(one):
                _print(
                    f"[ERROR] Check i:{number} name:{one['name']} in size:{len(buffer)} needsize:{_size(one)} not match"
                )
                raise RuntimeError("[1][ACL: invalid parameter]")
        return inputs

    def _faults(self) -> None:
        self._runs += 1
        if "device_lost" in npu_host.faults() and self._runs > int(npu_host.switch("LOSE_AFTER", "3")):
            _print("[ERROR] execute model failed, device 0 heartbeat lost")
            raise RuntimeError("[507011][ACL: model execute failed]")

    def _execute(self, buffers: Dict[str, bytes]) -> List[np.ndarray]:
        feeds = {
            one["name"]: np.frombuffer(buffers[one["name"]], one["dtype"]).reshape(one["shape"])
            for one in self._header["inputs"]
        }
        outputs: List[np.ndarray] = []
        for _ in range(self._loop):
            start = time.monotonic()
            outputs = self._onnx.run(None, feeds)
            self._times.append(self._time(start, time.monotonic()))
        return outputs

    def _time(self, start: float, end: float) -> Any:
        """float32 milliseconds: A the length of the call, B and C start and end since the session was created."""
        if GENERATION == "A":
            return float(np.float32((end - start) * 1000))
        return tuple(float(np.float32((one - self._zero) * 1000)) for one in (start, end))

    def _out(self, values: np.ndarray) -> Tensor:
        tensor = Tensor(np.array(values, order="C"))
        tensor.to_device(self._device)
        return tensor

    def sumary(self) -> Any:
        """Times of the runs."""
        self._alive()
        return SimpleNamespace(exec_time_list=list(self._times))

    def _reset(self) -> None:
        self._alive()
        self._times.clear()

    def _alive(self) -> None:
        if _Process.finalized or self._onnx is None:
            raise RuntimeError("[100001][ACL: uninitialize]")


def _desc(one: Dict[str, Any]) -> Any:
    kind = dtype["double" if one["dtype"] == "float64" else one["dtype"]]
    return SimpleNamespace(
        name=one["name"],
        datatype=kind,
        format=one["format"],
        shape=list(one["shape"]),
        size=_size(one),
        realsize=_size(one),
    )


def _size(one: Dict[str, Any]) -> int:
    return int(np.dtype(one["dtype"]).itemsize * math.prod(one["shape"]))


def _print(line: str) -> None:
    """C++ prints: to file descriptor 1, past `sys.stdout`."""
    if "silent" in npu_host.faults():
        return
    os.write(1, (line + "\n").encode())


def _finalize(*_: Any) -> None:
    if _Process.finalized:
        _print("[ERROR] acl finalize failed, repeat")
        raise RuntimeError("[100001][ACL: uninitialize]")
    _Process.finalized = True
    if npu_host.switch("FINALIZED"):
        with open(npu_host.switch("FINALIZED"), "a", encoding="utf-8") as stream:
            stream.write(f"{os.getpid()}\n")


def _free_resource(self: InferenceSession) -> None:
    self._alive()
    self._onnx = None


if GENERATION == "A":
    InferenceSession.finalize = lambda self: _finalize(self)  # type: ignore[attr-defined]
else:
    InferenceSession.finalize = staticmethod(lambda: _finalize())  # type: ignore[attr-defined]
    InferenceSession.free_resource = _free_resource  # type: ignore[attr-defined]
if GENERATION == "C":
    InferenceSession.summary = InferenceSession.sumary  # type: ignore[attr-defined]
    InferenceSession.reset_summaryinfo = InferenceSession._reset  # type: ignore[attr-defined]
else:
    InferenceSession.reset_sumaryinfo = InferenceSession._reset  # type: ignore[attr-defined]
