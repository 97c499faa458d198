"""Files that the recipe's own scripts made are taken as they are: two outputs, named axes, ArgMax of int64."""

from dataclasses import replace

import numpy as np
import pytest

from clipval import cli, export
from clipval.backends import onnx as onnx_backend
from clipval.errors import InputError
from clipval.towers import TEXT, VISION
from tests.simulator import tiny

NOTE = "ONNX files give more than the embedding (the recipe's own export adds exp(logit_scale)); it is picked by name"


def has_argmax_of_int64():
    import onnxruntime

    return tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 20)


@pytest.mark.parametrize("tower", [VISION, TEXT], ids=lambda tower: tower.name)
def test_the_embedding_of_an_onnx_file_is_picked_by_name(tmp_path, tower):
    rows, file = tiny.rows(tower, 3), tiny.write(tmp_path / "theirs.onnx", tower, recipe=True)
    if tower == TEXT and not has_argmax_of_int64():
        with pytest.raises(InputError, match="has no ArgMax on int64, 1.20 and newer do"):
            onnx_backend.OnnxBackend(tower, file)
        return
    theirs = onnx_backend.OnnxBackend(tower, file)
    ours = onnx_backend.OnnxBackend(tower, tiny.write(tmp_path / "ours.onnx", tower))
    assert np.allclose(theirs.run(rows), ours.run(rows), atol=1e-6)
    assert theirs.notes == (NOTE,)
    assert ours.notes == ()
    assert export.tower_of(tmp_path / "theirs.onnx") == tower


def test_another_width_behind_a_named_axis_is_seen(tmp_path):
    file = tiny.write(tmp_path / "x.onnx", VISION, recipe=True)
    with pytest.raises(InputError, match=r"outputs \[\('image_embed', 'tensor\(float\)', \[512\]\).* needs .*\[768\]"):
        onnx_backend.OnnxBackend(replace(VISION, width=768), file)


def test_an_onnxruntime_without_argmax_of_int64_is_the_reason(tmp_path, monkeypatch):
    """1.19 and older end so: 'NOT_IMPLEMENTED : Could not find an implementation for ArgMax(13) node'."""
    import onnxruntime

    def refuse(*_, **__):
        raise RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for ArgMax(13)")

    file = tiny.write(tmp_path / "x.onnx", TEXT, recipe=True)
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(InputError, match=r"has no ArgMax on int64, 1.20 and newer do; or export it with clipval"):
        onnx_backend.OnnxBackend(TEXT, file)


def test_embed_and_bench_take_the_recipes_onnx_files(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for number, row in enumerate(tiny.rows(VISION, 3)):
        np.save(images / f"{number}.npy", row[None])
    file = tiny.write(tmp_path / "vit_b_32_visual.onnx", VISION, recipe=True)
    out = ["--output", str(tmp_path), "--output_dirname", "out"]
    assert cli.main(["embed", "--model", str(file), "--input", str(images), *out]) == 0
    assert len(list((tmp_path / "out").glob("*_0.npy"))) == 3
    assert capsys.readouterr().err.count(NOTE) == 1
    quick = ["--perf-min-time", "0.05", "--perf-max-time", "0.1", "--workdir", str(tmp_path / "work")]
    cli.main(["bench", "--model", str(file), *quick])
    said = capsys.readouterr()
    assert said.err.count(NOTE) == 1
    assert "samples/s" in said.out
