"""The OM backend: an Ascend OM file of one static batch size, run through aclruntime.

One session is alive per device: opening another one closes the former, whose later use is an error. ACL is
finalised once, at the exit of the process that opened it, and is refused in a forked child.

Source: aclruntime of Ascend/tools (generation A, float times), of ais_bench 0.0.2 (B, pairs of times,
`free_resource`) and 0.0.3 (C, `summary`).
"""

from __future__ import annotations

import atexit
import functools
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from clipval.ascend import acl, atc, host, npu_smi, occupancy, om_files
from clipval.backends import Backend, BackendSettings, Identity, Kind, Materials, Opening
from clipval.errors import BackendUnavailable, ClipvalError, InputError, one_line
from clipval.towers import Tower

# Generations B and C keep start and end of each call as float32 milliseconds since the session was opened, so the
# clock gets coarser as the session ages. A session is opened anew before that costs more than this share of a call.
COARSEST = 0.01
LOG_WARNINGS = 3  # of aclruntime: errors are printed too, the line for every loaded model is not
FIRST_CHECK_MS = 16384.0  # float32 steps by 0.002 ms from here on

_lock = threading.RLock()
_alive: Dict[int, OmBackend] = {}
_first_pid: Optional[int] = None  # the process that initialised ACL
_first_runtime: Any = None


