"""Faults of one part of one block in an exported ONNX graph, each with the module and the words that must name it.

Names are those that the TorchScript exporter gives the shipped small CLIP; the block is the middle one of three.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import numpy as np

VISION, TEXT = "visual.transformer.resblocks.1", "transformer.resblocks.1"


class Planted(NamedTuple):
    """One fault: the tower, the module it must be located in, words its finding must say, and how it is planted."""

    tower: str
    module: str
    words: str
    change: Callable[[Any], None]


class Graph:
    """An ONNX model that faults are planted in."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.nodes = {node.name: node for node in model.graph.node}

    def node(self, name: str) -> Any:
        return self.nodes[name]

    def weight(self, name: str, place: int) -> np.ndarray:
        from onnx import numpy_helper

        (held,) = [one for one in self.model.graph.initializer if one.name == self.node(name).input[place]]
        return np.array(numpy_helper.to_array(held))

    def set_weight(self, name: str, place: int, values: np.ndarray) -> None:
        """Under a name of its own: exporters share equal weights between nodes."""
        from onnx import numpy_helper

        own = f"planted_{len(self.model.graph.initializer)}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), own))
        self.node(name).input[place] = own

    def constant(self, name: str, place: int, factor: float) -> None:
        """Multiply a scalar constant that a node takes."""
        from onnx import numpy_helper

        source = self.node(name).input[place]
        (made,) = [node for node in self.model.graph.node if source in node.output]
        held = numpy_helper.to_array(made.attribute[0].t)
        self.set_weight(name, place, np.asarray(held * factor, held.dtype))

    def bypass(self, name: str, place: int) -> None:
        """Whoever takes a node's result takes one of its inputs."""
        node = self.node(name)
        for other in self.model.graph.node:
            other.input[:] = [node.input[place] if one == node.output[0] else one for one in other.input]
        self.model.graph.node.remove(node)

    def after(self, name: str, nodes: Callable[[str, str], List[Any]]) -> None:
        """Put nodes behind one: `nodes(old result, new result)`."""
        node = self.node(name)
        old, new = node.output[0], f"{node.output[0]}_planted"
        for other in self.model.graph.node:
            other.input[:] = [new if one == old else one for one in other.input]
        place = list(self.model.graph.node).index(node) + 1
        for shift, one in enumerate(nodes(old, new)):
            self.model.graph.node.insert(place + shift, one)

    def cast(self, name: str, kind: int) -> None:
        """Round a node's result to another type and back."""
        from onnx import TensorProto, helper

        narrow = f"{name}_narrow"
        self.after(
            name,
            lambda old, new: [
                helper.make_node("Cast", [old], [narrow], name=f"{name}/to_narrow", to=kind),
                helper.make_node("Cast", [narrow], [new], name=f"{name}/to_wide", to=TensorProto.FLOAT),
            ],
        )


PLANTED: Dict[str, Planted] = {}


def planted(module: str, words: str, tower: str = "vision") -> Callable[[Any], Any]:
    def add(change: Callable[[Graph], None]) -> Callable[[Graph], None]:
        PLANTED[change.__name__] = Planted(tower, module, words, change)
        return change

    return add


def at(module: str, node: str) -> str:
    """`/visual/transformer/resblocks.1/mlp/c_fc/MatMul`."""
    head, _, rest = module.partition("resblocks.")
    number, _, tail = rest.partition(".")
    return "/" + "/".join([*head.strip(".").split("."), f"resblocks.{number}", *filter(None, tail.split(".")), node])


@planted(f"{VISION}.mlp.c_fc", "differs from visual.transformer.resblocks.1.mlp.c_fc.weight")
def weights_of_one_block(graph: Graph) -> None:
    name = at(f"{VISION}.mlp.c_fc", "MatMul")
    held = graph.weight(name, 1)
    graph.set_weight(name, 1, held * (1 + np.random.default_rng(0).normal(0, 0.01, held.shape)).astype(np.float32))


NORM = at(f"{VISION}.ln_2", "Add")  # adds epsilon


