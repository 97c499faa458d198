"""The measuring protocol on a fake clock: what it measures, and when it measures again."""

import gc

import numpy as np
import pytest

from clipval.backends import Identity
from clipval.throughput import baseline, machine, protocol
from clipval.throughput.feed import Feed
from clipval.throughput.outputs import Expected
from clipval.throughput.protocol import Attempt, Plan, Subject
from clipval.throughput.row import Judged
from clipval.throughput.statistics import summarise
from clipval.towers import TEXT

EXPECTED = 1000.0  # samples/s of every session of the baseline
TRIES = protocol.PATIENCE

pytestmark = pytest.mark.usefixtures("quiet_host")


@pytest.fixture
def quiet_host(monkeypatch):
    monkeypatch.setattr(machine.HostLoad, "_read", staticmethod(lambda: None))


class Device:
    """A backend on a fake clock: calls of 0.5 s, of which the device says 0.25; or of given seconds, no device."""

    tower, batch_size, threads = TEXT, None, None

    def __init__(self, fill=0.0, durations=None):
        self.executed, self.fill, self.now, self.refreshed = [], fill, 0.0, 0
        self.durations = durations
        self.identity = (
            Identity("om", "1", "npu", "fp16") if durations is None else Identity("onnx", "1", "cpu", "fp32")
        )

    def clock(self):
        return self.now

    def run(self, rows):
        self.now += 0.5 if self.durations is None else self.durations(self.now)
        self.executed.append(0.25)
        return np.full((len(rows), 512), self.fill, np.float32)

    def execute_seconds(self):
        return list(self.executed) if self.durations is None else None

    def copy_seconds(self):
        return {"to_device": [0.1] * 3, "from_device": [0.2, 0.1, 0.2]} if self.durations is None else None

    def refresh(self):
        self.refreshed += 1


class Speeds:
    """Shares of the machine's speed, one a look: one in a short attempt, else one before and one after."""

    best = peak = 1.0

    def __init__(self, *shares):
        self.shares = list(shares)

    def now(self):
        return self.shares.pop(0)


def measure(device, loop=None, *, seconds=20, cap=60, rounds=None, insist=True, settled=False, **held):
    subject = Subject(
        device, Feed(np.zeros((8, 77), np.int64), 4), clock=device.clock, other_clock=device.clock, **held
    )
    return protocol.measure(subject, Plan(seconds, cap, rounds=rounds, insist=insist, settled=settled), loop)


def test_the_devices_clock_is_kept_apart():
    device = Device()
    row, seconds = measure(device)
    execute, inference = row.clocks["execute"].timing, row.clocks["inference"].timing
    assert (execute.rounds, execute.samples_per_second_mean) == (40, pytest.approx(16.0))
    assert (inference.rounds, inference.samples_per_second) == (40, pytest.approx(8.0))
    assert (row.scope, row.valid, row.attempts, device.refreshed) == ("execute", True, 1, 1)
    assert seconds == [0.25] * 40
    assert row.warm_up.calls > 2  # neither the warm-up nor the fresh batches that are given again are in a figure
    assert len(device.executed) == row.warm_up.calls + 40 + 20
    assert row.copies == {"to_device": 0.1, "from_device": 0.2}


def test_the_devices_clock_is_read_once_a_loop():
    device, reads = Device(), []
    real = device.execute_seconds
    device.execute_seconds = lambda: reads.append(1) or real()
    measure(device)
    few = len(reads)
    measure(device, seconds=2000, cap=6000)
    assert len(reads) == 2 * few


def test_the_loop_is_handed_in_and_used_once():
    handed = []

    def loop(call, rounds):
        handed.append(rounds)
        for _ in range(rounds):
            call()

    row, _ = measure(Device(fill=1.0, durations=lambda now: 0.1 + now % 1), loop, seconds=2)
    assert len(handed) == 1
    assert row.attempts == 2
    assert row.decided.timing.rounds >= handed[0]


def test_garbage_collection_is_off_while_timing_and_on_again():
    seen = []

    def loop(call, rounds):
        seen.append(gc.isenabled())
        for _ in range(rounds):
            call()

    measure(Device(), loop)
    assert seen == [False]
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("fill", "more", "wanted", "reason"),
    [
        (float("nan"), {}, "BAD_OUTPUT", "NaN or infinity"),
        (
            1.0,
            {"expected": Expected(lambda rows: np.eye(len(rows), 512), 0.9, 0.1, ["x"] * 8)},
            "BAD_OUTPUT",
            "from pytorch's embedding",
        ),
        (0.0, {"busy": lambda: "process 7 uses the NPU"}, "BUSY", "process 7"),
        (0.0, {"rounds": 3}, "INSUFFICIENT", "3 rounds"),
    ],
)
def test_what_is_wrong_is_said_of_every_clock(fill, more, wanted, reason):
    row, _ = measure(Device(fill), **more)
    for one in row.clocks.values():
        assert one.verdict == wanted
        assert reason in one.reason


