"""Backends on a clock of their own, for the whole measuring path: what they compute, and what a call takes."""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Tuple

import numpy as np

from clipval.backends import Backend, Identity, Product
from clipval.throughput.feed import Feed
from clipval.throughput.outputs import Expected
from clipval.throughput.protocol import Plan, Subject, measure
from clipval.throughput.row import Row
from clipval.towers import TEXT, Tower

WIDTH = 16
OPERATIONS = 1e9  # of one sample
PEAK = 1e12  # of the fake machine's matrix product
BOUNDS = (1 - 1e-7, 2e-5)
SECONDS = 0.02  # of a call
TOWER: Tower = TEXT.__class__(**{**vars(TEXT), "width": WIDTH})


class Time:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def embed(rows: np.ndarray) -> np.ndarray:
    """An embedding of its own for each row, of unit length."""
    mixed = rows.reshape(len(rows), -1)[:, :20] @ np.cos(np.outer(np.arange(1, 21), np.arange(1, WIDTH + 1)))
    turned = np.cos(mixed).astype(np.float32)
    found: np.ndarray = turned / np.linalg.norm(turned, axis=1, keepdims=True)
    return found


class Fake(Backend):
    """A backend that computes `embed` in `SECONDS` of its clock.

    Args:
        change: what a call gives instead, of the rows, the right embeddings and the number of the call.
        takes: seconds of a call, of the rows and the number of the call.
        device: seconds of a call by the device's own clock, of what the call took; None for no such clock.
    """

    identity, tower, threads = Identity("onnx", "1", "cpu", "fp32"), TOWER, 2

    def __init__(
        self,
        change: Callable[[np.ndarray, np.ndarray, int], Any] = lambda rows, found, n: found,
        takes: Callable[[np.ndarray, int], float] = lambda rows, n: SECONDS * max(1, len(rows) / 4),
        device: Optional[Callable[[float], float]] = None,
    ) -> None:
        self.clock, self.calls = Time(), 0
        self._change, self._takes, self._device = change, takes, device
        self._executed: List[float] = []

    def run(self, rows: np.ndarray) -> np.ndarray:
        self.calls += 1
        took = self._takes(rows, self.calls)
        self.clock.now += took
        if self._device is not None:
            self._executed.append(self._device(took))
        found: np.ndarray = self._change(rows, embed(rows), self.calls)
        return found

    def execute_seconds(self) -> Optional[List[float]]:
        return None if self._device is None else list(self._executed)

    def product(self, side: int) -> Optional[Product]:
        return None


class Peak:
    """The matrix product of the fake machine."""

    def __init__(self) -> None:
        from clipval.throughput.plausible import Peaks

        self._peaks = Peaks()
        self._peaks._best["onnx 1 on cpu, fp32 2"] = PEAK
        self.of, self.impossible = self._of, self._peaks.impossible
        self._peaks.of = self._of  # type: ignore[method-assign]

    def _of(self, backend: Backend, seconds: float = 0.0) -> float:
        return PEAK


def cached(faster: float) -> Callable[[np.ndarray, int], float]:
    """Seconds of calls of a backend that takes so many times less of them for what it has seen before."""
    known = set()

    def takes(rows: np.ndarray, n: int) -> float:
        new = rows.tobytes() not in known
        known.add(rows.tobytes())
        return SECONDS if new else SECONDS / faster

    return takes


def keeping(size: int, make: Callable[[int], Any]) -> Callable[[np.ndarray, np.ndarray, int], np.ndarray]:
    """A change of a call that makes something of so many bytes, and keeps it."""
    kept: List[Any] = []

    def change(rows: np.ndarray, found: np.ndarray, n: int) -> np.ndarray:
        kept.append(make(size))
        return found

    return change


def captions(count: int) -> np.ndarray:
    """Token rows of CLIP's kind, all different."""
    rng, rows = np.random.default_rng(0), np.zeros((count, 77), np.int64)
    for row in rows:
        length = int(rng.integers(6, 20))
        row[: length + 2] = [900, *rng.integers(1, 60, length), 1000]
    return rows


def measured(backend: Fake, *, batch: int = 4, seconds: float = 1.0, **held: Any) -> Row:
    """The row of a backend, held to `embed` and to the fake machine's peak."""
    rows = captions(6 * batch)
    expected = Expected(embed, *BOUNDS, tuple(f"{n}_0" for n in range(len(rows))))
    wanted = {"expected": expected, "operations": OPERATIONS, "peaks": Peak(), "clock": backend.clock}
    subject = Subject(backend, Feed(rows, batch), **{"other_clock": backend.clock, **wanted, **held})
    row, _ = measure(subject, Plan(seconds, 3 * seconds, insist=False))
    return row


def verdict(backend: Fake, **more: Any) -> Tuple[str, str]:
    """Verdict and reason of the clock that decides."""
    decided = measured(backend, **more).decided
    return decided.verdict, decided.reason
