"""The ONNX Runtime backend. The only module that imports onnxruntime."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, List, Optional, Sequence, Union

import numpy as np

from clipval.backends import Backend, Identity, Kind, Materials, Opening, Product
from clipval.errors import BackendUnavailable, InputError, one_line
from clipval.towers import Tower

CPU = "CPUExecutionProvider"
# CUDA's provider rounds products to TF32 unless told otherwise (its option since ONNX Runtime 1.18); fp32 is claimed
PROVIDER_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
PRODUCTS_IN_A_ROW = 16
IR_VERSION = 8  # of a model of opset 14: every onnxruntime from 1.11 on reads it
MATRIX_PRODUCTS = ("Attention", "Conv", "Einsum", "Gemm", "MatMul")  # parts of operators' names, fused ones too


class OnnxBackend(Backend):
    """See `clipval.backends.Backend`.

    Args:
        tower: the tower's contract; the file's input and output are held to it.
        file: the ONNX file.
        providers: execution providers in order of preference, full names.
        threads: intra-op threads; None leaves ONNX Runtime's own choice (the physical cores).

    Raises:
        BackendUnavailable: onnxruntime is missing, lacks the provider, or fell back to another one.
        InputError: the file does not load or is not of this tower.
    """

    def __init__(
        self, tower: Tower, file: Path, providers: Sequence[str] = (CPU,), threads: Optional[int] = None
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendUnavailable(f"onnx backend: onnxruntime does not import: {error}") from error
        available = onnxruntime.get_available_providers()
        missing = [name for name in providers if name not in available]
        if missing:
            raise BackendUnavailable(
                f"onnx backend: onnxruntime {onnxruntime.__version__} has no {missing[0]}; "
                f"it has {', '.join(available)}"
            )
        self.tower = tower
        self._file = file
        if providers[0] != CPU:
            self._require_provider(onnxruntime, threads, list(providers))
        started, running = time.perf_counter(), _threads_running()
        options = self._options(onnxruntime, threads)
        self._session: Any = self._load(onnxruntime, options, list(providers))
        self._configured: Callable[[bytes], Any] = lambda model: _session(onnxruntime, model, options, providers)
        self.load_seconds = time.perf_counter() - started
        # the session does not tell how many it started beside the caller's own
        self.threads = threads or (1 + _threads_running() - running if running else None)
        self._check_contract()
        self.identity = Identity("onnx", f"onnxruntime {onnxruntime.__version__}", self._device(providers), "fp32")

    def _options(self, onnxruntime: Any, threads: Optional[int]) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        return options

    def _load(self, onnxruntime: Any, options: Any, providers: List[str]) -> Any:
        try:
            return _session(onnxruntime, str(self._file), options, providers)
        except Exception as error:  # the runtime raises its own classes and RuntimeError
            raise InputError(
                f"ONNX {self._file}: onnxruntime cannot load it ({one_line(error)}). Export it again"
            ) from error

    def _require_provider(self, onnxruntime: Any, threads: Optional[int], providers: List[str]) -> None:
        """Every matrix product runs on the provider that was asked for.

        A session takes the name of a provider that cannot compute the nodes, and computes them on the CPU without a
        word; its profile says where each one ran. Nodes about shapes may be on the CPU: CUDA's provider wants that.
        """
        options = self._options(onnxruntime, threads)
        with TemporaryDirectory() as folder:
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
            self._session = self._load(onnxruntime, options, providers)
            self.run(np.zeros(self.tower.shape(1), self.tower.dtype))
            events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        nodes = [event["args"] for event in events if event.get("cat") == "Node" and "provider" in event["args"]]
        heavy = [node for node in nodes if any(word in node["op_name"] for word in MATRIX_PRODUCTS)]
        strayed = [node for node in heavy if node["provider"] == CPU]
        if strayed:
            raise BackendUnavailable(
                f"onnx backend: {providers[0]} was asked for, but {len(strayed)} of {len(heavy)} matrix products fell "
                f"back to {CPU}; mend the provider's installation or ask for --onnx-providers cpu"
            )

    def _device(self, providers: Sequence[str]) -> str:
        """The provider that computes; a silent fall-back is an error."""
        used = self._session.get_providers()
        if used[0] != providers[0]:
            raise BackendUnavailable(
                f"onnx backend: {providers[0]} was asked for, but the session fell back to {used[0]}; "
                f"mend the provider's installation or ask for --onnx-providers {used[0]}"
            )
        return "cpu" if used[0] == CPU else str(used[0])

    def _check_contract(self) -> None:
        inputs = [(node.name, node.type, list(node.shape[1:])) for node in self._session.get_inputs()]
        outputs = [(node.name, node.type, list(node.shape[1:])) for node in self._session.get_outputs()]
        kind = {"float32": "tensor(float)", "int64": "tensor(int64)"}[self.tower.dtype]
        wanted_in = [(self.tower.input_name, kind, list(self.tower.row_shape))]
        wanted_out = [(self.tower.output_name, "tensor(float)", [self.tower.width])]
        if inputs != wanted_in or outputs != wanted_out:
            raise InputError(
                f"ONNX {self._file}: has inputs {inputs} and outputs {outputs}, the {self.tower.name} tower needs "
                f"{wanted_in} and {wanted_out}. Export it again with clipval export"
            )

    def run(self, rows: np.ndarray) -> np.ndarray:
        try:
            (embedding,) = self._session.run([self.tower.output_name], {self.tower.input_name: rows})
        except Exception as error:  # the runtime raises its own classes and RuntimeError
            raise InputError(
                f"ONNX {self._file}: onnxruntime cannot run it ({one_line(error)}). Export it again"
            ) from error
        return np.asarray(embedding)

    def product(self, side: int) -> Optional[Product]:
        # off the processor several in a row, so that transfers hardly count
        repeats = 1 if self.identity.on_host else PRODUCTS_IN_A_ROW
        square = np.full((side, side), 1 / side, np.float32)
        session = self._configured(_products(square, repeats))
        return Product(2.0 * repeats * side**3, lambda: session.run(None, {"square": square}))

    def close(self) -> None:
        self._session = None


def _artifact(made: Materials, tower: Tower, batch_size: int) -> Path:
    return made.onnx(tower)


def _open(made: Materials, asked: Opening) -> Backend:
    assert asked.file is not None
    return OnnxBackend(asked.tower, asked.file, made.settings.onnx_providers, made.settings.threads)


KIND = Kind(_open, suffix=".onnx", artifact=_artifact)


def _session(onnxruntime: Any, model: Union[str, bytes], options: Any, providers: Sequence[str]) -> Any:
    configured = [(name, PROVIDER_OPTIONS[name]) if name in PROVIDER_OPTIONS else name for name in providers]
    return onnxruntime.InferenceSession(model, options, providers=configured)


def _products(square: np.ndarray, repeats: int) -> bytes:
    """An ONNX model that multiplies its input by one matrix so many times, and gives the largest element."""
    from onnx import TensorProto, helper, numpy_helper

    names = ["square", *(f"product{n}" for n in range(repeats))]
    nodes = [helper.make_node("MatMul", [name, "weights"], [into]) for name, into in zip(names, names[1:])]
    nodes.append(helper.make_node("ReduceMax", [names[-1]], ["largest"], keepdims=0))
    given = helper.make_tensor_value_info("square", TensorProto.FLOAT, square.shape)
    largest = helper.make_tensor_value_info("largest", TensorProto.FLOAT, [])
    graph = helper.make_graph(nodes, "products", [given], [largest], [numpy_helper.from_array(square, "weights")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=IR_VERSION)
    found: bytes = model.SerializeToString()
    return found


def _threads_running() -> int:
    """Threads of this process; 0 where the system does not tell."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 0
