"""What a row of throughput needs of the chain: outputs against PyTorch, from file to embedding, baseline."""

from __future__ import annotations

import itertools
import time
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from clipval import baseline as baselines
from clipval import environment, preprocess
from clipval.backends import REFERENCE, Backend, Identity, base_name, kind
from clipval.chain import Chain
from clipval.machine import Pace
from clipval.parity import compare
from clipval.throughput import Feed, Judged, measure, time_calls
from clipval.towers import Tower

NEW_BATCHES = 3  # untimed batches that are tried before results are called kept
FRESH = 50.0  # a kept result is thousands of times faster; a busy host makes single calls ten times slower
# Tries of a row that lost speed. Neighbours that use the memory slow rows down by 5 to 15 % for a minute or more, which
# the machine's own products do not show: six tries of `--perf-max-time` go beyond that.
PATIENCE = 6
ONE = 1e-6  # |difference| of one element below which two embeddings are one: a constant output, by pytorch too
CHECKED_ROWS = 8  # of a timed batch that are compared with PyTorch


def check_outputs(chain: Chain, backend: Backend, feed: Feed) -> str:
    """Compare what a backend gives for two different batches with PyTorch; what is wrong, or an empty string.

    A backend that does not compute, or hands out an earlier result, is fast and worth nothing.
    """
    reference = chain.backend(REFERENCE, backend.tower, 1)
    bounds = chain.bounds(backend.identity)
    known: List[float] = []
    given: List[np.ndarray] = []
    for index, batch in zip(feed.indices[:2], feed.batches[:2]):
        spread = np.unique(np.linspace(0, len(batch) - 1, CHECKED_ROWS).round().astype(int))
        start = time.perf_counter()
        found = backend.run(batch)
        known.append(time.perf_counter() - start)
        if found.shape != (len(batch), backend.tower.width):
            return f"gave {found.shape} for a batch of {len(batch)}"
        wanted = reference.run(np.ascontiguousarray(batch[spread]))
        ids = tuple(chain.prepared.rows[backend.tower.name].ids[n] for n in index[spread])
        compared = compare(ids, wanted, found[spread])
        if not (compared.cosine.min() >= bounds.cosine_min and compared.max_abs.max() <= bounds.max_abs):
            worst = compared.worst(1)[0]
            said = f"cosine {worst['cosine']:.7f}, at least {bounds.cosine_min}"
            said += f", and |difference| {worst['max_abs']:.1e}, at most {bounds.max_abs:g}"
            return f"sample {worst['id']} is off pytorch's embedding: {said}"
        given.append(found[0])
    if np.abs(given[0] - given[1]).max() <= ONE and not np.array_equal(feed.batches[0][0], feed.batches[1][0]):
        return "two different inputs give one embedding"
    return _kept_results(chain, backend, feed, min(known))


def _kept_results(chain: Chain, backend: Backend, feed: Feed, known: float) -> str:
    """A batch that was not timed takes as long as those that were, or their results were kept.

    Args:
        known: seconds of a batch that was timed.
    """
    rows, size = chain.prepared.rows[backend.tower.name], len(feed.batches[0])
    ratios: List[float] = []
    for n in range(NEW_BATCHES):
        batch = rows[(feed.indices[-1] + 1 + n * size) % len(rows)]
        ratios += [seconds / known for seconds in time_calls(partial(backend.run, batch), 1)]
        if ratios[-1] <= FRESH:
            return ""
    return f"new inputs take {min(ratios):.1f} times as long as timed ones, allowed {FRESH}: results are kept"


