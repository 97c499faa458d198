"""What this machine's processors do while something is measured on them: who else uses them, and how fast they are."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Callable, Optional, Tuple

import numpy as np

OTHERS = 0.5  # processor cores kept busy by others; on a large machine, where daemons always run, a share of its cores
OTHERS_SHARE = 0.02
SETTLED = 0.9  # of the machine's best speed, which repeats to 2 %
MEETING_SIDE = 192  # of one whose product is about 0.1 ms, so that threads wait for each other as a model's do
MEETINGS = 64  # such products that are timed together

Clock = Callable[[], float]


def witness() -> float:
    """Seconds of a clock that nothing adjusts: it times what is no figure, and the clock of figures is held to it."""
    raw = getattr(time, "CLOCK_MONOTONIC_RAW", None)
    return time.monotonic() if raw is None else time.clock_gettime(raw)


class HostLoad:
    """Processor time that others use while something is measured, from Linux's /proc/stat."""

    def __init__(self) -> None:
        self._start = self._read()

    def busy(self) -> str:
        """Why the host is not idle, empty where it is or where this system does not tell."""
        now, start = self._read(), self._start
        if now is None or start is None or now[2] - start[2] < 0.2:
            return ""
        others = ((now[0] - start[0]) - (now[1] - start[1])) / (now[2] - start[2])
        allowed = max(OTHERS, OTHERS_SHARE * (os.cpu_count() or 1))
        return f"other processes kept {others:.1f} cores busy, allowed {allowed:.1f}" if others > allowed else ""

    def cores(self) -> Optional[float]:
        """Processor cores that this process and its children kept busy, None where this system does not tell."""
        now, start = self._read(), self._start
        if now is None or start is None or now[2] <= start[2]:
            return None
        return (now[1] - start[1]) / (now[2] - start[2])

    @staticmethod
    def _read() -> Optional[Tuple[float, float, float]]:
        """Seconds of processor time used by all, by this process and its children, and of the wall clock."""
        try:
            fields = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:]]
        except (OSError, ValueError):
            return None
        idle = fields[3] + fields[4]
        ticks = os.sysconf("SC_CLK_TCK")
        own = os.times()
        return (sum(fields[:8]) - idle) / ticks, sum(own[:4]), time.monotonic()


class Pace:
    """How fast this machine's processors are at the moment, as a share of the fastest they were seen.

    Told by small matrix products: they show what a large one and /proc/stat do not. On a virtual machine of two
    processors that the host moves apart and together again, every few seconds or for minutes, threads that must meet
    are slow while they are apart: the small products make 0.59 of their speed, models 0.6 to 0.85, a large product
    0.92, and one thread 1.00.

    Args:
        best: small products a second that are known to be possible, as from a baseline; 0 for none.
        threads: of the backends; None for as many as the libraries take.

    Attributes:
        best: small products a second at the fastest.
    """

    def __init__(self, best: float = 0.0, threads: Optional[int] = None) -> None:
        self.best = best
        self._threads = threads

    def now(self) -> float:
        """The share, in (0, 1]."""
        found = small_products(0.1, self._threads)
        self.best = max(self.best, found)
        return found / self.best


def small_products(seconds: float, threads: Optional[int] = None, *, clock: Clock = witness) -> float:
    """Small float32 matrix products a second, on so many threads that must meet after each of them.

    Args:
        seconds: of products; the best `MEETINGS` in a row count. threads: None for those that numpy's BLAS takes.
    """
    from threadpoolctl import threadpool_limits

    square = np.ones((MEETING_SIDE, MEETING_SIDE), np.float32)
    best, spent = math.inf, 0.0
    with threadpool_limits(limits=threads, user_api="blas"):
        while spent < seconds:
            start = clock()
            for _ in range(MEETINGS):
                square @ square
            elapsed = clock() - start
            best, spent = min(best, elapsed), spent + elapsed
    return MEETINGS / best
