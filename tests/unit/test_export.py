"""ONNX files: the contract, and what the check must refuse."""

import contextlib
import inspect
import json
from pathlib import Path

import numpy as np
import pytest

from clipval import export, library, model, probe, weights
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


def weights_of(model):
    return {name: (one.data_ptr(), one.detach().numpy().tobytes()) for name, one in model.module.named_parameters()}


@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower.name)
@pytest.mark.parametrize("fails", [False, True])
def test_the_other_tower_is_out_of_memory_meanwhile_and_comes_back_as_it_was(seeded, tmp_path, tower, fails):
    before = weights_of(seeded)
    with contextlib.suppress(ZeroDivisionError), export._other_tower_on_disk(seeded.module, tower, tmp_path):
        held = {name for name, one in seeded.module.named_parameters() if one.numel()}
        gone = set(before) - held
        assert gone
        assert {name.startswith("visual.") for name in gone} == {tower is TEXT}
        own = [name for name in before if name.startswith("visual.") == (tower is VISION)]
        assert held >= set(own)
        assert all(before[name][0] == dict(seeded.module.named_parameters())[name].data_ptr() for name in own)
        assert 1 / (not fails)
    after = weights_of(seeded)
    assert {name: content for name, (_, content) in after.items()} == {n: content for n, (_, content) in before.items()}


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
    with pytest.raises(BackendUnavailable, match=r"the text tower fell back to CPUExecutionProvider for \d+"):
        OnnxBackend(TEXT, files["text"], providers)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_silent_fall_back_is_an_error(files, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises((BackendUnavailable, InputError), match="fell back to CPUExecutionProvider|cannot load"):
        OnnxBackend(TEXT, files["text"], ["CUDAExecutionProvider"])


@pytest.fixture
def scattered(files, tmp_path):
    """What torch writes where a tower is larger than 2 GiB: a graph, and a file for each of its weights."""
    import onnx

    folder = tmp_path / "traced"
    folder.mkdir()
    graph = onnx.load(str(files["text"]))
    del graph.metadata_props[:]
    onnx.save(
        graph, str(folder / "text.onnx"), save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=1024
    )
    assert len(list(folder.iterdir())) > 10
    return folder / "text.onnx"


def test_weights_of_a_large_tower_are_gathered_into_one_file(files, scattered, tmp_path):
    file = tmp_path / "large.onnx"
    export._finish(scattered, file, TEXT, {"clipval.weights": "abc"})
    export.check(file, TEXT)
    assert [part.name for part in export.data_files(file)] == ["large.onnx.data"]
    assert export.read_metadata(file)["clipval.weights"] == "abc"
    assert file.stat().st_size < 300_000
    batch = rows(TEXT, 3)
    assert np.array_equal(OnnxBackend(TEXT, file).run(batch), OnnxBackend(TEXT, files["text"]).run(batch))


def test_a_copy_takes_its_weights_along(scattered, tmp_path):
    file, target = tmp_path / "large.onnx", tmp_path / "models" / "b_text.onnx"
    export._finish(scattered, file, TEXT, {})
    target.parent.mkdir()
    export.copy(file, target)
    assert sorted(path.name for path in target.parent.iterdir()) == ["b_text.onnx", "b_text.onnx.data"]
    batch = rows(TEXT, 2)
    wanted = OnnxBackend(TEXT, file).run(batch)
    (tmp_path / "large.onnx.data").unlink()
    assert np.array_equal(OnnxBackend(TEXT, target).run(batch), wanted)
    with pytest.raises(InputError, match=r"large\.onnx\.data, which is missing"):
        export.data_files(file)


def test_weights_in_another_folder_are_refused(files, tmp_path):
    import onnx

    graph = onnx.load(str(files["text"]))
    onnx.external_data_helper.convert_model_to_external_data(graph, location="weights.bin", size_threshold=1024)
    file = tmp_path / "moved.onnx"
    onnx.save(graph, str(file))
    graph = onnx.load(str(file), load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../weights.bin" if entry.key == "location" else entry.value
    file.write_bytes(graph.SerializeToString())
    with pytest.raises(InputError, match="expected a file in the same folder"):
        export.data_files(file)


def test_a_sigmoid_model_of_another_vocabulary(tmp_path):
    """As SigLIP: 1000 ids, 32 tokens, pooled at the last one, no causal mask, and a tokenizer that is not here."""
    text = {"context_length": 32, "vocab_size": 1000, "hf_tokenizer_name": "nobody/none", "pool_type": "last"}
    text.update(no_causal_mask=True, width=64, heads=2, layers=1)
    vision = {"image_size": 64, "layers": 1, "width": 64, "head_width": 32, "patch_size": 32}
    config = {"embed_dim": 48, "init_logit_bias": -10, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    name = str(tmp_path / "small-sigmoid.json")
    Path(name).write_text(json.dumps(config), encoding="utf-8")
    sizes = library.sizes(name)
    if "init_logit_bias" not in inspect.signature(library.import_open_clip().CustomTextCLIP).parameters:
        with pytest.raises(InputError, match=r"open_clip 2\.20\.0 cannot build it \(.*init_logit_bias"):
            model.load(name, weights.find_weights(name, weights.RANDOM), sizes)
        return
    loaded = model.load(name, weights.find_weights(name, weights.RANDOM), sizes)
    layout = probe.TokenLayout((), (), 1, model.vocabulary(loaded))
    assert layout.vocabulary == 1000
    inputs = {
        "vision": np.random.default_rng(0).normal(size=(3, 3, 64, 64)).astype(np.float32),
        "text": probe.captions(sizes["text"], layout, seed=0).rows,
    }
    for tower in sizes.values():
        file = tmp_path / f"{tower.name}.onnx"
        export.export(loaded, tower, file, metadata={})
        found = OnnxBackend(tower, file).run(inputs[tower.name])
        wanted = PytorchBackend(tower, model.encoder(loaded, tower)).run(inputs[tower.name])
        assert np.abs(found - wanted).max() < 2e-6
        assert export.read_metadata(file)["clipval.logit_bias"] == "-10.0"
        assert float(export.read_metadata(file)["clipval.logit_scale"]) == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower.name)
def test_memory_of_a_large_batch_is_given_back_without_a_change(files, tower):
    backend = OnnxBackend(tower, files[tower.name], threads=1)
    before = backend.run(rows(tower, 8))
    backend.release()
    assert backend._largest == 8  # kept: it is used all the time
    backend.run(rows(tower, 32))
    backend.release()
    assert backend._largest == 0
    assert backend.run(rows(tower, 8)).tobytes() == before.tobytes()
