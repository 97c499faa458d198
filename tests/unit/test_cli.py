"""The command line from end to end on a few drawn scenes, with the recipe's flags and files."""

import json
import re
import sys

import numpy as np
import pytest

from clipval import cli, embeddings, environment, spec
from clipval.datasets import karpathy, shapes
from clipval.spec import FOLDER
from clipval.throughput import baseline, machine, protocol
from clipval.towers import TEXT

from .conftest import CONFIG

WEIGHTS = str(FOLDER / "shapes-vit.pt")


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe's folders after preprocess, export and embed, made by our commands."""
    folder = tmp_path_factory.mktemp("recipe")
    shapes.write(folder / "data", count=12)
    model = ["--model-name", CONFIG, "--workdir", folder / "work"]
    assert run("preprocess", "--data-dir", folder / "data", "--save-dir", folder / "prep_data", *model) == 0
    assert run("export", "--pretrained", WEIGHTS, "--onnx-prefix", folder / "models" / "vit_b_32", *model) == 0
    for tower, rows in (("vision", "images"), ("text", "texts")):
        onnx = folder / "models" / f"vit_b_32_{tower}.onnx"
        out = ["--output", folder / "om_outputs", "--output_dirname", f"{tower}_embed_bs8", "--outfmt", "NPY"]
        assert run("embed", "--model", onnx, "--input", folder / "prep_data" / rows, "--batchsize", 8, *out) == 0
    return folder


def test_the_recipes_layout(recipe):
    images = sorted((recipe / "prep_data" / "images").iterdir())
    texts = sorted((recipe / "prep_data" / "texts").iterdir())
    assert (len(images), len(texts)) == (12, 60)
    assert {path.stem.rpartition("_")[0] for path in texts} == {path.stem for path in images}
    pixels, tokens = np.load(images[0]), np.load(texts[0])
    assert (pixels.shape, pixels.dtype) == ((1, 3, 224, 224), np.float32)
    assert (tokens.shape, tokens.dtype) == ((1, 77), np.int64)
    made = np.load(recipe / "om_outputs" / "text_embed_bs8" / f"{texts[0].stem}_0.npy")
    assert (made.shape, made.dtype) == ((1, 512), np.float32)
    assert np.linalg.norm(made) == pytest.approx(1, abs=1e-5)


def test_evaluate_prints_the_recipes_line(recipe, capsys):
    out = recipe / "om_outputs"
    given = ["--vision-embeds", out / "vision_embed_bs8", "--text-embeds", out / "text_embed_bs8"]
    assert run("evaluate", *given) == 0
    first = capsys.readouterr().out.splitlines()[0]
    metrics = json.loads(first.replace("Metrics: ", "").replace("'", '"'))
    assert set(metrics) == {"image_retrieval_recall@5", "text_retrieval_recall@5"}
    assert min(metrics.values()) > 0.9
    assert run("evaluate", *given, "--data-dir", recipe / "data") == 0


def test_evaluate_with_a_spec_is_a_gate(recipe, capsys):
    out = recipe / "om_outputs"
    given = ["--vision-embeds", out / "vision_embed_bs8", "--text-embeds", out / "text_embed_bs8"]
    assert run("evaluate", *given, "--spec", "vit-b-32-flickr30k") == 1
    assert "recall/om/image_retrieval_recall@1" in capsys.readouterr().out


OWN = """
name = "own"
title = "Twelve scenes"
[model]
name = "ViT-B-32"
[data]
name = "own"
"""
FIGURE = """
[[references]]
metric = "{}_retrieval_recall@5"
backend = "om"
value = 0.95
count = {}
within = 0.06
source = "a test"
"""


@pytest.mark.parametrize("left_out", ["", "an image", "a caption of each"])
def test_a_figure_is_of_as_many_samples(recipe, tmp_path, capsys, left_out):
    (tmp_path / "own.toml").write_text(OWN + FIGURE.format("image", 60) + FIGURE.format("text", 12), encoding="utf-8")
    vision, text = (embeddings.read(recipe / "om_outputs" / f"{name}_embed_bs8") for name in ("vision", "text"))
    image = vision.ids[3] if left_out == "an image" else ""
    for name, found in (("vision", vision), ("text", text)):
        kept = [n for n, one in enumerate(found.ids) if not (image and one.startswith(image))]
        kept = [n for n in kept if name == "vision" or left_out != "a caption of each" or n % 5]
        embeddings.write(tmp_path / name, embeddings.Embeddings(tuple(found.ids[n] for n in kept), found.values[kept]))
    given = ["--vision-embeds", tmp_path / "vision", "--text-embeds", tmp_path / "text"]
    assert run("evaluate", *given, "--spec", tmp_path / "own.toml") == (1 if left_out else 0)
    words = {"": "PASS", "an image": "11 queries among 55 candidates, but the reference has 12 among 60"}
    assert words.get(left_out, "12 queries among 48 candidates") in capsys.readouterr().out