@planted(f"{VISION}.ln_2", "epsilon is 0.001, PyTorch's is 1e-05")
def epsilon_of_one_norm(graph: Graph) -> None:
    graph.constant(NORM, 1, 100.0)


@planted(f"{TEXT}.mlp.gelu", "x sigmoid(1.702 x) form of GELU", "text")
def form_of_gelu(graph: Graph) -> None:
    from onnx import helper

    path = f"{TEXT}.mlp.gelu"
    first = graph.node(at(path, "Div")).input[0]
    last = graph.node(at(path, "Mul_1"))
    graph.set_weight(at(path, "Mul_1"), 1, np.array(1.702, np.float32))
    number = list(graph.model.graph.node).index(last)
    slope, output = last.input[1], last.output[0]
    graph.model.graph.node.remove(last)
    for shift, one in enumerate(
        [
            helper.make_node("Mul", [first, slope], ["quick_scaled"], name=at(path, "Mul_quick")),
            helper.make_node("Sigmoid", ["quick_scaled"], ["quick_gate"], name=at(path, "Sigmoid")),
            helper.make_node("Mul", [first, "quick_gate"], [output], name=at(path, "Mul_gate")),
        ]
    ):
        graph.model.graph.node.insert(number + shift, one)


@planted(f"{TEXT}.attn", "PyTorch's add in transformer.resblocks.1.attn has no counterpart", "text")
def mask_missing(graph: Graph) -> None:
    node = graph.node(at(f"{TEXT}.attn", "Softmax"))
    (added,) = [one for one in graph.model.graph.node if node.input[0] in one.output]
    made = {name for one in graph.model.graph.node if one.op_type == "MatMul" for name in one.output}
    graph.bypass(added.name, 0 if added.input[0] in made else 1)