class OmBackend(Backend):
    """See `clipval.backends.Backend`.

    Args:
        tower: the tower's contract; the file's input and output are held to it.
        om: the OM file.
        batch_size: rows of a batch; must be what the OM was compiled for.
        device_id: ACL's device id, a logic id after `ASCEND_RT_VISIBLE_DEVICES`.
        precision: atc's precision mode that the OM was compiled with; a label, the file does not tell.

    Raises:
        BackendUnavailable: aclruntime, the driver or the device cannot be used.
        InputError: the file does not load, or is not of this tower and batch size.
    """

    def __init__(
        self, tower: Tower, om: Path, batch_size: int, device_id: int = 0, precision: str = atc.DEFAULT_MODE
    ) -> None:
        _refuse_fork()
        self.tower = tower
        self.batch_size = batch_size
        self._rows = batch_size
        self._file = _readable(om)
        self._device_id = device_id
        self._where = f"om backend, {tower.name} tower, {self._file}"
        self._runtime = acl.load_runtime()
        self._times: List[float] = []  # of sessions that were closed
        self._closed = ""
        self._session: Any = None
        with _lock:
            former = _alive.pop(device_id, None)
            if former is not None:
                former._end(f"another OM was opened on device {device_id}")
            self._open()
            _alive[device_id] = self
        self.identity = Identity(
            "om",
            acl.stack_version(self._runtime),
            f"{_chip(device_id)}:{device_id}",
            precision,
            getattr(self._runtime, "__simulated__", False) is True,
        )

    def _open(self) -> None:
        """A fresh session that keeps the contract."""
        options = self._runtime.session_options()
        options.log_level = LOG_WARNINGS
        _remember(self._runtime)
        captured = acl.Captured()
        started = time.perf_counter()
        try:
            with acl.captured_stdout() as captured:
                # All three arguments are required, and must be positional.
                self._session = self._runtime.InferenceSession(str(self._file), self._device_id, options)
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise self._load_error(error, captured) from error
        self.load_seconds = time.perf_counter() - started
        self._opened_at = time.monotonic()
        self._check_at_ms = FIRST_CHECK_MS
        self._runs = 0
        try:
            self._output_name, self._output_dtype = self._check_contract()
        except ClipvalError:
            self._free()
            raise

    def _load_error(self, error: Exception, captured: acl.Captured) -> ClipvalError:
        words = "; ".join(part for part in (captured.errors(), one_line(error, 300)) if part)
        advice = acl.advice(words) or _no_such_device(self._device_id)
        if advice and not any(code in words for code in acl.MODEL_CODES):
            return BackendUnavailable(f"{self._where}: device {self._device_id}: {advice} ({words})")
        return InputError(
            f"{self._where}: cannot be loaded on device {self._device_id} ({words}). "
            f"{advice or 'Damaged or cut short, compiled for another chip, or by a newer CANN'}; compile it again"
        )

    def _check_contract(self) -> Tuple[str, str]:
        """Name and dtype of the output. The runtime itself compares byte counts only, and reads the rest as garbage."""
        inputs = [_describe(one) for one in self._session.get_inputs()]
        outputs = [_describe(one) for one in self._session.get_outputs()]
        tower = self.tower
        wanted = (tower.input_name, tower.dtype, tower.shape(self._rows))
        if len(inputs) != 1 or inputs[0][:2] != wanted[:2] or inputs[0][2][1:] != wanted[2][1:]:
            raise InputError(f"{self._where}: its inputs are {_say(inputs)}, the tower needs {_say([wanted])}")
        found = inputs[0][2][0]
        if found != self._rows:
            compiled = f"batch size {found}" if found > 0 else "a dynamic batch size"
            raise InputError(
                f"{self._where}: compiled for {compiled}, asked for {self._rows}; "
                f"compile one for batch size {self._rows}"
            )
        size = self._session.get_inputs()[0].realsize
        if size != np.dtype(tower.dtype).itemsize * int(np.prod(wanted[2])):
            raise InputError(f"{self._where}: its input takes {size} bytes, which are not those of {_say([wanted])}")
        return self._check_outputs(outputs)

    def _check_outputs(self, outputs: List[Tuple[str, str, Tuple[int, ...]]]) -> Tuple[str, str]:
        """ATC names outputs `producer:index:onnx_name`; only the last part is ours."""
        tower = self.tower
        if len(outputs) > 1:
            raise InputError(
                f"{self._where}: has {len(outputs)} outputs, {_say(outputs)}, expected only {tower.output_name}. The "
                f"recipe's own export adds the scalar exp(logit_scale); export with clipval and compile again"
            )
        wanted = (tower.output_name, "float32", (self._rows, tower.width))
        name, dtype, shape = outputs[0] if outputs else ("", "", ())
        if name.rsplit(":", 1)[-1] != wanted[0] or dtype not in ("float32", "float16") or shape != wanted[2]:
            raise InputError(f"{self._where}: its output is {_say(outputs)}, the tower needs {_say([wanted])}")
        return name, dtype

    def run(self, rows: np.ndarray) -> np.ndarray:
        """See `clipval.backends.Backend.run`.

        Raises:
            InputError: rows of another shape or dtype.
            BackendUnavailable: the device failed, or this session is closed.
        """
        exact = self._exact(rows)
        with _lock:
            self._refuse_closed()
            self._renew_when_stale()
            try:
                found = self._execute(exact)
            except (RuntimeError, TypeError, ValueError) as error:
                words = one_line(error, 300)
                advice = acl.advice(words) or "the device may be lost; see `npu-smi info` and the log in ~/ascend/log"
                raise BackendUnavailable(
                    f"{self._where}: device {self._device_id} failed in run {self._runs + 1} of this session "
                    f"({words}); {advice}"
                ) from error.with_traceback(None)  # its frames would keep device tensors alive
            self._runs += 1
        return self._embedding(found)

    def _execute(self, rows: np.ndarray) -> np.ndarray:
        tensor = output = None
        try:
            tensor = self._runtime.Tensor(rows)
            tensor.to_device(self._device_id)
            (output,) = self._session.run([self._output_name], [tensor])
            output.to_host()
            return np.array(output)
        finally:  # device memory must go before the session does, also where somebody keeps a traceback
            del output, tensor

    def _exact(self, rows: np.ndarray) -> np.ndarray:
        """The rows as the runtime's Tensor reads them right: contiguous, and of the very C type."""
        wanted = np.dtype(self.tower.dtype)
        if rows.shape != self.tower.shape(self._rows) or rows.dtype != wanted:
            raise InputError(
                f"{self._where}: input is {_say([(self.tower.input_name, str(rows.dtype), rows.shape)])}, this OM "
                f"takes {_say([(self.tower.input_name, self.tower.dtype, self.tower.shape(self._rows))])}"
            )
        # Tensor ignores strides, and takes C's `long long` for uint8, though numpy has it equal to int64.
        return np.ascontiguousarray(rows).view(wanted)

    def _embedding(self, found: np.ndarray) -> np.ndarray:
        if found.shape != (self._rows, self.tower.width) or str(found.dtype) != self._output_dtype:
            raise InputError(
                f"{self._where}: gave {found.dtype}{list(found.shape)}, its description says "
                f"{self._output_dtype}{[self._rows, self.tower.width]}"
            )
        return np.array(found, dtype=np.float32, order="C")

    def execute_seconds(self) -> Optional[List[float]]:
        """Seconds inside aclmdlExecute alone, one entry per `run` so far; copies to and from the device excluded."""
        with _lock:
            if self._session is not None:
                return self._times + self._session_times()
            return list(self._times)

    def _session_times(self) -> List[float]:
        recorded = self._recorded()
        if len(recorded) != self._runs:
            raise BackendUnavailable(
                f"{self._where}: aclruntime recorded {len(recorded)} times for {self._runs} runs; this version of it "
                f"is not known to clipval"
            )
        return [_milliseconds(entry) / 1000 for entry in recorded]

    def _recorded(self) -> List[Any]:
        """The runtime's own list. Its method is misspelt in generations A and B, and has both names in C."""
        if self._session is None:
            return []
        try:
            summary = getattr(self._session, "summary", None) or self._session.sumary
            return list(summary().exec_time_list)
        except (AttributeError, RuntimeError, TypeError) as error:
            raise BackendUnavailable(f"{self._where}: aclruntime does not tell execute times ({error})") from error

    def refresh(self) -> None:
        """Open the session anew, so that the clock is as fine as it can be; times so far are kept."""
        with _lock:
            self._refuse_closed()
            self._times += self._session_times()
            self._free()
            try:
                self._open()
            except ClipvalError:
                self._closed = "it could not be opened anew"
                raise

    def _age_ms(self) -> float:
        return (time.monotonic() - self._opened_at) * 1000

    def _renew_when_stale(self) -> None:
        """Reopen a session whose clock is too coarse. Looked at when its age has doubled, as reading times costs."""
        age_ms = self._age_ms()
        if age_ms < self._check_at_ms or not self._runs:
            return
        recorded = self._recorded()
        mean_ms = sum(map(_milliseconds, recorded)) / max(1, len(recorded))
        if recorded and _is_pair(recorded[0]) and float(np.spacing(np.float32(age_ms))) > COARSEST * mean_ms:
            self.refresh()
        else:
            self._check_at_ms *= 2

    def _refuse_closed(self) -> None:
        _refuse_fork()
        if self._session is None:
            raise BackendUnavailable(f"{self._where}: closed, as {self._closed}; open it again")

    def busy(self) -> str:
        """What else uses the NPU; see `clipval.ascend.occupancy`."""
        return occupancy.others(self._device_id)

    def close(self) -> None:
        """Free the session; its times stay readable. Calling it twice is allowed."""
        with _lock:
            if _alive.get(self._device_id) is self:
                del _alive[self._device_id]
            self._end("close() was called")

    def _end(self, reason: str) -> None:
        if self._session is None:
            return
        self._closed = reason
        with suppress(BackendUnavailable):  # after a failed run, whose own error was raised
            self._times += self._session_times()
        self._free()

    def _free(self) -> None:
        session, self._session = self._session, None
        free = getattr(session, "free_resource", None)  # generation A frees in its destructor
        if free is not None and _first_pid == os.getpid():
            with suppress(RuntimeError):  # a lost device cannot be freed, and what lost it was raised before
                free()


