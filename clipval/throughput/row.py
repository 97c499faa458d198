"""A row of throughput as it is handed on: one backend, tower and batch size."""

from __future__ import annotations

from typing import Dict, NamedTuple, Optional

import msgspec

from clipval.backends import Identity
from clipval.backends.pool import ColdStart
from clipval.throughput.baseline import Judgement
from clipval.throughput.statistics import Timing
from clipval.throughput.timing import WarmUp
from clipval.throughput.verdict import VALID

EXECUTE, INFERENCE = "execute", "inference"


class Judged(msgspec.Struct, frozen=True):
    """The calls of a row by one clock, whether that figure can be believed, and why not."""

    timing: Timing
    verdict: str
    reason: str


Clocks = Dict[str, Judged]  # scope -> figures


class EndToEnd(NamedTuple):
    """From JPEGs or captions to embeddings: median seconds of a batch, batches, and the threads that decoded."""

    seconds: float
    samples_per_second: float
    rounds: int
    threads: int


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one backend, tower and batch size.

    Attributes:
        made_by: the backend; tower: its name.
        clocks: by scope, `inference`, and `execute` where the device has a clock of its own.
        warm_up: untimed calls before; attempts: how often the row was measured; figures are of the last time.
        cores: busy with this process meanwhile; threads: of the processor that a call takes; None where unknown.
        machine_share: of the machine's best speed, see `machine.Pace`; None on another device.
        standing: against the baseline; None where none was given.
        cold_start, end_to_end: measured besides; None where they were not.
        flops_per_second: floating-point operations that the speed amounts to; peak_share: of what a matrix product of
            the same runtime reaches. None where they cannot be told.
        copies: median seconds of a call's copies, `to_device` and `from_device`; None where the runtime does not tell.
    """

    made_by: Identity
    tower: str
    batch_size: int
    clocks: Clocks
    warm_up: WarmUp
    attempts: int
    cores: Optional[float] = None
    threads: Optional[int] = None
    machine_share: Optional[float] = None
    standing: Optional[Judgement] = None
    cold_start: Optional[ColdStart] = None
    end_to_end: Optional[EndToEnd] = None
    flops_per_second: Optional[float] = None
    peak_share: Optional[float] = None
    copies: Optional[Dict[str, float]] = None

    @property
    def scope(self) -> str:
        """The clock that decides: the device's own where there is one, as the recipe's figure is made of it."""
        return deciding(self.clocks)

    @property
    def decided(self) -> Judged:
        """The figures of the clock that decides."""
        return self.clocks[self.scope]

    @property
    def valid(self) -> bool:
        """Every clock of the row is VALID."""
        return all(one.verdict == VALID for one in self.clocks.values())


def deciding(clocks: Clocks) -> str:
    """The scope that decides among those of a row."""
    return EXECUTE if EXECUTE in clocks else INFERENCE
