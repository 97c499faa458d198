"""How calls are timed: warm-up, how many, and the loop around them. Seconds everywhere."""

from __future__ import annotations

import gc
import math
from contextlib import contextmanager
from typing import Callable, Iterator, List

import msgspec
import numpy as np

from clipval.throughput.machine import Clock
from clipval.throughput.verdict import GOOD_ROUNDS

MAX_ROUNDS = 2000
OVERRUN = 2  # times the cap that `GOOD_ROUNDS` may take; a row without even `MIN_ROUNDS` in that time is INSUFFICIENT
WARM_UP_CALLS = 3
WARM_UP_SECONDS = 1.0  # longer only until the calls are stable
STABLE = 0.02  # warm when the median of the last calls is within 2 % of the calls before

Loop = Callable[[Callable[[], object], int], object]  # calls a function a number of times


class WarmUp(msgspec.Struct, frozen=True):
    """Untimed calls: how many, total seconds, the estimate for planning, whether they settled."""

    calls: int
    seconds: float
    estimate: float
    stable: bool


def warm_up(call: Callable[[], object], *, seconds: float, cap: float, clock: Clock) -> WarmUp:
    """Call until warm: a minimum count, a minimum time, and until the time of a call is stable.

    Args:
        seconds: minimum total time; cap: maximum, after which it stops even if not stable.
    """
    times: List[float] = []
    while True:
        start = clock()
        call()
        times.append(clock() - start)
        spent, half = sum(times), max(1, min(10, len(times) // 2))
        late, early = np.median(times[-half:]), np.median(times[-2 * half : -half] or times)
        stable = len(times) >= WARM_UP_CALLS and abs(late - early) <= STABLE * early
        if spent >= cap or len(times) >= MAX_ROUNDS or (len(times) >= WARM_UP_CALLS and spent >= seconds and stable):
            return WarmUp(len(times), spent, float(late), bool(stable))


def warm_up_seconds(seconds: float) -> float:
    """Minimum warm-up before `seconds` of timed calls."""
    return min(seconds / 4, WARM_UP_SECONDS)


def rounds_for(estimate: float, *, seconds: float, cap: float) -> int:
    """Number of timed calls for a time budget.

    As many as fill `seconds`, at most as many as fit into `cap`. `GOOD_ROUNDS` may take up to `OVERRUN` times the cap;
    slower calls get fewer, at least one, which the verdict reports.
    """
    estimate = max(estimate, 1e-9)
    wanted = max(GOOD_ROUNDS, min(math.ceil(seconds / estimate), MAX_ROUNDS))
    least = min(GOOD_ROUNDS, int(OVERRUN * cap / estimate))
    return max(1, least, min(wanted, int(cap / estimate)))


@contextmanager
def quiet() -> Iterator[None]:
    """Collect garbage now, and not while calls are timed."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def plain_loop(call: Callable[[], object], rounds: int) -> None:
    """Call `rounds` times; pytest-benchmark replaces this if available."""
    for _ in range(rounds):
        call()
