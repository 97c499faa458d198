"""The measuring protocol: warm up, time calls, judge, and repeat if the figure is doubtful.

One path for every caller. The loop around the timed calls is an argument, so that pytest-benchmark can be that loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from clipval.backends import Backend
from clipval.errors import ClipvalError
from clipval.throughput.baseline import REGRESSED, SLOW_MACHINE, Judgement, on_busy_host, on_slow_machine
from clipval.throughput.calls import Calls
from clipval.throughput.clocks import Watched, device_fault
from clipval.throughput.feed import Feed
from clipval.throughput.machine import SETTLED, Clock, HostLoad, Pace, witness
from clipval.throughput.outputs import Expected, cached_results, wrong_outputs
from clipval.throughput.plausible import Peaks
from clipval.throughput.process import LARGE_BATCH, idle_threads, leak, threads_used
from clipval.throughput.row import EXECUTE, INFERENCE, Clocks, Judged, Row, deciding
from clipval.throughput.statistics import summarise
from clipval.throughput.timing import Loop, plain_loop, quiet, rounds_for, warm_up, warm_up_seconds
from clipval.throughput.verdict import BAD_CLOCK, BAD_OUTPUT, BUSY, FAULTS, IDLE_THREADS, LEAKING, VALID, Fault, verdict

# Attempts at a row below its baseline. Other processes that use much memory bandwidth slow rows down by 5 to 15 % for a
# minute or more, which the machine's own products do not show: six attempts of `--perf-max-time` outlast that.
PATIENCE = 6


@dataclass(frozen=True)
class Plan:
    """How a row is measured.

    Attributes:
        seconds: of timed calls at a time; cap: of one whole attempt; rounds: a number of calls instead.
        noise: allowed half-width of the median's interval, see `verdict`.
        insist: measure again if the row is not VALID.
        settled: for a baseline: use all of `cap`, and repeat until the machine ran at full speed.
    """

    seconds: float
    cap: float
    rounds: Optional[int] = None
    noise: Optional[float] = None
    insist: bool = True
    settled: bool = False


@dataclass(frozen=True)
class Subject:
    """What is measured, and what it is compared with.

    Attributes:
        busy: what else uses the device, empty for nothing; called before and after.
        expected: the reference's embeddings and their bounds; None if there are none.
        operations: per sample; None if they cannot be counted. peaks: of the runtimes on this machine.
        threads: requested CPU threads; None if not set, and on another device.
        pace: of the CPU that the backend computes on; None for another device.
        standing: compares a row's clocks with a baseline; None without one.
        clock: times the calls; other_clock: the clock it is compared with.
    """

    backend: Backend
    feed: Feed
    busy: Callable[[], str] = lambda: ""
    expected: Optional[Expected] = None
    operations: Optional[float] = None
    peaks: Peaks = field(default_factory=Peaks)
    threads: Optional[int] = None
    pace: Optional[Pace] = None
    standing: Optional[Callable[[Clocks], Judgement]] = None
    clock: Clock = time.perf_counter
    other_clock: Clock = witness


class Attempt(NamedTuple):
    """One attempt at a row: `seconds` of each call by clock, `shares` of the machine's speed over time.

    Attributes:
        jumped: whether the host's clock jumped.
    """

    clocks: Clocks
    seconds: Dict[str, List[float]]
    cores: Optional[float]
    shares: List[float]
    standing: Optional[Judgement]
    jumped: bool = False

    @property
    def verdicts(self) -> List[str]:
        return [one.verdict for one in self.clocks.values()]

    @property
    def lost(self) -> bool:
        return self.standing is not None and self.standing.status in (REGRESSED, SLOW_MACHINE)

    @property
    def share(self) -> float:
        """The machine's share of its speed: the highest lower value of two consecutive samples.

        Between those two samples the machine was at least that fast, which one sample alone does not show.
        """
        return max(map(min, self.shares, self.shares[1:] or self.shares))


def measure(subject: Subject, plan: Plan, loop: Optional[Loop] = None) -> Tuple[Row, List[float]]:
    """Measure one row.

    The first attempt is a short one of `plan.seconds`. A row that is not VALID gets a second one that continues until
    it is, or for `plan.cap`. A regression must show in each of `PATIENCE` further attempts, with the machine at full
    speed in one of them; other devices are not disturbed this way and get one further attempt. A fault of the row
    itself ends the measurement.

    Args:
        loop: makes the calls of the first attempt; None for a plain loop.

    Returns:
        The row of the last attempt, and the seconds of each call of it by the clock that decides.
    """
    backend = subject.backend
    if backend.execute_seconds() is not None:
        backend.refresh()  # now, so that no session is reopened inside the timed calls
    warm = warm_up(
        lambda: backend.run(subject.feed.next()[1]),
        seconds=warm_up_seconds(plan.seconds),
        cap=plan.cap / 3,
        clock=subject.other_clock,
    )
    found = _attempt(subject, plan, warm.estimate, loop or plain_loop, short=not plan.settled)
    attempts, best = 1, found.share
    while _again(found, plan, attempts, subject.pace):
        if attempts == 1 and not plan.settled:
            best = 0.0  # a short attempt has only one sample of the machine's speed
        found = _attempt(subject, plan, warm.estimate, plain_loop, short=False)
        attempts, best = attempts + 1, max(best, found.share)
    speed = found.clocks[deciding(found.clocks)].timing.samples_per_second
    flops = subject.operations and subject.operations * speed
    peak = subject.peaks.of(backend) if flops else None
    copies = {name: float(np.median(times)) for name, times in (backend.copy_seconds() or {}).items()}
    row = Row(
        made_by=backend.identity,
        tower=backend.tower.name,
        batch_size=subject.feed.batch_size,
        clocks=_on_slow_machine(found.clocks, best) if plan.settled else found.clocks,
        warm_up=warm,
        attempts=attempts,
        cores=found.cores,
        threads=backend.threads,
        machine_share=best if subject.pace else None,
        standing=on_slow_machine(found.standing, best) if found.standing and attempts > 1 else found.standing,
        flops_per_second=flops,
        peak_share=flops / peak if flops and peak else None,
        copies=copies or None,
    )
    return row, found.seconds[row.scope]


def _again(found: Attempt, plan: Plan, attempts: int, pace: Optional[Pace]) -> bool:
    """Whether another attempt is needed."""
    if found.jumped and attempts == 1:
        return True  # a clock may be set once
    if set(found.verdicts) & set(FAULTS):
        return False
    if plan.settled:
        return found.share < SETTLED and attempts < PATIENCE
    if found.lost:
        return attempts <= (PATIENCE if pace else 1)
    return plan.insist and not plan.rounds and attempts == 1 and set(found.verdicts) != {VALID}


def _on_slow_machine(clocks: Clocks, share: float) -> Clocks:
    """No baseline is made of a machine that was not at its speed."""
    if share >= SETTLED:
        return clocks
    reason = f"the machine ran at {share:.0%} of its speed at best"
    return {scope: one if one.verdict in FAULTS else Judged(one.timing, BUSY, reason) for scope, one in clocks.items()}


def _attempt(subject: Subject, plan: Plan, estimate: float, loop: Loop, *, short: bool) -> Attempt:
    """Time calls for `plan.seconds` at a time, until all of them together are VALID or `plan.cap` is spent.

    Args:
        estimate: seconds of a call; short: once only.
    """
    look = subject.pace.now if subject.pace else lambda: 1.0
    shares = [] if short else [look()]
    whole = plan.settled or subject.standing is not None
    load, busy, timed = HostLoad(), subject.busy(), _Timed(subject)
    while True:
        timed.run(loop, plan.rounds or rounds_for(estimate, seconds=plan.seconds, cap=plan.cap))
        timings = {scope: summarise(times, subject.feed.batch_size, scope) for scope, times in timed.seconds().items()}
        good = all(verdict(timing, noise=plan.noise)[0] == VALID for timing in timings.values())
        spent = sum(timed.calls.times) + plan.seconds > plan.cap
        if short or plan.rounds or timed.clock_fault or (good and not whole) or spent:
            break
        shares.append(look())
    cores, busy = load.cores(), busy or load.busy() or subject.busy()
    shares.append(look())
    seconds, fault = timed.seconds(), timed.fault()
    clocks = {
        scope: Judged(timing, *verdict(timing, busy=busy, fault=fault, noise=plan.noise))
        for scope, timing in timings.items()
    }
    standing = on_busy_host(subject.standing(clocks), busy) if subject.standing else None
    return Attempt(clocks, seconds, cores, shares, standing, timed.jumped)


class _Timed:
    """The timed calls of one attempt, and what is wrong with them.

    Attributes:
        clock_fault: what is wrong with a clock, empty for nothing; jumped: it is the host's.
    """

    def __init__(self, subject: Subject) -> None:
        self.calls = Calls(subject.backend, subject.feed, subject.clock)
        self.clock_fault, self.jumped = "", False
        self._subject = subject
        self._executed: Optional[List[float]] = None
        self._known, self._elapsed = len(subject.backend.execute_seconds() or ()), 0.0
        self._used: Optional[int] = None

    def run(self, loop: Loop, rounds: int) -> None:
        """Make so many calls, then read the device's clock: once, as that takes longer with every call."""
        subject, before = self._subject, len(self.calls.times)
        self.calls.plan(rounds)
        with quiet():
            watched = Watched(subject.clock, subject.other_clock)
            self._used = threads_used(lambda: loop(self.calls, rounds))
            fault = watched.fault(self.calls.times[before:])
        self.jumped = bool(fault)
        self._elapsed += watched.elapsed()
        try:
            executed = subject.backend.execute_seconds()
            self._executed = None if executed is None else executed[self._known :]
            fault = fault or device_fault(self._executed, self.calls.times)
        except ClipvalError as error:
            fault = fault or str(error)
        self.clock_fault = self.clock_fault or fault

    def seconds(self) -> Dict[str, List[float]]:
        """Scope -> seconds of each call; where a clock is wrong, those that the other clock of the host tells."""
        count = len(self.calls.times)
        if self.clock_fault:
            return {INFERENCE: [max(self._elapsed, 1e-9) / count] * count}
        return {INFERENCE: list(self.calls.times), **({} if self._executed is None else {EXECUTE: self._executed})}

    def fault(self) -> Optional[Fault]:
        """What is wrong with the row itself, the worst first; asked after timing."""
        subject, calls = self._subject, self.calls
        bad = wrong_outputs(calls, subject.backend, subject.feed, subject.expected)
        if bad:
            return Fault(BAD_OUTPUT, bad)
        if self.clock_fault:
            return Fault(BAD_CLOCK, self.clock_fault)
        per_second = subject.feed.batch_size / float(np.median(calls.times))
        bad = cached_results(calls, subject.backend, subject.feed, subject.clock)
        bad = bad or subject.peaks.impossible(subject.backend, subject.operations, per_second)
        if bad:
            return Fault(BAD_OUTPUT, bad)
        lost = leak(calls.memory, calls)
        if lost:
            return Fault(LEAKING, lost)
        spent = sum(calls.times)
        idle = idle_threads(subject.threads, self._used, spent, self._large_call) if subject.threads else ""
        return Fault(IDLE_THREADS, idle) if idle else None

    def _large_call(self) -> None:
        backend, batch = self._subject.backend, self._subject.feed.fresh
        count = backend.batch_size or max(len(batch), LARGE_BATCH)
        backend.run(np.resize(batch, (count, *batch.shape[1:])))
