"""Rows of one run: what the protocol needs from the chain, for pytest and for the command line."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from clipval import environment, export, preprocess
from clipval.backends import REFERENCE, Backend, base_name, kind
from clipval.chain import Chain
from clipval.throughput import baseline
from clipval.throughput.feed import Feed
from clipval.throughput.machine import Pace, witness
from clipval.throughput.operations import flops_per_sample
from clipval.throughput.outputs import Expected
from clipval.throughput.plausible import Peaks
from clipval.throughput.protocol import Subject
from clipval.throughput.row import EXECUTE, INFERENCE, Clocks, EndToEnd
from clipval.towers import Tower

PEAKS = Peaks()  # of this machine, shared by all runs


def subject(
    chain: Chain,
    backend: Backend,
    feed: Feed,
    *,
    pace: Optional[Pace],
    known: Optional[baseline.Baseline] = None,
    checked: bool = True,
) -> Subject:
    """A backend of the chain, with PyTorch's outputs to compare with if the spec has bounds for them.

    Args:
        pace: of this machine's CPUs; known: the baseline of `--baseline`; checked: the model is the spec's.
    """
    name, tower = backend.identity.name, backend.tower
    key = baseline_key(chain, {name: str(backend.identity)}) if known else {}
    names = {scope: baseline.row_name(name, tower.name, feed.batch_size, scope) for scope in (EXECUTE, INFERENCE)}

    def expected() -> Expected:
        bounds = chain.bounds(backend.identity, tower)
        reference = chain.backend(REFERENCE, tower, 1)
        ids, of_rows = chain.prepared.rows[tower.name].ids, partial(chain.reference_rows, tower)
        return Expected(reference.run, bounds.cosine_min, bounds.max_abs, ids, of_rows)

    def standing(clocks: Clocks) -> baseline.Judgement:
        assert known is not None
        return baseline.standing(known, key, names, {scope: one.timing for scope, one in clocks.items()})

    return Subject(
        backend,
        feed,
        busy=backend.busy,
        expected=expected() if checked and chain.spec.parity else None,
        operations=operations(chain, tower) if checked else None,
        peaks=PEAKS,
        threads=chain.settings.threads if backend.identity.on_host else None,
        pace=pace if backend.identity.on_host else None,
        standing=standing if known else None,
    )


def baseline_key(chain: Chain, backends: Dict[str, str]) -> Dict[str, str]:
    """What must be equal to compare this run's throughput; `backends` is name -> identity."""
    model = f"{chain.weights.sha256} opset {chain.settings.opset_version}"
    origins = {base_name(name): kind(name).origin(chain.settings) for name in backends}
    return baseline.key_of(environment.describe(), model, chain.settings.threads, backends, origins)


def operations(chain: Chain, tower: Tower) -> float:
    """Floating-point operations per sample: of the architecture if it is a plain ViT, else of the graph."""
    return flops_per_sample(chain.model_key["config"], tower.name) or export.operations(chain.onnx(tower))


def end_to_end(chain: Chain, backend: Backend, batch_size: int) -> EndToEnd:
    """From JPEGs or captions to embeddings, by the host's clock, decoding in threads.

    Each batch has other images or captions; takes half the time of a row's timed calls, at least one batch.
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
        start = witness()
        batch()
        times.append(witness() - start)
    seconds = float(np.median(times))
    return EndToEnd(seconds, batch_size / seconds, len(times), preprocess.THREADS)
