"""The ONNX Runtime backend. The only module that imports onnxruntime."""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

import numpy as np

from clipval import environment, store
from clipval.ascend import cann, npu_smi, process
from clipval.backends import (
    EXTRA,
    Backend,
    BackendSettings,
    Identity,
    Kind,
    Materials,
    Opening,
    Product,
    given,
    placement,
    providers,
)
from clipval.backends.providers import CANN, CPU
from clipval.errors import BackendUnavailable, ClipvalError, InputError, one_line
from clipval.towers import Tower

PRODUCTS_IN_A_ROW = 16
KEPT_ROWS = 8  # of the accuracy path
IR_VERSION = 8  # of a model of opset 14, which every onnxruntime from 1.11 on reads


class OnnxBackend(Backend):
    """See `clipval.backends.Backend`.

    Args:
        tower: the tower's contract; the file's input and output are checked against it.
        file: the ONNX file.
        names: execution providers in order of preference, full names.
        threads: intra-op threads; None means ONNX Runtime's default (the physical cores).
        options: of the first provider.
        allowed: operators that may run on the CPU next to another provider.
        cache: folder for what the CANN provider compiles; it writes into the working directory.
        ready: the user's own file: names and dtypes of its input and output may differ from the contract's.

    Attributes:
        placement: which operators run on which provider; see `clipval.backends.placement`.

    Raises:
        BackendUnavailable: onnxruntime or the provider is missing, it rejects its options, or another one computes.
        InputError: the file does not load or is not of this tower.
    """

    def __init__(
        self,
        tower: Tower,
        file: Path,
        names: Sequence[str] = (CPU,),
        threads: Optional[int] = None,
        options: providers.Options = (),
        allowed: Sequence[str] = (),
        cache: Optional[Path] = None,
        ready: bool = False,
    ) -> None:
        self._runtime = _import_runtime(names)
        self.tower = tower
        self._file, self._names, self._threads, self._cache = file.absolute(), list(names), threads, cache
        self._configured = providers.configured(names[0], options)
        self._input, self._output = (tower.input_name, np.dtype(tower.dtype)), tower.output_name
        self._largest = 0  # rows of a call since the last `release`
        self._compiled: Set[int] = set()  # batch sizes that the provider has seen
        precision = providers.precision(names[0], self._configured)
        self._ready = ready
        self._half = ready and given.precision(self._file) in ("fp16", "bf16")
        if CANN in names:
            process.claim("onnxruntime's CANN provider")
        profile = self._profile(allowed) if names[0] != CPU else []
        started, running = time.perf_counter(), environment.threads_running()
        self._session: Any = self._load(self._options())
        self.load_seconds = time.perf_counter() - started
        environment.release_memory()  # of the file's own copy of the weights
        # the session does not report how many it started besides the caller's own
        self.threads = threads or (1 + environment.threads_running() - running if running else None)
        self.placement = placement.of(self._assigned(), profile)
        if ready:
            self._adapt()
            precision = given.precision(self._file) if precision == "fp32" else precision
        else:
            self._check_contract()
        version = f"onnxruntime {self._runtime.__version__}"
        version += f", CANN {cann.version()}" if names[0] == CANN else ""
        self.identity = Identity("onnx", version, self._device(), precision)

    def _options(self) -> Any:
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if self._half:  # onnxruntime 1.32 crashes when it changes the layout of a float16 convolution
            options.graph_optimization_level = self._runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        if hasattr(self._runtime.InferenceSession, "get_provider_graph_assignment_info"):
            options.add_session_config_entry(placement.RECORD, "1")
        return options

    def _assigned(self) -> Any:
        """Subgraphs by provider; None before ONNX Runtime 1.24."""
        tell = getattr(self._session, "get_provider_graph_assignment_info", None)
        return None if tell is None else tell()

    def _new_session(self, model: Union[str, bytes], options: Any) -> Any:
        """A session without ONNX Runtime's own fallback, which would hide the provider's error."""
        first, *rest = self._names
        given = [(first, self._configured), *rest] if self._configured else self._names
        return self._runtime.InferenceSession(model, options, providers=given, enable_fallback=0)

    def _load(self, options: Any) -> Any:
        first = self._names[0]
        try:
            with self._in_cache():
                return self._new_session(str(self._file), options)
        except Exception as error:  # the runtime raises its own classes and RuntimeError
            if first != CPU and self._loads_on_cpu():
                shown = ",".join(f"{name}={value}" for name, value in self._configured.items()) or "no options"
                raise BackendUnavailable(
                    f"onnx backend: {first} with {shown} cannot load {self._file} ({one_line(error, 600)}); correct "
                    "--onnx-provider-options or the provider's installation"
                ) from error
            cause = given.why_not(self._file, error, self._runtime.__version__)
            raise InputError(f"ONNX {self._file}: {cause}") from error

    def _loads_on_cpu(self) -> bool:
        """Whether the CPU provider loads the file, so that the file is not at fault."""
        try:
            self._runtime.InferenceSession(str(self._file), self._options(), providers=[CPU])
        except Exception:  # see _load
            return False
        return True

    @contextmanager
    def _in_cache(self, part: str = ".") -> Iterator[None]:
        """CANN's provider caches compiled models in the working directory, keyed only by name and input shape."""
        if self._cache is None:
            yield
            return
        before = os.getcwd()
        (self._cache / part).mkdir(parents=True, exist_ok=True)
        os.chdir(self._cache / part)
        try:
            yield
        finally:
            os.chdir(before)

    def _profile(self, allowed: Sequence[str]) -> List[Dict[str, Any]]:
        """Events of one profiled run, checked against the requested provider.

        Shape operators and allowed operators may be on the CPU.
        """
        options = self._options()
        with TemporaryDirectory() as folder:
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
            self._session = self._load(options)
            self._device()
            if self._ready:
                self._adapt()
            self.run(np.zeros(self.tower.shape(self.batch_size or 1), self.tower.dtype))
            events: List[Dict[str, Any]] = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        found = placement.of(self._assigned(), events)
        strayed = found.beyond(allowed)
        if strayed or not any(name != CPU for name in found.operators):
            raise BackendUnavailable(self._strayed(strayed, found.witness))
        self._compiled.clear()  # the profile came from another session
        return events

    def _strayed(self, strayed: Dict[str, int], witness: str) -> str:
        most = sorted(strayed.items(), key=lambda one: -one[1])
        listed = ", ".join(f"{name} {count}" for name, count in most[:8]) + (", ..." if len(most) > 8 else "")
        graph = "its graph mode lacks LayerNormalization and Gelu, which --opset-version 14 to 16 decompose"
        return (
            f"onnx backend: {self._names[0]} was requested, but the {self.tower.name} tower fell back to {CPU} for "
            f"{sum(strayed.values())} operators ({listed}), as the {witness} says; "
            f"{graph if self._names[0] == CANN else 'try another opset'}, or allow "
            f"them: --allow-cpu-operators {','.join(strayed)}"
        )

    def _device(self) -> str:
        """The provider that computes; a silent fallback is an error."""
        used = self._session.get_providers()
        if used[0] != self._names[0]:
            raise BackendUnavailable(
                f"onnx backend: {self._names[0]} was requested, but the session fell back to {used[0]}; "
                f"correct --onnx-provider-options or the provider's installation, or use --onnx-providers {used[0]}"
            )
        return "cpu" if used[0] == CPU else str(used[0])

    def _check_contract(self) -> None:
        """Find the embedding among the outputs: the recipe's own export adds exp(logit_scale)."""
        inputs = [(node.name, node.type, list(node.shape[1:])) for node in self._session.get_inputs()]
        outputs = [(node.name, node.type, list(node.shape[1:])) for node in self._session.get_outputs()]
        kind = {"float32": "tensor(float)", "int64": "tensor(int64)"}[self.tower.dtype]
        wanted_in = [(self.tower.input_name, kind, list(self.tower.row_shape))]
        wanted_out = (self.tower.output_name, "tensor(float)", [self.tower.width])
        # torch 1.11 gives an output symbolic axes instead of a width
        named = [one[:2] == wanted_out[:2] and given.sized(one[2], wanted_out[2]) for one in outputs]
        if inputs != wanted_in or sum(named) != 1:
            raise InputError(
                f"ONNX {self._file}: has inputs {inputs} and outputs {outputs}, the {self.tower.name} tower needs "
                f"{wanted_in} and {[wanted_out]}. Export it again with clipval export; files of other exporters are "
                "validated with --onnx-prefix or compare"
            )
        if len(outputs) > 1:
            self.notes = (EXTRA.format("ONNX"),)

    def _adapt(self) -> None:
        """Accept other names and dtypes of input and output if they can only be this tower's."""
        found = given.ports(self._file, self.tower, self._session.get_inputs(), self._session.get_outputs())
        self._input, self.batch_size, self._output = (found.name, found.dtype), found.batch, found.outputs[0]
        if len(found.outputs) > 1:
            fed = np.zeros(self.tower.shape(found.batch or 1), found.dtype)
            made = self._session.run(list(found.outputs), {found.name: fed})
            self._output = given.embedding_of(self._file, self.tower, dict(zip(found.outputs, made)))
        if found.more:
            self.notes = (f"ready ONNX files give more than the embedding; taken is {self._output}",)

    def run(self, rows: np.ndarray) -> np.ndarray:
        name, dtype = self._input
        fed = {name: rows.astype(dtype, copy=False)}
        self._largest = max(self._largest, len(rows))
        try:
            if len(rows) not in self._compiled:
                with self._in_cache():
                    (embedding,) = self._session.run([self._output], fed)
                self._compiled.add(len(rows))
            else:
                (embedding,) = self._session.run([self._output], fed)
        except Exception as error:  # the runtime raises its own classes and RuntimeError
            raise InputError(
                f"ONNX {self._file}: onnxruntime cannot run it ({one_line(error)}). Export it again"
            ) from error
        return np.asarray(embedding).astype(np.float32, copy=False)

    def release(self) -> None:
        """Let a call of one row give back the memory of inner tensors that a larger batch took."""
        if self._largest <= KEPT_ROWS or self.batch_size is not None or self.identity.device != "cpu":
            return
        self._largest, (name, dtype) = 0, self._input
        options = self._runtime.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._session.run([self._output], {name: np.zeros(self.tower.shape(1), dtype)}, options)
        environment.release_memory()

    def product(self, side: int) -> Optional[Product]:
        # several in a row on other devices, so that transfers hardly count
        repeats = 1 if self.identity.on_host else PRODUCTS_IN_A_ROW
        square = np.full((side, side), 1 / side, np.float32)
        with self._in_cache("products"):
            session = self._new_session(_products(square, repeats), self._options())
            session.run(None, {"square": square})
        return Product(2.0 * repeats * side**3, lambda: session.run(None, {"square": square}))

    def close(self) -> None:
        self._session = None