def test_pytorch_embeds_the_same(recipe):
    texts, out = recipe / "prep_data" / "texts", recipe / "om_outputs"
    model = ["--backend", "pytorch", "--model-name", CONFIG, "--pretrained", WEIGHTS]
    assert run("embed", *model, "--input", texts, "--output", out, "--output_dirname", "text_pytorch") == 0
    for path in sorted((out / "text_pytorch").iterdir()):
        assert np.allclose(np.load(path), np.load(out / "text_embed_bs8" / path.name), atol=1e-5)


def test_pin_writes_what_a_spec_holds_later_runs_to(recipe, capsys):
    model = ["--model-name", CONFIG, "--pretrained", WEIGHTS, "--workdir", recipe / "work"]
    data = ["--data-dir", recipe / "data", "--spec", _spec(recipe)]
    assert run("pin", *model, *data, "--samples", 5, "--save", recipe / "pins.npz") == 0
    pinned = spec.load(str(_spec(recipe, more=capsys.readouterr().out)))
    assert pinned.golden.file == "pins.npz"
    assert pinned.data.fingerprint == karpathy.read(recipe / "data").fingerprint()
    found = embeddings.read_golden(recipe / pinned.golden.file, TEXT).of_data
    assert len(found.ids) == 5
    for name, row in zip(found.ids, found.values):
        assert np.allclose(row, np.load(recipe / "om_outputs" / "text_embed_bs8" / f"{name}_0.npy"), atol=1e-5)


def test_bench_of_a_file(recipe, capsys):
    assert run("bench", "--model", recipe / "models" / "vit_b_32_text.onnx", "--loop", 7, "--batchsize", 4) == 0
    found = re.search(r"onnx/text/4/inference +([\d.]+) .* +7  [A-Z]+", capsys.readouterr().out)
    assert float(found[1]) > 0


@pytest.fixture
def session(recipe, monkeypatch):
    """Measure a session of a baseline into a file, on a machine that is at its speed; the exit code."""
    monkeypatch.setattr(machine.HostLoad, "_read", staticmethod(lambda: None))  # other workers may be busy
    monkeypatch.setattr(machine.Pace, "now", lambda pace: 1.0)
    given = ["--model-name", CONFIG, "--pretrained", WEIGHTS, "--workdir", recipe / "work", "--backends", "pytorch"]
    given += ["--data-dir", recipe / "data", "--batch-sizes", "4", "--perf-min-time", "0.02", "--spec", _spec(recipe)]
    return lambda file: run("bench", *given, "--perf-max-time", "1", "--save", file)


def test_bench_writes_a_session_of_a_baseline(session, tmp_path):
    assert session(tmp_path / "session.json") == 0
    rows = baseline.load(tmp_path / "session.json").rows
    assert sorted(rows) == ["pytorch/text/4/inference", "pytorch/vision/4/inference"]
    assert all(len(values) == 1 for values in rows.values())


