"""Ready ONNX files of anybody: quantised, fp16, int32 tokens, other names, one batch size."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from clipval import export, promise
from clipval.backends import given
from clipval.backends.onnx import OnnxBackend
from clipval.chain import Chain
from clipval.errors import InputError, UsageError
from clipval.options import Settings
from clipval.towers import TEXT, VISION


@pytest.fixture(scope="module")
def exported(seeded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ready")
    for tower in (VISION, TEXT):
        export.export(seeded, tower, folder / f"own_{tower.name}.onnx", metadata={})
    return folder / "own"


def rows(tower, count):
    drawn = np.random.default_rng(0)
    if tower is VISION:
        return drawn.normal(size=tower.shape(count)).astype(np.float32)
    found = np.zeros(tower.shape(count), np.int64)
    found[:, 0], found[:, 1:5], found[:, 5] = 49406, drawn.integers(1, 49000, (count, 4)), 49407
    return found


def renamed(graph):
    """Another exporter's names, and tokens of int32."""
    import onnx

    (given_in,) = graph.graph.input
    for node in graph.graph.node:
        node.input[:] = ["ids64" if name == given_in.name else name for name in node.input]
        node.output[:] = ["sentence" if name == "text_embed" else name for name in node.output]
    graph.graph.node.insert(0, onnx.helper.make_node("Cast", ["ids"], ["ids64"], to=onnx.TensorProto.INT64))
    given_in.name, given_in.type.tensor_type.elem_type = "ids", onnx.TensorProto.INT32
    graph.graph.output[0].name = "sentence"


def one_batch(graph):
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


def changed(exported, tmp_path, change, tower=TEXT):
    import onnx

    graph = onnx.load(str(given.file(exported, tower)))
    change(graph)
    onnx.save(graph, str(tmp_path / f"their_{tower.name}.onnx"))
    return tmp_path / f"their_{tower.name}.onnx"


def quantised(exported, tmp_path, tower):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made = tmp_path / f"int8_{tower.name}.onnx"
    one = str(given.file(exported, tower))
    quantize_dynamic(one, str(made), weight_type=QuantType.QUInt8)  # onnxruntime 1.17 convolves no int8
    return made


def cosine(one, two):
    return (one * two).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)


def test_names_and_int32_tokens_are_adapted(exported, tmp_path):
    backend = OnnxBackend(TEXT, changed(exported, tmp_path, renamed), ready=True)
    wanted = OnnxBackend(TEXT, given.file(exported, TEXT)).run(rows(TEXT, 3))
    assert np.array_equal(backend.run(rows(TEXT, 3)), wanted)
    assert (backend.identity.precision, backend.batch_size) == ("fp32", None)
    with pytest.raises(InputError, match="the text tower needs"):
        OnnxBackend(TEXT, tmp_path / "their_text.onnx")


def test_a_file_of_one_batch_size_says_so(exported, tmp_path):
    file = changed(exported, tmp_path, one_batch)
    assert OnnxBackend(TEXT, file, ready=True).batch_size == 4
    changed(exported, tmp_path, lambda graph: None, VISION)
    assert given.sizes(tmp_path / "their", [VISION, TEXT]) == (4,)
    assert given.sizes(exported, [VISION, TEXT]) is None


@pytest.mark.parametrize("tower", [VISION, TEXT], ids=lambda tower: tower.name)
def test_a_quantised_file_is_known_by_its_operators(exported, tmp_path, tower):
    backend = OnnxBackend(tower, quantised(exported, tmp_path, tower), ready=True)
    assert backend.identity.precision == "w8a8"
    wanted = OnnxBackend(tower, given.file(exported, tower)).run(rows(tower, 4))
    assert cosine(backend.run(rows(tower, 4)), wanted).min() > 0.9


def test_an_fp16_file_is_known_by_its_weights(exported, tmp_path):
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    file = tmp_path / "half_vision.onnx"
    onnx.save(convert_float_to_float16(onnx.load(str(given.file(exported, VISION)))), str(file))
    backend = OnnxBackend(VISION, file, ready=True)
    found = backend.run(rows(VISION, 2))
    assert backend.identity.precision == "fp16"
    assert found.dtype == np.float32
    assert cosine(found, OnnxBackend(VISION, given.file(exported, VISION)).run(rows(VISION, 2))).min() > 0.999


