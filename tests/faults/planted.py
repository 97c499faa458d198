"""A pytest plugin that plants one fault where it would really occur: -p tests.faults.planted, CLIPVAL_FAULT=<name>.

Each fault names the gate that is meant for it and words that the failure must say. Without it nothing changes.
CLIPVAL_BUILD_LOG=<file> notes each artifact that is built, CLIPVAL_ORDER=<seed> shuffles the tests, and
CLIPVAL_DISK_FULL=<kind> fills the disk while such an artifact is made.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import sys
from typing import Any, Callable, Dict, NamedTuple, Tuple

import numpy as np
import pytest

from clipval import chain, embeddings, export, model, preprocess, store
from clipval.backends.onnx import OnnxBackend
from clipval.datasets import karpathy

ACCURACY = ("-m", "accuracy")


class Fault(NamedTuple):
    """One fault.

    Attributes:
        says: what is wrong, for the documentation.
        gate: prefix of the gate that is meant for it; words: must stand in the output of the failed run.
        plant: replaces what must be replaced; arguments: of the run.
    """

    says: str
    gate: str
    words: Tuple[str, ...]
    plant: Callable[[], None]
    arguments: Tuple[str, ...] = ACCURACY


FAULTS: Dict[str, Fault] = {}


def fault(says: str, gate: str, *words: str, arguments: Tuple[str, ...] = ACCURACY) -> Callable[[Any], Any]:
    def add(plant: Callable[[], None]) -> Callable[[], None]:
        FAULTS[plant.__name__] = Fault(says, gate, words, plant, arguments)
        return plant

    return add


def output(change: Callable[[np.ndarray], np.ndarray], tower: str = "text") -> None:
    """Change what ONNX Runtime gives for one tower."""
    real = OnnxBackend.run

    def run(self: OnnxBackend, rows: np.ndarray) -> np.ndarray:
        found = real(self, rows)
        return np.asarray(change(found.copy()), np.float32) if self.tower.name == tower else found

    OnnxBackend.run = run  # type: ignore[method-assign]


@fault("one row of each batch destroyed", "parity/onnx/text", "minimum cosine", "worst samples")
def row_destroyed() -> None:
    output(lambda rows: np.concatenate([-rows[:1], rows[1:]]))


@fault("noise of 1e-4 on each element of the vision embeddings", "parity/onnx/vision", "minimum cosine")
def noise_on_embeddings() -> None:
    output(lambda rows: rows + np.random.default_rng(0).normal(0, 1e-4, rows.shape), "vision")


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


@fault("an embedding takes a hundredth of its neighbours'", "invariance/onnx/text", "|difference| reordered")
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


def exported(change: Callable[[Any, Any], None], tower: str = "text") -> None:
    """Change the ONNX model of one tower before it is published; `change(onnx, model)` edits it."""
    real = export.export

    def run(loaded: Any, one: Any, file: Any, *, opset: int, metadata: Dict[str, str]) -> None:
        real(loaded, one, file, opset=opset, metadata=metadata)
        if one.name == tower:
            import onnx

            graph = onnx.load(str(file))
            change(onnx, graph)
            onnx.save(graph, str(file))

    export.export = run  # type: ignore[assignment]


def weights(onnx: Any, graph: Any, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the largest matrix of the transformer's blocks: one layer's."""
    blocks = [one for one in graph.graph.initializer if len(one.dims) == 2 and max(one.dims) < 5000]
    chosen = max(blocks, key=lambda one: np.prod(one.dims))
    chosen.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(chosen).copy()), chosen.name))


def noise(values: np.ndarray) -> np.ndarray:
    drawn = np.random.default_rng(0).normal(0, 0.01, values.shape)
    return np.asarray(values * (1 + drawn), np.float32)


@fault("noise of 1 % on the weights of one layer of the vision tower", "parity/onnx/vision", "minimum cosine")
def weight_noise_vision() -> None:
    exported(lambda onnx, graph: weights(onnx, graph, noise), "vision")


@fault("noise of 1 % on the weights of one layer of the text tower", "parity/onnx/text", "minimum cosine")
def weight_noise_text() -> None:
    exported(lambda onnx, graph: weights(onnx, graph, noise))


@fault("one layer zeroed", "parity/onnx/vision", "minimum cosine")
def layer_zeroed() -> None:
    exported(lambda onnx, graph: weights(onnx, graph, np.zeros_like), "vision")


@fault("weights rounded to bfloat16", "parity/onnx/vision", "minimum cosine")
def bfloat16_weights() -> None:
    def rounded(values: np.ndarray) -> np.ndarray:
        return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)

    exported(lambda onnx, graph: weights(onnx, graph, rounded), "vision")


