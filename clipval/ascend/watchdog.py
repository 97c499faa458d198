"""Device calls that hang: a second process ends this one, reports why and records the run as failed.

aclruntime holds the GIL during a call (no `gil_scoped_release` in its source), so while a call hangs no thread of this
process can run. Both processes share a page of memory: a call costs two writes to it.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

from clipval.errors import BackendUnavailable, ClipvalError

METRIC = "device call"  # of the failed figure
SIZE = 1 << 14
DEADLINE = struct.Struct("d")  # of the current call, on the system-wide monotonic clock; 0 for none
TICK = 0.5  # seconds between two checks
KILL_SECONDS = 10.0  # a process that hangs in the driver may survive a signal

_page: Optional[mmap.mmap] = None
_owner = 0
_watcher: Optional[subprocess.Popen[bytes]] = None
_context: Dict[str, Any] = {}


def tell(**context: Any) -> None:
    """Set what to do besides ending this process; each value stays until it is replaced.

    Args:
        context: `results`, a file to append the failed figure to; `gate`, its id; `also`, the pid of a process that
            waits for this one; `say`, the descriptor for the message (2 by default).
    """
    _context.update(context)
    if _page is not None and _owner == os.getpid():
        _write(_page)


@contextmanager
def limit(seconds: Optional[float], device: int, what: str) -> Iterator[None]:
    """End this process if the body takes longer than `seconds`; None means no limit.

    Args:
        device: ACL's device id, whose state npu-smi then reports; what: description of the call, for the message.
    """
    if seconds is None:
        yield
        return
    page = _started()
    if (_context.get("seconds"), _context.get("device"), _context.get("what")) != (seconds, device, what):
        tell(seconds=seconds, device=device, what=what)
    DEADLINE.pack_into(page, 0, time.monotonic() + seconds)
    try:
        yield
    finally:
        DEADLINE.pack_into(page, 0, 0.0)


def _started() -> mmap.mmap:
    """The page shared with this process's watcher, which is started on first use, and again if something killed it.

    Raises:
        BackendUnavailable: the watcher cannot run, so that nothing would limit a call.
    """
    global _page, _owner, _watcher
    if _page is not None and _watcher is not None and _owner == os.getpid():
        code = _watcher.poll()
        if code is None:
            return _page
        if code >= 0:
            raise BackendUnavailable(
                f"om backend: the process that limits device calls (--device-timeout) ended with exit code {code}; run "
                f"`{sys.executable} -c 'import clipval.ascend.watchdog'` to see why"
            )
    with tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        page, _owner = mmap.mmap(file.fileno(), SIZE), os.getpid()
        say = os.dup(_context.get("say", 2))
        program = f"from clipval.ascend import watchdog; watchdog.watch({file.fileno()}, {os.getpid()}, {say})"
        package = str(Path(__file__).parents[2])
        _watcher = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([package, *filter(None, sys.path)])},
            pass_fds=(file.fileno(), say),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that Ctrl-C reaches only the run
        )
        os.close(say)
    _write(page)
    _page = page
    return page


def _write(page: mmap.mmap) -> None:
    text = json.dumps(_context).encode()[: SIZE - DEADLINE.size - 1]
    page[DEADLINE.size : DEADLINE.size + len(text) + 1] = text + b"\0"


def watch(descriptor: int, pid: int, say: int) -> None:
    """The watcher's main loop, until the process ends or one of its calls takes too long."""
    page = mmap.mmap(descriptor, SIZE)
    os.close(descriptor)
    watched = paused = 0.0
    while os.getppid() == pid:
        (deadline,) = DEADLINE.unpack_from(page, 0)
        if deadline != watched:
            watched, paused = deadline, 0.0
        if _stopped(pid):
            paused += TICK
        elif deadline and time.monotonic() > deadline + paused:
            end = page.find(b"\0", DEADLINE.size)
            _end(pid, say, json.loads(page[DEADLINE.size : end]))
            return
        time.sleep(TICK)


def _stopped(pid: int) -> bool:
    """Whether a person has suspended the process, e.g. with Ctrl-Z; false if the system does not say."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"T", b"t")
    return False


def _end(pid: int, say: int, context: Dict[str, Any]) -> None:
    message = (
        f"{context['what']}: device {context['device']} did not return within {context['seconds']:g} s "
        f"(--device-timeout); npu-smi reports: {_state(context['device'])}"
    )
    with suppress(OSError):
        os.write(say, f"\nclipval: FAIL: {message}; the run is ended\n".encode("utf-8", "replace"))
    if context.get("results"):
        _record(Path(context["results"]), context.get("gate") or "device", message)
    os.kill(pid, signal.SIGKILL)
    ends = time.monotonic() + KILL_SECONDS
    while os.getppid() == pid and time.monotonic() < ends:
        time.sleep(0.1)
    if os.getppid() == pid and context.get("also"):
        os.kill(context["also"], signal.SIGKILL)


def _state(device: int) -> str:
    """npu-smi's state of the chip on one line, or npu-smi's own error."""
    from clipval.ascend import npu_smi

    try:
        npu = npu_smi.npu(device)
    except ClipvalError as error:
        return str(error)
    held = ", ".join(f"{one.name or 'process'} {one.pid}" for one in npu.processes) or "no process"
    memory = f"{npu.memory_used_mb} of {npu.memory_total_mb} MB in use"
    return f"{npu.soc_version} NPU {npu.npu_id} chip {npu.chip_id}, health {npu.health}, {memory}, {held}"


def _record(file: Path, gate: str, message: str) -> None:
    """Append a failed figure, in the format of `clipval.results.read`."""
    figure = {"gate": gate, "metric": METRIC, "unit": "", "verdict": "fail"}
    figure.update({"failure": "environment", "message": message})
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab") as stream:
            stream.write(json.dumps(figure).encode() + b"\n")
