"""What one device does: open a backend, then make shards, or embed a batch again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, NamedTuple, Tuple

import numpy as np

from clipval import embeddings
from clipval.arrays import Source
from clipval.backends import Backend
from clipval.shards import files
from clipval.shards.files import Plan


class Device(NamedTuple):
    """Where a backend is opened.

    Attributes:
        number: of the device as the backend counts them; inside a worker of Ray always 0.
        where: which device of which host, in words.
        cores: of the processor that the worker keeps to; empty for all.
    """

    number: int
    where: str
    cores: Tuple[int, ...] = ()


class Task(NamedTuple):
    """One shard to make, or one batch to embed again.

    Attributes:
        number: of the shard, or of the batch within the plan.
        avoid: for a batch: the device that made it, which is not to embed it again if there is another; empty for a
            shard.
    """

    number: int
    avoid: str = ""

    def __str__(self) -> str:
        return f"batch {self.number}, embedded again" if self.avoid else f"shard {self.number}"


@dataclass
class Worker:
    """An open backend and the rows that it embeds."""

    planned: Plan
    backend: Backend
    rows: Source
    where: str

    def do(self, task: Task) -> Any:
        """Make a shard; or embed a batch: float32 [n, width], and the threads of the processor that did it."""
        if not task.avoid:
            files.make(self.planned, task.number, self.backend, self.rows, self.where)
            return None
        size = self.planned.batch_size
        start = task.number * size
        part = self.rows.part(start, min(start + size, len(self.rows)))
        (found,) = embeddings.batches(self.backend, part.ids, part, size)
        return np.array(found), self.backend.threads

    def close(self) -> None:
        """Free the device."""
        self.backend.close()


# Opens a worker on a device; travels to another process, so it is a function of a module or an object of its class.
Opener = Callable[[Device], Worker]
