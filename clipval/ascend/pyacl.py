"""pyACL, CANN's own module `acl`: one OM file, loaded on a device and run. The only module that imports acl.

Calls are positional and take Python ints; getters return a bare value, the others a code, alone or after a value.
Source: the C source of the module (hicann/runtime, python/pyACL), its documents for CANN 8 and 9, and the examples of
hicann/ge. None of them was run on a device here.
"""

from __future__ import annotations

import importlib
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

import numpy as np

from clipval.ascend import acl, cann
from clipval.errors import BackendUnavailable

REPEATED = 100002  # acl.init was called before; "you may ignore it", and the first caller finalises
TO_DEVICE, FROM_DEVICE = 1, 2
HUGE_PAGES_FIRST = 0

_open: Dict[int, Session] = {}  # sessions of this process by id()
_devices: Set[int] = set()
_initialised_in = 0  # the process that called acl.init first
_module: Any = None


def load() -> Any:
    """The acl module.

    Raises:
        BackendUnavailable: it does not import, with the loader's message; it is another module of that name; or another
            user of ACL is in this process.
    """
    acl.refuse_others("torch_npu", "aclruntime")
    try:
        found = importlib.import_module("acl")
    except ImportError as error:
        advice = cann.how_to_source()
        raise BackendUnavailable(f"om backend: pyACL (module acl) does not import: {error}; {advice}") from error
    if not (hasattr(found, "mdl") and hasattr(found, "rt")):
        where = getattr(found, "__file__", None) or "a folder without code"
        advice = f"put CANN's python/site-packages first: {cann.how_to_source()}"
        raise BackendUnavailable(f"om backend: the module acl is not pyACL but {where}; {advice}")
    return found


