"""Watch a run from a parent process: the child's closing record counts, besides its exit code.

A runtime's library or an exit hook may call `os._exit(0)` at any moment, and nothing inside the process can prevent
it. The child is a fork, so debuggers, coverage and interpreter options still apply.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from typing import Callable, Optional, Set

FROM_TERMINAL = 0x80  # SI_KERNEL of signal.h: Ctrl-C reached every process of the foreground group, including the child
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
DEBUGGERS = ("pydevd", "debugpy")  # they use threads, which a fork does not copy

_record: Optional[int] = None


def why_not() -> str:
    """Why this process cannot be watched; empty if it can be."""
    if not hasattr(os, "fork") or not hasattr(signal, "sigwaitinfo"):
        return "this system has no fork or sigwaitinfo"
    attached = [name for name in DEBUGGERS if name in sys.modules]
    if attached:
        return f"{attached[0]} is attached"
    return "threads are running" if threading.active_count() > 1 else ""


def fork(say: Callable[[str], None]) -> Optional[int]:
    """Fork: None in the child, which continues; in the parent the exit code, once the child has ended.

    Args:
        say: prints a line, in the parent.
    """
    global _record
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.flush()  # or both processes print what is buffered
    signals = {getattr(signal, name) for name in FORWARDED} | {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    parent, (reader, writer) = os.getpid(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _record = writer
        end_with(parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return None
    os.close(writer)
    status = _wait(child, signals)
    os.set_blocking(reader, False)  # a process left behind by the child may keep the other end open
    try:
        record = os.read(reader, 16)
    except BlockingIOError:
        record = b""
    code, said = verdict(status, int(record) if record else None)
    if said:
        say(said)
    return code


def watched() -> bool:
    """Whether this process is a watched child."""
    return _record is not None


def close(code: int) -> None:
    """Write the child's closing record, its intended exit code; does nothing if it is not watched."""
    if _record is not None:
        os.write(_record, str(int(code)).encode())


def verdict(status: int, record: Optional[int]) -> tuple[int, str]:
    """The overall exit code, and a message if the child did not end as its record states.

    Args:
        status: from `os.waitpid`; record: the child's closing record, None without one.
    """
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        when = "before its verdict" if record is None else "while it was ending, after its verdict"
        return 128 + number, f"clipval: the run was ended by {signal.Signals(number).name} {when}"
    code = os.WEXITSTATUS(status)
    if code:
        return code, ""
    if record is None:
        return 1, (
            "clipval: FAIL: the process ended with exit code 0 before its verdict; "
            "something called os._exit(0), e.g. a runtime"
        )
    ending = f"clipval: the run ended with exit code {record}; something in its exit hooks changed that to 0"
    return record, ending if record else ""


def _wait(child: int, signals: Set[signal.Signals]) -> int:
    """The child's status; signals sent to this process alone are passed on."""
    while True:
        heard = signal.sigwaitinfo(signals)
        if heard.si_signo != signal.SIGCHLD:
            if heard.si_code != FROM_TERMINAL:
                os.kill(child, heard.si_signo)
            continue
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status


def end_with(parent: int) -> None:
    """Die with the parent, so that `kill -9` of the run leaves no process that holds a device."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
