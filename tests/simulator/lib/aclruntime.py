"""aclruntime of the simulated host, quirks included, in the generations A, B-early, B and C of the public sources.

A and B-early have one context a device, which `Tensor.to_device` makes current and `run` does not. B and C give every
session a context of its own, with indices that rise per device and are never reset; `to_device` uses index 0 all the
same.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import time
from types import SimpleNamespace
from typing import Any, Dict, List

import npu_host
import numpy as np
import simulated_acl as acl
import simulated_binding as binding

if "no_ascendcl" in npu_host.faults():
    raise ImportError("libascendcl.so: cannot open shared object file: No such file or directory")
if "newer_wheel" in npu_host.faults():
    raise ImportError("aclruntime.so: undefined symbol: aclmdlSetExternalWeightAddress")

from simulated_binding import FAILED, GENERATION, INVALID, NO_MEMORY, ONE_CONTEXT, BaseTensor, Tensor, dtype

__all__ = ["BaseTensor", "InferenceSession", "Tensor", "dtype", "session_options"]
__simulated__ = True
__version__ = {"A": "0.0.1", "B-early": "0.0.2", "B": "0.0.2", "C": "0.0.3"}[GENERATION]


class session_options:  # the real name
    """Options of a session."""

    def __init__(self) -> None:
        self.loop = 1
        self.log_level = 2
        self.acl_json_path = ""


class InferenceSession:
    """One loaded OM. All three arguments are required, by position."""

    _model = 0

    def __init__(self, model_path: str, device_id: int, options: session_options, /) -> None:
        if not isinstance(model_path, str) or not isinstance(options, session_options):
            raise TypeError("__init__(): incompatible constructor arguments.")
        if GENERATION == "C":
            _checked(model_path, device_id)
        if not ONE_CONTEXT:
            binding.devices.log_level = options.log_level
        code, self._index = (binding.set_context(device_id), 0) if ONE_CONTEXT else binding.create_context(device_id)
        if code:
            raise binding.failure(code)
        binding.devices.log_level = options.log_level
        self._device, self._loop = device_id, options.loop
        acl.configure(options.acl_json_path)
        self._load(model_path)
        self._zero = time.monotonic() - float(npu_host.switch("AGE_SECONDS", "0"))
        self._times: List[Any] = []
        binding.devices.sessions.add(self)

    def _load(self, path: str) -> None:
        try:
            self._model = acl.load(path)
        except acl.AclError:  # its context stays behind
            binding.recent()
            binding.error(f"{'Load' if GENERATION == 'C' else 'load'} model from file failed, model file is {path}")
            warn = "[warning]" if GENERATION == "C" else "[WARN]"
            binding.say(f"{warn} Check failed:processModel->LoadModelFromFile(modelPath), ret:{INVALID}\n")
            binding.say(f"{warn} no model had been loaded, unload failed")
            raise binding.failure(INVALID) from None
        self._inputs = acl.model(self._model).inputs
        self._outputs = acl.model(self._model).outputs
        binding.info(f"load model {path} success")

    def get_inputs(self) -> List[Any]:
        """Descriptions of the inputs, under their ONNX names."""
        return [_desc(one) for one in self._inputs]

    def get_outputs(self) -> List[Any]:
        """Descriptions of the outputs, under `producer:index:onnx_name`."""
        return [_desc(one) for one in self._outputs]

    def options(self) -> session_options:
        """The options."""
        return session_options()

    def set_staticbatch(self) -> None:
        """Nothing to set in a static model."""

    def run(self, outnames: Any, feeds: Any, /) -> List[Tensor]:
        """Run on tensors that are on the device, or on addresses of the host; only byte counts are compared."""
        if not isinstance(outnames, list) or not all(isinstance(name, str) for name in outnames):
            raise TypeError("run(): incompatible function arguments.")
        ordered = self._ordered(feeds)
        if not ONE_CONTEXT:
            code = binding.set_context(self._device, self._index)
            if code:
                raise binding.failure(code)
        inputs = [self._input(feed) for feed in ordered]
        self._check(inputs)
        outputs = self._execute(inputs)
        names = [one["name"] for one in self._outputs]
        for name in outnames:
            if name not in names:
                binding.error(f"outnames {name} not valid")
                raise binding.failure(FAILED)
        return [self._out(names.index(name), outputs) for name in outnames]

    def _ordered(self, feeds: Any) -> List[Any]:
        if isinstance(feeds, dict):
            if not all(isinstance(one, Tensor) for one in feeds.values()):
                raise TypeError("run(): incompatible function arguments.")
            return [feeds[one["name"]] for one in self._inputs]
        kinds = {type(one) for one in feeds} if isinstance(feeds, list) else {list}
        if not kinds <= {Tensor} and kinds != {BaseTensor}:
            raise TypeError("run(): incompatible function arguments.")
        return list(feeds)

    def _input(self, feed: Any) -> binding.Buffer:
        """The feed's memory on the device; of an address a copy, in whatever context is this thread's."""
        if isinstance(feed, Tensor):
            return feed._buffer
        buffer = binding.Buffer(feed.size, self._device, self._index)
        if buffer.allocate_here():
            buffer.size = NO_MEMORY  # the real one goes on with the error code for a size
        else:
            acl.memcpy(buffer.address, buffer.size, feed.buf, feed.size)
        return buffer

    def _check(self, inputs: List[binding.Buffer]) -> None:
        if len(inputs) != len(self._inputs):
            raise binding.failure(FAILED)
        for number, (one, buffer) in enumerate(zip(self._inputs, inputs)):
            if buffer.size != acl.size_of(one):
                sizes = f"in size:{buffer.size} needsize:{acl.size_of(one)}"
                binding.error(f"Check i:{number} name:{one['name']} {sizes} not match")
                binding.error(f"Check InVector failed ret:{FAILED}")
                raise binding.failure(FAILED)

    def _execute(self, inputs: List[binding.Buffer]) -> List[binding.Buffer]:
        outputs = [binding.Buffer(acl.size_of(one), self._device, self._index) for one in self._outputs]
        for number, (one, buffer) in enumerate(zip(self._outputs, outputs)):
            if buffer.allocate_here():
                binding.error(f"MemoryHelper::MxbsMalloc failed.i:{number} name:{one['name']} size:{buffer.size}")
                binding.error(f"create outmemory data failed:{NO_MEMORY}")
                raise binding.failure(NO_MEMORY)
        pairs = [[(one.address, one.size) for one in some] for some in (inputs, outputs)]
        for _ in range(self._loop):
            start = time.monotonic()
            try:
                acl.execute(self._model, *pairs)
            except acl.AclError:
                binding.recent()
                binding.error(f"execute model failed, modelId is {self._model}")
                binding.error(f"acl execute failed:{INVALID}")
                binding.error(f"Execute Infer failed ret:{FAILED}")
                raise binding.failure(FAILED) from None
            self._times.append(self._time(start, time.monotonic()))
        return outputs

    def _time(self, start: float, end: float) -> Any:
        """float32 milliseconds: A the length of the call, the others start and end since the session was created."""
        if GENERATION == "A":
            return float(np.float32((end - start) * 1000))
        return tuple(float(np.float32((one - self._zero) * 1000)) for one in (start, end))

    def _out(self, number: int, outputs: List[binding.Buffer]) -> Tensor:
        tensor = Tensor.__new__(Tensor)
        one = self._outputs[number]
        tensor._hold(outputs[number], one["dtype"], list(one["shape"]))
        return tensor

    def sumary(self) -> Any:
        """Times of the runs."""
        return SimpleNamespace(exec_time_list=list(self._times))

    def _reset(self) -> None:
        self._times.clear()

    def _destroy(self) -> int:
        """Unload the model, in this session's context; what a destructor does, whatever has gone before."""
        if not self._model:
            return 0
        code = binding.set_context(self._device, self._index)
        if code:
            binding.error(f"TensorContext::SetContext failed. ret={code}")
            return code
        number, self._model = self._model, 0
        try:
            acl.unload(number)
        except acl.AclError:
            binding.recent()
            binding.error(f"unload model failed, modelId is {number}")
            return FAILED
        return 0

    def __del__(self) -> None:
        self._destroy()


