"""A device for tests of shards, whose workers run in other processes: quick, and faulty where it is told to be."""

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np

from clipval.backends import Backend, Identity
from clipval.errors import BackendUnavailable
from clipval.shards.files import Plan
from clipval.shards.work import Device, Worker
from clipval.towers import TEXT


def embeddings_of(rows: np.ndarray) -> np.ndarray:
    """What the fake device makes of rows: it depends on each row alone."""
    angle = rows.astype(np.float64).sum(axis=1, keepdims=True) + np.arange(TEXT.width)
    return (np.sin(angle) / np.sqrt(TEXT.width)).astype(np.float32)


class FakeDevice(Backend):
    def __init__(self, device: Device, job: "FakeJob") -> None:
        self.identity = Identity("fake", "1", f"Fake:{device.number}", "fp32")
        self.tower = TEXT
        self.job, self.number = job, device.number

    def run(self, rows: np.ndarray) -> np.ndarray:
        time.sleep(self.job.seconds)
        if self.job.after not in (None, self.number):
            self.wait_for(self.job.after)
        first = int(rows[0, 0])
        with open(self.job.log, "a", encoding="utf-8") as stream:
            stream.write(f"{first} {self.number}\n")
        if self.job.deadly.get(first, 0):
            died = Path(f"{self.job.log}.{first}")
            before = len(died.read_text()) if died.exists() else 0
            if before < self.job.deadly[first]:
                died.write_text("x" * (before + 1))
                os.kill(os.getpid(), signal.SIGKILL)
        if self.number == self.job.broken:
            raise BackendUnavailable(f"fake device {self.number} is lost; reset it")
        found = embeddings_of(rows)
        return found[:, ::-1] if self.number == self.job.wrong else found

    def wait_for(self, number: Optional[int]) -> None:
        """Until another device has had a call."""
        ends = time.monotonic() + 60
        while not (self.job.log.exists() and f" {number}\n" in self.job.log.read_text()):
            assert time.monotonic() < ends, f"device {number} had no call in a minute"
            time.sleep(0.01)


@dataclass(frozen=True)
class FakeJob:
    """Opens a fake device.

    Attributes:
        log: a file that gets a line a call: the first token of the batch, and the device.
        deadly: how often a batch, named by the first token of its first row, ends its process.
        broken: the device that fails; wrong: the one whose embeddings are wrong; seconds: that a call takes.
        after: the device that all others wait for, until it has had a call.
    """

    planned: Plan
    rows: Any
    log: Path
    deadly: Dict[int, int] = field(default_factory=dict)
    broken: Optional[int] = None
    wrong: Optional[int] = None
    seconds: float = 0.0
    after: Optional[int] = None

    def __call__(self, device: Device) -> Worker:
        return Worker(self.planned, FakeDevice(device, self), self.rows, device.where)