def test_a_row_that_is_not_valid_is_measured_once_more_where_that_is_insisted_on():
    def noisy(now):
        return 0.1 + now % 1

    assert measure(Device(durations=noisy), insist=True)[0].attempts == 2
    assert measure(Device(durations=noisy), insist=False)[0].attempts == 1
    assert measure(Device(durations=noisy), rounds=20)[0].attempts == 1


def test_a_baseline_takes_the_whole_time_of_a_machine_at_its_speed():
    device = Device()
    row, _ = measure(device, settled=True, pace=Speeds(1.0, 1.0, 1.0, 1.0))
    assert (row.decided.timing.rounds, row.attempts, row.machine_share) == (120, 1, 1.0)


def test_a_machine_that_is_never_at_its_speed_makes_no_baseline():
    row, _ = measure(Device(), settled=True, pace=Speeds(*[0.6] * 4 * TRIES))
    assert row.attempts == TRIES
    assert row.decided.verdict == "BUSY"
    assert "the machine ran at 60% of its speed at best" in row.decided.reason


@pytest.fixture
def tried():
    """Measure a row that makes so many samples/s in each attempt, held to a baseline of `EXPECTED`."""
    base = baseline.Baseline({}, {"onnx/text/4/inference": [EXPECTED] * 5})

    def run(speeds, pace):
        left, timed = iter(speeds), []

        def standing(clocks):
            speed = next(left)
            timed.append(clocks["inference"].timing.rounds)
            timings = {"inference": summarise([4 / speed] * 20, 4, "inference")}
            return baseline.standing(base, {}, {"inference": "onnx/text/4/inference"}, timings)

        device = Device(durations=lambda now: 0.5)
        row, _ = measure(device, pace=pace, standing=standing)
        assert (row.machine_share is None) == (pace is None)
        return row, timed

    return run


def looks(*pairs):
    """The look of the short attempt, and four of each whole one."""
    return Speeds(1.0, *(share for pair in pairs for share in pair))


def test_a_loss_that_stays_is_believed_of_a_machine_at_its_speed(tried):
    row, timed = tried([800.0] * (TRIES + 1), looks(*[(0.5,) * 4] * (TRIES - 1), (0.5, 1.0, 0.95, 0.5)))
    assert (row.standing.status, row.attempts) == ("regressed", TRIES + 1)
    assert timed == [40] + [120] * TRIES


def test_a_loss_that_goes_away_was_the_machine(tried):
    row, _ = tried([800.0, 800.0, 1000.0], looks((1.0,) * 4, (0.6,) * 4))
    assert (row.standing.status, row.attempts) == ("ok", 3)


def test_a_machine_that_stays_slow_allows_no_comparison(tried):
    row, _ = tried([800.0] * (TRIES + 1), looks((1.0, 0.7, 0.7, 1.0), *[(0.6, 1.0, 0.6, 1.0)] * (TRIES - 1)))
    assert (row.standing.status, row.attempts) == ("slow_machine", TRIES + 1)
    assert "70% of its speed" in row.standing.reason


def test_another_device_does_not_wait_for_the_processor(tried):
    row, _ = tried([800.0, 800.0], None)
    assert (row.standing.status, row.attempts) == ("regressed", 2)


@pytest.mark.parametrize(
    ("shares", "share"),
    [
        ([1.0, 0.5, 0.6, 0.7], 0.6),  # no two looks in a row at its speed
        ([0.5, 0.92, 0.94, 0.5], 0.92),
        ([0.5, 0.5, 0.5, 1.0], 0.5),
        ([0.8], 0.8),
    ],
)
def test_a_machine_was_at_its_speed_between_two_looks_that_say_so(shares, share):
    assert Attempt({}, {}, None, shares, None).share == share


def judged(scope):
    return Judged(summarise([8 / EXPECTED] * 20, 8, scope), "VALID", "")


@pytest.mark.parametrize(
    ("scopes", "status"),
    [(("inference", "execute"), "ok"), (("inference",), "no_baseline"), (("execute",), "no_baseline")],
)
def test_a_clock_that_is_lost_is_not_made_up_for_by_another(scopes, status):
    names = {scope: f"om/text/8/{scope}" for scope in ("execute", "inference")}
    base = baseline.Baseline({}, {name: [EXPECTED] * 5 for name in names.values()})
    found = baseline.standing(base, {}, names, {scope: judged(scope).timing for scope in scopes})
    assert found.status == status
    assert (found.expected is None) == (status == "no_baseline")
