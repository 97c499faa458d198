"""Exact ranks and margins both ways from one float32 product, in blocks, on every core.

A float32 dot product of width n, summed in any order, fused or not, is off by at most gamma(n) * |x| * |y|, where
gamma(n) = n * u / (1 - n * u) and u = 2**-24 (Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition,
section 3.1). Rounding both unit rows to float32 adds two u; `rounding` takes gamma(n + 8), which also covers the
thresholds' own rounding and underflow. So a float32 score is decisive unless it is within that bound of what it is
compared with; only those few pairs are computed in float64, where ties are detected.

Both directions share the product: a caption's wrong images are the rest of its row, an image's wrong captions the rest
of its column. Memory besides the embeddings: their float32 copies, and a few MiB per core.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache
from typing import Callable, ContextManager, Iterable, NamedTuple, Tuple, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController
from tqdm import tqdm

from clipval import environment
from clipval.errors import BackendUnavailable

TIE = 1e-12  # float64 products of equal vectors differ by less than this between kernels of one GEMM
RIVAL = 5  # margins are measured to this wrong candidate
IMAGES = 2032  # columns of a tile: a multiple of 8, of which a byte can count every eighth
CAPTIONS = 496  # rows of a product
STRIP = 248  # rows counted at once: a byte holds a column's count
PAIRS = 256  # pairs computed at once in float64: they stay in the cache
GROUP = 8
CROWDED = 32  # a float64 product costs as much as this share of its pairs one by one
NEVER = -2.0  # below every cosine, and above the -inf that stands for a positive


class Unit(NamedTuple):
    """Embeddings of one tower, prepared for comparison.

    Attributes:
        given: float [n, width] as given, or float64 of unit length if their squares would leave float64's range.
        norm: float64 [n], the lengths of `given`.
        unit: float32 [n padded with zeros to a multiple of 8, width], of unit length.
    """

    given: np.ndarray
    norm: np.ndarray
    unit: np.ndarray


class Ranks(NamedTuple):
    """One direction: int64 [n] ranks, 1 is best; float64 [n] margins, NaN with fewer than five wrong candidates."""

    ranks: np.ndarray
    margins: np.ndarray


def rounding(width: int) -> float:
    """Proven bound on |float32 score - cosine| of two rows of a width; see above."""
    error = (width + 8) * 2.0**-24
    return error / (1 - error)


def unit_rows(values: np.ndarray) -> Unit:
    """Scale rows [n, width] to unit length; a row of NaN, Inf or zeros has a non-finite or zero norm."""
    count, width = values.shape
    given = values if values.dtype in (np.float16, np.float32) else _in_range(values.astype(np.float64))
    norm = np.empty(count)
    unit = np.zeros((-(-count // GROUP) * GROUP, width), np.float32)

    def scale(start: int) -> None:
        rows = slice(start, min(start + PAIRS, count))
        wide = given[rows].astype(np.float64)
        norm[rows] = np.sqrt(np.einsum("ij,ij->i", wide, wide))
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            np.multiply(wide, (1 / norm[rows])[:, None], out=unit[rows], casting="same_kind")

    _in_threads(scale, range(0, count, PAIRS))
    return Unit(given, norm, unit)


def _in_range(wide: np.ndarray) -> np.ndarray:
    """Rows whose squares would overflow or vanish, scaled by their largest element."""
    largest = np.abs(wide).max(axis=1)
    extreme = np.isfinite(largest) & (largest > 0) & ((largest > 1e100) | (largest < 1e-100))
    wide[extreme] /= largest[extreme, None]
    return wide


def rank(vision: Unit, text: Unit, owner: np.ndarray) -> Tuple[Ranks, Ranks]:
    """Ranks of each caption's image among the images, and of each image's best caption among the captions.

    A wrong candidate that scores the same, or less by up to 1e-12, stands before the positive.

    Args:
        vision, text: n images and m captions.
        owner: int [m], index of each caption's image; every image has one.

    Returns:
        The captions' ranks [m], then the images' [n].

    Raises:
        BackendUnavailable: numpy's float32 product breaks its rounding bound.
    """
    with _one_blas_thread():
        return _Scores(vision, text, owner).rank()


class _Queries:
    """One direction while scores stream by; all arrays are per query, images padded to a multiple of 8."""

    def __init__(self, positive: np.ndarray, size: int, error: float, lock: ContextManager[object]) -> None:
        pad = (0, size - len(positive))
        self.count = len(positive)
        self.positive = np.pad(positive, pad, constant_values=np.inf)
        self.low = (self.positive - error - TIE).astype(np.float32)
        self.high = (self.positive + error).astype(np.float32)
        self.above = np.zeros(size, np.int64)
        self.best = np.full((size, RIVAL), -np.inf)  # float64 scores of the best wrong candidates
        self.best[self.count :] = np.inf
        self.error = error
        self.lock = lock

    def threshold(self, queries: slice, strip: np.ndarray) -> np.ndarray:
        """Float32 scores below these are not among a query's five best wrong candidates; `strip` [queries, candidates].

        At least five scores are no lower than the fifth best maximum over groups of candidates.
        """
        known = self.best[queries].min(axis=1) - self.error
        if np.isneginf(known).any():
            grouped = strip[:, : strip.shape[1] // GROUP * GROUP].reshape(len(strip), GROUP, -1).max(axis=1)
            if grouped.shape[1] >= RIVAL:
                known = np.maximum(known, np.partition(grouped, -RIVAL, axis=1)[:, -RIVAL] - 2 * self.error)
        floor: np.ndarray = np.maximum(known, NEVER).astype(np.float32)
        return floor

    def add(self, queries: slice, sure: np.ndarray, near: np.ndarray, exact: np.ndarray, decided: np.ndarray) -> None:
        """Add the candidates of one strip.

        Args:
            sure: int [queries], how many certainly score above the positive.
            near, exact, decided: for each pair computed in float64 the query within `queries`, its score, and whether
                it is counted in `sure`.
        """
        start = queries.start
        ahead = ~decided & (exact >= self.positive[queries][near] - TIE)
        counts = sure + np.bincount(near[ahead], minlength=len(sure))
        order = np.argsort(near, kind="stable")
        near, exact = near[order], exact[order]
        place = np.arange(len(near)) - np.searchsorted(near, near)
        with self.lock:
            self.above[queries] += counts
            if len(near):
                touched, row = np.unique(near, return_inverse=True)
                rivals = np.full((len(touched), RIVAL + 1 + place.max()), -np.inf)
                rivals[:, :RIVAL] = self.best[start + touched]
                rivals[row, RIVAL + place] = exact
                self.best[start + touched] = np.partition(rivals, -RIVAL, axis=1)[:, -RIVAL:]

    def result(self) -> Ranks:
        fifth = self.best[: self.count].min(axis=1)
        positive = self.positive[: self.count]
        margins = np.where(np.isfinite(fifth), positive - fifth, np.nan)
        return Ranks(1 + self.above[: self.count], margins)


class _Scores:
    """The product of all captions with all images, tile by tile."""

    def __init__(self, vision: Unit, text: Unit, owner: np.ndarray) -> None:
        self.vision, self.text, self.owner = vision, text, owner
        self.error = rounding(vision.unit.shape[1])
        self.buffers = threading.local()
        positive = np.empty(len(owner))

        def score(start: int) -> None:
            rows = np.arange(start, min(start + PAIRS, len(owner)))
            positive[rows] = self.exact(rows, owner[rows])

        _in_threads(score, range(0, len(owner), PAIRS))
        best = np.full(len(vision.norm), -np.inf)
        np.maximum.at(best, owner, positive)
        self.captions = _Queries(positive, len(positive), self.error, nullcontext())
        self.images = _Queries(best, len(vision.unit), self.error, threading.Lock())

    def rank(self) -> Tuple[Ranks, Ranks]:
        count = len(self.owner)
        cores = environment.usable_cores()
        blocks = min(-(-count // (CAPTIONS * cores)) * cores, count)  # the same number for every core
        edges = np.linspace(0, count, blocks + 1).astype(int)
        _in_threads(self.block, [slice(a, b) for a, b in zip(edges, edges[1:])], "ranks")
        return self.captions.result(), self.images.result()

    def block(self, rows: slice) -> None:
        """Score some captions against every image."""
        height, width = rows.stop - rows.start, min(IMAGES, len(self.vision.unit))
        buffer = np.empty((height, width), np.float32)
        for start in range(0, len(self.vision.unit), width):
            columns = slice(start, min(start + width, len(self.vision.unit)))
            scores = buffer[:, : columns.stop - start]
            np.matmul(self.text.unit[rows], self.vision.unit[columns].T, out=scores)
            self.hide(scores, rows, columns)
            for top in range(0, height, STRIP):
                part = slice(rows.start + top, min(rows.start + top + STRIP, rows.stop))
                self.strip(scores[top : top + STRIP], part, columns)

    def hide(self, scores: np.ndarray, rows: slice, columns: slice) -> None:
        """Exclude the positives and the padding from a tile; both directions have the same positives."""
        owner = self.owner[rows]
        own = np.flatnonzero((owner >= columns.start) & (owner < columns.stop))
        place = own, owner[own] - columns.start
        off = np.abs(scores[place] - self.captions.positive[rows][own])
        if len(off) and not off.max() <= self.error:
            raise BackendUnavailable(
                f"numpy's float32 product is off by {off.max():.1e}, where float32 allows {self.error:.1e}: its BLAS "
                f"computes in a reduced precision; switch that off"
            )
        scores[place] = -np.inf
        scores[:, len(self.vision.norm) - columns.start :] = -np.inf

    def strip(self, scores: np.ndarray, rows: slice, columns: slice) -> None:
        """Count in both directions what ranks above the positives; `scores` [at most STRIP, at most IMAGES]."""
        captions, images = self.captions, self.images
        floor = captions.threshold(rows, scores)[:, None]
        sure, row, column = _split(scores, captions.low[rows, None], captions.high[rows, None], floor)
        counts = np.ascontiguousarray(sure.view(np.uint64).sum(axis=1, dtype=np.uint64)).view(np.uint8)
        exact = self.decide(rows, columns, row, column)
        captions.add(rows, counts.reshape(-1, GROUP).sum(axis=1, dtype=np.int64), row, exact, sure[row, column])

        floor = images.threshold(columns, scores.T)
        sure, row, column = _split(scores, images.low[columns], images.high[columns], floor)
        exact = self.decide(rows, columns, row, column)
        images.add(columns, sure.view(np.uint8).sum(axis=0, dtype=np.uint8), column, exact, sure[row, column])

    def exact(self, captions: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Float64 cosines of pairs, given by their indices."""
        found = np.empty(len(captions))
        for start in range(0, len(captions), PAIRS):
            part = slice(start, start + PAIRS)
            one = self.text.given.take(captions[part], axis=0).astype(np.float64)
            other = self.vision.given.take(images[part], axis=0).astype(np.float64)
            found[part] = (one[:, None, :] @ other[:, :, None])[:, 0, 0]
        found /= self.text.norm[captions]
        found /= self.vision.norm[images]
        return found

    def decide(self, rows: slice, columns: slice, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Float64 cosines of pairs within a strip; if they are many (near copies), by one product."""
        row, column = row + rows.start, column + columns.start
        if len(row) * CROWDED <= (rows.stop - rows.start) * (columns.stop - columns.start):
            return self.exact(row, column)
        images = slice(columns.start, min(columns.stop, len(self.vision.norm)))
        found = self.text.given[rows].astype(np.float64) @ self.vision.given[images].astype(np.float64).T
        found /= self.text.norm[rows, None]
        found /= self.vision.norm[images]
        picked: np.ndarray = found[row - rows.start, column - columns.start]
        return picked


def _split(
    scores: np.ndarray, low: np.ndarray, high: np.ndarray, floor: np.ndarray
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which scores are certainly above (bool like `scores`); rows and columns of those that float64 must decide."""
    sure = scores > high
    open_ = scores >= low
    open_ ^= sure
    open_ |= scores >= floor
    words = np.flatnonzero(open_.view(np.uint64))  # eight at a time: nearly all are zero
    word, byte = np.nonzero(open_.reshape(-1, GROUP)[words])
    row, column = np.divmod(words[word] * GROUP + byte, scores.shape[1])
    return sure, row, column


Item = TypeVar("Item")


@lru_cache(maxsize=None)
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _one_blas_thread() -> ContextManager[object]:
    """Each core computes its own tiles, which keeps it busier than sharing each product."""
    limit: ContextManager[object] = _blas().limit(limits=1, user_api="blas")
    return limit


def _in_threads(function: Callable[[Item], object], items: Iterable[Item], describe: str = "") -> None:
    tasks = list(items)
    with ThreadPoolExecutor(environment.usable_cores()) as pool:
        done = pool.map(function, tasks)
        for _ in tqdm(done, desc=describe, total=len(tasks), disable=None if describe else True, leave=False, delay=2):
            pass
