"""This machine's CPUs during a measurement: other load on them, and how fast they run."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Callable, Optional, Tuple

import numpy as np

OTHERS = 0.5  # cores kept busy by others; on a large machine, where daemons always run, a share of its cores
OTHERS_SHARE = 0.02
SETTLED = 0.9  # of the machine's best speed, which is repeatable to 2 %
MEETING_SIDE = (
    192  # side of matrices whose product takes about 0.1 ms, so that threads synchronise as often as a model's
)
MEETINGS = 64  # such products timed together

Clock = Callable[[], float]


def witness() -> float:
    """Seconds on a clock that nothing adjusts, with which the clock of figures is compared."""
    raw = getattr(time, "CLOCK_MONOTONIC_RAW", None)
    return time.monotonic() if raw is None else time.clock_gettime(raw)


class HostLoad:
    """CPU time used by other processes during a measurement, from Linux's /proc/stat."""

    def __init__(self) -> None:
        self._start = self._read()

    def busy(self) -> str:
        """Why the host is not idle; empty if it is, or if unknown."""
        now, start = self._read(), self._start
        if now is None or start is None or now[2] - start[2] < 0.2:
            return ""
        others = ((now[0] - start[0]) - (now[1] - start[1])) / (now[2] - start[2])
        allowed = max(OTHERS, OTHERS_SHARE * (os.cpu_count() or 1))
        return f"other processes kept {others:.1f} cores busy, allowed {allowed:.1f}" if others > allowed else ""

    def cores(self) -> Optional[float]:
        """CPU cores that this process and its children kept busy; None if unknown."""
        now, start = self._read(), self._start
        if now is None or start is None or now[2] <= start[2]:
            return None
        return (now[1] - start[1]) / (now[2] - start[2])

    @staticmethod
    def _read() -> Optional[Tuple[float, float, float]]:
        """Seconds of CPU time of all processes, of this process with its children, and of the wall clock."""
        try:
            fields = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:]]
        except (OSError, ValueError):
            return None
        idle = fields[3] + fields[4]
        ticks = os.sysconf("SC_CLK_TCK")
        own = os.times()
        return (sum(fields[:8]) - idle) / ticks, sum(own[:4]), time.monotonic()


class Pace:
    """The current speed of this machine's CPUs, as a share of the highest seen.

    Measured with small matrix products, which show what a large one and /proc/stat do not: a hypervisor may place the
    two vCPUs of a virtual machine on distant cores, for seconds or minutes. Threads that synchronise are slow then:
    small products drop to 0.59x, CLIP models to 0.6-0.85x, a large product to 0.92x, and one thread not at all.

    Args:
        best: small products per second known to be possible, e.g. from a baseline; 0 for unknown.
        threads: of the backends; None for the libraries' default.

    Attributes:
        best: most small products per second seen.
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
    """Small float32 matrix products per second, on threads that synchronise after each.

    Args:
        seconds: to spend; the best `MEETINGS` in a row count. threads: None for numpy's BLAS default.
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
