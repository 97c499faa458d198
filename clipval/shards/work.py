"""The work of one device: open a backend, then make shards, or embed a batch again."""

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
    """The device that a backend is opened on.

    Attributes:
        number: the backend's device number; inside a Ray worker always 0.
        where: device and host, as text.
        cores: CPU cores that the worker is restricted to; empty for all.
    """

    number: int
    where: str
    cores: Tuple[int, ...] = ()


class Task(NamedTuple):
    """One shard to make, or one batch to embed again.

    Attributes:
        number: of the shard, or of the batch within the plan.
        avoid: for a batch: the device that made it, to be avoided if there is another; empty for a shard.
    """

    number: int
    avoid: str = ""

    def __str__(self) -> str:
        return f"batch {self.number}, embedded again" if self.avoid else f"shard {self.number}"


@dataclass
class Worker:
    """An open backend and the rows to embed."""

    planned: Plan
    backend: Backend
    rows: Source
    where: str

    def do(self, task: Task) -> Any:
        """Make a shard; or embed a batch: float32 [n, width], and the number of CPU threads."""
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


# Opens a worker on a device; it is pickled, so it is a module's function or an object of a module's class.
Opener = Callable[[Device], Worker]