@pytest.mark.parametrize("tower", [VISION, TEXT], ids=lambda tower: tower.name)
def test_the_other_towers_file_is_refused(exported, tower):
    other = {VISION: TEXT, TEXT: VISION}[tower]
    with pytest.raises(InputError, match=f"the two files may be swapped. The {tower.name} tower takes "):
        OnnxBackend(tower, given.file(exported, other), ready=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "none",
            r"no file .*none_text\.onnx; expected PREFIX_vision\.onnx and PREFIX_text.*; .* has own_text.onnx, own_vis",
        ),
        ("own_text.onnx", "it is a file; expected PREFIX_vision.onnx"),
        (".", "it is a folder; expected PREFIX_vision.onnx.* has own_text.onnx"),
    ],
)
def test_a_prefix_without_files_is_named(exported, name, words):
    with pytest.raises(InputError, match=words):
        given.file(exported.parent / name, TEXT)


def test_a_spec_without_bounds_for_the_precision_is_one_error(exported, tmp_path):
    import msgspec

    for tower in (VISION, TEXT):
        quantised(exported, tmp_path, tower)
    chain = Chain(Settings(workdir=tmp_path / "work", onnx_prefix=tmp_path / "int8"))
    bounds = [one for one in chain.spec.parity if one.precision != "w8a8"]
    chain.subject = chain.subject._replace(spec=msgspec.structs.replace(chain.spec, parity=bounds))
    with pytest.raises(InputError, match=r"no \[\[parity\]\] for backend 'onnx', precision 'w8a8'"):
        chain.open_given("onnx")


def node(name, kind, *shape):
    return SimpleNamespace(name=name, type=f"tensor({kind})", shape=list(shape))


PIXELS, IDS = node("pixel_values", "float", "b", 3, 224, 224), node("input_ids", "int64", "b", 77)
MASK, EMBEDDING = node("attention_mask", "int64", "b", 77), node("y", "float", "b", 512)


@pytest.mark.parametrize(
    ("tower", "inputs", "outputs", "words"),
    [
        (
            VISION,
            [PIXELS, IDS],
            [node("logits", "float", "i", "t")],
            "it holds both towers; export each to a file of its own",
        ),
        (TEXT, [PIXELS, IDS], [EMBEDDING], "it holds both towers"),
        (TEXT, [IDS, MASK], [EMBEDDING], "export it without attention_mask"),
        (VISION, [PIXELS, node("scale", "float")], [EMBEDDING], "one input alone, the others as constants"),
        (VISION, [IDS], [EMBEDDING], "the two files may be swapped"),
        (VISION, [node("x", "uint8", 1, 224, 224, 3)], [EMBEDDING], "its preprocessing is inside it"),
        (VISION, [node("x", "bfloat16", "b", 3, 224, 224)], [EMBEDDING], "numpy has no bfloat16"),
        (TEXT, [IDS], [node("hidden", "float", "b", 77, 512)], "export it with its pooling and projection"),
        (
            VISION,
            [node("x", "float", "b", 3, 336, 336)],
            [EMBEDDING],
            "of another model or size. The vision tower takes",
        ),
        (TEXT, [IDS], [node("y", "float", "b", 768)], r"gives y float \[b, 768\]; it is of another model or size"),
    ],
)
def test_what_else_a_file_may_be_is_said(tower, inputs, outputs, words, tmp_path):
    with pytest.raises(InputError, match=words) as caught:
        given.ports(tmp_path / "their.onnx", tower, inputs, outputs)
    assert "\n" not in str(caught.value)


def test_outputs_of_one_width_are_told_apart(tmp_path):
    found = given.ports(
        tmp_path, TEXT, [IDS], [node("pooler_output", "float", "b", 512), node("text_embeds", "float", "b", 512)]
    )
    assert found.outputs == ("text_embeds",)
    assert found.more
    raw = np.random.default_rng(0).normal(size=(1, 512)).astype(np.float32)
    unit = raw / np.linalg.norm(raw)
    assert given.embedding_of(tmp_path, TEXT, {"features": raw, "normalised": unit}) == "normalised"
    with pytest.raises(InputError, match="the outputs a, b are each 512 wide and differ.*name it text_embed"):
        given.embedding_of(tmp_path, TEXT, {"a": raw, "b": raw[:, ::-1]})


def with_two_outputs(graph):
    """The features before their normalisation too, under names that say nothing."""
    import onnx

    (made,) = graph.graph.output
    thrice = onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, ["batch", 512])
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(3, np.float32), "three"))
    graph.graph.node.append(onnx.helper.make_node("Mul", [made.name, "three"], ["a"]))
    graph.graph.node.append(onnx.helper.make_node("Identity", [made.name], ["b"]))
    named = onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, ["batch", 512])
    graph.graph.ClearField("output")
    graph.graph.output.extend([thrice, named])


