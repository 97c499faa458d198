"""The OM backend: an Ascend OM file of one static batch size, run through aclruntime or pyACL.

One session is alive per device: opening another one closes the earlier one, and using that one later is an error. ACL
is finalised once, when the process that opened it exits, and is refused in a forked child.
"""

from __future__ import annotations

import functools
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Callable, ContextManager, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from clipval.ascend import acl, aclruntime, atc, host, npu_smi, occupancy, om_files, pyacl, watchdog
from clipval.backends import EXTRA, Backend, BackendSettings, Identity, Kind, Materials, Opening
from clipval.errors import BackendUnavailable, ClipvalError, InputError
from clipval.towers import Tower

# The clock of some runtimes gets coarser as a session ages. The session is reopened before that costs more than this
# share of a call; checked from the age at which float32 milliseconds step by 0.002 ms, and when the age has doubled.
COARSEST = 0.01
FIRST_CHECK_SECONDS = 16.384

Session = Union[aclruntime.Session, pyacl.Session]
# The runtimes of OM files, by name in `--om-runtime`.
SESSIONS: Dict[str, Callable[[Path, int], Session]] = {"aclruntime": aclruntime.Session, "pyacl": pyacl.Session}

_lock = threading.RLock()
_alive: Dict[int, OmBackend] = {}


