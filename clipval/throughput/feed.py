"""The batches that a backend is timed with: half of them come again, half never came before."""

from __future__ import annotations

import os
from typing import Any, List, Tuple

import numpy as np

SEEN = 2  # batches that come again in turn; with a fresh one between them no input is the last one again
FRESH = -1  # the slot of a batch that never came before
SAMPLE = 64  # rows whose words stand in for others


class Feed:
    """Batches of one size from prepared rows, two by two: a seen one and a fresh one, in an order drawn by chance.

    A backend that hands out stored results is fast on what it has seen. The fresh batch is one array that is changed
    in place before each use: images have a rectangle inverted, captions have words replaced by others of the data. The
    changes are drawn from a seed that no backend can know.

    Args:
        rows: [n, *row_shape], or what slices to it; batch_size: rows of a batch. Short data is repeated.

    Attributes:
        indices: rows of each seen batch; batches: the seen batches; fresh: the one that is changed.
    """

    def __init__(self, rows: Any, batch_size: int) -> None:
        self.batch_size = batch_size
        self.indices = [np.arange(n * batch_size, (n + 1) * batch_size) % len(rows) for n in range(SEEN)]
        self.batches = [np.ascontiguousarray(rows[index]) for index in self.indices]
        self.fresh = np.array(rows[(self.indices[-1] + batch_size) % len(rows)], order="C")
        self._rows, self._coming, self._turn = rows, [0] * 0, 0
        self._rng = np.random.default_rng(list(os.urandom(16)))
        if self.fresh.dtype.kind == "i":
            self._words, self._columns = _replaceable(np.asarray(rows[np.arange(min(SAMPLE, len(rows)))]), self.fresh)

    def next(self) -> Tuple[int, np.ndarray]:
        """The next batch, C-contiguous, and its slot: its place in `batches`, or `FRESH`."""
        if not self._coming:
            self._turn = (self._turn + 1) % SEEN
            self._coming = [self._turn, FRESH] if self._rng.random() < 0.5 else [FRESH, self._turn]
        slot = self._coming.pop()
        batch = self.fresh if slot == FRESH else self.batches[slot]
        self._write(batch, changed=slot == FRESH)
        return slot, batch

    def begin_pair(self) -> None:
        """Let the next batch be the first of two."""
        self._coming.clear()

    def changed(self) -> List[str]:
        """Names of the seen batches that are no longer what the rows are: something wrote to them."""
        return [
            f"batch {n + 1}"
            for n, (index, batch) in enumerate(zip(self.indices, self.batches))
            if not np.array_equal(batch, np.asarray(self._rows[index]))
        ]

    def _write(self, batch: np.ndarray, *, changed: bool) -> None:
        """Make the fresh batch one that never was. A seen one is written to as well, so that caches hold both alike."""
        if batch.dtype.kind == "i":
            drawn = self._rng.choice(self._words, (self.batch_size, self._columns))
            place = batch[:, 1 : 1 + self._columns]
            place[:] = drawn if changed else place.copy()
            return
        # inverting twice restores, and rectangles of any size and place hardly ever do that
        top, left = (int(self._rng.integers(0, side // 2)) for side in batch.shape[-2:])
        height, width = (int(self._rng.integers(side // 4, side // 2 + 1)) for side in batch.shape[-2:])
        part = batch[..., top : top + height, left : left + width]
        for _ in range(1 if changed else 2):
            np.negative(part, out=part)


def _replaceable(sample: np.ndarray, fresh: np.ndarray) -> Tuple[np.ndarray, int]:
    """Ids that may stand for a word, and how many columns after the first hold words in every row.

    The end of a text is CLIP's highest id; in other tokenizers some word is, and those before it may be replaced too.
    """
    columns = max(1, int(fresh.argmax(axis=1).min()) - 1)
    inside = np.arange(sample.shape[1]) < sample.argmax(axis=1)[:, None]
    inside[:, 0] = False
    words = np.unique(sample[inside])
    return (words if len(words) > 1 else np.unique(sample)), columns
