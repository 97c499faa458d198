"""Hostile input on the command line: exit code 2 and one line that names the file, never a traceback or a verdict."""

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from clipval import cli
from clipval.datasets import shapes
from clipval.spec import FOLDER

from .conftest import CONFIG

WEIGHTS = FOLDER / "shapes-vit.pt"


def refused(capsys, *arguments):
    """Run a command that must be refused; what it says."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert "Metrics" not in captured.out
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


class Harm:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.fixture
def data(tmp_path):
    shapes.write(tmp_path / "数据 set", count=3)
    return tmp_path / "数据 set"


def preprocess(data, tmp_path):
    return "preprocess", "--model-name", CONFIG, "--data-dir", data, "--save-dir", tmp_path / "out"


def test_paths_with_spaces_and_chinese_characters_work(data, tmp_path):
    assert cli.main([str(one) for one in preprocess(data, tmp_path)]) == 0
    assert len(list((tmp_path / "out" / "texts").iterdir())) == 15


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "huge"])
def test_bad_pictures(kind, data, tmp_path, capsys):
    file = sorted(data.glob("*.jpg"))[1]
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:1500])
    elif kind == "huge":
        Image.new("1", (30_000, 30_000)).save(file, "png")
    else:
        file.write_bytes(b"hello" if kind == "text" else b"")
    assert file.name in refused(capsys, *preprocess(data, tmp_path))


def test_pictures_of_other_kinds_work(data, tmp_path):
    first, second, _ = sorted(data.glob("*.jpg"))
    Image.new("RGBA", (60, 40), (9, 9, 9, 99)).save(first, "png")
    Image.new("P", (300, 300)).save(second, "gif", save_all=True, append_images=[Image.new("P", (300, 300), 3)])
    assert cli.main([str(one) for one in preprocess(data, tmp_path)]) == 0


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (b"image,caption\nnone.jpg,x\n", "none.jpg"),
        (b"image,caption\n", "no captions"),
        (b"image,caption\n../../x.jpg,x\n", "../../x.jpg"),
        (b"image,caption\n\xff\xfe,x\n", "not UTF-8"),
        (b"\0\0\0", shapes.ANNOTATIONS),
    ],
)
def test_bad_annotations(rows, words, data, tmp_path, capsys):
    (data / shapes.ANNOTATIONS).write_bytes(rows)
    assert words in refused(capsys, *preprocess(data, tmp_path))


def good_embeddings(folder):
    rng = np.random.default_rng(0)
    for name, ids in (("v", ["1", "2"]), ("t", ["1_0", "2_0"])):
        (folder / name).mkdir()
        for one in ids:
            np.save(folder / name / f"{one}_0.npy", rng.normal(size=(1, 512)).astype(np.float32))
    return "evaluate", "--vision-embeds", folder / "v", "--text-embeds", folder / "t"


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((1, 512), np.float32),
        np.full((1, 512), np.nan, np.float32),
        np.ones((1, 512), np.int64),
        np.ones((1, 511), np.float32),
        np.ones((1, 512), ">f4"),
        np.array([Harm("harmed")], object),
        b"\x93NUMPY\x01\x00cut off",
        b"",
    ],
    ids=["zero", "nan", "int", "width", "byte order", "pickle", "cut off", "empty"],
)
def test_bad_embeddings(array, tmp_path, capsys):
    command = good_embeddings(tmp_path)
    assert cli.main([str(one) for one in command]) == 0
    file = tmp_path / "v" / "2_0.npy"
    if isinstance(array, bytes):
        file.write_bytes(array)
    else:
        np.save(file, array, allow_pickle=True)
    said = refused(capsys, *command) if capsys.readouterr() else ""
    assert "2" in said
    assert not (tmp_path / "harmed").exists()


def test_embeddings_that_do_not_belong_together(tmp_path, capsys):
    command = good_embeddings(tmp_path)
    (tmp_path / "v" / "2_0.npy").rename(tmp_path / "v" / "3_0.npy")
    assert "2_0" in refused(capsys, *command)


@pytest.mark.parametrize("kind", ["cut off", "empty", "pickle", "text", "missing"])
def test_bad_checkpoints(kind, tmp_path, capsys):
    file = tmp_path / "weights.pt"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Harm(tmp_path / "harmed"), protocol=2))
    elif kind != "missing":
        whole = WEIGHTS.read_bytes()
        file.write_bytes({"cut off": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}[kind])
    command = ["export", "--model-name", CONFIG, "--pretrained", file, "--workdir", tmp_path / "work"]
    assert "weights.pt" in refused(capsys, *command, "--onnx-prefix", tmp_path / "m")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x08\x07\x12"])
def test_bad_onnx_files(content, data, tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    np.save(tmp_path / "rows" / "1_0.npy", np.zeros((1, 77), np.int64))
    (tmp_path / "m.onnx").write_bytes(content)
    said = refused(capsys, "embed", "--model", tmp_path / "m.onnx", "--input", tmp_path / "rows")
    assert "m.onnx" in said


def test_a_work_directory_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"")
    command = ["export", "--model-name", CONFIG, "--pretrained", WEIGHTS, "--onnx-prefix", tmp_path / "m"]
    assert "--workdir" in refused(capsys, *command, "--workdir", tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("title =", "titel ="), "titel"),
        (("embed_dim", "embed_dmi"), "embed_dmi"),
        (("cosine_min = 0.999999", 'cosine_min = "high"'), "cosine_min"),
        (("max_abs = 1e-4", "max_abs = 1e-4\ntolerance = 1"), "tolerance"),
    ],
)
def test_bad_specs(change, words, tmp_path, capsys):
    text = (FOLDER / "shapes.toml").read_text(encoding="utf-8").replace("[data]", "embed_dim = 512\n[data]", 1)
    (tmp_path / "my.toml").write_text(text.replace(*change), encoding="utf-8")
    said = refused(capsys, "bench", "--spec", tmp_path / "my.toml", "--workdir", tmp_path / "w")
    assert words in said
    assert "my.toml" in said


def test_nothing_is_left_behind(data, tmp_path, capsys):
    shutil.rmtree(data)
    assert "no such folder" in refused(capsys, *preprocess(data, tmp_path))
    assert not (tmp_path / "out").exists()
