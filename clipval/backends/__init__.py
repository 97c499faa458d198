"""The interface of every backend, and their registry. Imports no runtime.

A backend is one file and one line of `MODULES`. The file is the only one that imports its runtime, and holds a class
derived from `Backend` and a `KIND` that states what the rest of clipval must know about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Protocol, Sequence, Tuple

import numpy as np

from clipval.errors import UsageError
from clipval.store import Store
from clipval.towers import Tower

if TYPE_CHECKING:
    from clipval.ascend.host import Finding

# By name, the reference first; a backend's module is imported on first use.
MODULES: Dict[str, str] = {
    "pytorch": "clipval.backends.pytorch",
    "onnx": "clipval.backends.onnx",
    "om": "clipval.backends.om",
}
REFERENCE = "pytorch"
# note on a file of the recipe's own export
EXTRA = "{} files give more than the embedding (the recipe's own export adds exp(logit_scale)); it is picked by name"


class Identity(NamedTuple):
    """What made a result; printed and stored with every figure.

    Attributes:
        name: of the backend; with several devices `om:<device>`.
        version: of the runtime, and of its driver stack if known.
        device: `cpu`, `cuda:0`, `Ascend910B4:0`, ...
        precision: that it computes in: `fp32`, or for OM the precision mode.
        simulated: True for the tests' simulated NPU; passes no gate unless that is allowed.
    """

    name: str
    version: str
    device: str
    precision: str
    simulated: bool = False

    @property
    def on_host(self) -> bool:
        """Whether it computes on this machine's CPU."""
        return self.device == "cpu"

    def __str__(self) -> str:
        simulated = " simulated" if self.simulated else ""
        return f"{self.name}{simulated} {self.version} on {self.device}, {self.precision}"


class Product(NamedTuple):
    """Products of square matrices: a call, and its floating-point operations."""

    operations: float
    call: Callable[[], object]


class Backend(Protocol):
    """One tower, loaded: a batch of inputs in, a batch of embeddings out.

    It does not pad, normalise or check values: `clipval.embeddings` does that once, for every backend. It holds a
    session or a device, so it has one owner, which closes it. A derived class must provide `identity`, `tower` and
    `run`; the defaults of the rest suit a runtime on the CPU.

    Attributes:
        identity: what it is.
        tower: the tower that was loaded.
        batch_size: rows that `run` requires (an OM file has one batch size); None for any number.
        load_seconds: time to open it, from its file to ready, with libraries already imported.
        threads: CPU threads that a call uses; None on another device, or if unknown.
        notes: what the user should know about its file, one line each, the same for every file of the kind.
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
            rows: [batch, *tower.row_shape], the tower's dtype, C-contiguous. Not modified.

        Returns:
            float32 [batch, width], owned by the caller.

        Raises:
            BackendUnavailable: the device or the runtime failed.
        """
        raise NotImplementedError

    def execute_seconds(self) -> Optional[List[float]]:
        """Seconds inside the device's own execute call, one entry per `run` so far, without host-device copies.

        None if the runtime does not report them (pytorch, onnx).
        """
        return None

    def copy_seconds(self) -> Optional[Dict[str, List[float]]]:
        """Seconds of the copies `to_device` and `from_device`, one entry per `run` since `refresh`, or None."""
        return None

    def refresh(self) -> None:
        """Before timed calls, restore the full resolution of the clock of `execute_seconds`; earlier times stay."""
        return None

    def product(self, side: int) -> Optional[Product]:
        """A matrix product in the same runtime, on the same threads and in the same precision.

        None if the runtime offers none.

        Args:
            side: of the square matrices.
        """
        return None

    def busy(self) -> str:
        """What else uses the device, as text; empty for nothing, and for the CPU."""
        return ""

    def release(self) -> None:
        """Give memory back that calls of a large batch have kept for the next one."""
        return None

    def close(self) -> None:
        """Free the session; calling it twice is allowed."""
        return None


@dataclass(frozen=True)
class BackendSettings:
    """The options that backends read; a part of `clipval.options.Settings`."""

    onnx_providers: Tuple[str, ...] = ("CPUExecutionProvider",)
    onnx_provider_options: Tuple[Tuple[str, str], ...] = ()
    allow_cpu_operators: Tuple[str, ...] = ()
    threads: Optional[int] = None
    reference_device: str = "cpu"
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
    """A tower as a torch module, inputs to unit-length embeddings, and the seconds it took to load its model."""

    module: Any
    load_seconds: float