def second_try(
    chain: Chain, backend: Backend, feed: Feed, batch_size: int, *, estimate: float, pace: Optional[Pace]
) -> Tuple[Judged, Optional[baselines.Judgement], Optional[float]]:
    """Measure a row again, warm, and hold it to the baseline where there is one; the machine's share of its speed.

    A loss is only believed if it is there in each of `PATIENCE` tries, and of a machine that was at its speed in one.
    Another device has no such neighbours, and one try.

    Args:
        estimate: seconds of a call; pace: of the processor that the backend computes on, None for another device.
    """
    settings = chain.settings
    again = partial(
        measure,
        backend,
        feed,
        batch_size,
        seconds=settings.perf_min_time,
        cap=settings.perf_max_time,
        estimate=estimate,
        noise=settings.perf_noise,
        whole=settings.baseline is not None,
        busy=lambda: chain.busy(backend.identity.name),
    )

    def standing(judged: Judged) -> Optional[baselines.Judgement]:
        return against_baseline(chain, backend.identity, backend.tower, batch_size, judged)

    def enough(judged: Judged, share: float) -> bool:
        earlier = standing(judged)
        return pace is None or earlier is None or earlier.status != baselines.REGRESSED

    judged, share = watched(again, pace, enough)
    earlier = standing(judged)
    return judged, earlier and baselines.on_slow_machine(earlier, share), share if pace else None


def watched(
    again: Callable[..., Judged], pace: Optional[Pace], enough: Callable[[Judged, float], bool]
) -> Tuple[Judged, float]:
    """Measure until it is enough, `PATIENCE` times at most: the last rows, and the machine's share of its speed.

    The share is the lower one of two looks in a row at the machine's speed, where it was highest: between those two it
    was that fast all the time, which one look alone does not say.

    Args:
        again: measures once, and looks by `between` from time to time; pace: None for a device that is not the
            processor. enough: of rows and share.
    """
    look = pace.now if pace else lambda: 1.0
    best = 0.0
    for _ in range(PATIENCE):
        shares = [look()]
        judged = again(between=lambda seen=shares: seen.append(look()))
        shares.append(look())
        share = max(map(min, shares, shares[1:]))
        best = max(best, share)
        if enough(judged, share):
            break
    return judged, best


def end_to_end(chain: Chain, backend: Backend, batch_size: int) -> Dict[str, float]:
    """From JPEGs or captions to embeddings, by the host's clock, decoding in threads.

    Other images or captions in each batch, for half the time that a row's timed calls have, at least one batch:
    median seconds of a batch, how many there were, and the threads that decoded.
    """
    name, data = backend.tower.name, chain.dataset
    items: Sequence[Any] = data.image_paths if name == "vision" else data.captions
    turn = itertools.count()

    def batch() -> None:
        start = next(turn) * batch_size
        picked = [items[(start + n) % len(items)] for n in range(batch_size)]
        if name == "vision":
            rows = np.stack(preprocess.each_in_threads(lambda path: preprocess.pixels(path, chain.model), picked))
        else:
            rows = preprocess.tokens(picked, chain.model, backend.tower)
        backend.run(rows)

    times: List[float] = []
    while not times or sum(times) + times[-1] <= chain.settings.perf_min_time / 2:
        times += time_calls(batch, 1)
    seconds = float(np.median(times))
    per_second = batch_size / seconds
    return {"seconds": seconds, "samples_per_second": per_second, "rounds": len(times), "threads": preprocess.THREADS}


def against_baseline(
    chain: Chain, where: Identity, tower: Tower, batch_size: int, judged: Judged
) -> Optional[baselines.Judgement]:
    """A row's standing against `--baseline`; None where none was given.

    Args:
        judged: scope -> (Throughput, verdict, reason); the device's own clock decides where there is one.
    """
    if chain.settings.baseline is None:
        return None
    scope = "execute" if "execute" in judged else "inference"
    known = baselines.load(chain.settings.baseline)
    names = {one: baselines.row_name(where.name, tower.name, batch_size, one) for one in ("execute", "inference")}
    lost = [name for one, name in names.items() if name in known.rows and one not in judged]
    if lost:
        return baselines.Judgement(baselines.NO_BASELINE, None, None, f"{lost[0]} of the baseline is measured no more")
    key = baseline_key(chain, {where.name: str(where)})
    return baselines.judge(known, key, names[scope], judged[scope][0].undisturbed)


def baseline_key(chain: Chain, backends: Dict[str, str]) -> Dict[str, str]:
    """What must be equal for this run's throughput to be compared; `backends` is name -> identity."""
    model = f"{chain.weights.sha256} opset {chain.settings.opset_version}"
    origins = {base_name(name): kind(name).origin(chain.settings) for name in backends}
    return baselines.key_of(environment.describe(), model, chain.settings.threads, backends, origins)
