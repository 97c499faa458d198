"""A measured row of throughput: one backend, tower and batch size."""

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
    """The calls of a row by one clock, with the verdict on that figure and its reason."""

    timing: Timing
    verdict: str
    reason: str


Clocks = Dict[str, Judged]  # scope -> figures


class EndToEnd(NamedTuple):
    """From JPEGs or captions to embeddings: median seconds per batch, batches, and decoding threads."""

    seconds: float
    samples_per_second: float
    rounds: int
    threads: int


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The measurements of one backend, tower and batch size.

    Attributes:
        made_by: the backend; tower: its name.
        clocks: by scope, `inference`, and `execute` if the device has its own clock.
        warm_up: the untimed calls; attempts: how often the row was measured; figures are from the last attempt.
        cores: kept busy by this process; threads: CPU threads that a call uses; None if unknown.
        machine_share: of the machine's best speed, see `machine.Pace`; None on another device.
        standing: the comparison with the baseline; None without one.
        cold_start, end_to_end: None if not measured.
        flops_per_second: corresponding to the speed; peak_share: of the speed of a matrix product in the same runtime;
        None if unknown.
        copies: median seconds of a call's copies, `to_device` and `from_device`; None if the runtime does not report
        them.
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
        """The clock that decides: the device's own if there is one, since the recipe's figure is based on it."""
        return deciding(self.clocks)

    @property
    def decided(self) -> Judged:
        """The figures by the clock that decides."""
        return self.clocks[self.scope]

    @property
    def valid(self) -> bool:
        """Whether every clock of the row is VALID."""
        return all(one.verdict == VALID for one in self.clocks.values())


def deciding(clocks: Clocks) -> str:
    """The scope that decides among those of a row."""
    return EXECUTE if EXECUTE in clocks else INFERENCE
