"""What is not numerics, planted and said: outputs, order, batch, normalisation, weights, stale files, inputs."""

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from clipval import options
from clipval.chain import Chain
from clipval.diagnose import candidate, checks
from clipval.diagnose.finding import INPUT, NONE
from clipval.errors import InputError
from clipval.results import FAIL, Figure


@pytest.fixture(scope="module")
def chain(built):
    return Chain(options.Settings(workdir=built, threads=1))


PICKED = np.arange(3)


def changed(chain, name, change, folder):
    """The tower's file after `change(model)`, under the tower's name."""
    model = onnx.load(str(chain.onnx(chain.towers[name])))
    change(model)
    file = folder / f"{name}.onnx"
    onnx.save(model, str(file))
    return file


def after(model, nodes, *held):
    """Nodes behind the embedding, which they take as `inner`."""
    end = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["inner" if name == end else name for name in node.output]
    model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in held)
    model.graph.node.extend(nodes(end))


def not_normalised(model):
    last = model.graph.node[-1]
    assert last.op_type == "Div"
    end, last.op_type = model.graph.output[0].name, "Identity"
    last.input[:] = [last.input[0]]
    assert list(last.output) == [end]


def in_another_order(model):
    held = ("back", np.array([-1], np.int64)), ("ends", np.array([-999], np.int64)), ("axis", np.array([0], np.int64))
    step = ("step", np.array([-1], np.int64))
    after(model, lambda end: [helper.make_node("Slice", ["inner", "back", "ends", "axis", "step"], [end])], *held, step)


def mixed_with_its_batch(model):
    """A little of the first sample of the batch in each."""

    def nodes(end):
        return [
            helper.make_node("Gather", ["inner", "zero"], ["first"], axis=0),
            helper.make_node("Mul", ["first", "share"], ["some"]),
            helper.make_node("Add", ["inner", "some"], ["sum"]),
            helper.make_node("ReduceL2", ["sum"], ["long"], axes=[1], keepdims=1),
            helper.make_node("Div", ["sum", "long"], [end]),
        ]

    after(model, nodes, ("zero", np.array([0], np.int64)), ("share", np.array(0.05, np.float32)))


def outputs_swapped(model):
    after(model, lambda end: [helper.make_node("Neg", ["inner"], [end])])
    other = helper.make_tensor_value_info("inner", TensorProto.FLOAT, ["batch", 512])
    model.graph.output.append(other)


def of_another_checkpoint(model):
    rng = np.random.default_rng(0)
    for one in model.graph.initializer:
        if len(one.dims) == 2:
            values = rng.normal(0, 0.05, tuple(one.dims)).astype(np.float32)
            one.CopyFrom(numpy_helper.from_array(values, one.name))


def stale(model):
    for entry in model.metadata_props:
        if entry.key == "clipval.weights":
            entry.value = "0" * 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (not_normalised, "the embeddings are not normalised"),
        pytest.param(in_another_order, "samples are in another order", marks=pytest.mark.proof),
        pytest.param(mixed_with_its_batch, "depends on its batch: at another place", marks=pytest.mark.proof),
        pytest.param(
            outputs_swapped,
            "outputs are swapped: inner is PyTorch's embedding, but image_embed is taken",
            marks=pytest.mark.proof,
        ),
        pytest.param(of_another_checkpoint, "the file holds other weights", marks=pytest.mark.proof),
        (stale, "a stale or different file"),
    ],
)
def test_a_fault_that_is_not_numerics_comes_first(chain, change, words, tmp_path):
    file = changed(chain, "vision", change, tmp_path)
    found = candidate.onnx(chain, chain.towers["vision"], PICKED, file=file)
    assert found.verdict == INPUT, found.sentence
    assert any(words in one for one in found.causes)
    assert found.sentence.startswith("onnx vision (vision.onnx, fp32): not numerics: ")


def second_output(model):
    """As the recipe's own export has it."""
    model.graph.node.append(helper.make_node("Constant", [], ["1775"], value_float=14.28))
    model.graph.output.insert(0, helper.make_tensor_value_info("1775", TensorProto.FLOAT, []))


def fixed_batch_and_other_names(model):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    names = {model.graph.input[0].name: "pixels", model.graph.output[0].name: "result"}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    model.graph.input[0].name, model.graph.output[0].name = "pixels", "result"


