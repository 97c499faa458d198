"""Faults of what computes: a backend's results, and what the accuracy run makes of them."""

from __future__ import annotations

import sys
from typing import Any, Callable, Dict, Type

import numpy as np

from clipval import chain, embeddings
from clipval.backends.onnx import OnnxBackend
from clipval.backends.pytorch import PytorchBackend
from tests.faults.table import ACCURACY, REBUILD, SEEDED, fault


def output(change: Callable[[np.ndarray], np.ndarray], tower: str = "text", backend: Type[Any] = OnnxBackend) -> None:
    """Change what a backend gives for one tower."""
    real = backend.run

    def run(self: Any, rows: np.ndarray) -> np.ndarray:
        found = real(self, rows)
        return np.asarray(change(found.copy()), np.float32) if self.tower.name == tower else found

    backend.run = run


@fault("one row of each batch destroyed", "parity/onnx/text", "minimum cosine", "worst samples")
def row_destroyed() -> None:
    output(lambda rows: np.concatenate([-rows[:1], rows[1:]]))


@fault("noise of 1e-4 on each element of the vision embeddings", "parity/onnx/vision", "minimum cosine")
def noise_on_embeddings() -> None:
    output(lambda rows: rows + np.random.default_rng(0).normal(0, 1e-4, rows.shape), "vision")


@fault("embeddings rounded to fp16 in an fp32 backend", "parity/onnx/text", "max |difference|", "sample")
def rounded_to_fp16() -> None:
    output(lambda rows: rows.astype(np.float16).astype(np.float32))


@fault("NaN in one element", "values/onnx/text", "NaN, Inf or +-65504", "first bad sample")
def nan_in_one_sample() -> None:
    def change(rows: np.ndarray) -> np.ndarray:
        if rows.shape[0] > 1:
            rows[1, 7] = np.nan
        return rows

    output(change)


@fault("fp16 overflow clamped at 65504", "values/onnx/vision", "NaN, Inf or +-65504", "first bad sample")
def fp16_overflow() -> None:
    output(lambda rows: np.clip(rows * 1e7, -65504, 65504), "vision")


@fault("normalisation missing on one side", "values/onnx/text", "|L2 norm - 1|", "sample")
def not_normalised() -> None:
    output(lambda rows: rows * 9.7)


@fault("embeddings scaled by 1 %", "values/onnx/vision", "|L2 norm - 1|", "sample")
def scaled() -> None:
    output(lambda rows: rows * 1.01, "vision")


@fault("sign of the embeddings flipped", "parity/onnx/vision", "minimum cosine")
def sign_flipped() -> None:
    output(lambda rows: -rows, "vision")


@fault("every text embedding equal", "distinct/onnx/text", "inputs with one embedding")
def every_text_equal() -> None:
    output(lambda rows: np.repeat(np.eye(1, 512), len(rows), axis=0))


@fault("every picture equal, of seeded weights", "distinct/onnx/vision", "inputs with one embedding", arguments=SEEDED)
def every_picture_equal() -> None:
    output(lambda rows: np.repeat(np.eye(1, 512), len(rows), axis=0), "vision")


@fault("two pictures equal, of seeded weights", "distinct/onnx/vision", "inputs with one embedding", arguments=SEEDED)
def two_pictures_equal() -> None:
    output(lambda rows: np.concatenate([rows[:1], rows[:1], rows[2:]])[: len(rows)], "vision")


@fault("an embedding takes a hundredth of the others in its batch", "invariance/onnx/text", "|difference| reordered")
def neighbours_leak() -> None:
    output(lambda rows: rows + 0.01 * rows.mean(axis=0))


@fault("results of the first batch handed out again and again", "parity/onnx/text", "minimum cosine")
def cached_results() -> None:
    kept: Dict[int, np.ndarray] = {}
    output(lambda rows: kept.setdefault(len(rows), rows))


def embedded(change: Callable[[embeddings.Embeddings], embeddings.Embeddings], tower: str = "text") -> None:
    """Change what the accuracy run of the ONNX backend collects for one tower."""
    real = chain.embed

    def embed(backend: Any, ids: Any, rows: Any, batch_size: int) -> embeddings.Embeddings:
        found = real(backend, ids, rows, batch_size)
        whole = len(ids) > 32 and backend.identity.name == "onnx" and backend.tower.name == tower
        return change(found) if whole else found

    chain.embed = embed  # type: ignore[attr-defined]


@fault("last partial batch dropped", "values/onnx/text", "|L2 norm - 1|")
def last_batch_dropped() -> None:
    def change(found: embeddings.Embeddings) -> embeddings.Embeddings:
        found.values[-4:] = 0
        return found

    embedded(change)


@fault("padded rows kept", "values/onnx/text", "ids, count and width")
def padding_kept() -> None:
    def change(found: embeddings.Embeddings) -> embeddings.Embeddings:
        padded = np.concatenate([found.values, found.values[-4:]])
        return embeddings.Embeddings((*found.ids, *(f"pad{n}" for n in range(4))), padded)

    embedded(change)


@fault("results in directory order instead of the order of ids", "parity/onnx/vision", "minimum cosine")
def directory_order() -> None:
    embedded(lambda found: embeddings.Embeddings(found.ids, found.values[np.argsort(found.ids)]), "vision")


