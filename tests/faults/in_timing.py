"""Faults of timed calls: what they gave, what they took, and what they left behind."""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, List

import numpy as np

from clipval.backends.onnx import OnnxBackend
from tests.faults.table import fault

PERF = ("-m", "perf", "--batch-sizes=8")
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


@fault("NaN in one of the timed calls", "throughput/onnx/text/8", "BAD_OUTPUT", "NaN or infinity", arguments=PERF)
def nan_under_load() -> None:
    timed(lambda self, rows, found, n: found * np.nan if n == TIMED + 10 else found)


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
       arguments=(*PERF, "--perf-min-time=0.5"))  # fmt: skip
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
            time.sleep(0.001)
            found[:] = real(self, given)

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
       arguments=(*PERF, "--threads=2", "--perf-min-time=0.5"))  # fmt: skip
def idle_threads() -> None:
    real: Any = OnnxBackend._options

    def options(self: OnnxBackend) -> Any:
        found = real(self)
        found.intra_op_num_threads = 1
        return found

    OnnxBackend._options = options  # type: ignore[method-assign]
