"""ONNX files: the contract, and what the check must refuse."""

import numpy as np
import pytest

from clipval import export, model
from clipval.backends.onnx import OnnxBackend
from clipval.backends.pytorch import PytorchBackend
from clipval.errors import BackendUnavailable, InputError, UsageError
from clipval.towers import TEXT, VISION

TOWERS = [VISION, TEXT]


@pytest.fixture(scope="module")
def files(seeded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    for tower in TOWERS:
        export.export(seeded, tower, folder / f"{tower.name}.onnx", metadata={"clipval.weights": "abc"})
    return {tower.name: folder / f"{tower.name}.onnx" for tower in TOWERS}


def rows(tower, count):
    found = export.example_rows(tower, count)
    if tower is VISION:
        return np.random.default_rng(0).normal(size=found.shape).astype(np.float32)
    found[:, 1] = np.arange(count) + 320
    return found


@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower.name)
@pytest.mark.parametrize("count", [1, 3])
def test_onnx_is_the_model(seeded, files, tower, count):
    found = OnnxBackend(tower, files[tower.name]).run(rows(tower, count))
    wanted = PytorchBackend(tower, model.encoder(seeded, tower)).run(rows(tower, count))
    assert found.shape == (count, tower.width)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < 2e-6


@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower.name)
def test_the_file_tells_what_it_is(files, tower):
    import onnx

    found = export.read_metadata(files[tower.name])
    assert found["clipval.weights"] == "abc"
    assert found["clipval.normalized"] == "true"
    assert found["opset"] == "14"
    assert export.tower_of(files[tower.name]) == tower
    graph = onnx.load(str(files[tower.name])).graph
    assert [value.name for value in graph.output] == [tower.output_name]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_argmax_takes_int32(files):
    import onnx

    graph = onnx.load(str(files["text"])).graph
    assert [node.op_type for node in graph.node].count("ArgMax") == 1
    for node in graph.node:
        if node.op_type == "ArgMax":
            (cast,) = [one for one in graph.node if node.input[0] in one.output]
            cast.attribute[0].i = onnx.TensorProto.INT64
    changed = files["text"].with_name("int64.onnx")
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8), changed)
    with pytest.raises(InputError, match="ArgMax .* must take tokens cast to int32"):
        export.check(changed, TEXT)


@pytest.mark.parametrize("opset", [11, 13, 19])
def test_opsets_out_of_range(seeded, tmp_path, opset):
    with pytest.raises(UsageError, match="torch 2 exports"):
        export.export(seeded, TEXT, tmp_path / "x.onnx", opset=opset, metadata={})


@pytest.mark.parametrize("opset", [17, 18])
def test_newer_opsets_work(seeded, tmp_path, opset):
    export.export(seeded, VISION, tmp_path / "x.onnx", opset=opset, metadata={})
    export.check(tmp_path / "x.onnx", VISION)
    assert np.allclose(OnnxBackend(VISION, tmp_path / "x.onnx").run(rows(VISION, 1)).shape, (1, 512))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_cut_off_file_is_one_line(files, tmp_path, share):
    whole = files["text"].read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: int(len(whole) * share)])
    for refuse in (lambda: export.check(tmp_path / "cut.onnx", TEXT), lambda: OnnxBackend(TEXT, tmp_path / "cut.onnx")):
        with pytest.raises(InputError, match="cut.onnx") as caught:
            refuse()
        assert "\n" not in str(caught.value)


def test_the_other_tower_is_refused(files):
    with pytest.raises(InputError, match="the vision tower needs"):
        export.check(files["text"], VISION)
    with pytest.raises(InputError, match="the text tower needs"):
        OnnxBackend(TEXT, files["vision"])


def test_missing_external_data_is_named(files, tmp_path):
    import onnx

    found = onnx.load(str(files["text"]))
    onnx.save(found, str(tmp_path / "ext.onnx"), save_as_external_data=True, location="weights.bin")
    (tmp_path / "weights.bin").unlink()
    for refuse in (lambda: export.check(tmp_path / "ext.onnx", TEXT), lambda: OnnxBackend(TEXT, tmp_path / "ext.onnx")):
        with pytest.raises(InputError, match="ext.onnx"):
            refuse()


def test_a_missing_provider_is_an_error(files):
    with pytest.raises(BackendUnavailable, match="has no CUDAExecutionProvider; it has .*CPUExecutionProvider"):
        OnnxBackend(TEXT, files["text"], ["CUDAExecutionProvider"])


@pytest.mark.parametrize("providers", [["AzureExecutionProvider"], ["AzureExecutionProvider", "CPUExecutionProvider"]])
def test_a_provider_that_computes_nothing_is_an_error(files, providers):
    """The session says that it runs on this provider, which every build has and which takes no node of a tower."""
    with pytest.raises(BackendUnavailable, match=r"([0-9]+) of \1 matrix products fell back to CPUExecutionProvider"):
        OnnxBackend(TEXT, files["text"], providers)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_silent_fall_back_is_an_error(files, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises((BackendUnavailable, InputError), match="fell back to CPUExecutionProvider|cannot load"):
        OnnxBackend(TEXT, files["text"], ["CUDAExecutionProvider"])
