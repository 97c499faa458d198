"""aclruntime: one OM file, loaded on a device and run. The only module that imports aclruntime.

Source: aclruntime of Ascend/tools at 9d6da90 (generation A), of sync-ait at 7348f67 (B-early) and c432ed5 (B), and of
Yanguan619/aclruntime at df1f9a4 (C), `backend/src`; each was compiled and run with an ACL that enforces contexts.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np

from clipval.ascend import acl, cann
from clipval.errors import BackendUnavailable

LOG_WARNINGS = 3  # prints errors, but not the line for every loaded model
# Pythons that the wheels of aclruntime 0.0.2 were made for, first and last
WHEELS = ((3, 7), (3, 12))

_open: Dict[int, Session] = {}  # sessions of this process known to ACL, by id()
_entered = threading.local()


def load() -> Any:
    """The aclruntime module.

    Raises:
        BackendUnavailable: it does not import, with the loader's message; or another ACL user is in this process.
    """
    acl.refuse_others("torch_npu", "acl")
    try:
        return importlib.import_module("aclruntime")
    except ImportError as error:
        raise BackendUnavailable(f"om backend: aclruntime does not import: {error}; {_import_advice(error)}") from error


def _import_advice(error: ImportError) -> str:
    if getattr(error, "name", None) == "aclruntime" and isinstance(error, ModuleNotFoundError):
        advice = wheel_advice()
        return advice if "pyACL" in advice else f"{advice}, or use --om-runtime pyacl, which comes with CANN"
    if "undefined symbol" in str(error):
        return (
            "the wheel is newer than this host's CANN; install the wheel of its release, or a newer CANN "
            "(requirements-npu.txt)"
        )
    if ".so" in str(error):
        return cann.how_to_source()
    return "install the wheel made for this Python and machine (requirements-npu.txt)"


def wheel_advice(python: Tuple[int, int] = sys.version_info[:2]) -> str:
    """Where to get aclruntime for a version of Python, or the alternatives if there is no wheel."""
    if WHEELS[0] <= python <= WHEELS[1]:
        return "install its wheel (not on PyPI, see requirements-npu.txt)"
    first, last, asked = (".".join(map(str, version)) for version in (*WHEELS, python))
    return (
        f"it has wheels for Python {first} to {last}, not for {asked}: use one of these, build it from source "
        "(requirements-npu.txt), or run OM files with pyACL, which comes with CANN: --om-runtime pyacl"
    )


def version(runtime: Any) -> str:
    """`aclruntime 0.0.2`, from the installed distribution, else from the module."""
    try:
        found = importlib.metadata.version("aclruntime")
    except importlib.metadata.PackageNotFoundError:
        found = str(getattr(runtime, "__version__", "of unknown version"))
    return f"aclruntime {found}"


class Session:
    """An OM file on a device.

    Args:
        file: the OM file, not a link.
        device: ACL's device id.
        acl_json: ACL configuration, which only a process's first session can set; empty for none.

    Raises:
        BackendUnavailable: aclruntime cannot be used in this process.
        acl.Failed: it does not load; with the runtime's message.
    """

    def __init__(self, file: Path, device: int, acl_json: str = "") -> None:
        self._runtime = load()
        self.version = version(self._runtime)
        self.simulated = getattr(self._runtime, "__simulated__", False) is True
        self._device = device
        self._native: Any = None
        self._spare: Any = None
        options = self._runtime.session_options()
        options.log_level = LOG_WARNINGS
        options.acl_json_path = acl_json
        acl.begin(_finalize, _natives)
        with acl.telling():
            # All three arguments are required, and must be positional.
            self._native = self._runtime.InferenceSession(str(file), device, options)
            # In B and C each session has its own context. A and B-early have one per device.
            self._own_context = hasattr(self._native, "free_resource")
            if not self._own_context:
                self._spare = self._runtime.Tensor(np.zeros(1, np.uint8))
        _entered.here = True
        _open[id(self)] = self
        self.inputs = [_node(one) for one in self._native.get_inputs()]
        self.outputs = [_node(one) for one in self._native.get_outputs()]

    def run(self, rows: np.ndarray, output: str) -> np.ndarray:
        """Run one batch, contiguous and of the input's byte size; returns the named output as the OM has it.

        Raises:
            acl.Failed: with the runtime's words.
        """
        feed = found = None
        with acl.telling():
            try:
                feed = self._feed(rows)
                (found,) = self._native.run([output], [feed])
                found.to_host()
                return np.array(found)
            finally:  # device memory must be freed before the session, even if someone keeps a traceback
                del feed, found

    def _feed(self, rows: np.ndarray) -> Any:
        """The rows in the form that this generation accepts in every session, whichever was open before.

        In B and C `to_device` uses the context of the device's first session, which ends with that session, while
        `BaseTensor` is copied in the session's own. In A and B-early `BaseTensor` is copied in the thread's current
        context, while `to_device` makes the device's current.
        """
        if self._own_context:
            return self._runtime.BaseTensor(rows.__array_interface__["data"][0], rows.nbytes)
        if not getattr(_entered, "here", False):  # a Tensor allocates pinned memory, for which a thread needs a context
            self._spare.to_device(self._device)
            self._spare.to_host()
            _entered.here = True
        tensor = self._runtime.Tensor(rows)
        tensor.to_device(self._device)
        return tensor

    def seconds(self) -> List[float]:
        """Seconds inside aclmdlExecute, one entry per run.

        Raises:
            acl.Failed: the runtime does not report them.
        """
        return [_milliseconds(entry) / 1000 for entry in self._recorded()]

    def copies(self) -> None:
        """None: the runtime records copy times only for the whole process."""
        return None

    def clock_step(self, age: float) -> float:
        """Resolution of the clock of `seconds` in a session of this age; both in seconds.

        B and C record start and end of each call as float32 milliseconds since the session was opened; A its duration.
        """
        recorded = self._recorded()
        return float(np.spacing(np.float32(age * 1000))) / 1000 if recorded and _is_pair(recorded[0]) else 0.0

    def _recorded(self) -> List[Any]:
        """The runtime's own list. Its method is misspelt in generations A and B, and has both names in C."""
        try:
            summary = getattr(self._native, "summary", None) or self._native.sumary
            return list(summary().exec_time_list)
        except (AttributeError, RuntimeError, TypeError) as error:
            raise acl.Failed(f"aclruntime reports no execute times ({error})") from error

    def free(self) -> None:
        """Free the device's memory. Errors of a lost device are ignored; the one that lost it was raised before."""
        native, self._native, self._spare = self._native, None, None
        if _open.pop(id(self), None) is None or not acl.mine():
            return
        with acl.captured(), suppress(RuntimeError):
            if self._own_context:
                native.free_resource()
            del native  # A and B-early unload in the destructor


