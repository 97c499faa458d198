"""Whether a backend really computed in the timed calls, by their outputs and times.

A backend that does not compute, returns an earlier result, or returns before it is done is fast, but its figure is
meaningless.
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

ONE = 1e-6  # |difference| of one element below which two embeddings are equal: a constant output
CHECKED_ROWS = 8  # rows of a batch that are compared with the reference
# Outputs for one batch may differ between calls by less than the bound on their cosine. This is checked on a random
# direction, on which a difference of length d projects to d times a normally distributed value.
DEVIATIONS = 5.0
LOOSE = 0.999  # cosine if no bound is known
CACHED = 1.25  # a fresh batch may take this many times as long as one seen before
CHANCE = 1e-6  # probability that as many pairs are above it by chance
MOST_PAIRS = 60


class Expected(NamedTuple):
    """What outputs are compared with.

    Attributes:
        embed: a batch -> the reference's embeddings of it.
        cosine_min: smallest allowed cosine of an embedding; max_abs: largest allowed difference of one element.
        ids: of all the rows that batches are made from.
    """

    embed: Callable[[np.ndarray], np.ndarray]
    cosine_min: float
    max_abs: float
    ids: Sequence[str]


def wrong_outputs(calls: Calls, feed: Feed, expected: Optional[Expected]) -> str:
    """What is wrong with the outputs of timed calls; empty for nothing.

    Every output must be finite, have the right shape and equal other calls' output for the same batch; the last output
    of each batch, including the fresh one, must be the reference's; and the inputs must be unchanged.

    Args:
        expected: None without a reference.
    """
    if calls.misshapen:
        return f"returned {calls.misshapen} for a batch of {feed.batch_size}"
    prints = {slot: np.stack(rows) for slot, rows in calls.prints.items()}
    bad = sum(int((~np.isfinite(rows)).any(axis=1).sum()) for rows in prints.values())
    if bad:
        return f"{bad} of {len(calls.times)} timed calls returned NaN or infinity"
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
            found = f"{calls} of {len(rows)} timed calls returned other embeddings for one batch than the rest"
            return f"{found}, e.g. in row {row} of call {call + 1}"
    return ""


def _changed_inputs(feed: Feed) -> str:
    changed = feed.changed()
    return f"the input was overwritten: {changed[0]} changed during the timed calls" if changed else ""


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
            said = f"1 - cosine {1 - worst['cosine']:.1e}, at most {1 - expected.cosine_min:.1e}"
            said += f", and |difference| {worst['max_abs']:.1e}, at most {expected.max_abs:g}"
            return f"after the last timed call {worst['id']} differs from pytorch's embedding: {said}"
    return ""


def _one_for_two(calls: Calls, feed: Feed) -> str:
    if not {0, 1} <= set(calls.last) or np.array_equal(feed.batches[0][0], feed.batches[1][0]):
        return ""
    same = np.abs(calls.last[0][0] - calls.last[1][0]).max() <= ONE
    return "two different inputs have the same embedding" if same else ""


def cached_results(calls: Calls, backend: Backend, feed: Feed, clock: Clock) -> str:
    """Why results appear to be cached: repeated batches take less time than fresh ones; empty if they do not.

    Calls are made in pairs, seen and fresh in random order, so other load affects both alike: if the backend computes
    both, the fresh one is slower in at most half of the pairs. More pairs are measured only while the fresh one is
    slower in most of them.
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
