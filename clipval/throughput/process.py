"""What timed calls do to this process: memory that they leak, and threads that they use."""

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

from clipval.throughput.machine import witness

LOOKS = 5  # samples of the memory needed for a median growth
LEAK = 2**19  # bytes per call; allocators take memory in steps, so a clean call shows 0 in most samples
AGAIN, MOST_AGAIN = 12, 60  # calls with garbage collection after each, before memory counts as leaked
STEPS = 2  # largest steps of the memory that do not count as leaked
ENOUGH = 0.5  # seconds of calls that show which threads compute
A_SHARE = 0.25  # a waiting thread spins for milliseconds at most; a working one takes nearly as much time as the others
LARGE_BATCH = 64  # rows that keep every thread busy
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096

Look = Tuple[int, "Memory"]  # calls so far, and the memory then


class Memory(NamedTuple):
    """Bytes of this process: its address space, its resident memory, and what malloc has handed out.

    A leak may reuse memory that was freed before, so that only the last one grows; with Python's or a runtime's own
    allocator only the others do. Zeros if unknown.
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
    """glibc's malloc statistics, since 2.33; None elsewhere."""
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
    """Bytes by which this process grew per call, by median or by sum; 0 for fewer than `LOOKS` samples.

    Allocators take memory in steps while leaking calls leak again and again, so the sum is without the largest `STEPS`.
    """
    if len(looks) < LOOKS:
        return 0.0
    calls, grown = np.diff([n for n, _ in looks]), np.diff([memory for _, memory in looks], axis=0)
    each = np.median(grown / calls[:, None], axis=0)
    kept = np.sort(grown, axis=0)[:-STEPS].sum(axis=0) / calls.sum()
    return float(max(each.max(), kept.max()))


def thread_seconds() -> Dict[str, float]:
    """CPU seconds of each thread of this process so far; empty if unknown."""
    found: Dict[str, float] = {}
    try:
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError, ValueError, IndexError):  # it has ended in the meantime
                text = Path(f"/proc/self/task/{thread}/schedstat").read_text(encoding="ascii")
                found[thread] = int(text.split()[0]) / 1e9
    except OSError:
        return {}
    return found


def threads_used(call: Callable[[], object]) -> Optional[int]:
    """Threads that compute during a call: those with at least `A_SHARE` of the busiest thread's CPU time."""
    before = thread_seconds()
    call()
    spent = [seconds - before.get(thread, 0.0) for thread, seconds in thread_seconds().items()]
    if not spent or max(spent) <= 0:
        return None
    return sum(one >= A_SHARE * max(spent) for one in spent)


def leak(looks: Sequence[Look], call: Callable[[], object]) -> str:
    """A message if each call leaks memory, else empty.

    Args:
        looks: samples during the timed calls; call: makes another call, used if memory grew, with garbage collection.
    """
    if growth(looks) < LEAK:
        return ""
    again: List[Look] = []
    for n in range(min(max(AGAIN, looks[-1][0]), MOST_AGAIN)):
        call()
        gc.collect()
        again.append((n, Memory.now()))
    kept = growth(again)
    return "" if kept < LEAK else f"each call keeps {kept / 2**20:.2g} MB of memory, allowed {LEAK / 2**20:g} MB"


def idle_threads(asked: int, used: Optional[int], seconds: float, call: Callable[[], object]) -> str:
    """A message if a backend leaves requested threads idle, else empty.

    Small batches do not keep many threads busy, so the square root of the requested number is enough. Calls for less
    than `ENOUGH` seconds do not distinguish working threads from waiting ones, so large ones are made for that long.

    Args:
        asked: threads that a call should use; used: those that computed during the timed calls, None if unknown;
            seconds: of the timed calls; call: makes a call with a large batch, which has work for all.
    """
    least = math.ceil(math.sqrt(asked))
    if used is None or (used >= least and seconds >= ENOUGH):
        return ""

    def for_long() -> None:
        start = witness()
        while True:
            call()
            if witness() - start >= ENOUGH:
                return

    used = threads_used(for_long) or used
    return "" if used >= least else f"{asked} threads were requested (--threads), but only {used} computed"
