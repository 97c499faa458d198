"""Faults of the exported ONNX files: their weights, their graph, and what they say they are."""

from __future__ import annotations

import copy
from typing import Any, Callable, Dict

import numpy as np

from clipval import chain, export
from tests.faults.table import fault


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
    """Change one matrix of the middle block; the last would do less, as normalisation follows it."""
    held = {one.name: one for one in graph.graph.initializer}
    used = [node.input[1] for node in graph.graph.node if node.op_type == "MatMul" and node.input[1] in held]
    chosen = held[used[len(used) // 2]]
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


@fault("ONNX of other weights that says it is of these", "parity/onnx/vision", "minimum cosine")
def other_weights() -> None:
    exported(lambda onnx, graph: weights(onnx, graph, lambda values: values[::-1].copy()), "vision")


@fault("one layer's weights in 8 bits", "parity/onnx/vision", "minimum cosine")
def int8_weights() -> None:
    def rounded(values: np.ndarray) -> np.ndarray:
        step = np.abs(values).max() / 127
        return np.asarray(np.round(values / step) * step, np.float32)

    exported(lambda onnx, graph: weights(onnx, graph, rounded), "vision")


@fault("ArgMax on tokens in int64", "artifact/onnx/text", "must take tokens cast to int32")
def int64_argmax() -> None:
    def change(onnx: Any, graph: Any) -> None:
        producers = {node.output[0]: node for node in graph.graph.node}
        (node,) = [node for node in graph.graph.node if node.op_type == "ArgMax"]
        node.input[0] = producers[node.input[0]].input[0]

    exported(change)


def module(change: Callable[[Any], Any], tower: str = "text") -> None:
    """Change the model of one tower as it is exported, and only there."""
    real = export.encoder

    def encoder(loaded: Any, one: Any) -> Any:
        if one.name == tower:
            loaded = loaded._replace(module=copy.deepcopy(loaded.module))
            change(loaded.module)
        return real(loaded, one)

    export.encoder = encoder  # type: ignore[attr-defined]


@fault("attention mask lost in the text export", "parity/onnx/text", "minimum cosine")
def mask_lost() -> None:
    module(lambda clip: clip.attn_mask.zero_())


@fault("positions shifted by one in the text export", "parity/onnx/text", "minimum cosine")
def positions_shifted() -> None:
    module(lambda clip: clip.positional_embedding.data.copy_(clip.positional_embedding.data.roll(1, 0)))


@fault("another epsilon in the layer norms of the vision export", "parity/onnx/vision", "minimum cosine")
def layer_norm_epsilon() -> None:
    def change(clip: Any) -> None:
        for one in clip.modules():
            if hasattr(one, "eps"):
                one.eps = 1e-3

    module(change, "vision")


@fault("QuickGELU for GELU in the text export", "parity/onnx/text", "minimum cosine")
def quick_gelu() -> None:
    def change(clip: Any) -> None:
        import torch
        from open_clip.transformer import QuickGELU

        for block in clip.transformer.resblocks:
            for name, child in block.mlp.named_children():
                if isinstance(child, torch.nn.GELU):
                    setattr(block.mlp, name, QuickGELU())

    module(change)


@fault("an epsilon of 1e-4 in one layer norm of the text export", "parity/onnx/text", "minimum cosine")
def one_epsilon() -> None:
    def change(onnx: Any, graph: Any) -> None:
        values = [node.attribute[0].t for node in graph.graph.node if node.op_type == "Constant"]
        epsilons = [one for one in values if abs(onnx.numpy_helper.to_array(one).ravel()[:1].sum() - 1e-5) < 1e-8]
        epsilons[2].CopyFrom(onnx.numpy_helper.from_array(np.array(1e-4, np.float32), epsilons[2].name))

    exported(change)


@fault("12 bits for the weights of one layer of the vision tower", "parity/onnx/vision", "minimum cosine")
def int12_layer() -> None:
    def rounded(values: np.ndarray) -> np.ndarray:
        step = np.abs(values).max() / 2047
        return np.asarray(np.round(values / step) * step, np.float32)

    exported(lambda onnx, graph: weights(onnx, graph, rounded), "vision")


ROW = 12_345  # of the table of tokens; no caption uses it


def change_table(onnx: Any, graph: Any, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the table of tokens of the text tower's export."""
    (held,) = [one for one in graph.graph.initializer if one.dims and one.dims[0] > 40000]
    held.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(held).copy()), held.name))


def with_noise(table: np.ndarray, row: int, size: float) -> np.ndarray:
    """The table with noise on one row."""
    table[row] += size * np.random.default_rng(0).normal(size=table.shape[1]).astype(table.dtype)
    return table


def exchanged(table: np.ndarray) -> np.ndarray:
    """The table with two rows that no caption uses in each other's place."""
    table[[20_000, 30_000]] = table[[30_000, 20_000]]
    return table


@fault("two rows of the table of tokens exchanged", "probe/onnx/text", "of all ids'", "repeat with --probe-seed")
def tokens_exchanged() -> None:
    exported(lambda onnx, graph: change_table(onnx, graph, exchanged))


@fault("one row of the table of tokens off by a thousandth", "probe/onnx/text", "of all ids'",
       "repeat with --probe-seed")  # fmt: skip
def token_off() -> None:
    exported(lambda onnx, graph: change_table(onnx, graph, lambda table: with_noise(table, ROW, 1e-3)))