def _import_runtime(names: Sequence[str]) -> Any:
    """onnxruntime, if it has these providers."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(f"onnx backend: onnxruntime does not import: {error}") from error
    available = onnxruntime.get_available_providers()
    missing = [name for name in names if name not in available]
    if missing:
        raise BackendUnavailable(
            f"onnx backend: onnxruntime {onnxruntime.__version__} has no {missing[0]}; it has {', '.join(available)}"
        )
    return onnxruntime


def _artifact(made: Materials, tower: Tower, batch_size: int) -> Path:
    prefix = made.settings.onnx_prefix
    return made.onnx(tower) if prefix is None else given.file(prefix, tower)


def _ahead(made: Materials, needed: Sequence[Tuple[Tower, int]]) -> None:
    """Export all towers, vision first, before a session is open: so the peak of a run's memory is lowest."""
    for tower in dict.fromkeys(tower for tower, _ in reversed(needed) if made.settings.onnx_prefix is None):
        with suppress(ClipvalError):  # raised again where this tower is needed
            made.onnx(tower)


def _sizes(asked: BackendSettings, towers: Sequence[Tower]) -> Optional[Tuple[int, ...]]:
    return given.sizes(asked.onnx_prefix, towers) if asked.onnx_prefix is not None else None


def _open(made: Materials, asked: Opening) -> Backend:
    assert asked.file is not None
    chosen = made.settings
    options, cache = chosen.onnx_provider_options, None
    if providers.accelerator(chosen.onnx_providers[0]) and "device_id" not in dict(options):
        options = (("device_id", str(asked.device)), *options)
    if chosen.onnx_providers[0] == CANN:
        cache = _cann_cache(made, asked, options)
    return OnnxBackend(
        asked.tower,
        asked.file,
        chosen.onnx_providers,
        chosen.threads,
        options,
        allowed=chosen.allow_cpu_operators,
        cache=cache,
        ready=asked.ready or chosen.onnx_prefix is not None,
    )


