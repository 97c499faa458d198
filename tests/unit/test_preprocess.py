"""Prepared arrays are bit for bit the model's own transform's, and a run that was stopped goes on."""

import inspect
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from clipval import model as models
from clipval import preprocess
from clipval.datasets import karpathy, shapes
from clipval.datasets.images import open_rgb
from clipval.errors import InputError
from clipval.towers import towers
from clipval.transform import DEFAULT, build

TOWERS = towers(224, 77, 512)
SIZES = ((500, 333), (333, 500), (224, 224), (246, 151), (234, 487), (31, 17), (640, 90))


def transform(**more):
    models.import_open_clip()
    from open_clip.transform import image_transform

    return image_transform(224, is_train=False, **more)


def tokenize(captions):
    import torch

    rows = torch.zeros(len(captions), 77, dtype=torch.int64)
    for row, caption in zip(rows, captions):
        letters = [ord(letter) for letter in caption[:70]]
        row[: len(letters) + 2] = torch.tensor([49406, *letters, 49407])
    return rows


@pytest.fixture(scope="module")
def model():
    return types.SimpleNamespace(transform=transform(), tokenize=tokenize)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Every kind of file that is read, in sizes that scale up and down, wide and tall."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    for n, (width, height) in enumerate(SIZES):
        noise = Image.fromarray(rng.integers(0, 256, (height // 3 + 2, width // 3 + 2, 3), np.uint8))
        image = noise.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        image.save(folder / f"jpeg{n}.jpg", quality=90)
        image.save(folder / f"progressive{n}.jpg", quality=80, progressive=True, subsampling=0)
        image.convert("L").save(folder / f"grey{n}.jpg")
        image.convert("CMYK").save(folder / f"cmyk{n}.jpg")
        image.save(folder / f"png{n}.png")
        Image.fromarray(np.dstack([pixels, pixels[..., :1]])).save(folder / f"alpha{n}.png")
        image.quantize(32).save(folder / f"palette{n}.png", transparency=3)
        image.convert("1").save(folder / f"bits{n}.png")
        image.convert("LA").save(folder / f"greyalpha{n}.png")
        image.quantize(64).save(folder / f"gif{n}.gif", save_all=True, append_images=[image.quantize(8)])
        image.save(folder / f"webp{n}.webp", lossless=True)
        image.save(folder / f"bmp{n}.bmp")
        image.save(folder / f"tiff{n}.tif")
    names = sorted(path.name for path in folder.iterdir())
    (folder / "set_karpathy.txt").write_text("".join(f"{name},{name}\n" for name in names), encoding="utf-8")
    return karpathy.read(folder)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"interpolation": "bilinear", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        {"resize_mode": "squash", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.5)},
        {"resize_mode": "longest", "fill_color": 9},
    ],
    ids=["default", "bilinear", "squash", "longest"],
)
def test_bit_for_bit_the_models_own(files, tmp_path, more):
    if not set(more) <= set(inspect.signature(models.import_open_clip().image_transform).parameters):
        with pytest.raises(InputError, match="open_clip 2.20.0 cannot resize"):
            build(msgspec.structs.replace(DEFAULT, **more), (224, 224))
        return
    own = transform(**more)
    model = types.SimpleNamespace(transform=own, tokenize=tokenize)
    assert preprocess.Transform(own)._table is not None
    preprocess.prepare(files, model, TOWERS, tmp_path)
    for name, path in zip(files.image_ids, files.image_paths):
        with Image.open(path) as stored:
            wanted = own(stored.convert("RGB")).numpy()
        assert np.array_equal(np.load(tmp_path / "images" / f"{name}.npy")[0], wanted), path.name


def test_another_transform_is_called_as_it_is(files):
    def own(image):
        import torch

        return torch.from_numpy(np.asarray(image.resize((224, 224)), np.float32).transpose(2, 0, 1)) - 7

    out = np.empty((3, 224, 224), np.float32)
    image = open_rgb(files.image_paths[0])
    preprocess.Transform(own)(image, out)
    assert np.array_equal(out, own(image).numpy())


@pytest.fixture
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    shapes.write(folder, count=12)
    return karpathy.read(folder)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_are_as_numpy_writes_them(drawn, model, tmp_path):
    preprocess.prepare(drawn, model, TOWERS, tmp_path)
    for path in tmp_path.rglob("*.npy"):
        again = io.BytesIO()
        np.save(again, np.load(path))
        assert path.read_bytes() == again.getvalue()
    assert len(list(tmp_path.rglob("*"))) == 12 + 60 + 2  # and nothing else is left


class Stopped(Exception):
    """As if the run had been killed."""


