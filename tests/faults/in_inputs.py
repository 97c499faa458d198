"""Faults that the data set's own inputs cannot show: other batch sizes, other tokens, pictures at the extremes."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np

from clipval.backends.onnx import OnnxBackend
from tests.faults.table import ACCURACY, fault


def wrong_where(
    wrong: Callable[[np.ndarray], np.ndarray], becomes: Callable[[np.ndarray], np.ndarray], tower: str = "text"
) -> None:
    """Change the embeddings of the rows that `wrong` picks; `becomes` gives what they are from all of the batch's."""
    real = OnnxBackend.run

    def run(self: Any, rows: np.ndarray) -> np.ndarray:
        found = real(self, rows)
        if self.tower.name == tower:
            picked = wrong(rows)
            found = np.where(picked[:, None], becomes(found), found)
        return np.asarray(found, np.float32)

    OnnxBackend.run = run  # type: ignore[method-assign]


def row_before(found: np.ndarray) -> np.ndarray:
    return np.roll(found, 1, axis=0)


def row_of_batch(size: int, row: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: (np.arange(len(rows)) == row) & (len(rows) == size)


@fault("one row of a batch of 16 is its neighbour's", "batches/onnx/text/16", "row 9 of batch",
       arguments=(*ACCURACY, "--batch-sizes=1,8,16"))  # fmt: skip
def row_of_batch_16() -> None:
    wrong_where(row_of_batch(16, 9), row_before)


@fault("the last row of a partial batch is the first's", "batches/onnx/vision/6", "row 2 of batch 2",
       arguments=(*ACCURACY, "--batch-sizes=1,6,8"))  # fmt: skip
def partial_batch() -> None:
    wrong_where(row_of_batch(3, 2), lambda found: np.repeat(found[:1], len(found), axis=0), "vision")


@fault("stored results for known inputs, those of another for new ones", "probe/onnx/text", "--probe-seed")
def stored_results() -> None:
    """The captions of the drawn scenes take few ids: all others get what one of them got."""
    wrong_where(lambda rows: (rows[:, 1:-1] % 7 == 3).sum(axis=1) > 6, row_before)


@fault("ids from 45000 on have another word's embedding", "probe/onnx/text", "minimum cosine")
def high_ids() -> None:
    real = OnnxBackend.run

    def run(self: Any, rows: np.ndarray) -> np.ndarray:
        text = self.tower.name == "text"
        return real(self, np.where((rows >= 45000) & (rows < 49406), 320, rows) if text else rows)

    OnnxBackend.run = run  # type: ignore[method-assign]


@fault("captions longer than 40 tokens are cut", "probe/onnx/text", "input '")
def long_captions_cut() -> None:
    real = OnnxBackend.run

    def run(self: Any, rows: np.ndarray) -> np.ndarray:
        if self.tower.name == "text":
            rows, long = rows.copy(), (rows == 49407).argmax(axis=1) > 40
            rows[long, 40], rows[long, 41:] = 49407, 0
        return real(self, rows)

    OnnxBackend.run = run  # type: ignore[method-assign]


@fault("pixels are clipped before the end of their range", "probe/onnx/vision", "minimum cosine")
def pixels_clipped() -> None:
    real = OnnxBackend.run

    def run(self: Any, rows: np.ndarray) -> np.ndarray:
        return real(self, np.minimum(rows, 1.9) if self.tower.name == "vision" else rows)

    OnnxBackend.run = run  # type: ignore[method-assign]


@fault("a black picture overflows", "probe/onnx/vision", "NaN or Inf")
def black_overflows() -> None:
    wrong_where(lambda rows: rows.max(axis=(1, 2, 3)) < -1, lambda found: found * np.nan, "vision")
