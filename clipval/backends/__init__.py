"""What every backend looks like from outside, and the registry of them. Imports no runtime.

A backend is one file and one line of `MODULES`. The file is the only one that imports its runtime, and holds a class
with the face of `Backend` and a `KIND` that says what the rest of clipval must know of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple

import numpy as np

from clipval.errors import UsageError
from clipval.store import Store
from clipval.towers import Tower

if TYPE_CHECKING:
    from clipval.ascend.host import Finding

# By name, the reference first; a backend's module is imported when it is asked for.
MODULES: Dict[str, str] = {
    "pytorch": "clipval.backends.pytorch",
    "onnx": "clipval.backends.onnx",
    "om": "clipval.backends.om",
}
REFERENCE = "pytorch"
# of a file of the recipe's own export, by its kind
EXTRA = "{} files give more than the embedding (the recipe's own export adds exp(logit_scale)); it is picked by name"


class Identity(NamedTuple):
    """What made a result; printed and stored beside every figure.

    Attributes:
        name: of the backend; with several devices `om:<device>`.
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

    @property
    def on_host(self) -> bool:
        """It computes on this machine's processor."""
        return self.device == "cpu"

    def __str__(self) -> str:
        simulated = " simulated" if self.simulated else ""
        return f"{self.name}{simulated} {self.version} on {self.device}, {self.precision}"


class Product(NamedTuple):
    """Products of square matrices: floating-point operations of one call, and the call."""

    operations: float
    call: Callable[[], Any]


class Backend(Protocol):
    """One tower, loaded: a batch of inputs in, a batch of embeddings out.

    It does not pad, normalise or check values: `clipval.embeddings` does that once, for every backend. It holds a
    session or a device, so it has one owner, which closes it. A class that derives from this one has to bring
    `identity`, `tower` and `run`; the rest is right for a runtime on the processor.

    Attributes:
        identity: what it is.
        tower: the tower that was loaded.
        batch_size: rows that `run` insists on (an OM file has one); None takes any number.
        load_seconds: what opening it took, from its file to ready, the libraries imported already.
        threads: of the processor that a call takes; None on another device, or where the system does not tell.
        notes: what a person should know of its file, one line each, the same for every file of the kind.
    """

    identity: Identity
    tower: Tower
    batch_size: Optional[int] = None
    load_seconds: float = 0.0
    threads: Optional[int] = None
    notes: Tuple[str, ...] = ()

    def run(self, rows: np.ndarray) -> np.ndarray:
        """Embed one batch.

        Args:
            rows: [batch, *tower.row_shape], the tower's dtype, C-contiguous. Is not written to.

        Returns:
            float32 [batch, width], owned by the caller.

        Raises:
            BackendUnavailable: the device or the runtime failed.
        """
        raise NotImplementedError

    def execute_seconds(self) -> Optional[List[float]]:
        """Seconds inside the device's own execute call, one entry per `run` so far, without host-device copies.

        None where the runtime does not tell (pytorch, onnx).
        """
        return None

    def copy_seconds(self) -> Optional[Dict[str, List[float]]]:
        """Seconds of the copies `to_device` and `from_device`, one entry a `run` since `refresh`, or None."""
        return None

    def refresh(self) -> None:
        """Make the clock of `execute_seconds` as fine as it can be, before calls are timed; its times so far stay."""
        return None

    def product(self, side: int) -> Optional[Product]:
        """A matrix product in the same runtime, on the same threads and in the same precision.

        None where the runtime offers none.

        Args:
            side: of the square matrices.
        """
        return None

    def busy(self) -> str:
        """What else uses the device, in words; empty for nothing, and for the processor."""
        return ""

    def close(self) -> None:
        """Free the session; calling it twice is allowed."""
        return None


@dataclass(frozen=True)
class BackendSettings:
    """What a backend is asked for; the part of `clipval.options.Settings` that backends read."""

    onnx_providers: Tuple[str, ...] = ("CPUExecutionProvider",)
    onnx_provider_options: Tuple[Tuple[str, str], ...] = ()
    allow_cpu_operators: Tuple[str, ...] = ()
    threads: Optional[int] = None
    onnx_prefix: Optional[Path] = None
    om_dir: Optional[Path] = None
    soc_version: Optional[str] = None
    precision_mode: str = ""
    keep_dtype: Optional[Path] = None
    atc_flags: Tuple[str, ...] = ()
    jobs: Optional[int] = None
    device_id: Tuple[int, ...] = (0,)
    om_runtime: str = "aclruntime"
    device_timeout: float = 300.0
    allow_health: bool = False
    allow_simulated: bool = False