def _readable(om: Path) -> Path:
    """The file without links: the runtime's own checks refuse a link."""
    if not om.is_file() or om.stat().st_size == 0:
        raise InputError(f"OM {om}: {'empty' if om.is_file() else 'no such file'}; compile it with clipval compile")
    return om.resolve()


def _refuse_fork() -> None:
    if _first_pid not in (None, os.getpid()):
        raise BackendUnavailable(
            f"om backend: process {os.getpid()} was forked from {_first_pid}, which uses ACL; start workers with spawn"
        )


@functools.lru_cache(maxsize=None)
def _chip(device_id: int) -> str:
    """The chip's name for people; inference itself needs no npu-smi, so its absence is no error here."""
    try:
        return npu_smi.npu(device_id).soc_version
    except ClipvalError:
        return "Ascend"


def _describe(desc: Any) -> Tuple[str, str, Tuple[int, ...]]:
    return str(desc.name), acl.dtype_name(desc.datatype), tuple(int(size) for size in desc.shape)


def _say(nodes: List[Tuple[str, str, Tuple[int, ...]]]) -> str:
    return ", ".join(f"{name!r} {dtype}{list(shape)}" for name, dtype, shape in nodes) or "none"


def _no_such_device(device_id: int) -> str:
    """npu-smi's word that there is no such device, for the runtime calls that an invalid parameter; else empty."""
    try:
        npu_smi.list_npus()
    except ClipvalError:
        return ""
    try:
        npu_smi.npu(device_id)
    except ClipvalError as error:
        return str(error)
    return ""