class Session:
    """An OM file on a device, with its own context, stream and buffers.

    Args:
        file: the OM file, not a link.
        device: ACL's device id.
        acl_json: ACL's configuration file, which only the first session of a process can set; empty for none.

    Raises:
        BackendUnavailable: acl cannot be used in this process, or was initialised without the configuration.
        acl.Failed: it does not load; with the code and the runtime's words.
    """

    version = "pyACL"

    def __init__(self, file: Path, device: int, acl_json: str = "") -> None:
        self._acl = load()
        self.simulated = getattr(self._acl, "__simulated__", False) is True
        self._undo = ExitStack()  # in the documented order: buffers, model, stream, context
        self._times: Dict[str, List[float]] = {"to_device": [], "execute": [], "from_device": []}
        acl.begin(_finalize, list)
        self._start(device, acl_json)
        _open[id(self)] = self
        try:
            self._load(file)
        except acl.Failed:
            self.free()
            raise

    def _start(self, device: int, acl_json: str) -> None:
        global _initialised_in, _module
        _module = self._acl
        ours = _initialised_in == os.getpid()
        code = 0 if ours else self._acl.init(*filter(None, [acl_json]))
        if acl_json and (ours or code == REPEATED):
            raise BackendUnavailable("om backend: ACL was initialised before, so its configuration cannot be set now")
        if code != REPEATED:
            self._check("acl.init", code)
            _initialised_in = os.getpid()
        self._check("acl.rt.set_device", self._acl.rt.set_device(device))
        _devices.add(device)
        self._context = self._value("acl.rt.create_context", self._acl.rt.create_context(device))
        self._undo.callback(self._acl.rt.destroy_context, self._context)

    def _load(self, file: Path) -> None:
        rt, mdl = self._acl.rt, self._acl.mdl
        self._stream = self._value("acl.rt.create_stream", rt.create_stream())
        self._undo.callback(rt.destroy_stream, self._stream)
        self._model = self._value("acl.mdl.load_from_file", mdl.load_from_file(str(file)))
        self._undo.callback(mdl.unload, self._model)
        desc = mdl.create_desc()
        self._undo.callback(mdl.destroy_desc, desc)
        self._check("acl.mdl.get_desc", mdl.get_desc(desc, self._model))
        self.inputs = [self._node("input", desc, n) for n in range(mdl.get_num_inputs(desc))]
        self.outputs = [self._node("output", desc, n) for n in range(mdl.get_num_outputs(desc))]
        self._into, self._input_set = self._buffers(self.inputs)
        self._from, self._output_set = self._buffers(self.outputs)

    def _node(self, kind: str, desc: int, number: int) -> acl.Node:
        def ask(what: str) -> Any:
            return getattr(self._acl.mdl, what.format(kind))(desc, number)

        # the name returned with the dims is truncated if it is long
        dims = self._value(f"acl.mdl.get_{kind}_dims", ask("get_{}_dims"))
        shape = tuple(int(size) for size in dims["dims"])
        size = int(ask("get_{}_size_by_index"))
        return acl.Node(ask("get_{}_name_by_index"), acl.dtype_name(ask("get_{}_data_type")), shape, size)

    def _buffers(self, nodes: List[acl.Node]) -> Tuple[List[int], int]:
        """Device addresses, and the ACL dataset that holds them."""
        rt, mdl = self._acl.rt, self._acl.mdl
        whole = mdl.create_dataset()
        self._undo.callback(mdl.destroy_dataset, whole)
        addresses = []
        for node in nodes:
            address = self._value("acl.rt.malloc", rt.malloc(node.size, HUGE_PAGES_FIRST))
            self._undo.callback(rt.free, address)
            buffer = self._acl.create_data_buffer(address, node.size)
            self._undo.callback(self._acl.destroy_data_buffer, buffer)
            self._value("acl.mdl.add_dataset_buffer", mdl.add_dataset_buffer(whole, buffer))
            addresses.append(address)
        return addresses, whole

    def run(self, rows: np.ndarray, output: str) -> np.ndarray:
        """Run one batch, contiguous and of the input's byte size; returns the named output as the OM has it.

        Waits for the device in `synchronize_stream`, which lets other threads run, unlike `execute`.

        Raises:
            acl.Failed: with the code and the runtime's words.
        """
        rt, mdl = self._acl.rt, self._acl.mdl
        if rows.nbytes != self.inputs[0].size:  # ACL accepts other sizes, and then reuses rows of the previous batch
            raise acl.Failed(f"the batch has {rows.nbytes} bytes, the model takes {self.inputs[0].size}")
        number = [node.name for node in self.outputs].index(output)
        node = self.outputs[number]
        found = np.empty(node.shape, node.dtype)
        if found.nbytes != node.size:
            raise acl.Failed(f"output {output} has {node.size} bytes, which are not {node.dtype}{list(node.shape)}")
        self._check("acl.rt.set_context", rt.set_context(self._context))
        marks = [time.perf_counter()]
        self._copy(self._into[0], int(rows.ctypes.data), node=self.inputs[0], kind=TO_DEVICE)
        marks.append(time.perf_counter())
        code = mdl.execute_async(self._model, self._input_set, self._output_set, self._stream)
        self._check("acl.mdl.execute_async", code)
        self._check("acl.rt.synchronize_stream", rt.synchronize_stream(self._stream))
        marks.append(time.perf_counter())
        self._copy(int(found.ctypes.data), self._from[number], node=node, kind=FROM_DEVICE)
        marks.append(time.perf_counter())
        for times, start, end in zip(self._times.values(), marks, marks[1:]):
            times.append(end - start)
        return found

    def _copy(self, target: int, source: int, *, node: acl.Node, kind: int) -> None:
        self._check("acl.rt.memcpy", self._acl.rt.memcpy(target, node.size, source, node.size, kind))

    def seconds(self) -> List[float]:
        """Seconds from the launch of each run until the device was done."""
        return list(self._times["execute"])

    def copies(self) -> Dict[str, List[float]]:
        """Seconds of each run's copies `to_device` and `from_device`."""
        return {name: list(times) for name, times in self._times.items() if name != "execute"}

    def clock_step(self, age: float) -> float:
        """Resolution of the clock: times are Python's, so the session's age does not matter."""
        return 0.0

    def free(self) -> None:
        """Free everything. Errors of a lost device are ignored; the one that lost it was raised before."""
        undo, self._undo = self._undo, ExitStack()
        if _open.pop(id(self), None) is None or not acl.mine():
            return
        self._acl.rt.set_context(self._context)
        undo.close()

    def _check(self, call: str, code: int) -> None:
        if code:
            words = self._acl.get_recent_err_msg() or ""  # of this thread; this call clears it
            raise acl.failure(f"{call} returned {code}", words)

    def _value(self, call: str, pair: Tuple[Any, int]) -> Any:
        value, code = pair
        self._check(call, code)
        return value


def _finalize() -> None:
    """Close what is open, reset the devices, then finalise; does nothing if another user initialised ACL."""
    for session in list(_open.values()):
        session.free()
    if _initialised_in != os.getpid():
        return
    for device in sorted(_devices):
        _module.rt.reset_device(device)
    _module.finalize()
