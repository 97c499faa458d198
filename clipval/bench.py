"""What a row of throughput needs of the chain: outputs against PyTorch, from file to embedding, baseline."""

from __future__ import annotations

import itertools
import time
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from clipval import baseline as baselines
from clipval import environment, preprocess
from clipval.backends import REFERENCE, Backend, Identity
from clipval.chain import Chain
from clipval.machine import SETTLED, Pace
from clipval.parity import compare
from clipval.throughput import Feed, measure, time_calls
from clipval.towers import Tower

NEW_BATCHES = 3  # untimed batches that are tried before results are called kept
FRESH = 50.0  # a kept result is thousands of times faster; a busy host makes single calls ten times slower
PATIENCE = 3  # tries of a row on a slow machine
CHECKED_ROWS = 8  # of a timed batch that are compared with PyTorch

Judged = Dict[str, Any]


def check_outputs(chain: Chain, backend: Backend, feed: Feed) -> str:
    """Compare what a backend gives for two different batches with PyTorch; what is wrong, or an empty string.

    A backend that does not compute, or hands out an earlier result, is fast and worth nothing.
    """
    reference = chain.backend(REFERENCE, backend.tower, 1)
    bounds = chain.bounds(backend.identity)
    known: List[float] = []
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
            return f"cosine {worst['cosine']:.6f} with pytorch for sample {worst['id']}, expected {bounds.cosine_min}"
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
) -> Tuple[Judged, Optional[baselines.Judgement]]:
    """Measure a row again, warm, and hold it to the baseline where there is one.

    A loss is only believed of a machine that was at its speed while it was measured.

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

    def no_loss(judged: Judged) -> bool:
        earlier = standing(judged)
        return earlier is None or earlier.status != baselines.REGRESSED

    judged, share = settled(again, pace, no_loss)
    earlier = standing(judged)
    return judged, earlier and baselines.on_slow_machine(earlier, share)


def settled(
    again: Callable[..., Judged], pace: Optional[Pace], enough: Callable[[Judged], bool] = lambda judged: False
) -> Tuple[Judged, float]:
    """Measure until the machine was at its speed meanwhile, `PATIENCE` times at most: the last rows, and the share.

    The share is the lower one of two looks in a row at the machine's speed, where it was highest: between those two it
    was that fast all the time, which one look alone does not say.

    Args:
        again: measures once, and looks by `between` from time to time; pace: None for a device that is not the
            processor. enough: rows that are good whatever the machine did.
    """
    look = pace.now if pace else lambda: 1.0
    for _ in range(PATIENCE):
        shares = [look()]
        judged = again(between=lambda seen=shares: seen.append(look()))
        shares.append(look())
        share = max(map(min, shares, shares[1:]))
        if share >= SETTLED or enough(judged):
            break
    return judged, share


def end_to_end(chain: Chain, backend: Backend, batch_size: int) -> Dict[str, float]:
    """From JPEGs or captions to embeddings, by the host's clock, decoding in threads.

    Other images or captions in each batch, for half the time that a row's timed calls have, at least one batch:
    median seconds of a batch, and how many there were.
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
    return {"seconds": seconds, "samples_per_second": batch_size / seconds, "rounds": len(times)}


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
    name = baselines.row_name(where.name, tower.name, batch_size, scope)
    key = baseline_key(chain, {where.name: str(where)})
    return baselines.judge(baselines.load(chain.settings.baseline), key, name, judged[scope][0].undisturbed)


def baseline_key(chain: Chain, backends: Dict[str, str]) -> Dict[str, str]:
    """What must be equal for this run's throughput to be compared; `backends` is name -> identity."""
    model = f"{chain.weights.sha256} opset {chain.settings.opset_version}"
    return baselines.key_of(environment.describe(), model, chain.settings.threads, backends)
