"""Faults of what is timed, planted into the whole measuring path: each has its verdict, and a clean row has none."""

import threading

import numpy as np
import pytest

from clipval.errors import BackendUnavailable
from clipval.throughput import machine, process
from clipval.throughput.outputs import Expected
from tests.speed_fakes import OPERATIONS, PEAK, SECONDS, Fake, cached, embed, keeping, verdict

WARM = 20  # calls after which all are timed ones


@pytest.fixture(autouse=True)
def quiet_host(monkeypatch):
    monkeypatch.setattr(machine.HostLoad, "_read", staticmethod(lambda: None))


def device(seconds):
    """A device whose clock gives so much of a call."""
    return Fake(device=seconds)


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("backend", [Fake(), device(lambda took: 0.9 * took), device(lambda took: took / 19)])
def test_a_clean_row_has_no_fault(backend, batch):
    assert verdict(backend, batch=batch) == ("VALID", "")


def stale(rows, found, n, kept={}):  # noqa: B006
    """Results are looked up by the address of the input."""
    return kept.setdefault((rows.ctypes.data, len(rows)), found).copy()


def overwritten(rows, found, n):
    rows[-1, 1] = 7
    return found


def later():
    """An output that the runtime writes after the call has returned: here, when the next one begins."""
    owed = []

    def change(rows, found, n):
        for given, right in owed:
            given[:] = right
        given = np.full_like(found, 0.25)
        owed[:] = [(given, found)]
        return given

    return change


def previous():
    """Each call gives the result of the one before."""
    kept = [None, None]

    def change(rows, found, n):
        kept[:] = [kept[1], found]
        return found if kept[0] is None else kept[0]

    return change


def wrong_once():
    """The rows of one batch are exchanged when it comes for the tenth time."""
    seen = {}

    def change(rows, found, n):
        times = seen[rows.tobytes()] = seen.get(rows.tobytes(), 0) + 1
        first = times == 10 and list(seen.values()).count(10) == 1
        return np.roll(found, 1, 0) if first and max(seen.values()) == 10 else found

    return change