def _cann_cache(made: Materials, asked: Opening, options: providers.Options) -> Path:
    """A folder of the work directory for what CANN's provider compiles, keyed by everything it depends on.

    The provider's own key has the subgraph's name and input shapes, but not precision, CANN, chip or weights.
    """
    assert asked.file is not None
    device = int(dict(options)["device_id"])
    return made.store.folder(
        "cann",
        {
            "onnx": [store.sha256(file) for file in given.files(asked.file)],
            "options": [pair for pair in options if pair[0] != "device_id"],
            "precision": providers.precision(CANN, dict(options)),
            "cann": cann.version(),
            "chip": made.settings.soc_version or npu_smi.npu(device).soc_version,
        },
    )


def _judged_as(where: Identity) -> str:
    """CANN's provider uses CANN's compiler on an NPU, like an OM file, so the same bounds apply."""
    return "om" if where.device == CANN else "onnx"


def _origin(asked: BackendSettings) -> str:
    options = ",".join(f"{name}={value}" for name, value in asked.onnx_provider_options)
    if asked.onnx_prefix is None:
        return options
    found = sorted(asked.onnx_prefix.parent.glob(f"{asked.onnx_prefix.name}_*.onnx"))
    files = [file for one in found for file in given.files(one)]
    return " ".join(["ready", *(f"{file.name} {store.once(file)}" for file in files), options])