def _checked(path: str, device: int) -> None:
    """Generation C looks at both before it calls ACL."""
    if not os.path.isfile(path):
        binding.error("path is not regular file")
        raise RuntimeError("please check model path")
    if not 0 <= device <= 255:
        binding.error("device id should not be out of [0, 255]")
        raise RuntimeError("device id is out of range")


def _desc(one: Dict[str, Any]) -> Any:
    kind = dtype["double" if one["dtype"] == "float64" else one["dtype"]]
    size = acl.size_of(one)
    return SimpleNamespace(
        name=one["name"], datatype=kind, format=one["format"], shape=list(one["shape"]), size=size, realsize=size
    )


def _finalize() -> int:
    """Destroy every context, close the devices, finalise ACL; nothing where that was done before."""
    if not binding.devices.initialised:
        return 0
    binding.devices.initialised = False
    for device, contexts in binding.devices.contexts.items():
        for context in contexts.values():
            acl.destroy_context(context)
        acl.reset_device(device)
    binding.devices.contexts.clear()
    acl.finalize()
    binding.info("end to finalize acl")
    return 0


def _finalize_of_session(self: InferenceSession) -> int:
    """A and B-early: a method of a session, which it unloads."""
    code = binding.set_context(self._device)
    if code:
        binding.error(f"TensorContext::SetContext failed. ret={code}")
        return code
    return self._destroy() or _finalize()


def _free_resource(self: InferenceSession) -> int:
    code = binding.set_context(self._device, self._index)
    if code:
        binding.error(f"TensorContext::SetContext failed. ret={code}")
        return code
    code = self._destroy()
    if code:
        return code
    acl.destroy_context(binding.devices.contexts[self._device].pop(self._index))
    return 0


if ONE_CONTEXT:
    InferenceSession.finalize = _finalize_of_session  # type: ignore[attr-defined]
else:
    InferenceSession.finalize = staticmethod(_finalize)  # type: ignore[attr-defined]
    InferenceSession.free_resource = _free_resource  # type: ignore[attr-defined]
if GENERATION == "C":
    InferenceSession.summary = InferenceSession.sumary  # type: ignore[attr-defined]
    InferenceSession.reset_summaryinfo = InferenceSession._reset  # type: ignore[attr-defined]
else:
    InferenceSession.reset_sumaryinfo = InferenceSession._reset  # type: ignore[attr-defined]


@atexit.register
def _static_destructors() -> None:
    """What C++ does at the process's exit: sessions that are still there are destroyed, then ACL is finalised."""
    for session in list(binding.devices.sessions):
        session._destroy()
    if acl.ready():
        _finalize()


def _in_child() -> None:
    """A forked child has the same destructors, and what they call is no longer there."""
    if acl.ready() and sys.modules.get("simulated_acl") is acl:
        library = ctypes.CDLL(None)
        atexit.unregister(_static_destructors)
        acl.leak_sessions()
        library.on_exit(library.abort, None)


os.register_at_fork(after_in_child=_in_child)