OUTPUTS = {
    "NaN in every timed call": (lambda rows, found, n: found * np.nan if n > WARM else found, "NaN or infinity"),
    "NaN in one timed call": (
        lambda rows, found, n: found * np.inf if n == WARM + 15 else found,
        "1 of 51 timed calls",
    ),
    "wrong under load": (lambda rows, found, n: np.roll(found, 1, 0) if n > WARM else found, "embedding"),
    "wrong in one timed call": (
        wrong_once(),
        "timed calls returned other embeddings for one batch than the rest, e.g. in row",
    ),
    "looked up by address": (stale, "from pytorch's embedding"),
    "input overwritten": (overwritten, "the input was overwritten"),
    "another shape": (lambda rows, found, n: found[:-1], "returned (3, 16) for a batch of 4"),
    "constant": (lambda rows, found, n: embed(np.zeros_like(rows)), "from pytorch's embedding"),
    "written after the call": (later(), "from pytorch's embedding"),
    "of the call before": (previous(), "other embeddings for one batch"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_timed_calls(name):
    change, words = OUTPUTS[name]
    found, reason = verdict(Fake(change))
    assert found == "BAD_OUTPUT"
    assert words in reason


def test_a_constant_is_no_embedding_whatever_the_reference_gives():
    def constant(rows):
        return np.full((len(rows), 16), 0.25, np.float32)

    expected = Expected(constant, 0.9, 0.1, ["x"] * 24)
    found = verdict(Fake(lambda rows, found, n: constant(rows)), expected=expected)
    assert found == ("BAD_OUTPUT", "two different inputs have the same embedding")


@pytest.mark.parametrize("faster", [1.4, 2, 20, 1000])
@pytest.mark.parametrize("seconds", [0.2, 2.0])
def test_cached_results_are_seen_whatever_they_save(faster, seconds):
    found, reason = verdict(Fake(takes=cached(faster)), seconds=seconds)
    assert found == "BAD_OUTPUT"
    assert "the backend appears to cache results" in reason


@pytest.mark.parametrize("seed", range(20))
def test_a_busy_host_is_no_cache(seed):
    """Single calls take up to a thousand times as long, and the machine is slow for seconds on end."""
    rng = np.random.default_rng(seed)

    def takes(rows, n):
        slow = 3.0 if np.sin(n / 7 + seed) > 0.3 else 1.0
        return (
            SECONDS * slow * float(np.exp(rng.normal(0, 0.3))) * (rng.choice([10, 1000]) if rng.random() < 0.2 else 1)
        )

    assert verdict(Fake(takes=takes), seconds=float(rng.choice([0.3, 3.0])))[0] in (
        "VALID",
        "NOISY",
        "THROTTLED",
        "INSUFFICIENT",
    )


@pytest.mark.parametrize(
    ("share", "wanted"), [(0.9, "VALID"), (1.4, "VALID"), (1.6, "BAD_OUTPUT"), (1000, "BAD_OUTPUT")]
)
def test_a_speed_that_cannot_be(share, wanted):
    seconds = OPERATIONS * 4 / (share * PEAK)
    found, reason = verdict(Fake(takes=lambda rows, n: seconds), seconds=100 * seconds)
    assert found == wanted
    assert ("of the same runtime reaches here (limit 1.5)" in reason) == (wanted == "BAD_OUTPUT")


def broken():
    raise BackendUnavailable("aclruntime recorded 39 times for 40 runs")


DEVICES = {
    "a thousand times too short": (lambda took: took / 1000, "0.001 of the time of the calls"),
    "just below a twentieth": (lambda took: took / 20.5, "expected at least 0.05"),
    "longer than the call": (lambda took: 1.05 * took, "are longer than their calls, e.g. 21 ms in a call of 20 ms"),
    "zeros": (lambda took: 0.0, "are not above zero"),
    "negative": (lambda took: -took, "are not above zero"),
    "not a number": (lambda took: float("nan"), "are not above zero"),
}


@pytest.mark.parametrize("name", DEVICES)
def test_a_devices_clock_is_held_to_the_hosts(name):
    seconds, words = DEVICES[name]
    found, reason = verdict(device(seconds))
    assert found == "BAD_CLOCK"
    assert words in reason


@pytest.mark.parametrize("kept", [slice(None, -1), slice(0, 0)])
def test_too_few_execute_times(kept):
    backend = device(lambda took: took / 2)
    real = backend.execute_seconds
    backend.execute_seconds = lambda: real()[kept] if backend.calls > WARM else real()
    found, reason = verdict(backend)
    assert found == "BAD_CLOCK"
    assert "execute times for 51 calls" in reason


def test_a_device_that_cannot_tell_its_times_is_a_verdict():
    backend = device(lambda took: took / 2)
    real = backend.execute_seconds
    backend.execute_seconds = lambda: real() if backend.calls < WARM else broken()
    assert verdict(backend) == ("BAD_CLOCK", "aclruntime recorded 39 times for 40 runs")


class Jumping:
    """A clock that is another one's, but for jumps."""

    def __init__(self, clock, jump):
        self.clock, self.jump, self.looks = clock, jump, 0

    def __call__(self):
        self.looks += 1
        return self.jump(self.clock(), self.looks)


@pytest.mark.parametrize(
    ("jump", "words"),
    [
        (lambda now, n: now + 0.5 * (n // 60), "the host's clock jumped"),
        (lambda now, n: now - 0.5 * (n // 61), "or negative time"),
        (lambda now, n: now / 2, "the host's clock jumped"),
        (lambda now, n: 1.05 * now, "the host's clock jumped"),
        (lambda now, n: 7.0, "or negative time"),
        (lambda now, n: float("nan"), "or negative time"),
    ],
)
def test_a_clock_of_the_host_that_jumps(jump, words):
    backend = Fake()
    found, reason = verdict(backend, clock=Jumping(backend.clock, jump))
    assert found == "BAD_CLOCK"
    assert words in reason


def test_a_clock_that_is_set_once_is_measured_again():
    backend = Fake()
    found = verdict(backend, clock=Jumping(backend.clock, lambda now, n: now + 3 * (n > 90)))
    assert found == ("VALID", "")


@pytest.mark.parametrize("make", [lambda size: np.ones(size, np.uint8), bytearray], ids=["touched", "untouched"])
def test_a_leak_of_a_megabyte_a_call(make):
    found, reason = verdict(Fake(keeping(2**20, make)), seconds=0.5)
    assert found == "LEAKING"
    assert "each call keeps 1 MB of memory" in reason


def test_a_leak_from_memory_that_was_freed_before():
    """Neither the address space nor what is resident grows while free memory is used up."""
    blocks = [np.ones(2**20, np.uint8) for _ in range(400)]
    pinned = blocks[::2]
    del blocks
    assert verdict(Fake(keeping(2**20, lambda size: np.ones(size, np.uint8))), seconds=0.5)[0] == "LEAKING"
    assert len(pinned) == 200


def test_memory_that_is_collected_is_no_leak():
    def cycle(rows, found, n):
        ring = [np.ones(2**20, np.uint8)]
        ring.append(ring)
        return found

    assert verdict(Fake(cycle), seconds=0.5)[0] == "VALID"


def test_memory_that_comes_and_goes_is_no_leak():
    kept = [None] * 3

    def change(rows, found, n):
        kept[n % 3] = np.ones(2**20 * (1 + n % 5), np.uint8)
        return found

    assert verdict(Fake(change), seconds=0.5)[0] == "VALID"


class Worker:
    """A second thread that computes beside the first one."""

    def __init__(self):
        self.asked, self.done = threading.Event(), threading.Event()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self):
        while self.asked.wait():
            self.asked.clear()
            spin()
            self.done.set()

    def compute(self):
        self.done.clear()
        self.asked.set()
        spin()
        self.done.wait()


def spin():
    for _ in range(3):
        np.sort(np.random.default_rng(0).normal(size=20_000))


@pytest.mark.skipif(not process.thread_seconds(), reason="this system does not tell the time of threads")
def test_threads_of_what_is_not_timed_do_not_count():
    """The machine's own products take the threads that were asked for, between the timed calls."""
    worker = Worker()

    class Pace:
        def now(self):
            worker.compute()
            return 1.0

    def one(rows, found, n):
        spin()
        return found

    assert verdict(Fake(one), threads=2, pace=Pace())[0] == "IDLE_THREADS"


@pytest.mark.skipif(not process.thread_seconds(), reason="this system does not tell the time of threads")
def test_threads_that_were_asked_for_and_are_not_used():
    worker = Worker()

    def one(rows, found, n):
        spin()
        return found

    def two(rows, found, n):
        worker.compute()
        return found

    def two_in_large_batches(rows, found, n):
        return two(rows, found, n) if len(rows) > 8 else one(rows, found, n)

    assert verdict(Fake(two), threads=2) == ("VALID", "")
    assert verdict(Fake(two_in_large_batches), threads=2) == ("VALID", "")
    assert verdict(Fake(one)) == ("VALID", "")
    found, reason = verdict(Fake(one), threads=2)
    assert (found, reason) == ("IDLE_THREADS", "2 threads were requested (--threads), but only 1 computed")
    assert verdict(Fake(two), threads=8)[0] == "IDLE_THREADS"