@pytest.mark.parametrize("verdict", ["BUSY", "BAD_OUTPUT", "INSUFFICIENT"])
def test_a_disturbed_session_is_no_baseline(verdict, session, tmp_path, capsys, monkeypatch):
    """A baseline of a busy machine would call every later loss of speed a pass."""
    monkeypatch.setattr(protocol, "verdict", lambda *_, **__: (verdict, "process 7"))
    assert session(tmp_path / "none.json") == 1
    assert f"pytorch/vision/4/inference is {verdict}: process 7" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize(
    ("verdict", "said"), [("VALID", "BUSY: the machine ran at 61%"), ("BAD_OUTPUT", "BAD_OUTPUT: ")]
)
def test_a_session_on_a_slow_machine_is_no_baseline(verdict, said, session, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(protocol, "verdict", lambda *_, **__: (verdict, ""))
    monkeypatch.setattr(machine.Pace, "now", lambda pace: 0.61)
    monkeypatch.setattr(protocol, "PATIENCE", 1)
    assert session(tmp_path / "none.json") == 1
    assert f"pytorch/vision/4/inference is {said}" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()


def test_a_baseline_is_of_the_specs_model(recipe, tmp_path, capsys):
    model = recipe / "models" / "vit_b_32_text.onnx"
    assert run("bench", "--model", model, "--save", tmp_path / "none.json") == 2
    assert "leave out --model" in capsys.readouterr().err


def _spec(folder, more=""):
    file = folder / "any.toml"
    text = 'name = "any"\ntitle = "any"\n[model]\nname = "x"\n[data]\nname = "any"\n'
    file.write_text(text + more.replace("[data]\n", ""), encoding="utf-8")
    return file


def test_stale_arrays_are_not_mixed_in(recipe, tmp_path, capsys):
    shapes.write(tmp_path / "other", seed=7, count=2)
    given = ["--data-dir", tmp_path / "other", "--save-dir", recipe / "prep_data", "--model-name", CONFIG]
    assert run("preprocess", *given) == 2
    assert "holds 12 arrays of other data" in capsys.readouterr().err


def test_embeddings_of_another_data_set_are_refused(recipe, tmp_path, capsys):
    shapes.write(tmp_path / "other", seed=7, count=12)
    out = recipe / "om_outputs"
    given = ["--vision-embeds", out / "vision_embed_bs8", "--text-embeds", out / "text_embed_bs8"]
    assert run("evaluate", *given, "--data-dir", tmp_path / "other") == 2
    assert "embeddings do not match the data" in capsys.readouterr().err


def test_reference(capsys):
    assert run("reference", "--model-name", "ViT-B-32", "--pretrained", "laion2b_s34b_b79k") == 0
    assert "0.6678 0.8838 0.9310" in capsys.readouterr().out
    assert run("reference", "--model-name", "ViT-Z") == 2


def test_doctor_says_what_is_there(capsys):
    assert run("doctor", "--backends", "pytorch,onnx") == 0
    out = capsys.readouterr().out
    assert "onnxruntime" in out
    assert "MISSING" not in out
    import torch

    assert f"{torch.__version__}, for " in out


@pytest.mark.parametrize(
    ("line", "version", "said"),
    [
        ("cuda: Optional[str] = '13.0'", "2.14.1+cu130", "for CUDA 13.0"),
        ("cuda: Optional[str] = None", "2.13.0+cpu", "for CPU"),
    ],
)
def test_doctor_says_which_build_of_torch(line, version, said, tmp_path, monkeypatch, capsys):
    """An installed torch of 2 GB of CUDA's packages, as its files say it; it is not imported."""
    for name, size in (("torch", 5), ("nvidia_cudnn_cu13", 2 * 10**9)):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
        (folder / "RECORD").write_text(f"{name}/x.so,sha256=0,{size}\n", encoding="utf-8")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\n{line}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    run("doctor", "--backends", "pytorch")
    (found,) = [line for line in capsys.readouterr().out.splitlines() if "torch build" in line]
    assert f"{version}, {said}" in found
    assert ("frees" in found) == ("CUDA" in said)
    freed = re.search(r"frees ([\d.]+) GB", found)  # beside what is really installed
    assert freed is None or float(freed[1]) >= 2.0


def test_doctor_advises_once_on_an_open_clip_that_does_not_import(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert run("doctor", "--backends", "pytorch") == 1
    (found,) = [line for line in capsys.readouterr().out.splitlines() if "does not import" in line]
    assert found.startswith("MISSING")
    assert found.count("pip install -r requirements.txt") == 1


def test_doctor_names_two_runtimes_that_overwrite_each_other(monkeypatch, capsys):
    monkeypatch.setattr(environment, "onnxruntimes", lambda: ["onnxruntime 1.20.1", "onnxruntime-gpu 1.20.1"])
    assert run("doctor", "--backends", "onnx") == 1
    assert "overwrite each other" in capsys.readouterr().out


def test_doctor_fails_on_a_host_without_npu(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run("doctor", "--backends", "om") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("MISSING") and "atc" in line]
    assert [line for line in lines if line.startswith("MISSING") and "npu-smi" in line]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["embed", "--input", "nowhere"], "no .npy files"),
        (["compile", "--model", "x.onnx"], "--batch-sizes"),
        (["compile", "--model", "x.onnx", "--input_shape", "image"], "expected NAME:BATCH"),
        (["bench", "--model", "x.bin"], "no such .onnx or .om file"),
        (["bench", "--loop", "0"], "at least 1"),
        (["baseline"], "--save FILE"),
        (["report", "nowhere.json"], "nowhere.json"),
        (["evaluate", "--vision-embeds", "a", "--text-embeds", "b"], "no such folder"),
        (["preprocess", "--model-name", "ViT-B-32"], "--data-dir"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, words, capsys):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"clipval {arguments[0]}: ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["export", "--opset-version", "11"],
        ["bench", "--batch-sizes", "0"],
        ["bench", "--backends", "tpu"],
        ["bench", "--perf-min-time", "-1"],
        ["compile", "--atc-flags", "'open"],
        ["preprocess", "--captions-format", "json"],
    ],
)
def test_wrong_usage_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err
