"""Ready ONNX files of anybody: quantised, fp16, int32 tokens, other names, one batch size."""

import numpy as np
import pytest

from clipval import export
from clipval.backends import given
from clipval.backends.onnx import OnnxBackend
from clipval.errors import InputError
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
    with pytest.raises(InputError, match=f"the {tower.name} tower takes one input"):
        OnnxBackend(tower, given.file(exported, other), ready=True)


def test_a_missing_file_is_named(exported):
    with pytest.raises(InputError, match=r"no file .*none_text\.onnx; expected PREFIX_vision\.onnx and PREFIX_text"):
        given.file(exported.with_name("none"), TEXT)
