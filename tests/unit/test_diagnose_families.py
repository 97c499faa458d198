"""Faults in towers other than a ViT: where weights alone are computed with, in nested Sequentials, in fused graphs."""

import json

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from clipval import export, library, model, weights
from clipval.diagnose import graph, ladder
from clipval.diagnose.finding import DIVERGENCE, NONE

TEXT = {"context_length": 15, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 1}
COCA = {
    "embed_dim": 48,
    "custom_text": True,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
}
COCA["vision_cfg"].update(attentional_pool=True, attn_pooler_heads=4, output_tokens=True)
TRUNK = {"timm_model_name": "convnext_atto", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
CONVNEXT = {"embed_dim": 48, "vision_cfg": {**TRUNK, "image_size": 64}, "text_cfg": TEXT}
STAGE, POOL = "visual.trunk.stages.2.blocks.1", "visual.attn_pool"


class Towers:
    """The vision tower of a family with seeded weights, none of which are all alike, and its ONNX file."""

    def __init__(self, config, folder):
        import torch

        name = folder / "small.json"
        name.write_text(json.dumps(config), encoding="utf-8")
        sizes = library.sizes(str(name))
        self.tower = sizes["vision"]
        self.loaded = model.load(str(name), weights.find_weights(str(name), weights.RANDOM), sizes)
        torch.manual_seed(0)
        for value in self.loaded.module.parameters():
            if value.ndim == 1 and float(value.detach().std()) < 1e-6:
                value.data = 0.5 + 0.2 * torch.randn(value.shape)
        self.file = folder / "vision.onnx"
        export.export(self.loaded, self.tower, self.file, metadata={})
        self.rows = np.random.default_rng(0).normal(0, 1, self.tower.shape(2)).astype(np.float32)
        self.encoder = model.encoder(self.loaded, self.tower)
        self.parameters = {name: value.detach().numpy() for name, value in self.loaded.module.named_parameters()}

    def judged(self, file):
        return ladder.judge(ladder.climb(self.encoder, graph.load(file), self.rows), "onnx")

    def broken(self, change, file):
        changed = onnx.load(str(self.file))
        change(changed, self.parameters)
        onnx.save(changed, str(file))
        return self.judged(file)


@pytest.fixture(scope="module")
def coca(tmp_path_factory):
    return Towers(COCA, tmp_path_factory.mktemp("coca"))


@pytest.fixture(scope="module")
def convnext(tmp_path_factory):
    return Towers(CONVNEXT, tmp_path_factory.mktemp("convnext"))


def takers(whole, value):
    """Nodes that take a copy of a parameter, with the name of that copy."""
    for one in whole.graph.initializer:
        held = numpy_helper.to_array(one)
        if held.size == value.size and np.array_equal(np.sort(held.ravel()), np.sort(value.ravel())):
            yield from ((node, one) for node in whole.graph.node if one.name in node.input)


def edited(name, change):
    def edit(whole, parameters):
        held = {one.name: one for _, one in takers(whole, parameters[name])}
        assert held
        for one in held.values():
            values = np.ascontiguousarray(change(numpy_helper.to_array(one)), np.float32)
            one.CopyFrom(numpy_helper.from_array(values, one.name))

    return edit


def without(name):
    """The bias is not added."""

    def edit(whole, parameters):
        ((node, one),) = takers(whole, parameters[name])
        node.input.remove(one.name)

    return edit


def sharper(whole, parameters):
    (softmax,) = [node for node in whole.graph.node if node.op_type == "Softmax" and "attn_pool" in node.name]
    whole.graph.initializer.append(numpy_helper.from_array(np.array(1.2, np.float32), "more"))
    node = helper.make_node("Mul", [softmax.input[0], "more"], ["sharper"], name="/visual/attn_pool/attn/Mul_more")
    whole.graph.node.insert(list(whole.graph.node).index(softmax), node)
    softmax.input[0] = "sharper"


def without_branch(whole, parameters):
    """The residual sum after a block's MLP is its other summand; what computed the branch is still in the file."""
    (node,) = [one for one in whole.graph.node if one.name == "/visual/transformer/resblocks.0/Add_1"]
    kept = next(name for name in node.input if "mlp" not in name)
    for other in whole.graph.node:
        other.input[:] = [kept if name == node.output[0] else name for name in other.input]


def noisy(values):
    return values * (1 + np.random.default_rng(1).normal(0, 0.1, values.shape))


@pytest.mark.parametrize(
    ("change", "module", "words"),
    [
        (edited(f"{POOL}.query", noisy), POOL, "differs from visual.attn_pool.query by"),
        *(
            pytest.param(*more, marks=pytest.mark.proof)
            for more in [
                (
                    edited(f"{POOL}.attn.k_proj_weight", noisy),
                    f"{POOL}.attn",
                    "differs from visual.attn_pool.attn.k_proj_weight",
                ),
                (sharper, f"{POOL}.attn", "its argument is PyTorch's times 1.2"),
                (
                    without(f"{POOL}.attn.out_proj.bias"),
                    f"{POOL}.attn",
                    "visual.attn_pool.attn.out_proj.bias is missing",
                ),
                (without_branch, "visual.transformer.resblocks.0", "resblocks.0.mlp is in the graph"),
            ]
        ),
    ],
)
def test_a_fault_in_a_tower_with_an_attention_pool_is_located(coca, change, module, words, tmp_path):
    found = coca.broken(change, tmp_path / "faulty.onnx")
    assert found.module == module, found.sentence
    assert words in " ".join(found.causes)
    assert "8 bits" not in " ".join(found.lines())


@pytest.mark.parametrize(
    ("change", "module", "words"),
    [
        (edited(f"{STAGE}.gamma", lambda values: 1.3 * values), STAGE, "its length is 1.3 of PyTorch's"),
        pytest.param(
            edited(f"{STAGE}.conv_dw.weight", lambda values: values[..., ::-1, ::-1]),
            f"{STAGE}.conv_dw",
            "the same values in another order",
            marks=pytest.mark.proof,
        ),
        pytest.param(
            without(f"{STAGE}.mlp.fc2.bias"),
            f"{STAGE}.mlp.fc2",
            "mlp.fc2.bias is missing",
            marks=pytest.mark.proof,
        ),
    ],
)
def test_a_fault_in_a_convolutional_tower_is_located(convnext, change, module, words, tmp_path):
    found = convnext.broken(change, tmp_path / "faulty.onnx")
    assert found.module == module, found.sentence
    assert found.causes[0].find(words) >= 0, found.causes


def test_names_in_a_sequential_are_the_modules(convnext):
    modules = {node.module for node in graph.load(convnext.file).nodes}
    assert {f"{STAGE}.mlp.fc1", f"{STAGE}.conv_dw", "visual.trunk.stages.1.downsample.1"} <= modules


@pytest.mark.proof
@pytest.mark.parametrize("name", ["coca", "convnext"])
def test_a_graph_after_an_optimiser(name, request, tmp_path):
    """A clean one has no excess; a norm's epsilon is found where sums are fused and the error does not arrive."""
    import onnxruntime

    made = request.getfixturevalue(name)
    norm = "visual.transformer.resblocks.0.ln_2" if name == "coca" else f"{STAGE}.norm"
    for fault in (False, True):
        changed, file = onnx.load(str(made.file)), tmp_path / f"{fault}.onnx"
        if fault:
            coarser(changed, norm)
        onnx.save(changed, str(file))
        wanted = onnxruntime.SessionOptions()
        wanted.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        wanted.optimized_model_filepath, wanted.log_severity_level = str(tmp_path / f"fused{fault}.onnx"), 4
        onnxruntime.InferenceSession(str(file), wanted, providers=["CPUExecutionProvider"])
        found = made.judged(tmp_path / f"fused{fault}.onnx")
        assert found.verdict == (DIVERGENCE if fault else NONE), found.sentence
        assert not fault or (found.module == norm and "its epsilon is" in found.sentence), found.sentence


@pytest.mark.proof
def test_a_factor_that_an_optimiser_folded_into_a_layer_is_told_from_its_weights(convnext, tmp_path):
    import onnxruntime

    layer = f"{STAGE}.mlp.fc2"
    for name, module, words in (
        (f"{STAGE}.gamma", STAGE, f"the factor of {STAGE}, folded into"),
        (f"{layer}.weight", layer, f"is {layer}.weight with the factor of {STAGE} folded in, and differs"),
    ):
        changed, file = onnx.load(str(convnext.file)), tmp_path / f"{len(name)}.onnx"
        edited(name, noisy)(changed, convnext.parameters)
        wanted = onnxruntime.SessionOptions()
        wanted.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        wanted.optimized_model_filepath, wanted.log_severity_level = str(file), 4
        onnxruntime.InferenceSession(changed.SerializeToString(), wanted, providers=["CPUExecutionProvider"])
        found = convnext.judged(file)
        assert found.module == module, found.sentence
        assert found.causes[0].find(words) >= 0, found.causes


def coarser(whole, norm):
    """A norm with 300 times its epsilon."""
    nodes = [node for node in whole.graph.node if graph.module_path(node) == norm and node.op_type == "Add"]
    for made in [one for one in whole.graph.node if one.op_type == "Constant"]:
        for node in nodes:
            if made.output[0] in node.input:
                held = numpy_helper.to_array(made.attribute[0].t)
                whole.graph.initializer.append(numpy_helper.from_array(held * 300, "coarse"))
                node.input[list(node.input).index(made.output[0])] = "coarse"
