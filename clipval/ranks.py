"""Exact ranks and margins both ways from one float32 product, in blocks, on every core.

A float32 dot product of width n, summed in any order, fused or not, is off by at most gamma(n) * |x| * |y|, where
gamma(n) = n * u / (1 - n * u) and u = 2**-24 (Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition,
section 3.1). Rounding both unit rows to float32 adds two u; `rounding` takes gamma(n + 8), which also covers the
thresholds' own rounding and underflow. So a float32 score is decisive unless it is within that bound of what it is
compared with; only those few pairs are computed in float64, where ties are detected. Of the wrong candidates that a
margin needs only the fifth best is: the four before it are so by their float32 scores unless they are as near to it.

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
CAPTIONS = 248  # rows of a tile: a byte holds a column's count
PAIRS = 256  # pairs computed at once in float64: they stay in the cache
GROUP = 8
CROWDED = 32  # a float64 product costs as much as this share of its pairs one by one
DECIDED = -1  # stands for a candidate whose score is a float64 one
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


class _Pairs(NamedTuple):
    """Some pairs of a tile, in one direction, [pairs] each: the query within it, the candidate, the float32 score."""

    query: np.ndarray
    candidate: np.ndarray
    score: np.ndarray


Exact = Callable[[np.ndarray, np.ndarray], np.ndarray]  # float64 cosines of queries and candidates


class _Queries:
    """One direction while scores stream by; all arrays are per query, images padded to a multiple of 8."""

    def __init__(
        self, positive: np.ndarray, size: int, error: float, exact: Exact, lock: ContextManager[object]
    ) -> None:
        pad = (0, size - len(positive))
        self.count = len(positive)
        self.positive = np.pad(positive, pad, constant_values=np.inf)
        self.low = (self.positive - error - TIE).astype(np.float32)
        self.high = (self.positive + error).astype(np.float32)
        self.above = np.zeros(size, np.int64)
        self.best = np.full((size, RIVAL), -np.inf)  # scores of the best wrong candidates
        self.best[self.count :] = np.inf
        self.pending = np.full((size, RIVAL), DECIDED)  # whose scores these are, while they are float32 ones
        self.error = error
        self.exact = exact
        self.lock = lock

    def threshold(self, queries: slice, scores: np.ndarray) -> np.ndarray:
        """Float32 `scores` [queries, candidates] below these are not among a query's five best wrong candidates.

        At least five scores are no lower than the fifth best maximum over groups of candidates.
        """
        known = self.best[queries].min(axis=1)
        if np.isneginf(known).any():
            grouped = scores[:, : scores.shape[1] // GROUP * GROUP].reshape(len(scores), GROUP, -1).max(axis=1)
            if grouped.shape[1] >= RIVAL:
                known = np.maximum(known, np.partition(grouped, -RIVAL, axis=1)[:, -RIVAL])
        floor: np.ndarray = np.maximum(known - 2 * self.error, NEVER).astype(np.float32)
        return floor

    def add(self, queries: slice, sure: np.ndarray, pairs: _Pairs, floor: np.ndarray) -> None:
        """Add the candidates of one tile.

        Args:
            sure: int [queries], how many certainly score above the positive.
            pairs: those that float32 leaves open, and those that may be among the five best wrong ones.
            floor: of `threshold`.
        """
        at = queries.start + pairs.query
        close = (pairs.score >= self.low[at]) & (pairs.score <= self.high[at])
        ahead = self.exact(at[close], pairs.candidate[close]) >= self.positive[at[close]] - TIE
        counts = sure + np.bincount(pairs.query[close][ahead], minlength=len(sure))
        rivals = _Pairs(*(one[pairs.score >= floor[pairs.query]] for one in pairs))
        with self.lock:
            self.above[queries] += counts
            if len(rivals.query):
                self.keep(queries.start, rivals)

    def keep(self, start: int, pairs: _Pairs) -> None:
        """Keep the five best wrong candidates of each query; float64 decides where float32 scores are too near."""
        order = np.argsort(pairs.query, kind="stable")
        near = pairs.query[order]
        touched, row = np.unique(near, return_inverse=True)
        place = RIVAL + np.arange(len(near)) - np.searchsorted(near, near)
        shape = (len(touched), 1 + place.max())
        rivals, pending = np.full(shape, -np.inf), np.full(shape, DECIDED)
        rivals[:, :RIVAL], pending[:, :RIVAL] = self.best[start + touched], self.pending[start + touched]
        rivals[row, place], pending[row, place] = pairs.score[order], pairs.candidate[order]
        fifth = np.partition(rivals, -RIVAL, axis=1)[:, -RIVAL]
        crowded = ((rivals >= (fifth - 2 * self.error)[:, None]).sum(axis=1) > RIVAL) & np.isfinite(fifth)
        self.settle(start + touched, rivals, pending, np.where(crowded, fifth, np.nan))
        best = np.argpartition(rivals, -RIVAL, axis=1)[:, -RIVAL:]
        self.best[start + touched] = np.take_along_axis(rivals, best, axis=1)
        self.pending[start + touched] = np.take_along_axis(pending, best, axis=1)

    def settle(self, queries: np.ndarray, rivals: np.ndarray, pending: np.ndarray, fifth: np.ndarray) -> None:
        """Compute the scores that may be the fifth best in float64; none where `fifth` is NaN."""
        near = (np.abs(rivals - fifth[:, None]) <= 2 * self.error) & (pending != DECIDED)
        row, place = np.nonzero(near)
        rivals[row, place] = self.exact(queries[row], pending[row, place])
        pending[row, place] = DECIDED

    def result(self) -> Ranks:
        margins = np.empty(self.count)

        def margin(start: int) -> None:
            queries = np.arange(start, min(start + PAIRS, self.count))
            best = self.best[queries]
            fifth = best.min(axis=1)
            fifth[np.isneginf(fifth)] = np.nan
            self.settle(queries, best, self.pending[queries], fifth)
            margins[queries] = np.where(np.isnan(fifth), fifth, self.positive[queries] - best.min(axis=1))

        _in_threads(margin, range(0, self.count, PAIRS))
        return Ranks(1 + self.above[: self.count], margins)


class _Scores:
    """The product of all captions with all images, tile by tile."""

    def __init__(self, vision: Unit, text: Unit, owner: np.ndarray) -> None:
        self.vision, self.text, self.owner = vision, text, owner
        self.error = rounding(vision.unit.shape[1])
        positive = np.empty(len(owner))

        def score(start: int) -> None:
            rows = np.arange(start, min(start + PAIRS, len(owner)))
            positive[rows] = self.exact(rows, owner[rows])

        _in_threads(score, range(0, len(owner), PAIRS))
        best = np.full(len(vision.norm), -np.inf)
        np.maximum.at(best, owner, positive)
        self.captions = _Queries(positive, len(positive), self.error, self.exact, nullcontext())
        self.images = _Queries(
            best, len(vision.unit), self.error, lambda rows, columns: self.exact(columns, rows), threading.Lock()
        )

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
            self.count(scores, rows, columns)

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

    def count(self, scores: np.ndarray, rows: slice, columns: slice) -> None:
        """Count in both directions what ranks above the positives; `scores` [at most CAPTIONS, at most IMAGES]."""
        captions, images = self.captions, self.images
        floor = captions.threshold(rows, scores)
        sure, row, column = _split(scores, captions.low[rows, None], captions.high[rows, None], floor[:, None])
        counts = np.ascontiguousarray(sure.view(np.uint64).sum(axis=1, dtype=np.uint64)).view(np.uint8)
        pairs = _Pairs(row, column + columns.start, scores[row, column])
        captions.add(rows, counts.reshape(-1, GROUP).sum(axis=1, dtype=np.int64), pairs, floor)

        floor = images.threshold(columns, scores.T)
        sure, row, column = _split(scores, images.low[columns], images.high[columns], floor)
        pairs = _Pairs(column, row + rows.start, scores[row, column])
        images.add(columns, sure.view(np.uint8).sum(axis=0, dtype=np.uint8), pairs, floor)

    def exact(self, captions: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Float64 cosines of pairs, given by their indices; if they are many (near copies), by one product."""
        if len(captions) > PAIRS and len(captions) * CROWDED > (np.ptp(captions) + 1) * (np.ptp(images) + 1):
            first, other = captions.min(), images.min()
            one = self.text.given[first : captions.max() + 1].astype(np.float64)
            product = one @ self.vision.given[other : images.max() + 1].astype(np.float64).T
            found: np.ndarray = product[captions - first, images - other]
        else:
            found = np.empty(len(captions))
            for start in range(0, len(captions), PAIRS):
                part = slice(start, start + PAIRS)
                one = self.text.given.take(captions[part], axis=0).astype(np.float64)
                other = self.vision.given.take(images[part], axis=0).astype(np.float64)
                found[part] = (one[:, None, :] @ other[:, :, None])[:, 0, 0]
        found /= self.text.norm[captions]
        found /= self.vision.norm[images]
        return found


def _split(
    scores: np.ndarray, low: np.ndarray, high: np.ndarray, floor: np.ndarray
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which scores are certainly above (bool like `scores`); rows and columns of those that must be looked at."""
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
