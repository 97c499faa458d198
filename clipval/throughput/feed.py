"""The batches that a backend is timed with."""

from __future__ import annotations

from typing import Any, List

import numpy as np

BUFFERS = 4  # distinct inputs in turn: one input again and again would stay in the caches


class Feed:
    """Batches of one size from prepared rows, in turn.

    Args:
        rows: [n, *row_shape], or what slices to it; batch_size: rows of a batch. Short data is repeated.
    """

    def __init__(self, rows: Any, batch_size: int) -> None:
        self._rows, self.batch_size = rows, batch_size
        count = min(BUFFERS, max(1, len(rows) // batch_size))
        picked = [np.arange(n * batch_size, (n + 1) * batch_size) % len(rows) for n in range(max(count, 2))]
        self.indices: List[np.ndarray] = picked
        self.batches = [np.ascontiguousarray(rows[index]) for index in picked]
        self._turn = 0

    def next(self) -> np.ndarray:
        """The next batch, C-contiguous."""
        self._turn = (self._turn + 1) % len(self.batches)
        return self.batches[self._turn]

    def unseen(self, n: int) -> np.ndarray:
        """The n-th of the batches that follow those in turn."""
        start = self.indices[-1] + 1 + n * self.batch_size
        return np.ascontiguousarray(self._rows[start % len(self._rows)])
