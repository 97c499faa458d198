"""PyTorch's intermediate results in a tower: the result of every operator, with its module's path.

The truth is the tower in float64; the float32 model's own distance from it is the noise of float32 at each tap. The
only module of `clipval.diagnose` that imports torch.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np

if TYPE_CHECKING:
    import torch

# Operators that only change the shape, order, dtype or position of their input's values.
SAME_VALUES = (
    "_reshape_alias _to_copy _unsafe_view alias clone contiguous copy_ detach dropout expand feature_dropout flatten "
    "lift_fresh permute reshape resolve_conj squeeze t to transpose unflatten unsqueeze view"
)
PARTS = ("split", "split_with_sizes", "chunk", "unbind", "tensor_split")  # with several results
BYTES = 512 << 20  # of truth held in memory; samples that do not fit are left out


@dataclass
class Tap:
    """The result of one PyTorch operator.

    Attributes:
        op: the operator, e.g. `softmax`.
        module: path of the module that ran it, e.g. `visual.transformer.resblocks.3.attn`; empty for the tower itself.
        ends: modules whose output this is, innermost first.
        parents: numbers of the taps that it was computed from.
        fixed: it is computed from weights alone, e.g. the query of an attention pool.
        noise: relative L2 distance of the float32 model's result from the truth.
        truth: the float64 model's result, stored as float32: [n, ...] in PyTorch's own layout.
    """

    op: str
    module: str
    ends: List[str] = field(default_factory=list)
    parents: Tuple[int, ...] = ()
    fixed: bool = False
    noise: float = 0.0
    truth: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))

    @property
    def name(self) -> str:
        """For display: the outermost module that ends here, else the operator in its module."""
        return self.ends[-1] if self.ends else f"{self.module or 'the tower'} ({self.op})"

    @property
    def paths(self) -> List[str]:
        """Module paths that an exporter may give this tensor's node."""
        return [self.module, *(path for path in self.ends if path != self.module)]


class Recorded:
    """Taps of one run of a tower, in order of computation.

    Attributes:
        taps: all taps.
        output: number of the tap that is the tower's embedding.
        modules: torch modules by path.
        rows: the inputs that were run: [n, ...].
    """

    def __init__(self, taps: List[Tap], output: int, modules: Dict[str, torch.nn.Module], rows: np.ndarray) -> None:
        self.taps = taps
        self.output = output
        self.modules = modules
        self.rows = rows

    def leading(self) -> List[int]:
        """Numbers of the taps that the embedding is computed from, in order, including itself."""
        found, rest = set(), [self.output]
        while rest:
            number = rest.pop()
            if number >= 0 and number not in found:
                found.add(number)
                rest += self.taps[number].parents
        return sorted(found)

    def parameters(self, module: str) -> Dict[str, np.ndarray]:
        """Weights of a module and its submodules, by path; of all modules for an empty path."""
        inside = f"{module}." if module else ""
        found = {}
        for path, one in self.modules.items():
            if path == module or path.startswith(inside):
                for name, value in one.named_parameters(recurse=False):
                    found[f"{path}.{name}" if path else name] = value.detach().numpy()
        return found

    def setting(self, module: str, name: str) -> Any:
        """An attribute of a module, e.g. `eps`; None if it has none."""
        return getattr(self.modules.get(module), name, None)