@fault("embeddings of another data set", "values/onnx/vision", "ids, count and width")
def another_data_set() -> None:
    def change(found: embeddings.Embeddings) -> embeddings.Embeddings:
        other = np.random.default_rng(1).normal(size=found.values.shape).astype(np.float32)
        return embeddings.Embeddings(tuple(f"x{name}" for name in found.ids), other)

    embedded(change, "vision")


@fault("results of a batch handed to the wrong samples of it", "parity/onnx/vision", "minimum cosine", "worst samples")
def rows_rolled() -> None:
    output(lambda rows: np.roll(rows, 1, axis=0), "vision")


@fault("the last sample of all destroyed", "parity/onnx/text", "minimum cosine", "worst samples")
def last_sample() -> None:
    def change(found: embeddings.Embeddings) -> embeddings.Embeddings:
        found.values[-1] = -found.values[-1]
        return found

    embedded(change)


@fault("wrong in batches of one only", "invariance/onnx/text", "|difference| in batches of 1", "sample")
def batch_of_one() -> None:
    output(lambda rows: np.roll(rows, 1, axis=1) if len(rows) == 1 else rows)


@fault("NaN in the reference", "values/pytorch/vision", "NaN, Inf or +-65504", "first bad sample", arguments=REBUILD)
def nan_in_reference() -> None:
    def change(rows: np.ndarray) -> np.ndarray:
        rows[0, 3] = np.nan
        return rows

    output(change, "vision", PytorchBackend)


@fault("normalisation missing in the reference", "values/pytorch/text", "|L2 norm - 1|", arguments=REBUILD)
def reference_not_normalised() -> None:
    output(lambda rows: rows * 3, "text", PytorchBackend)


@fault("the device is lost after a few batches", "parity/onnx/text", "device lost")
def device_lost() -> None:
    real, calls = OnnxBackend.run, []

    def run(self: OnnxBackend, rows: np.ndarray) -> np.ndarray:
        calls.append(rows.shape)
        if len(calls) > 9:
            raise RuntimeError("device lost")
        return real(self, rows)

    OnnxBackend.run = run  # type: ignore[method-assign]


@fault("a runtime that ends the process as if all were well", "parity/onnx/text", "SystemExit")
def runtime_exits() -> None:
    OnnxBackend.run = lambda self, rows: sys.exit(0)  # type: ignore[method-assign]


@fault("the provider that was asked for is not there", "artifact/onnx/vision", "has no CUDAExecutionProvider",
       arguments=(*ACCURACY, "--onnx-providers=cuda"))  # fmt: skip
def provider_missing() -> None:
    return None


@fault("the provider that was asked for fell back to another", "artifact/onnx/vision",
       "fell back to CPUExecutionProvider",
       arguments=(*ACCURACY, "--onnx-providers=AzureExecutionProvider"))  # fmt: skip
def provider_fell_back() -> None:
    import onnxruntime

    real = onnxruntime.InferenceSession

    def session(file: str, options: Any, providers: Any, **_: Any) -> Any:
        return real(file, options, providers=["CPUExecutionProvider"])

    onnxruntime.get_available_providers = lambda: ["AzureExecutionProvider", "CPUExecutionProvider"]
    onnxruntime.InferenceSession = session


@fault("a provider that leaves every product to the CPU", "artifact/onnx/vision", "fell back to CPUExecutionProvider",
       arguments=(*ACCURACY, "--onnx-providers=AzureExecutionProvider"))  # fmt: skip
def provider_computes_nothing() -> None:
    return None


@fault("onnxruntime is not installed", "artifact/onnx/vision", "onnxruntime does not import")
def no_onnxruntime() -> None:
    sys.modules["onnxruntime"] = None  # type: ignore[assignment]


@fault("a fast backend that does not compute", "throughput/onnx/text/8", "BAD_OUTPUT",
       arguments=("-m", "perf", "--batch-sizes=8"))  # fmt: skip
def not_computing() -> None:
    zeros = np.zeros((8, 512), np.float32)
    zeros[:, 0] = 1
    OnnxBackend.run = lambda self, rows: zeros[: len(rows)].copy()  # type: ignore[method-assign]


@fault("rows of a large batch beyond the eighth are copies of the first", "throughput/onnx/text/16", "BAD_OUTPUT",
       arguments=("-m", "perf", "--batch-sizes=16"))  # fmt: skip
def large_batch() -> None:
    output(lambda rows: np.concatenate([rows[:8], np.repeat(rows[:1], max(0, len(rows) - 8), axis=0)]))


@fault("a backend that knows the batches it is timed with", "throughput/onnx/text/8", "BAD_OUTPUT",
       arguments=("-m", "perf", "--batch-sizes=8"))  # fmt: skip
def known_batches() -> None:
    real, kept = OnnxBackend.run, {}  # type: ignore[var-annotated]

    def run(self: OnnxBackend, rows: np.ndarray) -> np.ndarray:
        key = (self.tower.name, rows.ctypes.data, len(rows))
        if key not in kept:
            kept[key] = (rows, real(self, rows))  # the rows too, so that no other array takes their place
        found: np.ndarray = kept[key][1]
        return found.copy()

    OnnxBackend.run = run  # type: ignore[method-assign]