class OmBackend(Backend):
    """See `clipval.backends.Backend`.

    Args:
        tower: the tower's contract; the file's input and output are checked against it.
        om: the OM file.
        batch_size: rows per batch; must be the one that the OM was compiled for.
        device_id: ACL's device id, a logic id after `ASCEND_RT_VISIBLE_DEVICES`.
        precision: atc's precision mode that the OM was compiled with; only a label, since the file does not record it.
        device_timeout: seconds after which a device call ends the process; see `clipval.ascend.watchdog`.
        runtime: a name in `SESSIONS`.

    Raises:
        BackendUnavailable: the runtime, the driver or the device cannot be used.
        InputError: the file does not load, or is not of this tower and batch size.
    """

    def __init__(
        self,
        tower: Tower,
        om: Path,
        batch_size: int,
        device_id: int = 0,
        precision: str = atc.DEFAULT_MODE,
        device_timeout: Optional[float] = None,
        runtime: str = "aclruntime",
    ) -> None:
        acl.refuse_fork()
        self.tower = tower
        self.batch_size = batch_size
        self._rows = batch_size
        self._file = _readable(om)
        self._device_id = device_id
        self._where = f"om backend, {tower.name} tower, {self._file}"
        self._device_timeout = device_timeout
        self._runtime = runtime
        self._times: List[float] = []  # of closed sessions
        self._closed = ""
        self._session: Optional[Session] = None
        with _lock:
            former = _alive.pop(device_id, None)
            if former is not None:
                former._end(f"another OM was opened on device {device_id}")
            session = self._open()
            _alive[device_id] = self
        version = acl.stack_version(session.version)
        self.identity = Identity("om", version, f"{_chip(device_id)}:{device_id}", precision, session.simulated)

    def _open(self) -> Session:
        """A new session whose inputs and outputs match the contract."""
        started = time.perf_counter()
        try:
            with self._limited("loading"):
                session = SESSIONS[self._runtime](self._file, self._device_id)
        except acl.Failed as failed:
            raise self._load_error(failed) from failed
        self.load_seconds = time.perf_counter() - started
        self._opened_at = time.monotonic()
        self._check_at = FIRST_CHECK_SECONDS
        self._runs = 0
        try:
            self._check_input(session.inputs)
            self._output = self._check_outputs(session.outputs)
        except ClipvalError:
            self._free(session)
            raise
        self._session = session
        return session

    def _load_error(self, failed: acl.Failed) -> ClipvalError:
        advice = acl.advice(failed.words)
        if advice and not any(code in failed.words for code in acl.MODEL_CODES):
            return BackendUnavailable(f"{self._where}: device {self._device_id}: {advice} ({failed})")
        return InputError(
            f"{self._where}: cannot be loaded on device {self._device_id} ({failed}); "
            f"{advice or 'damaged or truncated, compiled for another chip, or by a newer CANN'}; compile it again"
        )

    def _check_input(self, inputs: List[acl.Node]) -> None:
        """Check the inputs: the runtime itself only compares byte counts, and misreads anything else."""
        tower = self.tower
        wanted = _node(tower.input_name, tower.dtype, tower.shape(self._rows))
        found = inputs[0] if len(inputs) == 1 else None
        if found is None or found[:2] != wanted[:2] or found.shape[1:] != wanted.shape[1:]:
            raise InputError(f"{self._where}: its inputs are {_say(inputs)}, the tower needs {_say([wanted])}")
        if found.shape[0] != self._rows:
            compiled = f"batch size {found.shape[0]}" if found.shape[0] > 0 else "a dynamic batch size"
            raise InputError(
                f"{self._where}: compiled for {compiled}, asked for {self._rows}; "
                f"compile one for batch size {self._rows}"
            )
        if found.size != wanted.size:
            raise InputError(
                f"{self._where}: its input takes {found.size} bytes, which are not those of {_say([wanted])}"
            )

    def _check_outputs(self, outputs: List[acl.Node]) -> acl.Node:
        """The embedding, by name: ATC names outputs `producer:index:onnx_name`, of which only the last part is ours.

        The recipe's own export has exp(logit_scale) as a second output, first or last.
        """
        tower = self.tower
        wanted = _node(tower.output_name, "float32", (self._rows, tower.width))
        named = [one for one in outputs if one.name.rsplit(":", 1)[-1] == wanted.name]
        found = named[0] if len(named) == 1 else _node("", "", ())
        if found.dtype not in ("float32", "float16") or found.shape != wanted.shape:
            what = "its output is" if len(outputs) == 1 else "its outputs are"
            raise InputError(f"{self._where}: {what} {_say(outputs)}, the tower needs {_say([wanted])}")
        if len(outputs) > 1:
            self.notes = (EXTRA.format("OM"),)
        return found

    def run(self, rows: np.ndarray) -> np.ndarray:
        """See `clipval.backends.Backend.run`.

        Raises:
            InputError: rows of another shape or dtype.
            BackendUnavailable: the device failed, or this session is closed.
        """
        exact = self._exact(rows)
        with _lock:
            self._renew_when_stale()
            session = self._require_open()
            try:
                with self._limited("a run"):
                    found = session.run(exact, self._output.name)
            except acl.Failed as failed:
                advice = acl.advice(failed.words) or "the device may be lost; see `npu-smi info` and ~/ascend/log"
                raise BackendUnavailable(
                    f"{self._where}: device {self._device_id} failed in run {self._runs + 1} of this session "
                    f"({failed}); {advice}"
                ) from failed
            self._runs += 1
        return self._embedding(found)

    def _exact(self, rows: np.ndarray) -> np.ndarray:
        """The rows as the runtime needs them: contiguous, and of exactly the C type."""
        wanted = np.dtype(self.tower.dtype)
        if rows.shape != self.tower.shape(self._rows) or rows.dtype != wanted:
            raise InputError(
                f"{self._where}: input is {_say([_node(self.tower.input_name, str(rows.dtype), rows.shape)])}, this "
                f"OM takes {_say([_node(self.tower.input_name, str(wanted), self.tower.shape(self._rows))])}"
            )
        # aclruntime ignores strides, and takes C's `long long` for uint8, though for numpy it equals int64.
        return np.ascontiguousarray(rows).view(wanted)

    def _embedding(self, found: np.ndarray) -> np.ndarray:
        if (found.shape, str(found.dtype)) != (self._output.shape, self._output.dtype):
            raise InputError(
                f"{self._where}: gave {found.dtype}{list(found.shape)}, its description says "
                f"{self._output.dtype}{list(self._output.shape)}"
            )
        return np.array(found, dtype=np.float32, order="C")

    def execute_seconds(self) -> Optional[List[float]]:
        """Seconds inside the device's execute call only, one entry per `run` so far; copies are excluded."""
        with _lock:
            return self._times + self._session_times()

    def copy_seconds(self) -> Optional[Dict[str, List[float]]]:
        """Seconds of the copies `to_device` and `from_device`, one entry per run of the open session; see `Backend`."""
        with _lock:
            return None if self._session is None else self._session.copies()

    def _session_times(self) -> List[float]:
        session = self._session
        if session is None:
            return []
        try:
            found = session.seconds()
        except acl.Failed as failed:
            raise BackendUnavailable(f"{self._where}: {failed}") from failed
        if len(found) != self._runs:
            raise BackendUnavailable(
                f"{self._where}: {session.version} recorded {len(found)} times for {self._runs} runs; clipval does "
                f"not know this version of it"
            )
        return found

    def refresh(self) -> None:
        """Reopen the session to restore the clock's resolution; times so far are kept."""
        with _lock:
            session = self._require_open()
            self._times += self._session_times()
            self._session = None
            self._free(session)
            try:
                self._open()
            except ClipvalError:
                self._closed = "it could not be reopened"
                raise

    def _renew_when_stale(self) -> None:
        """Reopen a session whose clock is too coarse."""
        session = self._require_open()
        age = time.monotonic() - self._opened_at
        if age < self._check_at or not self._runs:
            return
        mean = float(np.mean(self._session_times()))
        if session.clock_step(age) > COARSEST * mean:
            self.refresh()
        else:
            self._check_at *= 2

    def _require_open(self) -> Session:
        acl.refuse_fork()
        if self._session is None:
            raise BackendUnavailable(f"{self._where}: closed, because {self._closed}; open it again")
        return self._session

    def busy(self) -> str:
        """What else uses the NPU; see `clipval.ascend.occupancy`."""
        return occupancy.others(self._device_id)

    def close(self) -> None:
        """Free the session; its times stay readable. May be called twice."""
        with _lock:
            if _alive.get(self._device_id) is self:
                del _alive[self._device_id]
            self._end("close() was called")

    def _end(self, reason: str) -> None:
        if self._session is None:
            return
        self._closed = reason
        with suppress(BackendUnavailable):  # after a failed run, whose error was raised
            self._times += self._session_times()
        session, self._session = self._session, None
        self._free(session)

    def _free(self, session: Session) -> None:
        with self._limited("closing"):
            session.free()

    def _limited(self, what: str) -> ContextManager[None]:
        return watchdog.limit(self._device_timeout, self._device_id, f"{self._where}: {what}")


