"""The batches that a backend is timed with: half of them repeat, half are new."""

from __future__ import annotations

import os
from typing import Any, Iterator, List, Tuple

import numpy as np

SEEN = 2  # batches that repeat in turn; with a fresh one in between, no input equals the previous one
FRESH = -1  # the slot of a new batch
SAMPLE = 64  # rows whose words replace others


class Feed:
    """Batches of one size from prepared rows, in pairs: a seen one and a fresh one, in random order.

    A backend that returns cached results is fast on batches it has seen. The fresh batch is one array that is modified
    in place before each use: a rectangle of each image is inverted, words of each caption are replaced by others of the
    data set, with a seed that no backend can know.

    Args:
        rows: [n, *row_shape], or an object that slices to it; batch_size: rows per batch. Short data is repeated.

    Attributes:
        indices: rows of each seen batch; batches: the seen batches; fresh: the modified one.
    """

    def __init__(self, rows: Any, batch_size: int) -> None:
        self.batch_size = batch_size
        self.indices = [np.arange(n * batch_size, (n + 1) * batch_size) % len(rows) for n in range(SEEN)]
        self.batches = [np.ascontiguousarray(rows[index]) for index in self.indices]
        self.fresh = np.array(rows[(self.indices[-1] + batch_size) % len(rows)], order="C")
        self._rows, self._coming, self._turn = rows, [0] * 0, 0
        self._rng = np.random.default_rng(list(os.urandom(16)))
        self._drawn: List[int] = []  # seeds of the changes to the fresh batch so far
        if self.fresh.dtype.kind == "i":
            self._words, self._columns = _replaceable(np.asarray(rows[np.arange(min(SAMPLE, len(rows)))]), self.fresh)

    def next(self) -> Tuple[int, np.ndarray]:
        """The next batch, C-contiguous, and its slot: its index in `batches`, or `FRESH`."""
        if not self._coming:
            self._turn = (self._turn + 1) % SEEN
            self._coming = [self._turn, FRESH] if self._rng.random() < 0.5 else [FRESH, self._turn]
        slot = self._coming.pop()
        batch = self.fresh if slot == FRESH else self.batches[slot]
        seed = int(self._rng.integers(2**63))
        self._write(batch, seed, changed=slot == FRESH)
        if slot == FRESH:
            self._drawn.append(seed)
        return slot, batch

    def again(self, count: int) -> Iterator[np.ndarray]:
        """The fresh batch as it was the last so many times, the last one first. It stays as it was the first of them.

        A runtime that wrote to it in between does not find it as it was.
        """
        for n in range(count):
            if n:
                self._undo()
            yield self.fresh

    def _undo(self) -> None:
        """Make the fresh batch what it was the time before."""
        last = self._drawn.pop()
        words = self.fresh.dtype.kind == "i"  # they are written over; a rectangle is inverted a second time
        self._write(self.fresh, self._drawn[-1] if words else last, changed=True)

    def begin_pair(self) -> None:
        """Make the next batch the first of a pair."""
        self._coming.clear()

    def changed(self) -> List[str]:
        """Names of the seen batches that no longer equal their rows: something wrote to them."""
        return [
            f"batch {n + 1}"
            for n, (index, batch) in enumerate(zip(self.indices, self.batches))
            if not np.array_equal(batch, np.asarray(self._rows[index]))
        ]

    def _write(self, batch: np.ndarray, seed: int, *, changed: bool) -> None:
        """Modify the fresh batch. A seen one is rewritten unchanged, so that CPU caches treat both alike."""
        rng = np.random.default_rng(seed)
        if batch.dtype.kind == "i":
            drawn = rng.choice(self._words, (self.batch_size, self._columns))
            place = batch[:, 1 : 1 + self._columns]
            place[:] = drawn if changed else place.copy()
            return
        # inverting twice restores the image, which rectangles of random size and place hardly ever do
        top, left = (int(rng.integers(0, side // 2)) for side in batch.shape[-2:])
        height, width = (int(rng.integers(side // 4, side // 2 + 1)) for side in batch.shape[-2:])
        part = batch[..., top : top + height, left : left + width]
        for _ in range(1 if changed else 2):
            np.negative(part, out=part)


def _replaceable(sample: np.ndarray, fresh: np.ndarray) -> Tuple[np.ndarray, int]:
    """Ids that may replace a word, and how many columns after the first hold words in every row.

    CLIP's end token has the highest id; in other tokenizers some word has, and the words before it may be replaced too.
    """
    columns = max(1, int(fresh.argmax(axis=1).min()) - 1)
    inside = np.arange(sample.shape[1]) < sample.argmax(axis=1)[:, None]
    inside[:, 0] = False
    words = np.unique(sample[inside])
    return (words if len(words) > 1 else np.unique(sample)), columns