KIND = Kind(
    _open,
    suffix=".onnx",
    artifact=_artifact,
    ahead=_ahead,
    sizes=_sizes,
    accelerator=lambda asked: providers.accelerator(asked.onnx_providers[0]),
    precision=lambda where: providers.precision_class(where.precision),
    judged_as=_judged_as,
    origin=_origin,
    acl_user=lambda asked: "onnxruntime's CANN provider" if CANN in asked.onnx_providers else "",
)


def _products(square: np.ndarray, repeats: int) -> bytes:
    """An ONNX model that multiplies its input by one matrix `repeats` times and returns the largest element."""
    from onnx import TensorProto, helper, numpy_helper

    names = ["square", *(f"product{n}" for n in range(repeats))]
    nodes = [helper.make_node("MatMul", [name, "weights"], [into]) for name, into in zip(names, names[1:])]
    nodes.append(helper.make_node("ReduceMax", [names[-1]], ["largest"], keepdims=0))
    given = helper.make_tensor_value_info("square", TensorProto.FLOAT, square.shape)
    largest = helper.make_tensor_value_info("largest", TensorProto.FLOAT, [])
    graph = helper.make_graph(nodes, "products", [given], [largest], [numpy_helper.from_array(square, "weights")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=IR_VERSION)
    return bytes(model.SerializeToString())
