"""Timed calls of one backend, with each call's output and the memory of the process."""

from __future__ import annotations

from typing import Dict, List, Tuple

import numpy as np

from clipval.backends import Backend
from clipval.throughput.feed import FRESH, Feed
from clipval.throughput.machine import Clock
from clipval.throughput.process import Memory

SAMPLES = 64  # most samples of the process's memory in one loop


class Calls:
    """Calls of a backend on one batch after another, timed by the host's clock.

    Each output is copied as soon as the call returns, so what a runtime writes later is not in the copy.

    Attributes:
        times: seconds of each call so far; slots: of each call's batch, see `Feed.next`.
        last: slot -> its last output; prints: slot -> one fingerprint per call, to tell outputs apart.
        misshapen: shape of the first output that was not [batch, width]; empty if there was none.
        memory: samples of this process's memory: calls so far, bytes.
    """

    def __init__(self, backend: Backend, feed: Feed, clock: Clock) -> None:
        self.times: List[float] = []
        self.slots: List[int] = []
        self.last: Dict[int, np.ndarray] = {}
        self.prints: Dict[int, List[np.ndarray]] = {}
        self.misshapen: Tuple[int, ...] = ()
        self.memory: List[Tuple[int, Memory]] = []
        self._backend, self._feed, self._clock = backend, feed, clock
        self._shape = (feed.batch_size, backend.tower.width)
        # the projection of an embedding on a random direction changes as the embedding does
        self._direction = np.random.default_rng(0).normal(size=backend.tower.width).astype(np.float32)
        self._every = 1
        feed.begin_pair()

    def plan(self, rounds: int) -> None:
        """Announce the number of calls to come, of which at most `SAMPLES` sample the memory."""
        self._every = max(1, rounds // SAMPLES)

    def __call__(self) -> None:
        slot, batch = self._feed.next()
        start = self._clock()
        found = np.asarray(self._backend.run(batch))
        self.times.append(self._clock() - start)
        self.slots.append(slot)
        self._look(slot, found)

    def _look(self, slot: int, found: np.ndarray) -> None:
        if found.shape != self._shape:
            self.misshapen = self.misshapen or found.shape or (0,)
            return
        self.last[slot] = np.array(found)
        self.prints.setdefault(slot, []).append(self.print_of(found))
        if len(self.times) % self._every == 0:
            self.memory.append((len(self.times), Memory.now()))

    def print_of(self, found: np.ndarray) -> np.ndarray:
        """A figure of each row of an output, which tells it from others: [batch]."""
        figures: np.ndarray = np.einsum("ij,j->i", found, self._direction)
        return figures

    def pairs(self) -> np.ndarray:
        """Seconds [pairs, 2] of paired calls: with the seen batch, and with the fresh one."""
        count = len(self.times) // 2 * 2
        times = np.array(self.times[:count], np.float64).reshape(-1, 2)
        fresh = np.array(self.slots[:count]).reshape(-1, 2) == FRESH
        return np.stack([times[~fresh], times[fresh]], axis=1)
