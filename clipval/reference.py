"""The reference's embeddings of a whole data set: in shards that survive a kill, on the CPU or compared with it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Callable, Dict, List

from tqdm import tqdm

from clipval import parity
from clipval.arrays import Source
from clipval.backends import Backend
from clipval.embeddings import Embeddings, embed
from clipval.errors import BackendUnavailable
from clipval.shards import files
from clipval.spec import ParityBounds
from clipval.towers import Tower

BATCH = 32  # fewer calls: torch's threads synchronise at every operator, which is slow on a busy host
SHARD = 4 * BATCH  # most samples that are recomputed after a kill
DRAWN = 32  # samples that a GPU's embeddings are compared on


def make(folder: Path, key: Dict[str, Any], rows: Source, open_backend: Callable[[], Backend]) -> None:
    """Embed every row into shards, except those that a killed run completed.

    Args:
        folder: of the shards; key: everything the embeddings depend on; open_backend: called if a shard is missing.
    """
    planned = files.plan(folder, rows, BATCH, -(-len(rows) // SHARD), key)
    left = files.prepare(planned)
    for number in tqdm(left, desc=f"reference {rows.tower.name}, shards", disable=None, leave=False):
        backend = open_backend()
        files.make(planned, number, backend, rows, backend.identity.device)
    files.publish_index(planned, files.complete(planned), {})


def hold_to_cpu(on_gpu: Embeddings, rows: Source, cpu: Backend, bounds: ParityBounds, seed: int) -> None:
    """Compare a GPU's embeddings of all rows with the CPU's on a drawn sample; see `hold`."""
    picked = drawn(len(rows), seed)
    ids = tuple(rows.ids[n] for n in picked)
    wanted = embed(cpu, ids, rows[picked], BATCH)
    hold(rows.tower, Embeddings(ids, on_gpu.values[picked]), wanted, bounds, seed)


def drawn(count: int, seed: int) -> List[int]:
    """Indices of the samples on which a GPU's embeddings are compared with the CPU's."""
    return sorted(random.Random(seed).sample(range(count), min(DRAWN, count)))


def hold(tower: Tower, on_gpu: Embeddings, on_cpu: Embeddings, bounds: ParityBounds, seed: int) -> None:
    """Compare a GPU's embeddings with the CPU's of the same samples, both in fp32.

    Args:
        bounds: for two fp32 backends; only the order of operations may differ.

    Raises:
        BackendUnavailable: they differ by more.
    """
    found = parity.compare(on_cpu.ids, on_cpu.values, on_gpu.values)
    cosine, largest = found.cosine.min(), found.max_abs.max()
    if not (cosine >= bounds.cosine_min and largest <= bounds.max_abs):
        raise BackendUnavailable(
            f"--reference-device cuda, {tower.name} tower: the GPU's embeddings differ from the CPU's, minimum cosine "
            f"1 - {1 - cosine:.2g}, expected >= 1 - {1 - bounds.cosine_min:.2g}, one element by {largest:.2g}, "
            f"expected <= {bounds.max_abs:g} (of {len(on_cpu.ids)} samples drawn by --probe-seed {seed} the worst is "
            f"{found.worst(1)[0]['id']}); it does not compute in full fp32; use the CPU for the reference"
        )
