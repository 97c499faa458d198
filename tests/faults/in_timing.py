"""Faults of timed calls: what they gave, what they took, and what they left behind."""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, List

import numpy as np

from clipval.backends.onnx import OnnxBackend
from clipval.throughput.calls import Calls
from clipval.throughput.feed import Feed
from tests.faults.table import fault

PERF = ("-m", "perf", "--batch-sizes=8", "--perf-min-time=0.5")  # long enough for many calls on a busy host
TIMED = 12  # calls with a batch after which all are timed ones: cold start and warm-up come before


def timed(change: Callable[[OnnxBackend, np.ndarray, np.ndarray, int], np.ndarray]) -> None:
    """Change what the text tower gives, of the backend, the rows, the right embeddings, and the number of the call."""
    real, calls = OnnxBackend.run, [0]

    def run(self: OnnxBackend, rows: np.ndarray) -> np.ndarray:
        found = real(self, rows)
        if self.tower.name != "text":
            return found
        calls[0] += 1
        return change(self, rows, found, calls[0])

    OnnxBackend.run = run  # type: ignore[method-assign]


@fault("NaN in one of twenty timed calls", "throughput/onnx/text/8", "BAD_OUTPUT", "NaN or infinity", arguments=PERF)
def nan_under_load() -> None:
    timed(lambda self, rows, found, n: found * np.nan if n > TIMED and n % 20 == 0 else found)


@fault("rows exchanged in the timed calls", "throughput/onnx/text/8", "BAD_OUTPUT", "embedding", arguments=PERF)
def wrong_under_load() -> None:
    timed(lambda self, rows, found, n: np.roll(found, 1, axis=0) if n > TIMED else found)


@fault("the input overwritten", "throughput/onnx/text/8", "BAD_OUTPUT", "the input was overwritten", arguments=PERF)
def input_overwritten() -> None:
    def change(self: OnnxBackend, rows: np.ndarray, found: np.ndarray, n: int) -> np.ndarray:
        rows[0, 1] = rows[0, 2]
        return found

    timed(change)


@fault("results cached by content, twice as fast", "throughput/onnx/text/8", "BAD_OUTPUT", "appears to cache",
       arguments=PERF)  # fmt: skip
def cached_by_content() -> None:
    real, known = OnnxBackend.run, {}  # type: ignore[var-annotated]

    def run(self: OnnxBackend, rows: np.ndarray) -> np.ndarray:
        key = (self.tower.name, rows.tobytes())
        if key in known:
            time.sleep(0.02)
            found: np.ndarray = known[key].copy()
            return found
        time.sleep(0.04)
        known[key] = real(self, rows)
        return real(self, rows)

    OnnxBackend.run = run  # type: ignore[method-assign]


@fault("a call that returns before it is done", "throughput/onnx/text/8", "BAD_OUTPUT", "from pytorch's embedding",
       arguments=PERF)  # fmt: skip
def returns_early() -> None:
    real = OnnxBackend.run

    def run(self: OnnxBackend, rows: np.ndarray) -> np.ndarray:
        found = np.full((len(rows), self.tower.width), self.tower.width**-0.5, np.float32)

        def compute(given: np.ndarray) -> None:
            time.sleep(0.1)  # after the result has been looked at, on a busy host too
            found[:1] = real(self, given[:1])

        threading.Thread(target=compute, args=(rows.copy(),), daemon=True).start()
        return found

    OnnxBackend.run = run  # type: ignore[method-assign]


@fault("a host clock that jumps ahead now and then", "throughput/onnx/text/8", "BAD_CLOCK", "the host's clock jumped",
       arguments=PERF)  # fmt: skip