def test_the_output_of_unit_length_is_taken(exported, tmp_path):
    backend = OnnxBackend(TEXT, changed(exported, tmp_path, with_two_outputs), ready=True)
    assert np.abs(np.linalg.norm(backend.run(rows(TEXT, 3)), axis=1) - 1).max() < 1e-5
    assert backend.notes == ("ready ONNX files give more than the embedding; taken is b",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it has no operators, so it is empty or cut off"),
        (b"<!DOCTYPE html>", "a page of HTML or XML, probably of a failed download"),
        (b"PK\x03\x04abc", "a checkpoint of PyTorch or a zip archive. Export it"),
        (b"not a model", r"not an ONNX model, damaged or cut off \(.*\). Copy or export it again"),
    ],
)
def test_what_is_no_model_is_named(tmp_path, content, words):
    (tmp_path / "their_text.onnx").write_bytes(content)
    with pytest.raises(InputError, match=words):
        given.sizes(tmp_path / "their", [TEXT])


def test_weights_outside_the_file_are_found_wherever_they_belong(exported, tmp_path):
    import onnx
    from onnx.external_data_helper import convert_model_to_external_data

    graph = onnx.load(str(given.file(exported, TEXT)))
    weight = next(one for one in graph.graph.initializer if len(one.dims) == 2)
    graph.graph.initializer.remove(weight)
    constant = onnx.helper.make_node("Constant", [], [weight.name], value=weight)
    graph.graph.node.insert(0, constant)
    convert_model_to_external_data(graph, location="their.data", size_threshold=1024, convert_attribute=True)
    file, data = tmp_path / "their_text.onnx", tmp_path / "their.data"
    onnx.save(graph, str(file))
    assert given.files(file) == [file, data]
    assert OnnxBackend(TEXT, file, ready=True).run(rows(TEXT, 1)).shape == (1, 512)
    size = data.stat().st_size
    data.write_bytes(data.read_bytes()[: size // 2])
    with pytest.raises(InputError, match=rf"its weights are in their.data, which is cut off, {size // 2} of \d+ bytes"):
        OnnxBackend(TEXT, file, ready=True)
    data.unlink()
    with pytest.raises(InputError, match="their.data, which is missing"):
        OnnxBackend(TEXT, file, ready=True)


@pytest.mark.parametrize(("kind", "precision"), [("UINT8", "w8a8"), ("UINT16", "w8a16")])
def test_the_bits_of_activations_are_read(tmp_path, kind, precision):
    import onnx

    point = onnx.helper.make_tensor("point", getattr(onnx.TensorProto, kind), [], [0])
    scale = onnx.helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [1.0])
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "scale", "point"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "scale", "point"], ["y"]),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4]) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "quantised", ends[:1], ends[1:], [scale, point])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / f"{kind}.onnx"))
    assert given.precision(tmp_path / f"{kind}.onnx") == precision


def test_a_wrong_file_is_one_error_before_the_first_gate(exported, tmp_path):
    for tower, other in ((VISION, TEXT), (TEXT, VISION)):
        (tmp_path / f"swapped_{tower.name}.onnx").symlink_to(given.file(exported, other))
    chain = Chain(Settings(workdir=tmp_path / "work", onnx_prefix=tmp_path / "swapped"))
    with pytest.raises(InputError, match="the two files may be swapped"):
        promise.check_inputs(chain, ["parity/onnx/text"], alone=False)
    promise.check_inputs(chain, [], alone=False)


def test_another_batch_size_than_the_files_is_refused(exported, tmp_path):
    for tower in (VISION, TEXT):
        changed(exported, tmp_path, one_batch, tower)
    chain = Chain(Settings(workdir=tmp_path / "work", onnx_prefix=tmp_path / "their", batch_sizes=(4, 8)))
    with pytest.raises(UsageError, match=r"their was exported for batches of 4, not of 8; leave the option out"):
        chain.open_given("onnx")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Load model from x.onnx failed:/onnxruntime_src/model.cc:179 Model::Model("
            + "const onnxruntime::PathString&, " * 20
            + ") Unsupported model IR version: 10, max supported IR version: 9",
            "max supported IR version: 9.. It is newer than onnxruntime 1.17",
        ),
        ("NOT_IMPLEMENTED : Could not find ArgMax(13)", "1.17 has no ArgMax on int64, 1.20 and newer do"),
        ("Type 'tensor(bfloat16)' of input parameter (/Cast_output_0)", "lacks this operator in bfloat16"),
        ("Type (tensor(float16)) of output arg (/Cast): Type Error", "A converter to fp16 left a Cast"),
        (
            "x" * 1000 + "nbits_ == 4 was false",
            "nbits_ == 4 was false.. Export it again, or use another onnxruntime than 1.17",
        ),
    ],
)
def test_the_cause_that_onnxruntime_names_is_shown(tmp_path, said, words):
    found = given.why_not(tmp_path / "none.onnx", RuntimeError(said), "1.17")
    assert re.search(words, found)
    assert len(found) < 500
