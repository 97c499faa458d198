"""The protocol on a fake clock: exact, and every verdict can be reached."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipval import machine, throughput
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
    ("estimate", "rounds"),
    [
        (0.001, 1000),
        (0.1, 10),
        (1e-7, throughput.MAX_ROUNDS),
        (0.0, throughput.MAX_ROUNDS),
        (1.1, throughput.GOOD_ROUNDS),  # 9.9 s
        (1.5, throughput.GOOD_ROUNDS),  # 13.5 s, more than the cap and not twice as much
        (2.5, 8),  # as many as twice the cap has time for
        (5.0, 4),
        (60.0, 1),
    ],
)
def test_rounds_follow_the_time_budget(estimate, rounds):
    assert throughput.rounds_for(estimate, seconds=1, cap=10) == rounds


def test_the_recipes_figure():
    found = summarise([0.010, 0.020, 0.050, 0.020, 0.020], 8, "inference")
    assert found.samples_per_second == pytest.approx(8 / 0.020)
    assert found.samples_per_second_mean == pytest.approx(1000 * 8 / 24.0)


def test_calls_too_slow_for_the_budget_are_insufficient():
    times = [7.0] * throughput.rounds_for(7.0, seconds=1, cap=10)
    name, reason = verdict(summarise(times, 64, "inference"))
    assert name == "INSUFFICIENT"
    assert "--perf-max-time" in reason


@settings(deadline=None)
@given(st.floats(0, 1e3), st.floats(0.01, 60), st.floats(0.01, 600))
def test_rounds_fit_the_budget(estimate, seconds, cap):
    rounds = throughput.rounds_for(estimate, seconds=seconds, cap=cap)
    assert 1 <= rounds <= throughput.MAX_ROUNDS
    assert rounds == 1 or rounds * estimate <= throughput.OVERRUN * cap * (1 + 1e-9)


def test_figures_by_hand():
    found = summarise([0.1, 0.2, 0.3, 0.4, 1.0], 4, "inference")
    assert found.median_seconds == pytest.approx(0.3)
    assert found.mean_seconds == pytest.approx(0.4)
    assert found.stdev_seconds == pytest.approx(np.sqrt(0.125))
    assert found.cv == pytest.approx(np.sqrt(0.125) / 0.4)
    assert found.mad_seconds == pytest.approx(0.1)
    assert found.interval == (pytest.approx(4.0), pytest.approx(40.0))
    assert (found.min_seconds, found.max_seconds, found.outliers) == (0.1, 1.0, 1)


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
        low, high = throughput.median_interval(np.exp(0.05 * draw(rng, count)))
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
    assert throughput.effective_rounds(np.full(50, 0.1)) == 50
    assert throughput.effective_rounds(np.arange(1.0, 101)) == throughput.MIN_ROUNDS
    assert 500 < throughput.effective_rounds(rng.normal(size=1000)) <= 1000
    assert 50 < throughput.effective_rounds(wander(rng, 0.7, 1000)) < 300  # 1000 * 0.3 / 1.7 is 176


@pytest.mark.parametrize("times", [[0.5, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.5], [1.0] * 30, [1.0], [1.0, 2.0]])
def test_a_coarse_clock_gives_figures(times):
    found = summarise(times, 1, "execute")
    assert np.isfinite([found.autocorrelation, found.drift, *found.interval]).all()


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
        (0.01 * np.linspace(1.3, 1, 100), {}, "NOISY"),  # becoming faster: not settled, but no fault of the cooling
        (noisy(200, 0.02), {"busy": "someone else"}, "BUSY"),
        (noisy(4, 0.001), {}, "INSUFFICIENT"),
        (noisy(200, 0.02), {"bad_output": "zeros"}, "BAD_OUTPUT"),
    ],
)
def test_each_verdict(times, more, wanted):
    name, reason = verdict(summarise(times, 8, "inference"), **more)
    assert name == wanted
    assert bool(reason) == (wanted != "VALID")


def test_the_worst_fault_is_named():
    times = noisy(4, 0.5)
    assert verdict(summarise(times, 8, "inference"), busy="x", bad_output="zeros") == ("BAD_OUTPUT", "zeros")
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
    assert sum(row.drift > throughput.DRIFT for row in rows) <= most


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
    plain = {"layers": 12, "width": 768, "image_size": 224, "patch_size": 32}
    config = {"embed_dim": 512, "vision_cfg": {"layers": [3, 4, 6, 3]}, "text_cfg": {"hf_model_name": "x"}}
    for vision in ({**plain, "image_size": [224, 336]}, {"timm_model_name": "x", "layers": 12}):
        assert throughput.flops_per_sample({**config, "vision_cfg": vision}, "vision") is None
    assert throughput.flops_per_sample({**config, "vision_cfg": plain, "multimodal_cfg": {}}, "vision") is None
    assert throughput.flops_per_sample(config, "vision") is None
    assert throughput.flops_per_sample(config, "text") is None


class Device:
    """A backend on a fake clock: calls of 0.5 s, of which the device says 0.25."""

    identity, tower, batch_size = Identity("om", "1", "npu", "fp16"), TEXT, None

    def __init__(self, fill=0.0):
        self.executed, self.fill, self.now = [], fill, 0.0

    def clock(self):
        return self.now

    def run(self, rows):
        self.now += 0.5
        self.executed.append(0.25)
        return np.full((len(rows), 512), self.fill, np.float32)

    def execute_seconds(self):
        return list(self.executed)


@pytest.fixture
def quiet_host(monkeypatch):
    monkeypatch.setattr(machine.HostLoad, "_read", staticmethod(lambda: None))


def measure(device, **more):
    feed = Feed(np.zeros((8, 77), np.int64), 4)
    return throughput.measure(device, feed, 4, seconds=20, cap=60, clock=device.clock, **more)


@pytest.mark.usefixtures("quiet_host")
def test_measure_keeps_the_devices_clock_apart():
    device = Device()
    found = measure(device)
    execute, inference = found["execute"][0], found["inference"][0]
    assert (execute.rounds, execute.samples_per_second_mean) == (40, pytest.approx(16.0))
    assert (inference.rounds, inference.samples_per_second) == (40, pytest.approx(8.0))
    assert [name for _, name, _ in found.values()] == ["VALID", "VALID"]
    assert len(device.executed) == 3 + 40  # the warm-up is in no figure


@pytest.mark.usefixtures("quiet_host")
@pytest.mark.parametrize(
    ("fill", "more", "wanted", "reason"),
    [
        (float("nan"), {}, "BAD_OUTPUT", "NaN or infinity"),
        (0.0, {"check": lambda: "rows differ from the accuracy path"}, "BAD_OUTPUT", "accuracy path"),
        (0.0, {"busy": lambda: "process 7 uses the NPU"}, "BUSY", "process 7"),
        (0.0, {"rounds": 3}, "INSUFFICIENT", "3 rounds"),
    ],
)
def test_measure_judges(fill, more, wanted, reason):
    for _, name, said in measure(Device(fill), **more).values():
        assert name == wanted
        assert reason in said


@pytest.mark.usefixtures("quiet_host")
@pytest.mark.parametrize(("whole", "rounds", "looks"), [(False, 40, 0), (True, 120, 2)])
def test_the_whole_time_is_spent_where_neighbours_matter(whole, rounds, looks):
    device, seen = Device(), []
    found = measure(device, whole=whole, between=lambda: seen.append(device.now))
    assert found["inference"][0].rounds == rounds
    assert len(seen) == looks


def test_garbage_collection_is_off_while_timing_and_on_again():
    import gc

    seen = []
    throughput.time_calls(lambda: seen.append(gc.isenabled()), 3)
    assert seen == [False] * 3
    assert gc.isenabled()


def test_garbage_collection_that_was_off_stays_off():
    import gc

    gc.disable()
    try:
        with throughput.quiet():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_row_is_plain_json():
    import json

    found = throughput.as_dict(summarise(noisy(20, 0.01), 8, "inference"))
    assert json.loads(json.dumps(found))["rounds"] == 20