@planted(f"{VISION}.attn", "attn", "vision")
def head_count_of_one_attention(graph: Graph) -> None:
    """Two heads of 64 for four of 32: the same shapes outside, other products inside."""
    from onnx import helper

    path = f"{VISION}.attn"
    for name in ("Mul_1", "Mul_2", "Reshape_8"):  # query, transposed key, value: [batch, 4, 50, 32] each
        node = graph.node(at(path, name))
        order = [0, 2, 1, 3] if name != "Mul_2" else [0, 3, 1, 2]
        back = [0, 2, 1, 3] if name != "Mul_2" else [0, 2, 3, 1]

        def nodes(old: str, new: str, order: List[int] = order, back: List[int] = back, name: str = name) -> List[Any]:
            from onnx import numpy_helper

            shape = numpy_helper.from_array(np.array([0, 0, 2, 64]), f"heads_{name}")
            graph.model.graph.initializer.append(shape)
            made = [("Transpose", [old], "a", {"perm": order}), ("Reshape", ["a", shape.name], "b", {})]
            made += [("Transpose", ["b"], "", {"perm": back})]
            return [
                helper.make_node(
                    op,
                    [f"{name}_{one}" if len(one) == 1 else one for one in inputs],
                    [f"{name}_{output}" if output else new],
                    name=at(path, f"Planted_{op}_{name}_{output}"),
                    **more,
                )
                for op, inputs, output, more in made
            ]

        graph.after(node.name, nodes)
    output = graph.node(at(path, "MatMul_2"))  # [batch, 2, 50, 64] back to [batch, 4, 50, 32]

    def merge(old: str, new: str) -> List[Any]:
        from onnx import numpy_helper

        graph.model.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 4, 32]), "heads_out"))
        return [
            helper.make_node("Transpose", [old], ["out_a"], name=at(path, "Planted_out_a"), perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", ["out_a", "heads_out"], ["out_b"], name=at(path, "Planted_out_b")),
            helper.make_node("Transpose", ["out_b"], [new], name=at(path, "Planted_out_c"), perm=[0, 2, 1, 3]),
        ]

    graph.after(output.name, merge)


@planted(f"{VISION}.attn", "out_proj.weight, but transposed|same values in another order")
def projection_transposed(graph: Graph) -> None:
    name = at(f"{VISION}.attn", "Gemm")
    graph.set_weight(name, 1, graph.weight(name, 1).T)


@planted(f"{VISION}", "also takes visual.transformer.resblocks.1 (add), which the graph leaves out")
def residual_left_out(graph: Graph) -> None:
    node = graph.node(at(VISION, "Add_1"))
    graph.bypass(node.name, 1 if "mlp" in node.input[1] else 0)


@planted(f"{TEXT}.mlp.c_proj", "distinct values, as after quantisation to 8 bits", "text")
def one_layer_quantised(graph: Graph) -> None:
    name = at(f"{TEXT}.mlp.c_proj", "MatMul")
    held = graph.weight(name, 1)
    step = np.abs(held).max() / 127
    graph.set_weight(name, 1, np.asarray(np.round(held / step) * step, np.float32))


@planted("", "positional_embedding by", "text")
def position_embedding_shifted(graph: Graph) -> None:
    graph.set_weight("/Add", 1, np.roll(graph.weight("/Add", 1), 1, axis=-2))


@planted("visual", "visual")
def class_token_swapped(graph: Graph) -> None:
    node = graph.node("/visual/Concat_2")
    node.input[:] = list(node.input)[::-1]


@planted("visual", "visual")
def pooled_at_another_token(graph: Graph) -> None:
    (node,) = [
        one for one in graph.model.graph.node if one.op_type == "Gather" and one.input[0].startswith("/visual/ln_post")
    ]
    graph.set_weight(node.name, 1, np.array(1, np.int64))


@planted(f"{TEXT}.mlp.c_fc", "transformer.resblocks.1.mlp.c_fc.bias is missing", "text")
def bias_dropped(graph: Graph) -> None:
    node = graph.node(at(f"{TEXT}.mlp.c_fc", "Add"))
    graph.bypass(node.name, 1 if "MatMul" in node.input[1] else 0)


@planted(f"{VISION}.attn", "its softmax is over axis")
def softmax_over_another_axis(graph: Graph) -> None:
    node = graph.node(at(f"{VISION}.attn", "Softmax"))
    (axis,) = [one for one in node.attribute if one.name == "axis"]
    axis.i = -2


@planted(f"{VISION}.mlp.c_proj", "computed in bf16")
def one_layer_in_bf16(graph: Graph) -> None:
    from onnx import TensorProto

    name = at(f"{VISION}.mlp.c_proj", "MatMul")
    held = graph.weight(name, 1)
    graph.set_weight(name, 1, (held.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).reshape(held.shape))
    graph.cast(name, TensorProto.BFLOAT16)


@planted(f"{VISION}.attn", "it is PyTorch's times 1.5")
def scale_of_one_attention(graph: Graph) -> None:
    name = at(f"{VISION}.attn", "Mul_1")

    def nodes(old: str, new: str) -> List[Any]:
        from onnx import helper, numpy_helper

        graph.model.graph.initializer.append(numpy_helper.from_array(np.array(1.5, np.float32), "half_more"))
        return [helper.make_node("Mul", [old, "half_more"], [new], name=at(f"{VISION}.attn", "Mul_more"))]

    graph.after(name, nodes)


@planted(f"{VISION}.mlp.c_fc", "65504|NaN or Inf")
def mlp_overflows_in_fp16(graph: Graph) -> None:
    """Of a model whose values are that large there: see `large_mlp`."""
    from onnx import TensorProto

    graph.cast(at(f"{VISION}.mlp.c_fc", "MatMul"), TensorProto.FLOAT16)


LARGE = 3e5


def large_mlp(clip: Any) -> Any:
    """A model with large values inside one MLP, which is as good as any other in fp32."""
    mlp = clip.visual.transformer.resblocks[1].mlp
    for value in (mlp.c_fc.weight, mlp.c_fc.bias):
        value.data.mul_(LARGE)
    mlp.c_proj.weight.data.div_(LARGE)
    return clip


def names() -> Tuple[str, ...]:
    return tuple(PLANTED)
