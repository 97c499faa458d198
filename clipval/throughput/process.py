"""What timed calls do to this process: memory that they keep, and threads that they use."""

from __future__ import annotations

import ctypes
import gc
import math
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

LOOKS = 5  # at the memory, least for a median of what lies between them
LEAK = 2**19  # bytes a call; allocators take memory in steps, so that a clean call shows 0 in most looks
AGAIN = 12  # calls with garbage collected after each, before memory is called lost
A_SHARE = 0.25  # a thread that waits spins for milliseconds at most; one that works takes nearly as much as the others
LARGE_BATCH = 64  # rows that keep every thread busy
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096

Look = Tuple[int, "Memory"]  # calls made so far, and the memory then


class Memory(NamedTuple):
    """Bytes of this process: its address space, what of it is resident, and what malloc has given out.

    What is lost may come from memory that was freed before, so that only the last one grows; where Python's or a
    runtime's own allocator takes it, only the others do. Zeros where this system does not tell.
    """

    size: int
    resident: int
    allocated: int

    @classmethod
    def now(cls) -> Memory:
        try:
            with open("/proc/self/statm", "rb") as stream:
                size, resident = (int(word) * PAGE for word in stream.read().split()[:2])
        except (OSError, ValueError):
            return cls(0, 0, 0)
        return cls(size, resident, _allocated())


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc, see mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "free", "fast", "maps", "hblkhd", "most", "fastest", "uordblks", "unused", "top")
    ]


@lru_cache(maxsize=None)
def _mallinfo() -> Optional[Callable[[], _MallInfo]]:
    """glibc's own account of malloc, which it has since 2.33; None elsewhere."""
    found: Any = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if found is not None:
        found.restype = _MallInfo
    return found  # type: ignore[no-any-return]


def _allocated() -> int:
    account = _mallinfo()
    if account is None:
        return 0
    told = account()
    return int(told.uordblks) + int(told.hblkhd)


def growth(looks: Sequence[Look]) -> float:
    """Bytes that this process grew by with each call, as the median between looks; 0 for fewer than `LOOKS`.

    A median, since an allocator takes memory in steps: a call that keeps some of it does so every time.
    """
    if len(looks) < LOOKS:
        return 0.0
    calls, grown = np.diff([n for n, _ in looks]), np.diff([memory for _, memory in looks], axis=0)
    return float(np.median(grown / calls[:, None], axis=0).max())


def thread_seconds() -> Dict[str, float]:
    """Processor seconds of each thread of this process so far; empty where this system does not tell."""
    found: Dict[str, float] = {}
    try:
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError, ValueError, IndexError):  # it has ended meanwhile
                text = Path(f"/proc/self/task/{thread}/schedstat").read_text(encoding="ascii")
                found[thread] = int(text.split()[0]) / 1e9
    except OSError:
        return {}
    return found


def threads_used(call: Callable[[], Any]) -> Optional[int]:
    """Threads that compute during a call: that take at least `A_SHARE` of the time of the one that takes most."""
    before = thread_seconds()
    call()
    spent = [seconds - before.get(thread, 0.0) for thread, seconds in thread_seconds().items()]
    if not spent or max(spent) <= 0:
        return None
    return sum(one >= A_SHARE * max(spent) for one in spent)


def leak(looks: Sequence[Look], call: Callable[[], Any]) -> str:
    """Whether each call keeps memory, empty where it does not.

    Args:
        looks: during the timed calls; call: one more of them, made where memory grew, with garbage collected after it.
    """
    if growth(looks) < LEAK:
        return ""
    again: List[Look] = []
    for n in range(AGAIN):
        call()
        gc.collect()
        again.append((n, Memory.now()))
    kept = growth(again)
    return "" if kept < LEAK else f"each call keeps {kept / 2**20:.2g} MB of memory, allowed {LEAK / 2**20:g} MB"


def idle_threads(asked: int, used: Optional[int], call: Callable[[], Any]) -> str:
    """Whether a backend leaves the threads idle that were asked for, empty where it does not.

    Small batches do not keep many threads busy, so the square root of their number is enough.

    Args:
        asked: threads that a call should take; used: those that computed during the timed calls, None where this system
            does not tell; call: one of a large batch, which has work for all.
    """
    least = math.ceil(math.sqrt(asked))
    if used is None or used >= least:
        return ""
    used = threads_used(call) or used
    return "" if used >= least else f"{asked} threads were asked for (--threads), and {used} computed"
