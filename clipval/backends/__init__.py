"""What every backend looks like from outside: one tower, loaded and ready. Imports no runtime.

`pytorch` is the reference, `onnx` is ONNX Runtime, `om` is an Ascend OM file through aclruntime. Each lives in
the one file that may import its runtime, and is opened by `clipval.chain`.
"""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Protocol

import numpy as np

from clipval.towers import Tower

NAMES = ("pytorch", "onnx", "om")
REFERENCE = "pytorch"


def kind_of(name: str) -> str:
    """`om` of `om:3`: which backend it is, whichever device it runs on."""
    return name.partition(":")[0]


class Identity(NamedTuple):
    """What made a result; printed and stored beside every figure.

    Attributes:
        name: one of `NAMES`; with several NPUs `om:<device>`.
        version: of the runtime, and of its driver stack where it tells.
        device: `cpu`, `cuda:0`, `Ascend910B4:0`, ...
        precision: what it computes in: `fp32`, or for OM the precision mode.
        simulated: True for the simulated NPU of the tests; never passes a gate unless that was allowed.
    """

    name: str
    version: str
    device: str
    precision: str
    simulated: bool = False

    def __str__(self) -> str:
        simulated = " simulated" if self.simulated else ""
        return f"{self.name}{simulated} {self.version} on {self.device}, {self.precision}"


class Backend(Protocol):
    """One tower, loaded: a batch of inputs in, a batch of embeddings out.

    It does not pad, normalise or check values: `clipval.embeddings` does that once, for every backend. It holds a
    session or a device, so it has one owner, which closes it.

    Attributes:
        identity: what it is.
        tower: the tower that was loaded.
        batch_size: rows that `run` insists on (an OM file has one); None takes any number.
        load_seconds: what opening it took, from its file to ready, the libraries imported already.
        threads: of the processor that a call takes; None on another device, or where the system does not tell.
    """

    identity: Identity
    tower: Tower
    batch_size: Optional[int]
    load_seconds: float
    threads: Optional[int]

    def run(self, rows: np.ndarray) -> np.ndarray:
        """Embed one batch.

        Args:
            rows: [batch, *tower.row_shape], the tower's dtype, C-contiguous. Is not written to.

        Returns:
            float32 [batch, width], owned by the caller.

        Raises:
            BackendUnavailable: the device or the runtime failed.
        """
        ...

    def execute_seconds(self) -> Optional[List[float]]:
        """Seconds inside the runtime's own execute call, one entry per `run` so far, without host-device
        copies; None where the runtime does not tell (pytorch, onnx)."""
        ...

    def close(self) -> None:
        """Free the session; calling it twice is allowed."""
        ...
