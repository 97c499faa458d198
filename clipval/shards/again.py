"""Random samples, embedded a second time on another device and compared."""

from __future__ import annotations

import random
from typing import Any, Dict, List, NamedTuple, Sequence

import numpy as np

from clipval import parity
from clipval.errors import InputError
from clipval.shards.files import VALUES, Plan, Shard, usable
from clipval.shards.work import Task

# For two equal accelerators. The same program on the same batch is bit-identical unless its order of summation varies,
# which changes an fp16 embedding by units in the last place (2**-11 of an element each): 1 - cosine stays below
# (2**-11)**2 / 2 = 1.2e-7. A faulty device is off by far more.
COSINE = 1 - 1e-6


class Drawn(NamedTuple):
    """A sample that was embedded twice.

    Attributes:
        id: of the sample; made, again: the two devices; cosine: of both embeddings; same: bit-identical.
        exact: they must be, having been computed on the CPU with the same number of threads.
    """

    id: str
    made: str
    again: str
    cosine: float
    same: bool
    exact: bool

    @property
    def off(self) -> bool:
        """Whether the two devices disagree."""
        return not self.same and (self.exact or not self.cosine >= COSINE)


def draw(planned: Plan, shards: Sequence[Shard], count: int, seed: int) -> Dict[Task, List[int]]:
    """Batches to embed again, each with its drawn samples, by index in the plan."""
    picked = random.Random(seed).sample(range(len(planned.ids)), min(count, len(planned.ids)))
    found: Dict[Task, List[int]] = {}
    for n in sorted(picked):
        task = Task(n // planned.batch_size, shards[planned.number(n)].where)
        found.setdefault(task, []).append(n)
    return found


def compare(planned: Plan, task: Task, samples: Sequence[int], where: str, found: Any) -> List[Drawn]:
    """Compare a device's embeddings of a batch with those in the shards.

    Args:
        samples: of the batch, by index in the plan; found: the result of `clipval.shards.work.Worker.do`.
    """
    values, threads = found
    first = task.number * planned.batch_size
    number = planned.number(first)
    shard = usable(planned, number)
    if shard is None:
        raise InputError(f"{planned.place(number)}: damaged during the check; run embed again")
    stored = np.load(planned.place(number) / VALUES, mmap_mode="r")
    exact = shard.identity.on_host and shard.threads == threads
    drawn = []
    for n in samples:
        was, now = stored[n - planned.edges[number]][None], values[n - first][None]
        cosine = float(parity.compare((planned.ids[n],), was, now).cosine[0])
        drawn.append(Drawn(planned.ids[n], task.avoid, where, cosine, was.tobytes() == now.tobytes(), exact))
    return drawn


def summary(drawn: Sequence[Drawn], seed: int) -> Dict[str, object]:
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
