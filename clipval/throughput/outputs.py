"""Whether a backend really computed in the timed calls, by their outputs and times.

A backend that does not compute, returns an earlier result, or returns before it is done is fast, but its figure is
meaningless.
"""

from __future__ import annotations

import math
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from clipval.backends import Backend
from clipval.parity import compare
from clipval.throughput.calls import Calls
from clipval.throughput.feed import FRESH, Feed
from clipval.throughput.machine import Clock

ONE = 1e-6  # |difference| of one element below which two embeddings are equal: a constant output
CHECKED_ROWS = 8  # rows of a fresh batch that are compared with the reference
# Outputs for one batch may differ between calls by less than the bound on their cosine. This is checked on a random
# direction, on which a difference of length d projects to d times a normally distributed value.
DEVIATIONS = 5.0
LOOSE = 0.999  # cosine if no bound is known
CACHED = 1.25  # a fresh batch may take this many times as long as one seen before
SOMETIMES = 0.25  # share of pairs above it from which more pairs are measured
# Pairs of which the share counts. Of fewer two are enough: half the results cached are 3 of 15 pairs in 1 of 60 runs.
ENOUGH = 40
CHANCE = 1e-6  # probability that so many more pairs are above it than below its inverse by chance
MOST_PAIRS = 120


class Expected(NamedTuple):
    """What outputs are compared with.

    Attributes:
        embed: a batch -> the reference's embeddings of it.
        cosine_min: smallest allowed cosine of an embedding; max_abs: largest allowed difference of one element.
        ids: of all the rows that batches are made from.
        of_rows: indices of these rows -> the reference's embeddings of them; None to compute them each time.
    """

    embed: Callable[[np.ndarray], np.ndarray]
    cosine_min: float
    max_abs: float
    ids: Sequence[str]
    of_rows: Optional[Callable[[np.ndarray], np.ndarray]] = None


def wrong_outputs(calls: Calls, backend: Backend, feed: Feed, expected: Optional[Expected]) -> str:
    """What is wrong with the outputs of timed calls; empty for nothing.

    Every output must be finite, have the right shape and equal other calls' output for the same batch; the last output
    of each batch, including the fresh one, must be the reference's; and the inputs must be unchanged. Each fresh batch
    came only once, so it is run again, untimed.

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
        or _unlike_again(prints, backend, feed, calls, expected.cosine_min if expected else LOOSE)
    )


def _allowed(cosine_min: float) -> float:
    """How far two outputs for one batch may be apart on a random direction."""
    return DEVIATIONS * math.sqrt(2 * (1 - cosine_min))


def _unlike_others(prints: Dict[int, np.ndarray], cosine_min: float) -> str:
    allowed = _allowed(cosine_min)
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


def _unlike_again(prints: Dict[int, np.ndarray], backend: Backend, feed: Feed, calls: Calls, cosine_min: float) -> str:
    rows = prints.get(FRESH, np.empty((0, feed.batch_size)))
    again: List[np.ndarray] = [calls.print_of(backend.run(batch)) for batch in feed.again(len(rows))]
    off = ~(np.abs(rows - np.reshape(again[::-1], rows.shape)) <= _allowed(cosine_min))
    if not off.any():
        return ""
    call, row = np.argwhere(off)[0]
    return (
        f"{int(off.any(axis=1).sum())} of {len(rows)} timed calls with a batch that never came before gave other "
        f"embeddings than when it was given again, as in row {row} of call {call + 1}"
    )


def _changed_inputs(feed: Feed) -> str:
    changed = feed.changed()
    return f"the input was overwritten: {changed[0]} changed during the timed calls" if changed else ""


def _off_reference(calls: Calls, feed: Feed, expected: Expected) -> str:
    some = np.sort(np.random.default_rng().permutation(feed.batch_size)[:CHECKED_ROWS])
    for slot, found in sorted(calls.last.items()):
        if slot == FRESH:
            names, found = [f"row {n} of a fresh batch" for n in some], found[some]
            wanted = expected.embed(np.ascontiguousarray(feed.fresh[some]))
        else:
            index = feed.indices[slot]
            names = [f"sample {expected.ids[int(n)]}" for n in index]
            wanted = expected.of_rows(index) if expected.of_rows else expected.embed(feed.batches[slot])
        compared = compare(tuple(names), wanted, found)
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
    both, the fresh one is as often much slower as much faster. Results that are only sometimes cached show too. More
    pairs are measured only while the fresh one is often slower.
    """
    from scipy.stats import binom

    pairs = calls.pairs()
    while True:
        ratios = pairs[:, 1] / pairs[:, 0]
        slower, faster, count = int((ratios > CACHED).sum()), int((ratios < 1 / CACHED).sum()), len(ratios)
        few = SOMETIMES * count if count >= ENOUGH else min(SOMETIMES * count, 1)
        if count and slower <= max(few, 2 * faster):
            return ""
        if count and binom.sf(slower - 1, slower + faster, 0.5) < CHANCE:
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