class Materials(Protocol):
    """What the chain provides to a backend to build and open its artifact."""

    @property
    def settings(self) -> BackendSettings:
        """The options."""
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
        """The model's tower as a torch module."""
        ...


class Opening(NamedTuple):
    """What to open: a tower in a file, for one batch size, on a device.

    Attributes:
        file: the artifact; None for a backend without one.
        device: number from `om:3`, else from `--device-id`; ignored by backends without numbered devices.
        ready: the file was provided by the user and need not follow clipval's contract.
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


def _on_host(_: BackendSettings) -> str:
    return ""


def _no_host(_: BackendSettings) -> List[Finding]:
    return []


@dataclass(frozen=True)
class Kind:
    """What the rest of clipval must know about a backend.

    Attributes:
        open: returns an open backend.
        suffix: of the artifact's file; empty for a backend that opens the model itself.
        artifact: builds or finds the file for a tower and batch size; None if the suffix is empty.
        ahead: builds the artifacts of several towers and batch sizes in parallel; a failed one fails again when it is
            needed. None: each is built when it is needed.
        fixed_batch: the artifact takes one batch size only.
        sizes: batch sizes of given ready files that every tower has, None if no files were given; None for a kind that
            takes no ready files.
        one_session: a device holds one session at a time, and `--device-id` selects the devices to validate.
        accelerator: what it computes on with these settings: `NPU`, `GPU`, or empty for this machine's processor.
        compiled: makes the artifact of any ONNX file: settings, file, folder, its contract, batch size -> the artifact.
        dumped: the device can dump the artifact's inner tensors, which diagnosis reads.
        precision: which of a spec's parity bounds apply to an identity: `fp32`, `fp16`, or a ready file's own.
        host: what a host of this backend has and lacks, with these settings.
        acl_user: what would initialise ACL in this process, in words; empty if nothing would.
        judged_as: the backend whose parity bounds apply to an identity; empty for its own.
        origin: text for what artifacts depend on besides model, device and precision.
    """

    open: Callable[[Materials, Opening], Backend]
    suffix: str = ""
    artifact: Optional[Callable[[Materials, Tower, int], Path]] = None
    ahead: Optional[Callable[[Materials, Sequence[Tuple[Tower, int]]], None]] = None
    fixed_batch: bool = False
    sizes: Optional[Callable[[BackendSettings, Sequence[Tower]], Optional[Tuple[int, ...]]]] = None
    one_session: bool = False
    accelerator: Callable[[BackendSettings], str] = _on_host
    compiled: Optional[Callable[[BackendSettings, Path, Path, Tower, int], Path]] = None
    dumped: bool = False
    precision: Callable[[Identity], str] = _fp32
    host: Callable[[BackendSettings], List[Finding]] = _no_host
    acl_user: Callable[[BackendSettings], str] = _nothing_else
    origin: Callable[[BackendSettings], str] = _nothing_else
    judged_as: Callable[[Identity], str] = _as_itself

    @property
    def takes_onnx(self) -> bool:
        """Whether the artifact is the exported ONNX file itself."""
        return self.suffix == ".onnx"


def names() -> Tuple[str, ...]:
    """Every backend, the reference first."""
    return tuple(MODULES)


def base_name(name: str) -> str:
    """The backend's name without its device: `om` for `om:3`."""
    return name.partition(":")[0]


def kind(name: str) -> Kind:
    """The backend with a name such as `onnx` or `om:3`.

    Raises:
        UsageError: there is no such backend.
    """
    module = MODULES.get(base_name(name))
    if module is None:
        raise UsageError(f"unknown backend {name!r}; known: {', '.join(MODULES)}")
    found: Kind = import_module(module).KIND
    return found


def check_acl(wanted: Iterable[str], asked: BackendSettings) -> None:
    """Refuse backends that cannot share a process, before any of them is opened.

    Raises:
        UsageError: two of them would initialise ACL, which allows one user per process.
    """
    users = list(dict.fromkeys(filter(None, (kind(name).acl_user(asked) for name in wanted))))
    if len(users) > 1:
        raise UsageError(
            f"{' and '.join(users)} cannot share a run: ACL allows one user per process; use separate runs"
        )


def of_file(file: Path) -> Optional[str]:
    """The backend that opens a file, by its suffix; None if there is none."""
    return next((name for name in MODULES if file.suffix and kind(name).suffix == file.suffix), None)
