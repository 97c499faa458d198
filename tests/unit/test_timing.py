"""Warm-up and rounds on a fake clock: exact."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipval.throughput import timing
from clipval.throughput.statistics import summarise
from clipval.throughput.verdict import GOOD_ROUNDS, verdict


class Clock:
    """A clock that each call moves on by the next of some durations."""

    def __init__(self, durations):
        self.now, self.durations = 0.0, iter(durations)

    def __call__(self):
        return self.now

    def call(self):
        self.now += next(self.durations)


def endless(*first):
    yield from first
    while True:
        yield first[-1]


def test_warm_up_goes_on_until_calls_are_stable():
    clock = Clock(endless(1.0, 0.5, 0.25, 0.1))
    warm = timing.warm_up(clock.call, seconds=0.1, cap=100, clock=clock)
    assert warm.stable
    assert warm.estimate == pytest.approx(0.1)
    assert warm.calls > 6


def test_warm_up_ends_at_its_cap():
    clock = Clock(1.0 + 0.5 * (n % 2) + n for n in range(1000))
    warm = timing.warm_up(clock.call, seconds=1, cap=20, clock=clock)
    assert not warm.stable
    assert warm.seconds < 30


@pytest.mark.parametrize(
    ("estimate", "rounds"),
    [
        (0.001, 1000),
        (0.1, 10),
        (1e-7, timing.MAX_ROUNDS),
        (0.0, timing.MAX_ROUNDS),
        (1.1, GOOD_ROUNDS),  # 9.9 s
        (1.5, GOOD_ROUNDS),  # 13.5 s, more than the cap and not twice as much
        (2.5, 8),  # as many as twice the cap has time for
        (5.0, 4),
        (60.0, 1),
    ],
)
def test_rounds_follow_the_time_budget(estimate, rounds):
    assert timing.rounds_for(estimate, seconds=1, cap=10) == rounds


def test_calls_too_slow_for_the_budget_are_insufficient():
    times = [7.0] * timing.rounds_for(7.0, seconds=1, cap=10)
    name, reason = verdict(summarise(times, 64, "inference"))
    assert name == "INSUFFICIENT"
    assert "--perf-max-time" in reason


@settings(deadline=None)
@given(st.floats(0, 1e3), st.floats(0.01, 60), st.floats(0.01, 600))
def test_rounds_fit_the_budget(estimate, seconds, cap):
    rounds = timing.rounds_for(estimate, seconds=seconds, cap=cap)
    assert 1 <= rounds <= timing.MAX_ROUNDS
    assert rounds == 1 or rounds * estimate <= timing.OVERRUN * cap * (1 + 1e-9)


def test_garbage_collection_that_was_off_stays_off():
    import gc

    gc.disable()
    try:
        with timing.quiet():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