def narrow_tokens(model):
    """int32 tokens, which are widened first."""
    given = model.graph.input[0].name
    for node in model.graph.node:
        node.input[:] = ["wide" if name == given else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Cast", [given], ["wide"], to=TensorProto.INT64))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("vision", second_output),
        pytest.param("vision", fixed_batch_and_other_names, marks=pytest.mark.proof),
        pytest.param("text", narrow_tokens, marks=pytest.mark.proof),
    ],
)
def test_a_good_file_of_somebody_else_has_no_excess(chain, name, change, tmp_path):
    file = changed(chain, name, change, tmp_path)
    found = candidate.onnx(chain, chain.towers[name], PICKED, file=file)
    assert found.verdict == NONE, found.sentence


def test_the_file_that_is_validated_is_the_one_that_is_diagnosed(chain, tmp_path):
    changed(chain, "vision", not_normalised, tmp_path).rename(tmp_path / "their_vision.onnx")
    changed(chain, "text", stale, tmp_path).rename(tmp_path / "their_text.onnx")
    theirs = Chain(options.Settings(workdir=chain.settings.workdir, onnx_prefix=tmp_path / "their", threads=1))
    found = candidate.onnx(theirs, theirs.towers["vision"], PICKED)
    assert "their_vision.onnx" in found.candidate
    assert "not normalised" in found.sentence


def test_how_inputs_differ_is_said():
    rng = np.random.default_rng(1)
    mean, std = np.array([0.5, 0.4, 0.45])[:, None, None], np.array([0.26, 0.27, 0.25])[:, None, None]
    raw = rng.uniform(0, 1, (2, 3, 8, 8))
    right = (raw - mean) / std

    def said(given):
        return " ".join(checks.inputs(("a", "b"), np.asarray(given), right))

    assert said(right) == ""
    assert "(as if normalised twice)" in said((right - mean) / std)
    assert "(as if not normalised)" in said(raw)
    assert "(scaled by 2" not in said(raw * 255)
    assert "BGR for RGB" in said(right[:, ::-1])
    assert "pixels differ from the model's own: 2 of 2" in said(right + rng.normal(0, 0.1, right.shape))
    tokens = np.array([[1, 5, 9, 2]])
    told = checks.inputs(("a",), tokens, np.array([[1, 6, 9, 2]]))[0]
    assert "(token 1 is 5, the tokenizer gives 6)" in told


def test_an_om_that_is_older_than_its_onnx_file_is_said(chain, tmp_path):
    made, onnx_file = tmp_path / "vision_bs8.om", tmp_path / "vision.onnx"
    made.touch()
    onnx_file.touch()
    os.utime(made, (1, 1))
    tower = chain.towers["vision"]
    (said,) = candidate._compiled_from(chain, tower, made, made)
    assert said.startswith("vision_bs8.om is older than vision.onnx next to it")
    os.utime(onnx_file, (1, 1))
    assert candidate._compiled_from(chain, tower, made, made) == []


@pytest.mark.parametrize("error", [InputError("text.onnx: no node"), KeyError("Gemm_7"), MemoryError()])
def test_a_diagnosis_that_fails_leaves_the_gate_red(built, monkeypatch, error):
    chain = Chain(options.Settings(workdir=built, threads=1, diagnose=True))
    tower = chain.towers["text"]
    gate = {"gate": "parity/onnx/text", "unit": "cosine", "verdict": FAIL}
    red = [Figure(metric=name, message=f"{name} off", **gate) for name in ("minimum cosine", "mean cosine")]

    def fails(*_):
        raise error

    monkeypatch.setattr(candidate, "locate", fails)
    first, second = candidate.annotated(chain, "onnx", tower, red)
    assert (first.verdict, second) == (FAIL, red[1])
    assert first.message.startswith("minimum cosine off\ndiagnosis: failed")
    assert type(error).__name__ in first.message or str(error) in first.message


def test_the_output_that_was_taken_is_known_by_its_values():
    features = np.array([[3.0, 4.0]])
    made = {"features": features, "unit": features / 5, "scale": np.array(100.0)}
    assert [candidate.taken(made, made[name]) for name in ("features", "unit")] == ["features", "unit"]
