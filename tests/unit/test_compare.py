"""clipval compare: any two of ONNX, OM, embeddings and pytorch, with the same evidence and an exit code."""

import numpy as np
import pytest

from clipval import cli, embeddings, export, library, model, spec, weights
from clipval.embeddings import Embeddings


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The text tower of the embedded default."""
    own = spec.load("shapes")
    name, checkpoint = own.beside(own.model.name), own.beside(own.model.pretrained)
    loaded = model.load(name, weights.find_weights(name, checkpoint), library.sizes(name))
    file = tmp_path_factory.mktemp("compare") / "text.onnx"
    export.export(loaded, library.sizes(name)["text"], file, metadata={})
    return file


def compare(capsys, *arguments, code=0):
    ended = cli.main(["compare", *map(str, arguments)])
    said = "".join(capsys.readouterr())
    assert ended == code, said
    return said


def test_an_export_against_the_model_on_drawn_inputs(file, capsys, tmp_path):
    said = compare(capsys, "pytorch", file, "--workdir", tmp_path)
    assert "75 samples, bounds of fp32" in said
    assert said.count("PASS") == 3


def test_a_quantised_file_is_held_to_its_own_precision(file, capsys, tmp_path):
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(file), str(tmp_path / "int8_text.onnx"))
    assert "bounds of w8a8" in compare(capsys, file, tmp_path / "int8_text.onnx", "--workdir", tmp_path)
    exact = [file, tmp_path / "int8_text.onnx", "--precision", "fp32", "--workdir", tmp_path]
    assert "minimum cosine" in compare(capsys, *exact, code=1)


def folder(path, rows):
    embeddings.write(path, Embeddings(tuple(f"{n}_0" for n in range(len(rows))), rows))
    return path


@pytest.mark.parametrize(("off", "code"), [(0.0, 0), (1e-3, 1)])
def test_two_folders_of_embeddings(capsys, tmp_path, off, code):
    rows = np.random.default_rng(0).normal(size=(20, 512)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    other = rows.copy()
    other[7] += off * np.random.default_rng(1).normal(size=512)
    given = [folder(tmp_path / "one", rows), folder(tmp_path / "two", other), "--tower", "text", "--precision", "fp32"]
    said = compare(capsys, *given, code=code)
    assert "20 samples" in said
    assert ("7_0" in said) == bool(code)


@pytest.mark.parametrize(("one", "two", "code"), [(1, 3, 1), (3, 1, 1), (3, 3, 0), (1, 1, 0)])
def test_a_length_that_only_one_of_them_has_is_a_difference(capsys, tmp_path, one, two, code):
    rows = np.random.default_rng(0).normal(size=(20, 512)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    given = [folder(tmp_path / "one", one * rows), folder(tmp_path / "two", two * rows)]
    said = compare(capsys, *given, "--tower", "text", "--precision", "fp32", code=code)
    assert ("max |length - 1|, of one of the two alone is 2" in said) == bool(code)


def test_weights_that_were_left_behind_are_named(file, capsys, tmp_path):
    import onnx

    held = onnx.load(str(file))
    outside = {"save_as_external_data": True, "location": "text.data", "size_threshold": 100}
    onnx.save(held, str(tmp_path / "text.onnx"), **outside)
    (tmp_path / "text.data").unlink()
    said = compare(capsys, tmp_path / "text.onnx", file, "--workdir", tmp_path, code=2)
    assert "text.onnx: its weights are in text.data, which is missing; copy it there too" in said


def test_an_fp16_conversion_that_left_a_cast_is_said(file, capsys, tmp_path):
    from onnx import TensorProto, helper, save

    cast = helper.make_node("Cast", ["text"], ["a"], name="/Cast", to=TensorProto.FLOAT)
    given = helper.make_tensor_value_info("text", TensorProto.INT64, ["n", 77])
    made = helper.make_tensor_value_info("b", TensorProto.FLOAT16, ["n", 77])
    between = helper.make_tensor_value_info("a", TensorProto.FLOAT16, ["n", 77])
    graph = helper.make_graph(
        [cast, helper.make_node("Relu", ["a"], ["b"])], "half", [given], [made], value_info=[between]
    )
    held = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    broken = tmp_path / "long path" / ("x" * 200) / "text.onnx"  # which onnxruntime repeats before the cause
    broken.parent.mkdir(parents=True)
    save(held, str(broken))
    said = compare(capsys, broken, file, "--workdir", tmp_path, code=2)
    assert "A converter to fp16 left a Cast to another type" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pytorch", "none_text.onnx"], "neither an ONNX or OM file, nor a folder of embeddings"),
        (["pytorch", "none.onnx"], "neither an ONNX or OM file, nor a folder of embeddings"),
        (["pytorch", "pytorch"], "give --tower"),
        (["one", "two", "--tower", "text"], "give --precision"),
        (["one", "pytorch", "--tower", "text"], "give --input"),
    ],
)
def test_what_cannot_be_compared_is_said(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    rows = np.eye(512, dtype=np.float32)[:3]
    folder(tmp_path / "one", rows)
    folder(tmp_path / "two", rows)
    assert words in compare(capsys, *arguments, "--workdir", tmp_path / "work", code=2)
