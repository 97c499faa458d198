"""Watch a run from a parent process: the child's closing record counts, besides its exit code.

A runtime's library or an exit hook may call `os._exit(0)` at any moment, and nothing inside the process can prevent
it. The child is a fork, so debuggers, coverage and interpreter options still apply. A fork does not copy threads, so
beside running threads the child is a process that starts again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Callable, List, NamedTuple, Optional, Set

FROM_TERMINAL = 0x80  # SI_KERNEL of signal.h: Ctrl-C reached every process of the foreground group, including the child
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
TERMINAL = (signal.SIGINT, signal.SIGQUIT)  # typed, they have reached the child too
LOOK = 0.2  # seconds between two looks at the child
ENDING = 60.0  # seconds that a run may take to end after its verdict: closing devices, deleting scratch files
DEBUGGERS = ("pydevd", "debugpy")  # their threads can neither be copied nor started again
THREADED = ("onnxruntime",)  # modules with native threads, which they wait for at exit
VARIABLE = "CLIPVAL_WATCHED_BY"  # of a child that starts again: its parent, and where its closing record goes

_record: Optional[int] = None


class _Ended(NamedTuple):
    """How a child ended: its status of `os.waitpid`, and its closing record."""

    status: int
    record: Optional[int]


Rescue = Callable[[int, str], Optional[int]]


def _nothing(child: int, said: str) -> None:
    return None


def why_not() -> str:
    """Why this process cannot be watched; empty if it can be."""
    if not hasattr(os, "fork") or not hasattr(signal, "sigwaitinfo"):
        return "this system has no fork or sigwaitinfo"
    loaded = [name for name in DEBUGGERS if name in sys.modules]
    return f"{loaded[0]} is loaded, and its threads cannot be watched" if loaded else ""


def start(again: List[str], say: Callable[[str], None], rescue: Rescue = _nothing) -> Optional[int]:
    """Let a child do the work: None in the child, which continues; in the parent the exit code, once it has ended.

    Args:
        again: command line of a child that starts again; others: see `fork`.
    """
    if _adopted():
        return None
    threads = threading.active_count() > 1 or any(name in sys.modules for name in THREADED)
    return fork(say, rescue, again if threads else None)


def _adopted() -> bool:
    """Whether this process is a child that started again; from now on it writes its closing record."""
    global _record
    parent, _, writer = os.environ.pop(VARIABLE, "").partition(" ")
    if parent != str(os.getppid()):
        return False
    _record = int(writer)
    os.set_inheritable(_record, False)
    end_with(int(parent))
    return True


def fork(say: Callable[[str], None], rescue: Rescue = _nothing, again: Optional[List[str]] = None) -> Optional[int]:
    """Fork: None in the child, which continues; in the parent the exit code, once the child has ended.

    Args:
        say: prints a line, in the parent.
        rescue: called in the parent if the child ended without a verdict, with its pid and how it ended; saves what is
            left of its run, and may return another exit code.
        again: command line of a child that is started instead.
    """
    global _record
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.flush()  # or both processes print what is buffered
    signals = {getattr(signal, name) for name in FORWARDED} | {signal.SIGCHLD}
    parent, (reader, writer) = os.getpid(), os.pipe()
    if again is not None:  # a program that starts inherits what is blocked, so it starts first
        told = {**os.environ, VARIABLE: f"{parent} {writer}"}
        process = subprocess.Popen(again, pass_fds=[writer], env=told)
        child = process.pid
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    if again is None:
        child = os.fork()
    if child == 0:
        os.close(reader)
        _record = writer
        end_with(parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return None
    os.close(writer)
    ended = _wait(child, signals, reader, say)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    code, said = verdict(*ended)
    if said:
        say(said)
    other = rescue(child, said) if said and ended.record is None else None
    return code if other is None else other


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


def _wait(child: int, signals: Set[signal.Signals], reader: int, say: Callable[[str], None]) -> _Ended:
    """How the child ended; signals sent to this process alone are passed on.

    A thread that a library started before the fork may receive a signal instead of this one, SIGCHLD without a trace,
    so each signal has a handler, and the child is looked at from time to time. A child that does not end after its
    verdict, e.g. in an exit hook that waits for a device or for a thread of the parent, is killed.
    """
    strays: List[int] = []
    for one in signals:
        signal.signal(one, lambda number, _: strays.append(number))
    os.set_blocking(reader, False)  # a process left behind by the child may keep the other end open
    record, deadline = None, float("inf")
    while True:
        heard = signal.sigtimedwait(signals, LOOK)
        passed, strays[:] = [number for number in strays if number not in TERMINAL], []
        if heard is not None and heard.si_code != FROM_TERMINAL:
            passed.append(heard.si_signo)
        for number in passed:
            if number != signal.SIGCHLD:
                os.kill(child, number)
        pid, status = os.waitpid(child, os.WNOHANG)
        if record is None:
            record = _read(reader)
            deadline = time.monotonic() + ENDING if record is not None else deadline
        if pid:
            return _Ended(status, record)
        if time.monotonic() > deadline:
            say(f"clipval: the run had its verdict (exit code {record}), but did not end within {ENDING:g} s of it")
            os.kill(child, signal.SIGKILL)
            deadline = float("inf")


def _read(reader: int) -> Optional[int]:
    try:
        found = os.read(reader, 16)
    except BlockingIOError:
        return None
    return int(found) if found else None


def end_with(parent: int) -> None:
    """Die with the parent, so that `kill -9` of the run leaves no process that holds a device."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
