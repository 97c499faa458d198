"""Statistics of timed calls, and the verdict on them: exact, and every verdict can be reached."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipval.throughput import statistics
from clipval.throughput.statistics import summarise
from clipval.throughput.verdict import DRIFT, FAULTS, Fault, verdict


def test_the_recipes_figure():
    found = summarise([0.010, 0.020, 0.050, 0.020, 0.020], 8, "inference")
    assert found.samples_per_second == pytest.approx(8 / 0.020)
    assert found.samples_per_second_mean == pytest.approx(1000 * 8 / 24.0)


def test_figures_by_hand():
    found = summarise([0.1, 0.2, 0.3, 0.4, 1.0], 4, "inference")
    assert found.median_seconds == pytest.approx(0.3)
    assert found.samples_per_second_mean == pytest.approx(4 / 0.4)
    assert found.cv == pytest.approx(np.sqrt(0.125) / 0.4)
    assert found.interval == (pytest.approx(4.0), pytest.approx(40.0))


def noisy(count, spread, seed=0):
    return 0.01 * np.exp(np.random.default_rng(seed).normal(0, spread, count))


@pytest.mark.parametrize(("count", "known"), [(50, []), (100, ["p90", "p95"]), (300, ["p90", "p95", "p99"])])
def test_percentiles_need_enough_rounds(count, known):
    found = summarise(noisy(count, 0.01), 1, "inference")
    assert [name for name in ("p90", "p95", "p99") if getattr(found, name) is not None] == known


@pytest.mark.parametrize("times", [[], [0.0], [-1.0], [float("nan")], [float("inf")]])
def test_times_that_cannot_be(times):
    with pytest.raises(ValueError, match="positive number"):
        summarise(times, 1, "inference")


def wander(rng, correlation, count):
    """First-order noise of unit variance."""
    drawn = rng.normal(size=count + 200) * np.sqrt(1 - correlation**2)
    from scipy.signal import lfilter  # half a second, which listing the tests need not take

    return lfilter([1], [1, -correlation], drawn)[200:]


def coverage(draw, count=200, tries=400):
    rng, hits = np.random.default_rng(0), 0
    for _ in range(tries):
        low, high = statistics.median_interval(np.exp(0.05 * draw(rng, count)))
        hits += low <= 1 <= high
    return hits / tries


@pytest.mark.parametrize("count", [6, 9, 20, 50, 200])
def test_the_interval_covers_the_median_of_independent_calls(count):
    assert coverage(lambda rng, count: rng.normal(size=count), count) >= 0.94


def test_the_interval_allows_for_calls_that_hang_together():
    assert coverage(lambda rng, count: wander(rng, 0.5, count)) >= 0.94
    assert coverage(lambda rng, count: wander(rng, 0.7, count)) >= 0.94  # one for independent calls covers 0.6 here
    assert coverage(lambda rng, count: wander(rng, 0.7, count), 20) >= 0.92  # the signs alone: 0.87


def test_the_interval_sees_a_slow_wave_under_jitter():
    """Successive calls hardly correlate there: allowing for that alone covers 0.63."""

    def draw(rng, count):
        return 0.6 * wander(rng, 0.95, count) + 0.8 * rng.normal(size=count)

    assert coverage(draw, 500) >= 0.82


def test_nine_rounds_bear_one_outlier():
    times = np.array([1.0, 1.01, 1.0, 1.01, 1.0, 1.01, 1.0, 1.01, 3.0])
    assert verdict(summarise(times, 1, "inference"))[0] == "VALID"
    assert verdict(summarise(times[-5:], 1, "inference"))[0] == "NOISY"


def test_effective_rounds():
    rng = np.random.default_rng(0)
    assert statistics.effective_rounds(np.full(50, 0.1)) == 50
    assert statistics.effective_rounds(np.arange(1.0, 101)) == statistics.MIN_ROUNDS
    assert 500 < statistics.effective_rounds(rng.normal(size=1000)) <= 1000
    assert 50 < statistics.effective_rounds(wander(rng, 0.7, 1000)) < 300  # 1000 * 0.3 / 1.7 is 176


@pytest.mark.parametrize("times", [[0.5, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.5], [1.0] * 30, [1.0], [1.0, 2.0]])
def test_a_coarse_clock_gives_figures(times):
    found = summarise(times, 1, "execute")
    assert np.isfinite([found.drift, *found.interval]).all()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=60), st.integers(1, 64))
def test_statistics_hold_together(times, batch_size):
    found = summarise(times, batch_size, "inference")
    assert found.interval[0] <= found.samples_per_second * (1 + 1e-9)
    assert found.samples_per_second <= found.interval[1] * (1 + 1e-9)
    assert min(times) <= found.median_seconds <= max(times)


@pytest.mark.parametrize(
    ("times", "more", "wanted"),
    [
        (noisy(200, 0.02), {}, "VALID"),
        (noisy(12, 0.5), {}, "NOISY"),
        (0.01 * np.linspace(1, 1.3, 100), {}, "THROTTLED"),
        (0.01 * np.linspace(1.3, 1, 100), {}, "NOISY"),  # becoming faster: not settled, but no fault of the cooling
        (noisy(200, 0.02), {"busy": "someone else"}, "BUSY"),
        (noisy(4, 0.001), {}, "INSUFFICIENT"),
        *((noisy(200, 0.02), {"fault": Fault(name, "zeros")}, name) for name in FAULTS),
    ],
)
def test_each_verdict(times, more, wanted):
    name, reason = verdict(summarise(times, 8, "inference"), **more)
    assert name == wanted
    assert bool(reason) == (wanted != "VALID")


def test_the_worst_fault_is_named():
    times = noisy(4, 0.5)
    assert verdict(summarise(times, 8, "inference"), busy="x", fault=Fault("LEAKING", "1 MB")) == ("LEAKING", "1 MB")
    assert verdict(summarise(times, 8, "inference"), busy="x")[0] == "INSUFFICIENT"
    assert verdict(summarise(noisy(20, 0.5), 8, "inference"), busy="x") == ("BUSY", "x")


def test_a_device_is_held_to_a_narrower_interval():
    times = noisy(30, 0.09)
    assert verdict(summarise(times, 1, "inference"))[0] == "VALID"
    assert verdict(summarise(times, 1, "end_to_end"))[0] == "VALID"
    assert verdict(summarise(times, 1, "execute"))[0] == "NOISY"


@pytest.mark.parametrize(("correlation", "most"), [(0.0, 6), (0.7, 18)])
def test_memory_alone_is_seldom_called_throttling(correlation, most):
    """A slope over single calls instead of blocks of them calls 28 of 200 so."""
    rng = np.random.default_rng(0)
    rows = [summarise(0.01 * np.exp(0.05 * wander(rng, correlation, 30)), 1, "inference") for _ in range(200)]
    assert sum(row.drift > DRIFT for row in rows) <= most


def test_a_rise_under_noise_is_seen():
    rng = np.random.default_rng(0)
    rise = 0.01 * np.linspace(1, 1.1, 100)
    rows = [summarise(rise * np.exp(0.02 * rng.normal(size=100)), 1, "inference") for _ in range(50)]
    assert all(0.05 < row.drift < 0.15 for row in rows)


def test_outliers_do_not_make_a_row_noisy():
    times = noisy(200, 0.01)
    times[::20] *= 5
    found = summarise(times, 1, "inference")
    assert found.cv > 0.5
    assert verdict(found)[0] == "VALID"


def test_the_noise_limit_can_be_widened():
    found = summarise(noisy(12, 0.2), 1, "inference")
    assert verdict(found)[0] == "NOISY"
    assert verdict(found, noise=0.9)[0] == "VALID"
