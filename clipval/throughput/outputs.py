"""Whether a backend computed what it was timed for: its outputs against the reference's."""

from __future__ import annotations

import time
from typing import Callable, List, NamedTuple, Sequence

import numpy as np

from clipval import arrays
from clipval.backends import Backend
from clipval.parity import compare
from clipval.throughput.feed import Feed

NEW_BATCHES = 3  # untimed batches that are tried before results are called cached
FRESH = 50.0  # a cached result is thousands of times faster; a busy host makes single calls ten times slower
ONE = 1e-6  # |difference| of one element below which two embeddings are one: a constant output, by pytorch too
CHECKED_ROWS = 8  # of a timed batch that are compared with the reference


class Expected(NamedTuple):
    """What outputs are held to.

    Attributes:
        embed: a batch -> the reference's embeddings of it.
        cosine_min: least cosine of an embedding; max_abs: largest difference of one element.
        ids: of all the rows that batches are made of.
    """

    embed: Callable[[np.ndarray], np.ndarray]
    cosine_min: float
    max_abs: float
    ids: Sequence[str]


def check_outputs(backend: Backend, feed: Feed, expected: Expected) -> str:
    """Compare what a backend gives for two different batches with the reference; what is wrong, or an empty string.

    A backend that does not compute, or hands out an earlier result, is fast and worth nothing.
    """
    known: List[float] = []
    given: List[np.ndarray] = []
    for index, batch in zip(feed.indices[:2], feed.batches[:2]):
        spread = arrays.spread(len(batch), CHECKED_ROWS)
        start = time.perf_counter()
        found = backend.run(batch)
        known.append(time.perf_counter() - start)
        if found.shape != (len(batch), backend.tower.width):
            return f"gave {found.shape} for a batch of {len(batch)}"
        wanted = expected.embed(np.ascontiguousarray(batch[spread]))
        compared = compare(tuple(expected.ids[n] for n in index[spread]), wanted, found[spread])
        if not (compared.cosine.min() >= expected.cosine_min and compared.max_abs.max() <= expected.max_abs):
            worst = compared.worst(1)[0]
            said = f"cosine {worst['cosine']:.7f}, at least {expected.cosine_min}"
            said += f", and |difference| {worst['max_abs']:.1e}, at most {expected.max_abs:g}"
            return f"sample {worst['id']} is off pytorch's embedding: {said}"
        given.append(found[0])
    if np.abs(given[0] - given[1]).max() <= ONE and not np.array_equal(feed.batches[0][0], feed.batches[1][0]):
        return "two different inputs give one embedding"
    return _cached_results(backend, feed, min(known))


def _cached_results(backend: Backend, feed: Feed, known: float) -> str:
    """A batch that was not timed takes as long as those that were, or their results were cached.

    Args:
        known: seconds of a batch that was timed.
    """
    ratios: List[float] = []
    for n in range(NEW_BATCHES):
        batch = feed.unseen(n)
        start = time.perf_counter()
        backend.run(batch)
        ratios.append((time.perf_counter() - start) / known)
        if ratios[-1] <= FRESH:
            return ""
    return (
        f"an unseen batch took {min(ratios):.1f}x a timed one (limit {FRESH:g}x): the backend appears to cache results"
    )