def _readable(om: Path) -> Path:
    """The file with links resolved: the runtime's own checks reject a link."""
    if not om.is_file() or om.stat().st_size == 0:
        raise InputError(f"OM {om}: {'empty' if om.is_file() else 'no such file'}; compile it with clipval compile")
    return om.resolve()


@functools.lru_cache(maxsize=None)
def _chip(device_id: int) -> str:
    """The chip's name for display; inference itself needs no npu-smi, so its absence is no error."""
    try:
        return npu_smi.npu(device_id).soc_version
    except ClipvalError:
        return "Ascend"


def _node(name: str, dtype: str, shape: Tuple[int, ...]) -> acl.Node:
    return acl.Node(name, dtype, shape, np.dtype(dtype or "V0").itemsize * int(np.prod(shape)))


def _say(nodes: List[acl.Node]) -> str:
    return ", ".join(f"{node.name!r} {node.dtype}{list(node.shape)}" for node in nodes) or "none"


def atc_options(asked: BackendSettings) -> atc.AtcOptions:
    """atc's options for a run; see `clipval.ascend.om_files.options` for errors."""
    first, keep = asked.device_id[0], asked.keep_dtype
    return om_files.options(asked.soc_version, first, asked.precision_mode, keep, asked.atc_flags)


def _sizes(asked: BackendSettings, towers: Sequence[Tower]) -> Optional[Tuple[int, ...]]:
    return om_files.sizes(asked.om_dir, towers) if asked.om_dir is not None else None


def _artifact(made: Materials, tower: Tower, batch_size: int) -> Path:
    asked = made.settings
    if asked.om_dir is not None:
        return om_files.ready(asked.om_dir, tower, batch_size)
    return om_files.compiled(made.store, made.onnx(tower), tower, batch_size, atc_options(asked))


def _compiled(asked: BackendSettings, onnx: Path, folder: Path, tower: Tower, batch_size: int) -> Path:
    return atc.compile_om(onnx, folder, f"{tower.name}_bs{batch_size}", tower, batch_size, atc_options(asked))


def _ahead(made: Materials, needed: Sequence[Tuple[Tower, int]]) -> None:
    if made.settings.om_dir is None and len(needed) > 1:
        for tower, _ in needed:
            made.onnx(tower)  # exported one after the other, since torch's exporter is not thread-safe
        om_files.side_by_side([functools.partial(_artifact, made, *one) for one in needed], made.settings.jobs)


def _open_file(made: Materials, asked: Opening) -> Backend:
    assert asked.file is not None
    chosen = made.settings
    precision, timeout = chosen.precision_mode or atc.DEFAULT_MODE, chosen.device_timeout
    health = _health(asked.device, chosen.allow_health)
    with occupancy.opening(asked.device):
        backend = OmBackend(
            asked.tower, asked.file, asked.batch_size, asked.device, precision, timeout, chosen.om_runtime
        )
    backend.notes = (*backend.notes, *health)
    return backend


def _health(device_id: int, allowed: bool) -> Tuple[str, ...]:
    """A note on the chip's health; anything worse than a warning fails before anything is measured.

    Raises:
        BackendUnavailable: Alarm, Critical or an unknown word, and not `allowed`.
    """
    npu = npu_smi.npu(device_id)
    if npu.health.lower() == "ok":
        return ()
    said = f"device {device_id} ({npu.soc_version}) has health {npu.health} according to npu-smi"
    if npu.health.lower() != "warning" and not allowed:
        raise BackendUnavailable(
            f"om backend: {said}; see `npu-smi info -t health -i {npu.npu_id}`, reset or replace it. 310B boards "
            f"report Alarm and work: allow it with --allow-health"
        )
    return (said,)


KIND = Kind(
    _open_file,
    suffix=".om",
    artifact=_artifact,
    ahead=_ahead,
    fixed_batch=True,
    sizes=_sizes,
    one_session=True,
    accelerator=lambda _: "NPU",
    compiled=_compiled,
    dumped=True,
    precision=lambda where: atc.precision_class(where.precision),
    host=lambda asked: host.check_host(asked.device_id[0], runtime=asked.om_runtime),
    acl_user=lambda asked: "the om backend",
    origin=lambda asked: om_files.origin(asked.om_dir, asked.keep_dtype, asked.atc_flags),
)