def _is_pair(entry: Any) -> bool:
    return not isinstance(entry, (float, int)) and hasattr(entry, "__len__")


def _milliseconds(entry: Any) -> float:
    """One call: generation A records its length, B and C its start and end."""
    return float(entry[1]) - float(entry[0]) if _is_pair(entry) else float(entry)


def _remember(runtime: Any) -> None:
    """Note who initialises ACL, and have it finalised at this process's exit."""
    global _first_pid, _first_runtime
    if _first_pid is None:
        _first_pid, _first_runtime = os.getpid(), runtime
        atexit.register(_finalize)


def _finalize() -> None:
    """Finalise ACL, once, at the exit of the process that initialised it; never in a forked child.

    Generation A has it as a method of a session, B and C as a static method that wants all sessions freed first.
    """
    if _first_pid != os.getpid():
        return
    for backend in list(_alive.values()):
        if hasattr(backend._session, "free_resource"):
            backend.close()
    sessions = [backend._session for backend in _alive.values() if backend._session is not None]
    owner = sessions[0] if sessions else _first_runtime.InferenceSession
    # Generation A without a session has nothing to finalise with; the process ends anyway.
    with suppress(AttributeError, TypeError, RuntimeError):
        owner.finalize()
    _alive.clear()


def atc_options(asked: BackendSettings) -> atc.AtcOptions:
    """What atc is asked for by the options of a run; see `clipval.ascend.om_files.options` for errors."""
    first, keep = asked.device_id[0], asked.keep_dtype
    return om_files.options(asked.soc_version, first, asked.precision_mode, keep, asked.atc_flags)


def _artifact(made: Materials, tower: Tower, batch_size: int) -> Path:
    asked = made.settings
    if asked.om_dir is not None:
        return om_files.ready(asked.om_dir, tower, batch_size)
    return om_files.compiled(made.store, made.onnx(tower), tower, batch_size, atc_options(asked))


def _open_file(made: Materials, asked: Opening) -> Backend:
    assert asked.file is not None
    precision = made.settings.precision_mode or atc.DEFAULT_MODE
    with occupancy.opening(asked.device):
        return OmBackend(asked.tower, asked.file, asked.batch_size, asked.device, precision)


KIND = Kind(
    _open_file,
    suffix=".om",
    artifact=_artifact,
    fixed_batch=True,
    one_session=True,
    precision=lambda where: atc.precision_class(where.precision),
    host=host.check_host,
    origin=lambda asked: om_files.origin(asked.om_dir, asked.keep_dtype, asked.atc_flags),
)
