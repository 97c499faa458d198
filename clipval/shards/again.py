"""Samples drawn at random, embedded a second time on another device than the one that made them, and compared."""

from __future__ import annotations

import random
from typing import Any, Dict, List, NamedTuple, Sequence

import numpy as np

from clipval import parity
from clipval.errors import InputError
from clipval.shards.files import VALUES, Plan, Shard, usable
from clipval.shards.work import Task

# Of two equal devices off the processor. The same program on the same batch gives the same bits unless it adds in an
# order that is not fixed, which moves an fp16 embedding by units in the last place (2**-11 of an element each):
# 1 - cosine stays below (2**-11)**2 / 2 = 1.2e-7. A device that computes wrong is off by far more than this.
COSINE = 1 - 1e-6


class Drawn(NamedTuple):
    """A sample that was embedded twice.

    Attributes:
        id: of the sample; made, again: the two devices; cosine: of both embeddings; same: to the bit.
        exact: it must be, as it was computed on the processor with as many threads.
    """

    id: str
    made: str
    again: str
    cosine: float
    same: bool
    exact: bool

    @property
    def off(self) -> bool:
        """The two devices disagree."""
        return not self.same and (self.exact or not self.cosine >= COSINE)


def draw(planned: Plan, shards: Sequence[Shard], count: int, seed: int) -> Dict[Task, List[int]]:
    """Batches to embed again, each with the drawn samples in it, by their index in the plan."""
    picked = random.Random(seed).sample(range(len(planned.ids)), min(count, len(planned.ids)))
    found: Dict[Task, List[int]] = {}
    for n in sorted(picked):
        shard = int(np.searchsorted(planned.edges, n, side="right")) - 1
        task = Task(n // planned.batch_size, shards[shard].where)
        found.setdefault(task, []).append(n)
    return found


def compare(planned: Plan, task: Task, samples: Sequence[int], where: str, found: Any) -> List[Drawn]:
    """Hold what a device gave for a batch to what is in the shards.

    Args:
        samples: of the batch, by their index in the plan; found: as `clipval.shards.work.Worker.do` gave it.
    """
    values, threads = found
    first = task.number * planned.batch_size
    number = int(np.searchsorted(planned.edges, first, side="right")) - 1
    shard = usable(planned, number)
    if shard is None:
        raise InputError(f"{planned.place(number)}: was damaged while it was checked; run embed again")
    stored = np.load(planned.place(number) / VALUES, mmap_mode="r")
    exact = shard.identity.on_host and shard.threads == threads
    drawn = []
    for n in samples:
        was, now = stored[n - planned.edges[number]][None], values[n - first][None]
        cosine = float(parity.compare((planned.ids[n],), was, now).cosine[0])
        drawn.append(Drawn(planned.ids[n], task.avoid, where, cosine, was.tobytes() == now.tobytes(), exact))
    return drawn


def summary(drawn: Sequence[Drawn], seed: int) -> Dict[str, Any]:
    """For `shards.json`."""
    worst = min((one.cosine for one in drawn), default=None)
    elsewhere = sum(one.made != one.again for one in drawn)
    same = sum(one.same for one in drawn)
    return {
        "samples": len(drawn),
        "on_another_device": elsewhere,
        "equal_to_the_bit": same,
        "min_cosine": worst,
        "seed": seed,
    }