def count_writes(monkeypatch, most=10**6):
    """Names of the files that are written, which end with `Stopped` after so many."""
    real, made = preprocess._write, []

    def write(file, data):
        if len(made) >= most:
            raise Stopped
        made.append(file.name)
        real(file, data)

    monkeypatch.setattr(preprocess, "_write", write)
    return made


def stop(monkeypatch, after, *arguments):
    with monkeypatch.context() as patches:
        count_writes(patches, after)
        with pytest.raises(Stopped):
            preprocess.prepare(arguments[0], arguments[1], TOWERS, arguments[2])


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setattr(preprocess, "THREADS", 1)
    monkeypatch.setattr(preprocess, "CAPTIONS", 10)


@pytest.mark.parametrize("before", [3, 12, 40])
def test_a_stopped_run_goes_on(drawn, model, tmp_path, monkeypatch, one_thread, before):
    preprocess.prepare(drawn, model, TOWERS, tmp_path / "whole")
    stop(monkeypatch, before, drawn, model, tmp_path / "out")
    cut = min((tmp_path / "out" / "images").iterdir())
    cut.write_bytes(cut.read_bytes()[:5000])  # as a kill in the middle of a write leaves it
    made = count_writes(monkeypatch)
    preprocess.prepare(drawn, model, TOWERS, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert len(made) == 72 - before + 1
    assert cut.name in made


@pytest.mark.parametrize("change", ["picture", "caption", "transform", "tokenizer", "code"])
def test_what_another_run_left_is_not_taken(drawn, model, tmp_path, monkeypatch, one_thread, change):
    stop(monkeypatch, 40, drawn, model, tmp_path / "out")
    if change == "picture":
        Image.new("RGB", (300, 300), "red").save(drawn.image_paths[0])
    elif change == "caption":
        drawn = type(drawn)(**{**vars(drawn), "captions": (*drawn.captions[:-1], "another")})
    elif change == "transform":
        model = types.SimpleNamespace(transform=transform(mean=(0.5, 0.5, 0.5)), tokenize=tokenize)
    elif change == "tokenizer":
        model = types.SimpleNamespace(
            transform=model.transform, tokenize=lambda some: tokenize([one.upper() for one in some])
        )
    else:
        monkeypatch.setattr("clipval.store.code_hash", lambda *modules: "other code")
    made = count_writes(monkeypatch)
    preprocess.prepare(drawn, model, TOWERS, tmp_path / "out")
    assert len(made) == 72
    preprocess.prepare(drawn, model, TOWERS, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


KILLED = """
import os, signal, sys, types
from pathlib import Path
from clipval import preprocess
from clipval.datasets import karpathy
from tests.unit import test_preprocess as these

real, left = preprocess._write, int(sys.argv[3])
def write(file, data):
    global left
    left -= 1
    if left < 0:
        file.write_bytes(bytes(data)[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    real(file, data)
preprocess._write = write
model = types.SimpleNamespace(transform=these.transform(), tokenize=these.tokenize)
preprocess.prepare(karpathy.read(Path(sys.argv[1])), model, these.TOWERS, Path(sys.argv[2]))
"""


def test_a_killed_process_goes_on(drawn, model, tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(drawn.folder), str(tmp_path / "out"), "30"]
    variables = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, capture_output=True, env=variables, check=False)
    assert done.returncode == -9, done.stderr
    assert json.loads((tmp_path / "out" / preprocess.UNFINISHED).read_bytes())["data"]
    preprocess.prepare(drawn, model, TOWERS, tmp_path / "out")
    preprocess.prepare(drawn, model, TOWERS, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_captions_are_tokenised_in_parts(drawn, model, tmp_path, monkeypatch, one_thread):
    real, sizes = preprocess.tokens, []

    def tokens(captions, *others):
        sizes.append(len(captions))
        return real(captions, *others)

    monkeypatch.setattr(preprocess, "tokens", tokens)
    preprocess.prepare(drawn, model, TOWERS, tmp_path)
    assert sizes[1:] == [10] * 6  # the first are those of the key


def test_tasks_do_not_pile_up():
    begun, ended, ahead = 0, 0, 0

    def items():
        nonlocal begun, ahead
        for n in range(1000):
            begun += 1
            ahead = max(ahead, begun - ended)
            yield n

    def work(n):
        nonlocal ended
        ended += 1
        return 2 * n

    assert preprocess.each_in_threads(work, items()) == list(range(0, 2000, 2))
    assert ahead <= preprocess.AHEAD + 1


def test_a_bad_picture_is_named(drawn, model, tmp_path):
    drawn.image_paths[7].write_bytes(b"no picture")
    with pytest.raises(InputError, match=drawn.image_ids[7]):
        preprocess.prepare(drawn, model, TOWERS, tmp_path)
    assert not (tmp_path / "images" / f"{drawn.image_ids[7]}.npy").exists()
