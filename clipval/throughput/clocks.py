"""Whether clocks are valid: the host's is compared with a second clock, the device's with the host's."""

from __future__ import annotations

import os
from typing import Optional, Sequence

import numpy as np

from clipval.throughput.machine import Clock, witness

APART = 0.02  # share of the elapsed time by which two clocks of one host may differ; a slewed one is off by 5e-4
SLACK = 0.01  # further seconds, for reading the clocks
TICKS = 0.03  # further seconds, three ticks of times(2): a third clock, which the system call alone tells
# Execute time is inside the call: at most the call's time, apart from the resolution of a float32 clock in milliseconds
# (see `clipval.backends.om`), and at least a twentieth of it, since transfers and Python do not take nineteen parts.
LONGEST = 1.02
TICK = 2e-5
SHORTEST = 1 / 20


class Watched:
    """A time span on two clocks of the host."""

    def __init__(self, clock: Clock, other: Clock) -> None:
        self._clocks = clock, other
        self._start, self._ticks = (clock(), other()), os.times().elapsed

    def elapsed(self) -> float:
        """Seconds by the other clock."""
        return self._clocks[1]() - self._start[1]

    def fault(self, times: Sequence[float]) -> str:
        """What is wrong with the times of calls made in this span; empty for nothing.

        Args:
            times: seconds of each call by the first clock.
        """
        elapsed, other = (clock() - start for clock, start in zip(self._clocks, self._start))
        ticks = os.times().elapsed - self._ticks
        seconds = np.asarray(times, np.float64)
        bad = int((~(seconds > 0)).sum())
        if bad:
            return f"{bad} of {len(seconds)} calls took no or negative time by the host's clock"
        if abs(elapsed - other) > APART * abs(other) + SLACK or seconds.sum() > (1 + APART) * other + SLACK:
            calls = f"{len(seconds)} calls took {seconds.sum():.3f} s"
            return f"the host's clock jumped: {calls} of {elapsed:.3f} s by this clock, {other:.3f} s by another"
        if self._clocks[1] is witness and self._ticks and abs(ticks - other) > APART * ticks + TICKS:
            return f"the host's clocks cannot be believed: {other:.3f} s by them were {ticks:.2f} s by times(2)"
        return ""


def device_fault(executed: Optional[Sequence[float]], times: Sequence[float]) -> str:
    """What is wrong with the device's execute times; empty for nothing, and if the device has no clock.

    Args:
        executed: seconds of each call by the device's clock; times: by the host's.
    """
    if executed is None:
        return ""
    if len(executed) != len(times):
        return f"the device's clock recorded {len(executed)} execute times for {len(times)} calls"
    inside, whole = np.asarray(executed, np.float64), np.asarray(times, np.float64)
    bad = int((~(np.isfinite(inside) & (inside > 0))).sum())
    if bad:
        return f"{bad} of {len(inside)} execute times of the device's clock are not above zero"
    longer = inside > LONGEST * whole + TICK
    if longer.any():
        n = int(np.argmax(inside - whole))
        return (
            f"{longer.sum()} of {len(inside)} execute times of the device's clock are longer than their calls, e.g. "
            f"{1000 * inside[n]:.3g} ms in a call of {1000 * whole[n]:.3g} ms"
        )
    if inside.sum() < SHORTEST * whole.sum():
        return (
            f"execute times of the device's clock are {inside.sum() / whole.sum():.2g} of the time of the calls, "
            f"expected at least {SHORTEST:g}: its unit or its zero differs from what clipval assumes"
        )
    return ""