@fault("pooling at the wrong position (ArgMin for ArgMax)", "parity/onnx/text", "minimum cosine")
def wrong_pooling() -> None:
    def change(onnx: Any, graph: Any) -> None:
        for node in graph.graph.node:
            node.op_type = "ArgMin" if node.op_type == "ArgMax" else node.op_type

    exported(change)


@fault("ArgMax on tokens in fp16, where the last ids are one value", "distinct/onnx/text", "inputs with one embedding")
def fp16_argmax() -> None:
    def change(onnx: Any, graph: Any) -> None:
        (node,) = [node for node in graph.graph.node if node.op_type == "ArgMax"]
        for n, kind in enumerate((onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.INT32)):
            cast = onnx.helper.make_node("Cast", [node.input[0]], [f"rounded{n}"], to=kind)
            graph.graph.node.insert(list(graph.graph.node).index(node), cast)
            node.input[0] = f"rounded{n}"

    exported(change)


@fault("attention mask lost in the text export", "parity/onnx/text", "minimum cosine")
def mask_lost() -> None:
    real = export.encoder

    def encoder(loaded: Any, tower: Any) -> Any:
        if tower.name == "text":
            import copy

            loaded = loaded._replace(module=copy.deepcopy(loaded.module))
            loaded.module.attn_mask.zero_()
        return real(loaded, tower)

    export.encoder = encoder  # type: ignore[attr-defined]


@fault("stale ONNX of other weights", "artifact/onnx/vision", "of the weights under test")
def stale_onnx() -> None:
    real = export.export

    def run(loaded: Any, tower: Any, file: Any, *, opset: int, metadata: Dict[str, str]) -> None:
        real(loaded, tower, file, opset=opset, metadata={**metadata, "clipval.weights": "0" * 64})

    export.export = run  # type: ignore[assignment]


@fault("towers swapped", "artifact/onnx/text", "the text tower needs")
def towers_swapped() -> None:
    real = chain.Chain.onnx

    def onnx(self: chain.Chain, tower: Any) -> Any:
        other = {"vision": "text", "text": "vision"}[tower.name]
        return real(self, self.towers[other])

    chain.Chain.onnx = onnx  # type: ignore[method-assign]


def transformed(change: Callable[[Any], Any], after: bool = True) -> None:
    """Change pixels inside the model's own transform, so that every stage sees the same wrong ones."""
    real = model.load

    def load(*arguments: Any) -> Any:
        loaded = real(*arguments)
        whole = loaded.transform
        wrong = (lambda image: change(whole(image))) if after else (lambda image: whole(change(image)))
        return loaded._replace(transform=wrong)

    model.load = load  # type: ignore[assignment]


@fault("BGR for RGB", "prepared/data/vision", "|pixel - the spec's|", "sample")
def bgr() -> None:
    transformed(lambda pixels: pixels.flip(0))


@fault("mean and std of another model", "prepared/data/vision", "|pixel - the spec's|", "sample")
def other_mean() -> None:
    transformed(lambda pixels: pixels * 0.54 - 0.03)


@fault("resize without antialias", "prepared/data/vision", "|pixel - the spec's|", "sample")
def no_antialias() -> None:
    def change(image: Any) -> Any:
        from PIL import Image

        short = min(image.size)
        size = tuple(int(224 * edge / short) for edge in image.size)
        return image.resize(size, Image.Resampling.NEAREST)

    transformed(change, after=False)


@fault("crop off by one pixel", "prepared/data/vision", "|pixel - the spec's|", "sample")
def crop_off_by_one() -> None:
    transformed(lambda pixels: pixels.roll(1, dims=2))


@fault("images mirrored", "prepared/data/vision", "|pixel - the spec's|", "sample")
def mirrored() -> None:
    transformed(lambda pixels: pixels.flip(2))


@fault("constant images", "prepared/data/vision", "|pixel - the spec's|", "distinct/pytorch/vision")
def constant_images() -> None:
    transformed(lambda pixels: pixels * 0)


