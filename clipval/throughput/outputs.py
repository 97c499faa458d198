"""Whether a backend computed what it was timed for: the outputs of the timed calls, and what they took.

A backend that does not compute, hands out an earlier result or returns before it is done is fast, and its figure means
nothing.
"""

from __future__ import annotations

import math
from typing import Callable, Dict, NamedTuple, Optional, Sequence

import numpy as np

from clipval import arrays
from clipval.backends import Backend
from clipval.parity import compare
from clipval.throughput.calls import Calls
from clipval.throughput.feed import FRESH, Feed
from clipval.throughput.machine import Clock

ONE = 1e-6  # |difference| of one element below which two embeddings are one: a constant output, by the reference too
CHECKED_ROWS = 8  # of a batch that are compared with the reference
# Outputs for one batch may differ from call to call by less than the bound on their cosine allows. That is seen on a
# random direction, where a difference of length d is one of d times a normal value.
DEVIATIONS = 5.0
LOOSE = 0.999  # cosine where no bound is known
CACHED = 1.25  # a fresh batch may take so many times as long as one seen before
CHANCE = 1e-6  # that so many of the pairs are beyond it by chance
MOST_PAIRS = 60


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


def wrong_outputs(calls: Calls, feed: Feed, expected: Optional[Expected]) -> str:
    """What is wrong with the outputs of timed calls, empty for nothing.

    Every output is finite, of its shape, and what other calls gave for the same batch; the last one for each batch is
    the reference's, the fresh batch included; and the inputs are what they were.

    Args:
        expected: None where no reference is at hand.
    """
    if calls.misshapen:
        return f"gave {calls.misshapen} for a batch of {feed.batch_size}"
    prints = {slot: np.stack(rows) for slot, rows in calls.prints.items()}
    bad = sum(int((~np.isfinite(rows)).any(axis=1).sum()) for rows in prints.values())
    if bad:
        return f"{bad} of {len(calls.times)} timed calls gave NaN or infinity"
    return (
        _unlike_others(prints, expected.cosine_min if expected else LOOSE)
        or _changed_inputs(feed)
        or (_off_reference(calls, feed, expected) if expected else "")
        or _one_for_two(calls, feed)
    )


def _unlike_others(prints: Dict[int, np.ndarray], cosine_min: float) -> str:
    allowed = DEVIATIONS * math.sqrt(2 * (1 - cosine_min))
    for slot, rows in prints.items():
        if slot == FRESH:
            continue
        off = np.abs(rows - np.median(rows, axis=0)) > allowed
        if off.any():
            call, row = np.argwhere(off)[0]
            calls = int(off.any(axis=1).sum())
            found = f"{calls} of {len(rows)} timed calls gave other embeddings for one batch than the rest"
            return f"{found}, as in row {row} of call {call + 1}"
    return ""


def _changed_inputs(feed: Feed) -> str:
    changed = feed.changed()
    return f"the input was overwritten: {changed[0]} is not what it was before the timed calls" if changed else ""


def _off_reference(calls: Calls, feed: Feed, expected: Expected) -> str:
    spread = arrays.spread(feed.batch_size, CHECKED_ROWS)
    for slot, found in sorted(calls.last.items()):
        batch = feed.fresh if slot == FRESH else feed.batches[slot]
        names = [f"row {n} of a fresh batch" for n in spread]
        if slot != FRESH:
            names = [f"sample {expected.ids[n]}" for n in feed.indices[slot][spread]]
        wanted = expected.embed(np.ascontiguousarray(batch[spread]))
        compared = compare(tuple(names), wanted, found[spread])
        if not (compared.cosine.min() >= expected.cosine_min and compared.max_abs.max() <= expected.max_abs):
            worst = compared.worst(1)[0]
            said = f"cosine {worst['cosine']:.7f}, at least {expected.cosine_min}"
            said += f", and |difference| {worst['max_abs']:.1e}, at most {expected.max_abs:g}"
            return f"after the last timed call {worst['id']} is off pytorch's embedding: {said}"
    return ""


def _one_for_two(calls: Calls, feed: Feed) -> str:
    if not {0, 1} <= set(calls.last) or np.array_equal(feed.batches[0][0], feed.batches[1][0]):
        return ""
    same = np.abs(calls.last[0][0] - calls.last[1][0]).max() <= ONE
    return "two different inputs give one embedding" if same else ""


def cached_results(calls: Calls, backend: Backend, feed: Feed, clock: Clock) -> str:
    """Whether batches that came before take less time than fresh ones, empty where they do not.

    Calls were made in pairs, seen and fresh in an order drawn by chance, so other load falls on either alike: where the
    backend computes both, the fresh one is the slower in half of the pairs at most. More pairs are made only while the
    fresh one is slower in most of them.
    """
    from scipy.stats import binom

    pairs = calls.pairs()
    while True:
        ratios = pairs[:, 1] / pairs[:, 0]
        slower, count = int((ratios > CACHED).sum()), len(ratios)
        if count and 2 * slower <= count:
            return ""
        if count and binom.sf(slower - 1, count, 0.5) < CHANCE:
            return (
                f"a fresh batch took {np.median(ratios):.3g}x one seen before (limit {CACHED}x, in {slower} of {count} "
                f"pairs): the backend appears to cache results"
            )
        if count >= MOST_PAIRS:
            return ""
        more = Calls(backend, feed, clock)
        more()
        more()
        pairs = np.concatenate([pairs, more.pairs()])
