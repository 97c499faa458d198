"""The protocol on a fake clock: exact, and every verdict can be reached."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipval import throughput
from clipval.backends import Identity
from clipval.throughput import Feed, summarise, verdict
from clipval.towers import TEXT


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


def test_a_feed_turns_through_different_batches():
    rows = np.arange(10 * 77).reshape(10, 77)
    feed = Feed(rows, 2)
    seen = [feed.next()[0, 0] for _ in range(8)]
    assert len(set(seen[:4])) == 4
    assert seen[:4] == seen[4:]
    assert all(batch.flags.c_contiguous and len(batch) == 2 for batch in feed.batches)


def test_short_data_is_repeated_but_two_batches_differ():
    feed = Feed(np.arange(3 * 77).reshape(3, 77), 2)
    assert [list(index) for index in feed.indices] == [[0, 1], [2, 0]]


def test_warm_up_goes_on_until_calls_are_stable():
    clock = Clock(endless(1.0, 0.5, 0.25, 0.1))
    warm = throughput.warm_up(clock.call, seconds=0.1, cap=100, clock=clock)
    assert warm.stable
    assert warm.first_call == 1.0
    assert warm.estimate == pytest.approx(0.1)
    assert warm.calls > 6


def test_warm_up_ends_at_its_cap():
    clock = Clock(1.0 + 0.5 * (n % 2) + n for n in range(1000))
    warm = throughput.warm_up(clock.call, seconds=1, cap=20, clock=clock)
    assert not warm.stable
    assert warm.seconds < 30


@pytest.mark.parametrize(
    ("estimate", "rounds"), [(0.001, 1000), (0.1, 10), (2.2, throughput.MIN_ROUNDS), (1e-7, throughput.MAX_ROUNDS)]
)
def test_rounds_follow_the_time_budget(estimate, rounds):
    assert throughput.rounds_for(estimate, seconds=1, cap=10) == rounds


def test_the_recipes_figure():
    found = summarise([0.010, 0.020, 0.030, 0.020, 0.020], 8, "inference")
    assert found.samples_per_second == pytest.approx(8 / 0.020)
    assert found.samples_per_second_mean == pytest.approx(1000 * 8 / 20.0)


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


def coverage(correlation, count=200, tries=300):
    rng, hits = np.random.default_rng(0), 0
    for _ in range(tries):
        noise = rng.normal(size=count)
        for n in range(1, count):
            noise[n] = correlation * noise[n - 1] + np.sqrt(1 - correlation**2) * noise[n]
        low, high = throughput.median_interval(np.exp(0.05 * noise))
        hits += low <= 1 <= high
    return hits / tries


def test_the_interval_covers_the_median():
    assert coverage(0.0) >= 0.92
    assert coverage(0.7) >= 0.88  # an interval for independent calls covers 0.57 here


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=60), st.integers(1, 64))
def test_statistics_hold_together(times, batch_size):
    found = summarise(times, batch_size, "inference")
    assert found.interval[0] <= found.samples_per_second * (1 + 1e-9)
    assert found.samples_per_second <= found.interval[1] * (1 + 1e-9)
    assert found.min_seconds <= found.median_seconds <= found.max_seconds


@pytest.mark.parametrize(
    ("times", "more", "wanted"),
    [
        (noisy(200, 0.02), {}, "VALID"),
        (noisy(12, 0.5), {}, "NOISY"),
        (0.01 * np.linspace(1, 1.3, 100), {}, "THROTTLED"),
        (noisy(200, 0.02), {"busy": "someone else"}, "BUSY"),
        (noisy(4, 0.001), {}, "INSUFFICIENT"),
        (noisy(200, 0.02), {"bad_output": "zeros"}, "BAD_OUTPUT"),
    ],
)
def test_each_verdict(times, more, wanted):
    name, reason = verdict(summarise(times, 8, "inference"), **more)
    assert name == wanted
    assert bool(reason) == (wanted != "VALID")


def test_outliers_do_not_make_a_row_noisy():
    times = noisy(200, 0.01)
    times[::20] *= 5
    found = summarise(times, 1, "inference")
    assert found.cv > 0.5
    assert found.outliers >= 10
    assert verdict(found)[0] == "VALID"


def test_the_noise_limit_can_be_widened():
    found = summarise(noisy(12, 0.2), 1, "inference")
    assert verdict(found)[0] == "NOISY"
    assert verdict(found, noise=0.9)[0] == "VALID"


@pytest.mark.parametrize(("tower", "flops"), [("vision", 8.82e9), ("text", 5.96e9)])
def test_flops_are_the_published_ones(tower, flops):
    config = {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
        "text_cfg": {"context_length": 77, "width": 512, "heads": 8, "layers": 12},
    }
    assert throughput.flops_per_sample(config, tower) == pytest.approx(flops, rel=2e-3)


def test_other_architectures_have_no_count():
    config = {"embed_dim": 512, "vision_cfg": {"layers": [3, 4, 6, 3]}, "text_cfg": {"hf_model_name": "x"}}
    assert throughput.flops_per_sample(config, "vision") is None
    assert throughput.flops_per_sample(config, "text") is None


class Device:
    """A backend whose device tells its own time."""

    identity, tower, batch_size = Identity("om", "1", "npu", "fp16"), TEXT, None

    def __init__(self):
        self.executed = []

    def run(self, rows):
        self.executed.append(0.5)
        return np.zeros((len(rows), 512), np.float32)

    def execute_seconds(self):
        return list(self.executed)


def test_measure_keeps_the_devices_clock_apart():
    device = Device()
    found = throughput.measure(device, Feed(np.zeros((8, 77), np.int64), 4), 4, seconds=0.01, cap=1, rounds=7)
    row, name, _ = found["execute"]
    assert (row.rounds, row.samples_per_second_mean) == (7, pytest.approx(8.0))
    assert name in ("VALID", "BUSY")
    assert found["inference"][0].samples_per_second > 8


def test_garbage_collection_is_off_while_timing_and_on_again():
    import gc

    seen = []
    throughput.time_calls(lambda: seen.append(gc.isenabled()), 3)
    assert seen == [False] * 3
    assert gc.isenabled()


def test_the_matmul_peak_is_a_speed():
    assert throughput.matmul_peak(0.01) > 1e9