class Encoder(NamedTuple):
    """A tower as a torch module, inputs to unit-length embeddings, and the seconds that loading its model took."""

    module: Any
    load_seconds: float


class Materials(Protocol):
    """What the chain has at hand for a backend that builds its artifact or opens it."""

    @property
    def settings(self) -> BackendSettings:
        """What was asked for."""
        ...

    @property
    def towers(self) -> Dict[str, Tower]:
        """Both towers' contracts by name."""
        ...

    @property
    def store(self) -> Store:
        """Where artifacts are kept."""
        ...

    def onnx(self, tower: Tower) -> Path:
        """The ONNX file of a tower."""
        ...

    def encoder(self, tower: Tower) -> Encoder:
        """The tower as the model has it."""
        ...


class Opening(NamedTuple):
    """What is opened: a tower in a file, for one batch size, on a device.

    Attributes:
        file: the artifact; None for a backend that has none.
        device: number of `om:3`, else of `--device-id`; means nothing to a backend without numbered devices.
        ready: the file is somebody's own, which need not look as clipval's does.
    """

    tower: Tower
    file: Optional[Path]
    batch_size: int
    device: int
    ready: bool = False


def _fp32(_: Identity) -> str:
    return "fp32"


def _as_itself(_: Identity) -> str:
    return ""


def _nothing_else(_: BackendSettings) -> str:
    return ""


def _no_host(_: int) -> List[Finding]:
    return []


@dataclass(frozen=True)
class Kind:
    """What a backend is to the rest of clipval.

    Attributes:
        open: gives an open backend.
        suffix: ending of the artifact's file; empty for a backend that opens the model itself.
        artifact: builds or finds the file for a tower and batch size; None beside an empty suffix.
        ahead: builds the artifacts of several towers and batch sizes side by side; what fails, fails again when it is
            asked for. None: each is built when it is asked for.
        fixed_batch: the artifact takes one batch size only.
        sizes: batch sizes of ready files that were given, for which every tower has one, and None where none were;
            None for a kind that takes no ready files.
        one_session: a device holds one session at a time, and `--device-id` says which devices are validated.
        dumped: the device dumps the inner tensors of its artifact, which diagnosis reads.
        precision: which of a spec's parity bounds hold for an identity: `fp32`, `fp16`, or a ready file's own.
        host: what a host of this backend has and lacks, by the number of the device.
        judged_as: the backend whose parity bounds hold for an identity; empty for its own.
        origin: what artifacts depend on besides model, device and precision, in words that differ where they do.
    """

    open: Callable[[Materials, Opening], Backend]
    suffix: str = ""
    artifact: Optional[Callable[[Materials, Tower, int], Path]] = None
    ahead: Optional[Callable[[Materials, Sequence[Tuple[Tower, int]]], None]] = None
    fixed_batch: bool = False
    sizes: Optional[Callable[[BackendSettings, Sequence[Tower]], Optional[Tuple[int, ...]]]] = None
    one_session: bool = False
    dumped: bool = False
    precision: Callable[[Identity], str] = _fp32
    host: Callable[[int], List[Finding]] = _no_host
    origin: Callable[[BackendSettings], str] = _nothing_else
    judged_as: Callable[[Identity], str] = _as_itself

    @property
    def takes_onnx(self) -> bool:
        """The artifact is the exported ONNX file itself."""
        return self.suffix == ".onnx"


def names() -> Tuple[str, ...]:
    """Every backend, the reference first."""
    return tuple(MODULES)


def base_name(name: str) -> str:
    """`om` of `om:3`: which backend it is, whichever device it runs on."""
    return name.partition(":")[0]


def kind(name: str) -> Kind:
    """The backend of a name such as `onnx` or `om:3`.

    Raises:
        UsageError: there is none.
    """
    module = MODULES.get(base_name(name))
    if module is None:
        raise UsageError(f"unknown backend {name!r}; known: {', '.join(MODULES)}")
    found: Kind = import_module(module).KIND
    return found


def of_file(file: Path) -> Optional[str]:
    """The backend that opens a file, by its ending; None for none."""
    return next((name for name in MODULES if file.suffix and kind(name).suffix == file.suffix), None)
