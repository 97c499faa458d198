"""The validity of a row: its verdict and the reason."""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple

from clipval.options import NOISE
from clipval.throughput.statistics import MIN_ROUNDS, Timing

VALID, NOISY, THROTTLED, BUSY = "VALID", "NOISY", "THROTTLED", "BUSY"
INSUFFICIENT, BAD_OUTPUT, BAD_CLOCK = "INSUFFICIENT", "BAD_OUTPUT", "BAD_CLOCK"
LEAKING, IDLE_THREADS = "LEAKING", "IDLE_THREADS"
# These fail a row in every run: it is not what it claims to be. The others concern the machine or the time allowed.
FAULTS = (BAD_OUTPUT, BAD_CLOCK, LEAKING, IDLE_THREADS)

GOOD_ROUNDS = 9  # the fewest whose interval excludes the slowest and the fastest call
DRIFT = 0.05  # increase of the call time over the whole run, as a share of the median


class Fault(NamedTuple):
    """One of `FAULTS`, and the reason."""

    verdict: str
    reason: str


def verdict(
    found: Timing, *, busy: str = "", fault: Optional[Fault] = None, noise: Optional[float] = None
) -> Tuple[str, str]:
    """The verdict on a row, and the reason.

    Args:
        noise: allowed half-width of the median's interval, as a share, and allowed drift if larger; None is `NOISE`.
        busy: what else ran on the device or the host, empty for nothing; fault: what is wrong with the row itself.
    """
    half_width = (found.interval[1] - found.interval[0]) / 2 / found.samples_per_second
    limit = NOISE.get(found.scope, NOISE["inference"]) if noise is None else noise
    drift = max(DRIFT, limit)
    if fault:
        return fault
    if found.rounds < MIN_ROUNDS:
        return INSUFFICIENT, f"{found.rounds} rounds, at least {MIN_ROUNDS} required; raise --perf-max-time"
    if busy:
        return BUSY, busy
    if found.drift > drift:
        return THROTTLED, f"calls became {found.drift:.1%} slower over the run, allowed {drift:.1%}"
    if half_width > limit:
        width, advice = f"95 % interval of the median is +-{half_width:.1%}", "stop other load or raise --perf-noise"
        return NOISY, f"{width}, limit {limit:.1%}; {advice}"
    return VALID, ""
