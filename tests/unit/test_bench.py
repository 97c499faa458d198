"""The second try of a row of throughput: when a loss of speed is believed."""

from types import SimpleNamespace

import numpy as np
import pytest

from clipval import baseline, bench, throughput
from clipval.backends import Identity
from clipval.throughput import Feed

EXPECTED = 1000.0  # samples/s of every session


class Backend:
    """Calls of no time; what they take is said by the test."""

    identity, tower = Identity("onnx", "1", "cpu", "fp32"), SimpleNamespace(name="text")


class Speeds:
    """Shares of the machine's speed, one a look: two a try."""

    best = 1.0

    def __init__(self, *shares):
        self.shares = list(shares)

    def now(self):
        return self.shares.pop(0)


@pytest.fixture
def tried(monkeypatch, tmp_path):
    """Run `second_try` on a row that makes so many samples/s in each try; what it gives, and the tries made."""
    made = []

    def run(speeds, pace, file=True):
        left = iter(speeds)

        def measure(*_, **options):
            row = throughput.summarise([8 / next(left)] * 20, 8, "inference")
            made.append(options)
            return {"inference": (row, "VALID", "")}

        monkeypatch.setattr(bench, "measure", measure)
        monkeypatch.setattr(bench, "baseline_key", lambda *_: {})
        saved = tmp_path / "b.json"
        baseline.save(baseline.Baseline({}, {"onnx/text/8/inference": [EXPECTED] * 5}), saved)
        settings = SimpleNamespace(
            perf_min_time=1.0, perf_max_time=10.0, perf_noise=None, baseline=saved if file else None
        )
        chain = SimpleNamespace(settings=settings, busy=lambda name: "")
        feed = Feed(np.zeros((8, 77), np.int64), 8)
        judged, earlier = bench.second_try(chain, Backend(), feed, 8, estimate=0.1, pace=pace)
        return judged["inference"][0].undisturbed, earlier, made

    return run


def test_a_loss_on_a_machine_at_its_speed_is_believed(tried):
    _, earlier, made = tried([800.0], Speeds(1.0, 0.95))
    assert (earlier.status, len(made)) == ("regressed", 1)
    assert made[0]["whole"]


def test_a_loss_that_goes_away_was_the_machine(tried):
    speed, earlier, made = tried([800.0, 1000.0], Speeds(0.5, 0.6, 0.6, 0.6))
    assert (speed, earlier.status, len(made)) == (pytest.approx(1000), "ok", 2)


def test_a_machine_that_stays_slow_allows_no_comparison(tried):
    _, earlier, made = tried([800.0] * 3, Speeds(0.5, 0.5, 1.0, 0.7, 0.6, 1.0))
    assert (earlier.status, len(made)) == ("slow_machine", bench.PATIENCE)
    assert "60% of its speed" in earlier.reason  # of the last try, at its faster end


def test_another_device_does_not_wait_for_the_processor(tried):
    _, earlier, made = tried([800.0], None)
    assert (earlier.status, len(made)) == ("regressed", 1)


def test_without_a_baseline_one_try_ends_when_it_is_valid(tried):
    _, earlier, made = tried([800.0], Speeds(0.5, 0.5), file=False)
    assert (earlier, len(made)) == (None, 1)
    assert not made[0]["whole"]


@pytest.mark.parametrize(
    ("looks", "share"),
    [
        ([1.0, 0.5, 0.6, 0.7], 0.6),  # no two looks in a row at its speed
        ([0.5, 0.92, 0.94, 0.5], 0.92),
        ([0.5, 0.5, 0.5, 1.0], 0.5),
    ],
)
def test_a_machine_was_at_its_speed_between_two_looks_that_say_so(looks, share):
    def again(between):
        between()
        between()
        return {}

    assert bench.settled(again, Speeds(*looks), lambda judged: True) == ({}, share)