def prepared_tokens(change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the tokens that preprocessing writes."""
    real = preprocess.tokens

    def tokens(*arguments: Any) -> np.ndarray:
        return change(real(*arguments))

    preprocess.tokens = tokens  # type: ignore[assignment]


@fault("end of text lost from the tokens", "prepared/data/text", "tokens that differ", "sample")
def end_of_text_lost() -> None:
    prepared_tokens(lambda rows: np.where(rows == 49407, 0, rows))


@fault("one caption's tokens replaced by another's", "prepared/data/text", "tokens that differ", "sample")
def one_caption_replaced() -> None:
    prepared_tokens(lambda rows: np.concatenate([rows[:9], rows[10:11], rows[10:]]))


def dataset(change: Callable[[Any], Any]) -> None:
    """Change what the reader gives on."""
    real = karpathy.read

    def read(*arguments: Any, **more: Any) -> Any:
        return change(real(*arguments, **more))

    karpathy.read = read  # type: ignore[assignment]


@fault("captions shuffled by one", "recall/pytorch/image_retrieval_recall@5", "queries")
def captions_shuffled() -> None:
    dataset(lambda data: dataclasses.replace(data, captions=(*data.captions[1:], data.captions[0])))


@fault("captions cut at the first comma", "prepared/data/text", "captions that differ")
def captions_cut() -> None:
    dataset(lambda data: dataclasses.replace(data, captions=tuple(one.split(",")[0] for one in data.captions)))


@fault("each image's file is the next one's", "recall/pytorch/text_retrieval_recall@5", "queries")
def images_shifted() -> None:
    dataset(lambda data: dataclasses.replace(data, image_paths=(*data.image_paths[1:], data.image_paths[0])))


@fault("two captions with one id", "recall/pytorch/image_retrieval_recall@5", "different")
def duplicate_ids() -> None:
    def change(data: Any) -> Any:
        object.__setattr__(data, "caption_ids", (data.caption_ids[1], *data.caption_ids[1:]))
        return data

    dataset(change)


@fault("the provider that was asked for is not there", "parity/onnx/text", "has no CUDAExecutionProvider",
       arguments=(*ACCURACY, "--onnx-providers=cuda"))  # fmt: skip
def provider_missing() -> None:
    return None


@fault("the provider that was asked for fell back to another", "parity/onnx/text", "fell back to CPUExecutionProvider",
       arguments=(*ACCURACY, "--onnx-providers=AzureExecutionProvider"))  # fmt: skip
def provider_fell_back() -> None:
    import onnxruntime

    real = onnxruntime.InferenceSession

    def session(file: str, options: Any, providers: Any) -> Any:
        return real(file, options, providers=["CPUExecutionProvider"])

    onnxruntime.get_available_providers = lambda: ["AzureExecutionProvider", "CPUExecutionProvider"]
    onnxruntime.InferenceSession = session


@fault("onnxruntime is not installed", "parity/onnx/text", "onnxruntime does not import")
def no_onnxruntime() -> None:
    sys.modules["onnxruntime"] = None  # type: ignore[assignment]


@fault("a gate that is skipped", "parity/onnx/text", "a gate must not be skipped")
def skipped_gate() -> None:
    return None  # done when tests are collected


@fault("a gate that is not collected", "parity/onnx/text", "not evaluated",
       arguments=(*ACCURACY, "--backends=pytorch,onnx"))  # fmt: skip
def lost_gate() -> None:
    return None  # done when tests are collected


@fault("an empty run", "prepared/data/vision", "not evaluated",
       arguments=(*ACCURACY, "--backends=pytorch,onnx", "-k", "nothing"))  # fmt: skip
def empty_run() -> None:
    return None


@fault("a fast backend that does not compute", "throughput/onnx/text/8", "BAD_OUTPUT",
       arguments=("-m", "perf", "--batch-sizes=8"))  # fmt: skip
def not_computing() -> None:
    zeros = np.zeros((8, 512), np.float32)
    zeros[:, 0] = 1
    OnnxBackend.run = lambda self, rows: zeros[: len(rows)].copy()  # type: ignore[method-assign]


def log_builds(file: str) -> None:
    real = store.Store._build

    def build(self: store.Store, folder: Any, key: Any, make: Any) -> None:
        with open(file, "a", encoding="utf-8") as stream:
            stream.write(f"{folder.parent.name}/{folder.name}\n")
        real(self, folder, key, make)

    store.Store._build = build  # type: ignore[method-assign]


def fill_disk(kind: str) -> None:
    """Let the build of one kind of artifact write something and then find the disk full."""
    real = store.Store._build

    def build(self: store.Store, folder: Any, key: Any, make: Any) -> None:
        def half(scratch: Any) -> None:
            (scratch / "half").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch / "half"))

        real(self, folder, key, half if key["kind"] == kind else make)

    store.Store._build = build  # type: ignore[method-assign]


def pytest_configure(config: Any) -> None:
    name, log = os.environ.get("CLIPVAL_FAULT"), os.environ.get("CLIPVAL_BUILD_LOG")
    if name:
        FAULTS[name].plant()
    if log:
        log_builds(log)
    if "CLIPVAL_DISK_FULL" in os.environ:
        fill_disk(os.environ["CLIPVAL_DISK_FULL"])


def pytest_collection_modifyitems(items: Any) -> None:
    name, order = os.environ.get("CLIPVAL_FAULT"), os.environ.get("CLIPVAL_ORDER")
    if order:
        random.Random(int(order)).shuffle(items)
    parity = [item for item in items if item.name.startswith("test_parity[")]
    if name == "skipped_gate":
        for item in parity:
            item.add_marker(pytest.mark.skip(reason="no time"))
    elif name == "lost_gate":
        items[:] = [item for item in items if item not in parity]
