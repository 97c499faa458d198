"""The measuring protocol: warm up, time calls, judge, and measure again where the figure is doubtful.

One path for every caller. The loop around the timed calls is handed in, so that pytest-benchmark can be that loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from clipval.backends import Backend
from clipval.throughput.baseline import REGRESSED, Judgement, on_slow_machine
from clipval.throughput.feed import Feed
from clipval.throughput.machine import SETTLED, Clock, HostLoad, Pace
from clipval.throughput.row import EXECUTE, INFERENCE, Clocks, Judged, Row
from clipval.throughput.statistics import summarise
from clipval.throughput.timing import Calls, Loop, plain_loop, quiet, rounds_for, warm_up, warm_up_seconds
from clipval.throughput.verdict import BAD_OUTPUT, BUSY, VALID, verdict

# Attempts at a row that lost speed. Other processes that use the memory slow rows down by 5 to 15 % for a minute or
# more, which the machine's own products do not show: six attempts of `--perf-max-time` go beyond that.
PATIENCE = 6


@dataclass(frozen=True)
class Plan:
    """How a row is measured.

    Attributes:
        seconds: of timed calls at a time; cap: of all of one attempt; rounds: a number of calls instead.
        noise: allowed half-width of the median's interval, see `verdict`.
        insist: measure once more where the row is not VALID.
        settled: for a baseline: spend all of `cap`, and measure until the machine was at its speed meanwhile.
    """

    seconds: float
    cap: float
    rounds: Optional[int] = None
    noise: Optional[float] = None
    insist: bool = True
    settled: bool = False


@dataclass(frozen=True)
class Subject:
    """What is measured, and what it is held to.

    Attributes:
        busy: what else uses the device, empty for nothing; asked before and after.
        check: what is wrong with outputs, empty for nothing; asked after timing.
        pace: of the processor that the backend computes on, None for another device.
        standing: of the clocks of a row against a baseline; None where there is none.
    """

    backend: Backend
    feed: Feed
    busy: Callable[[], str] = lambda: ""
    check: Callable[[], str] = lambda: ""
    pace: Optional[Pace] = None
    standing: Optional[Callable[[Clocks], Judgement]] = None
    clock: Clock = time.perf_counter


class Attempt(NamedTuple):
    """One attempt at a row: `seconds` of each call by clock, `shares` of the machine's speed, in the order seen."""

    clocks: Clocks
    seconds: Dict[str, List[float]]
    cores: Optional[float]
    shares: List[float]
    standing: Optional[Judgement]

    @property
    def valid(self) -> bool:
        return all(one.verdict == VALID for one in self.clocks.values())

    @property
    def lost(self) -> bool:
        return self.standing is not None and self.standing.status == REGRESSED

    @property
    def share(self) -> float:
        """The machine's share of its speed: the lower one of two looks in a row, where it was highest.

        Between those two looks it was that fast all the time, which one look alone does not say.
        """
        return max(map(min, self.shares, self.shares[1:] or self.shares))


def measure(subject: Subject, plan: Plan, loop: Optional[Loop] = None) -> Tuple[Row, List[float]]:
    """Measure one row.

    The first attempt is a short one of `plan.seconds`. A row that is not VALID gets a second one that goes on until it
    is, or for `plan.cap`. A loss against the baseline is only believed if it is there in each of `PATIENCE` attempts
    more, and of a machine that was at its speed in one; another device has no such disturbance, and one attempt more.

    Args:
        loop: calls so often in the first attempt; None for a plain loop.

    Returns:
        The row of the last attempt, and the seconds of each call of it by the clock that decides.
    """
    backend = subject.backend
    if backend.execute_seconds() is not None:
        # a fresh session's clock, so that none is opened inside the timed calls
        backend.refresh()
    warm = warm_up(
        lambda: backend.run(subject.feed.next()),
        seconds=warm_up_seconds(plan.seconds),
        cap=plan.cap / 3,
        clock=subject.clock,
    )
    found = _attempt(subject, plan, warm.estimate, loop or plain_loop, short=not plan.settled)
    attempts, best = 1, found.share
    while _again(found, plan, attempts, subject.pace):
        if attempts == 1 and not plan.settled:
            best = 0.0  # a short attempt has one look at the machine
        found = _attempt(subject, plan, warm.estimate, plain_loop, short=False)
        attempts, best = attempts + 1, max(best, found.share)
    row = Row(
        made_by=backend.identity,
        tower=backend.tower.name,
        batch_size=subject.feed.batch_size,
        clocks=_final(found, subject, plan, best),
        warm_up=warm,
        attempts=attempts,
        cores=found.cores,
        threads=backend.threads,
        machine_share=best if subject.pace else None,
        standing=on_slow_machine(found.standing, best) if found.standing and attempts > 1 else found.standing,
    )
    return row, found.seconds[row.scope]


def _again(found: Attempt, plan: Plan, attempts: int, pace: Optional[Pace]) -> bool:
    """Another attempt is needed."""
    if plan.settled:
        return found.share < SETTLED and attempts < PATIENCE
    if found.lost:
        return attempts <= (PATIENCE if pace else 1)
    return plan.insist and not plan.rounds and attempts == 1 and not found.valid


def _attempt(subject: Subject, plan: Plan, estimate: float, loop: Loop, *, short: bool) -> Attempt:
    """Time calls for `plan.seconds` at a time, until all of them together are VALID or `plan.cap` is spent.

    Args:
        estimate: seconds of a call; short: once only.
    """
    look = subject.pace.now if subject.pace else lambda: 1.0
    shares = [] if short else [look()]
    load, busy = HostLoad(), subject.busy()
    calls, known = Calls(subject.backend, subject.feed, subject.clock), len(subject.backend.execute_seconds() or ())
    whole = plan.settled or subject.standing is not None
    while True:
        with quiet():
            loop(calls, plan.rounds or rounds_for(estimate, seconds=plan.seconds, cap=plan.cap))
        seconds = {INFERENCE: calls.times}
        executed = subject.backend.execute_seconds()  # once a loop, as reading all of them takes time
        if executed is not None:
            seconds[EXECUTE] = executed[known:]
        timings = {scope: summarise(times, subject.feed.batch_size, scope) for scope, times in seconds.items()}
        good = all(verdict(timing, noise=plan.noise)[0] == VALID for timing in timings.values())
        if short or plan.rounds or (good and not whole) or sum(calls.times) + plan.seconds > plan.cap:
            break
        shares.append(look())
    cores, busy = load.cores(), busy or load.busy() or subject.busy()
    shares.append(look())
    bad = "" if np.isfinite(calls.last).all() else "the last timed call gave NaN or infinity"
    clocks = {
        scope: Judged(timing, *verdict(timing, busy=busy, bad_output=bad, noise=plan.noise))
        for scope, timing in timings.items()
    }
    return Attempt(clocks, seconds, cores, shares, subject.standing(clocks) if subject.standing else None)


def _final(found: Attempt, subject: Subject, plan: Plan, share: float) -> Clocks:
    """The clocks of the last attempt, with what is only known after it."""
    bad, slow = subject.check(), f"the machine ran at {share:.0%} of its speed at best"
    worst = (BAD_OUTPUT, bad) if bad else (BUSY, slow) if plan.settled and share < SETTLED else None
    return {
        scope: Judged(one.timing, *(one.verdict, one.reason) if one.verdict == BAD_OUTPUT or not worst else worst)
        for scope, one in found.clocks.items()
    }