def _natives() -> List[object]:
    """Objects whose destructor calls ACL."""
    return [one for session in _open.values() for one in (session._native, session._spare)]


def _finalize() -> None:
    """B and C have a static method that requires all sessions to be freed; A and B-early a method of a session.

    Without a session A and B-early finalise in a static destructor of their own.
    """
    sessions = list(_open.values())
    last = sessions[-1] if sessions and not sessions[-1]._own_context else None
    for session in sessions:
        if session is not last:
            session.free()
    with acl.captured(), suppress(KeyError, AttributeError, TypeError, RuntimeError):
        if last is not None:
            last._spare = None
            last._native.finalize()
        else:
            sys.modules["aclruntime"].InferenceSession.finalize()
    if last is not None:
        last.free()


def _node(desc: Any) -> acl.Node:
    shape = tuple(int(size) for size in desc.shape)
    return acl.Node(str(desc.name), acl.dtype_name(desc.datatype), shape, int(desc.realsize))


def _is_pair(entry: Any) -> bool:
    return not isinstance(entry, (float, int)) and hasattr(entry, "__len__")


def _milliseconds(entry: Any) -> float:
    """One call's duration: generation A records it, the others record start and end."""
    return float(entry[1]) - float(entry[0]) if _is_pair(entry) else float(entry)