def record(encoder: torch.nn.Module, rows: np.ndarray) -> Recorded:
    """Run a tower in float64 and in float32 and record its intermediate results.

    Args:
        encoder: see `clipval.model.encoder`; left unchanged.
        rows: inputs, [n, ...]. As many samples are used as fit into `BYTES`.
    """
    one = _run(encoder, rows[:1], double=False)
    weight = max(1, sum(tap.truth.nbytes for tap in one.taps))
    rows = rows[: max(1, min(len(rows), BYTES // weight))]
    del one
    truth = _run(encoder, rows, double=True)

    def measure(number: int, tap: Tap, values: np.ndarray) -> None:
        held = truth.taps[number] if number < len(truth.taps) else None
        if held is not None and held.op == tap.op and held.truth.shape == values.shape:
            held.noise = relative(values, held.truth)

    _run(encoder, rows, double=False, seen=measure)
    return truth


def relative(found: np.ndarray, truth: np.ndarray) -> float:
    """|found - truth| / |truth|, Euclidean; inf if only one of them is finite.

    A mask's -inf equals a large negative number used in its place.
    """
    found, truth = found.ravel(), truth.ravel()
    masked = np.isneginf(truth) & (found <= -1e4)
    same = masked | (np.isposinf(truth) & np.isposinf(found))
    if same.any():
        found, truth = found[~same], truth[~same]
    with np.errstate(invalid="ignore", over="ignore"):
        off = float(np.linalg.norm(np.subtract(found, truth, dtype=np.float64)))
    size = float(np.linalg.norm(truth.astype(np.float64)))
    if not np.isfinite(off) or not np.isfinite(size):
        return float("inf")
    return off / size if size else (0.0 if off == 0 else float("inf"))


def _run(
    encoder: torch.nn.Module,
    rows: np.ndarray,
    *,
    double: bool,
    seen: Optional[Callable[[int, Tap, np.ndarray], None]] = None,
) -> Recorded:
    import torch

    modules = {_path(name): module for name, module in encoder.named_modules() if name}
    recorder = _recorder(torch, seen)
    with ExitStack() as stack:
        for path, module in modules.items():
            if not path:
                continue  # not the whole model is called, only its towers
            stack.enter_context(_hooked(module, path, recorder))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_plain_attention(torch))
        fed = torch.from_numpy(np.ascontiguousarray(rows))
        if double:
            stack.enter_context(_in_double(encoder))
            fed = fed.double() if fed.is_floating_point() else fed
        fed._clipval_moving = True  # type: ignore[attr-defined]
        with recorder:
            output = encoder(fed)
    return Recorded(recorder.taps, recorder.number(output), modules, rows)


def _path(name: str) -> str:
    """Path inside the open_clip model, which is `clip` in the encoder."""
    return name.partition("clip.")[2] if name.startswith("clip.") else ""


def _recorder(torch: Any, seen: Optional[Callable[[int, Tap, np.ndarray], None]]) -> Any:
    """A dispatch mode that records each operator with its module; a function, since defining it needs torch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):  # type: ignore[misc, no-untyped-call]
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.taps: List[Tap] = []
            self.path: List[str] = []

        def number(self, tensor: Any) -> int:
            return max(getattr(tensor, "_clipval_taps", (-1,)), default=-1)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            op = str(func).split(".")[1] if str(func).startswith("aten.") else str(func)
            tensors = [one for one in _tensors(torch, (args, kwargs)) if hasattr(one, "_clipval_taps")]
            parents = tuple(sorted({number for one in tensors for number in one._clipval_taps}))
            moving = any(hasattr(one, "_clipval_moving") for one in _tensors(torch, (args, kwargs)))
            parts = list(result) if isinstance(result, (tuple, list)) and op in PARTS else _tensors(torch, result)[:1]
            for made in _tensors(torch, result) if moving else ():
                made._clipval_moving = True
            for part in parts:
                self._note(op, part, parents, fixed=not moving)
            return result

        def _note(self, op: str, tensor: Any, parents: Tuple[int, ...], fixed: bool) -> None:
            # arithmetic on parameters alone is not a step of the computation
            if op in SAME_VALUES.split() or not tensor.is_floating_point() or tensor.numel() < 2:
                if parents or op not in SAME_VALUES.split():
                    tensor._clipval_taps = parents
                return
            values = tensor.detach().to(torch.float32, copy=True).numpy()
            tap = Tap(op, self.path[-1] if self.path else "", parents=parents, fixed=fixed)
            if seen is None:
                tap.truth = values
            else:
                seen(len(self.taps), tap, values)
            tensor._clipval_taps = (len(self.taps),)
            self.taps.append(tap)

    return Recorder()


def _tensors(torch: Any, value: Any) -> List[Any]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [one for part in value for one in _tensors(torch, part)] if isinstance(value, (tuple, list)) else []


@contextmanager
def _hooked(module: torch.nn.Module, path: str, recorder: Any) -> Iterator[None]:
    def enter(*_: Any) -> None:
        recorder.path.append(path)

    def leave(one: Any, __: Any, output: Any) -> None:
        recorder.path.pop()
        if type(one).__name__ == "Identity":
            return
        tensor = output[0] if isinstance(output, (tuple, list)) and output else output
        number = recorder.number(tensor)
        if number >= 0 and path not in recorder.taps[number].ends:
            recorder.taps[number].ends.append(path)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _plain_attention(torch: Any) -> Iterator[None]:
    """Run attention as products and a softmax, as in an ONNX graph, instead of one fused operator."""
    mha, flags = getattr(torch.backends, "mha", None), torch.backends.cuda  # torch 2.1 has no switch for the fast path
    fast = mha is not None and mha.get_fastpath_enabled()
    before = flags.flash_sdp_enabled(), flags.mem_efficient_sdp_enabled()
    if mha is not None:
        mha.set_fastpath_enabled(False)
    flags.enable_flash_sdp(False)
    flags.enable_mem_efficient_sdp(False)
    try:
        yield
    finally:
        if mha is not None:
            mha.set_fastpath_enabled(fast)
        flags.enable_flash_sdp(before[0])
        flags.enable_mem_efficient_sdp(before[1])


@contextmanager
def _in_double(encoder: torch.nn.Module) -> Iterator[None]:
    """Convert the module to float64 and back, which is lossless; a copy would need more memory."""
    encoder.double()
    try:
        yield
    finally:
        encoder.float()