def jumping_clock() -> None:
    real, looks = time.perf_counter, [0]

    def clock() -> float:
        looks[0] += 1
        return real() + 0.25 * (looks[0] // 20)

    time.perf_counter = clock


@fault("a host clock that stands still", "throughput/onnx/text/8", "BAD_CLOCK", "or negative time", arguments=PERF)
def frozen_clock() -> None:
    time.perf_counter = lambda: 7.0


def execute_times(change: Callable[[List[float]], List[float]]) -> None:
    """Give the ONNX backend a device clock: nearly all of each call, changed."""
    real, told = OnnxBackend.run, []  # type: ignore[var-annotated]

    def run(self: OnnxBackend, rows: np.ndarray) -> np.ndarray:
        start = time.perf_counter()
        found = real(self, rows)
        told.append(0.9 * (time.perf_counter() - start))
        return found

    OnnxBackend.run = run  # type: ignore[method-assign]
    OnnxBackend.execute_seconds = lambda self: change(list(told))  # type: ignore[method-assign]


@fault("execute times in another unit, a thousand times too short", "throughput/onnx/text/8", "BAD_CLOCK",
       "expected at least 0.05", arguments=PERF)  # fmt: skip
def execute_too_short() -> None:
    execute_times(lambda told: [one / 1000 for one in told])


@fault("execute times longer than the calls", "throughput/onnx/text/8", "BAD_CLOCK", "longer than their calls",
       arguments=PERF)  # fmt: skip
def execute_too_long() -> None:
    execute_times(lambda told: [1.3 * one for one in told])


@fault("execute times of zero", "throughput/onnx/text/8", "BAD_CLOCK", "are not above zero", arguments=PERF)
def execute_zero() -> None:
    execute_times(lambda told: [0.0 if n % 7 == 0 else one for n, one in enumerate(told)])


@fault("every second execute time lost", "throughput/onnx/text/8", "BAD_CLOCK", "execute times for", arguments=PERF)
def execute_too_few() -> None:
    execute_times(lambda told: told[::2])


@fault("a leak of 1 MB a call", "throughput/onnx/text/8", "LEAKING", "of memory", arguments=PERF)
def leak() -> None:
    kept: List[Any] = []

    def change(self: OnnxBackend, rows: np.ndarray, found: np.ndarray, n: int) -> np.ndarray:
        kept.append(np.ones(2**20, np.uint8))
        return found

    timed(change)


@fault("a leak of memory that is never touched", "throughput/onnx/text/8", "LEAKING", "of memory", arguments=PERF)
def untouched_leak() -> None:
    kept: List[Any] = []

    def change(self: OnnxBackend, rows: np.ndarray, found: np.ndarray, n: int) -> np.ndarray:
        kept.append(bytearray(2**20))
        return found

    timed(change)


@fault("threads that were asked for and are not used", "throughput/onnx/text/8", "IDLE_THREADS", "2 threads were",
       arguments=(*PERF, "--threads=2"))  # fmt: skip
def idle_threads() -> None:
    real: Any = OnnxBackend._options

    def options(self: OnnxBackend) -> Any:
        found = real(self)
        found.intra_op_num_threads = 1
        return found

    OnnxBackend._options = options  # type: ignore[method-assign]


def of_new_batches(change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change what the text tower gives for the third batch that never came before, once the timed calls have begun."""
    plan, seen, new = Calls.plan, set(), [0]

    def begin(self: Calls, rounds: int) -> None:
        new[0] = 0
        plan(self, rounds)

    def of(self: OnnxBackend, rows: np.ndarray, found: np.ndarray, n: int) -> np.ndarray:
        known = rows.tobytes() in seen
        seen.add(rows.tobytes())
        new[0] += not known
        return change(found) if new[0] == 3 and not known else found

    Calls.plan = begin  # type: ignore[method-assign]
    timed(of)


@fault("one batch that never came before is given other embeddings, in the middle of the timed calls",
       "throughput/onnx/text/8", "BAD_OUTPUT", "than when it was given again", arguments=PERF)  # fmt: skip
def one_new_batch_wrong() -> None:
    of_new_batches(lambda found: np.roll(found, 1, axis=1))


@fault("two rows of one new batch exchanged, in the middle of the timed calls",
       "throughput/onnx/text/8", "BAD_OUTPUT", "than when it was given again", arguments=PERF)  # fmt: skip
def one_new_batch_exchanged() -> None:
    of_new_batches(lambda found: found[[1, 0, *range(2, len(found))]])


LARGE = (*PERF, "--batch-sizes=16")


@fault("the fourth row of each large batch wrong", "throughput/onnx/text/16", "BAD_OUTPUT",
       "differs from pytorch's embedding", arguments=LARGE)  # fmt: skip
def fourth_row() -> None:
    def change(self: OnnxBackend, rows: np.ndarray, found: np.ndarray, n: int) -> np.ndarray:
        found[3:4] = np.roll(found[3:4], 1, axis=1)
        return found

    timed(change)


@fault("two rows of each large batch exchanged", "throughput/onnx/text/16", "BAD_OUTPUT",
       "differs from pytorch's embedding", arguments=LARGE)  # fmt: skip
def large_batch_exchanged() -> None:
    timed(lambda self, rows, found, n: found[[0, 2, 1, *range(3, 16)]] if len(found) == 16 else found)


def cached_now_and_then(share: float) -> None:
    """Hand out stored results so often, at once."""
    real, known, rng = OnnxBackend.run, {}, np.random.default_rng(0)  # type: ignore[var-annotated]

    def run(self: OnnxBackend, rows: np.ndarray) -> np.ndarray:
        key = (self.tower.name, rows.tobytes())
        stored = key in known and rng.random() < share
        if not stored:
            time.sleep(0.03)
            known[key] = real(self, rows)
        found: np.ndarray = known[key].copy()
        return found

    OnnxBackend.run = run  # type: ignore[method-assign]


CACHED = (*PERF, "--perf-min-time=1")


@fault("every second result cached by content", "throughput/onnx/text/8", "BAD_OUTPUT", "appears to cache",
       arguments=CACHED)  # fmt: skip
def cached_half() -> None:
    cached_now_and_then(0.5)


@fault("three in four results cached by content", "throughput/onnx/text/8", "BAD_OUTPUT", "appears to cache",
       arguments=CACHED)  # fmt: skip
def cached_mostly() -> None:
    cached_now_and_then(0.75)


def leaking_in_steps(every: int, size: int) -> None:
    """Keep so many bytes with every so manieth call."""
    kept: List[Any] = []

    def change(self: OnnxBackend, rows: np.ndarray, found: np.ndarray, n: int) -> np.ndarray:
        if n % every == 0:
            kept.append(np.ones(size, np.uint8))
        return found

    timed(change)


@fault("a leak of 3 MB in every third call", "throughput/onnx/text/8", "LEAKING", "of memory", arguments=PERF)
def leak_in_every_third_call() -> None:
    leaking_in_steps(3, 3 * 2**20)


@fault("a leak of 10 MB in every tenth call", "throughput/onnx/text/8", "LEAKING", "of memory",
       arguments=(*PERF, "--perf-min-time=2"))  # fmt: skip
def leak_in_every_tenth_call() -> None:
    leaking_in_steps(10, 10 * 2**20)


def clocks(of: Callable[[str, Callable[..., float]], Callable[..., float]]) -> None:
    """Replace every clock of Python's `time` that counts from a start."""
    for name in ("perf_counter", "monotonic", "clock_gettime"):
        replaced = of(name, getattr(time, name))
        replaced.__name__, replaced.__module__ = name, "time"  # pytest-benchmark looks its timer up by them
        setattr(time, name, replaced)


@fault("all clocks of the host at a third of their speed", "throughput/onnx/text/8", "BAD_CLOCK", "cannot be believed",
       arguments=PERF)  # fmt: skip
def slow_clocks() -> None:
    def slowed(name: str, real: Callable[..., float]) -> Callable[..., float]:
        starts: Any = {}
        return lambda *which: starts.setdefault(which, real(*which)) * 2 / 3 + real(*which) / 3

    clocks(slowed)


@fault(
    "all clocks of the host stand still while a runtime computes",
    "throughput/onnx/text/8",
    "BAD_CLOCK",
    "cannot be believed",
    arguments=(*PERF, "--perf-min-time=0.1"),
)  # 20 times as long by a right clock
def stopping_clocks() -> None:
    real, lost, clock = OnnxBackend.run, [0.0], time.perf_counter

    def run(self: OnnxBackend, rows: np.ndarray) -> np.ndarray:
        start = clock()
        found = real(self, rows)
        lost[0] += 0.95 * (clock() - start)
        return found

    OnnxBackend.run = run  # type: ignore[method-assign]
    clocks(lambda name, told: lambda *which: told(*which) - lost[0])


def ahead(tower: str) -> None:
    """Compute each batch before its call begins, which then only hands the result out."""
    real, draw, ready = OnnxBackend.run, Feed.next, {}  # type: ignore[var-annotated]
    backends: List[OnnxBackend] = []

    def next_batch(self: Feed) -> Any:
        slot, batch = draw(self)
        for backend in backends[-1:]:
            if batch.shape[1:] == backend.tower.row_shape:
                ready[id(batch)] = real(backend, batch)
        return slot, batch

    def run(self: OnnxBackend, rows: np.ndarray) -> np.ndarray:
        if self.tower.name == tower and self not in backends:
            backends.append(self)
        found: np.ndarray = ready.pop(id(rows), None) if id(rows) in ready else real(self, rows)
        return found

    Feed.next = next_batch  # type: ignore[method-assign]
    OnnxBackend.run = run  # type: ignore[method-assign]


@fault("texts computed before the clock starts", "throughput/onnx/text/8", "BAD_OUTPUT", "a matrix product",
       arguments=PERF)  # fmt: skip
def texts_ahead() -> None:
    ahead("text")


@fault("images computed before the clock starts", "throughput/onnx/vision/8", "BAD_OUTPUT", "a matrix product",
       arguments=PERF)  # fmt: skip
def images_ahead() -> None:
    ahead("vision")


AGAINST = (*PERF, "--backends=onnx", "--perf-max-time=1")


def slowed(share: float, factor: float) -> None:
    """Let a share of the text tower's calls take so many times as long."""
    real, calls = OnnxBackend.run, [0]

    def run(self: OnnxBackend, rows: np.ndarray) -> np.ndarray:
        calls[0] += 1
        start = time.perf_counter()
        found = real(self, rows)
        if self.tower.name == "text" and calls[0] * share % 1 < share:
            time.sleep((factor - 1) * (time.perf_counter() - start))
        return found

    OnnxBackend.run = run  # type: ignore[method-assign]


@fault("nine calls in ten take three times as long as in the baseline", "throughput/onnx/text/8",
       "over 5 sessions, bound", arguments=AGAINST, baseline=True)  # fmt: skip
def most_calls_slow() -> None:
    slowed(0.9, 3)


@fault("one call in ten takes fifteen times as long as in the baseline", "throughput/onnx/text/8",
       "over 5 sessions, bound", arguments=AGAINST, baseline=True)  # fmt: skip
def some_calls_very_slow() -> None:
    slowed(0.1, 15)


@fault("every call takes twice as long as in the baseline", "throughput/onnx/text/8", "undisturbed samples/s, baseline",
       arguments=AGAINST, baseline=True)  # fmt: skip
def every_call_slow() -> None:
    slowed(1, 2)
