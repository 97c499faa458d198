"""Transforms of images: which one belongs to weights, and that our own account of each agrees with open_clip's code."""

import json
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipval import cli, library, preprocess, transform, weights
from clipval.datasets import shapes
from clipval.errors import InputError
from clipval.spec import PreprocessSpec

from .conftest import CONFIG

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "source": "a test"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Wide, high, square, small and one pixel off, as PNG so that no JPEG coder is between."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for width, height in ((300, 201), (97, 260), (128, 128), (40, 33), (225, 224)):
        noise = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height)).save(folder / f"{width}x{height}.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("size", [(224, 224), (64, 64), (64, 96), (96, 64)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_each_mode_of_open_clip_is_known(resize_mode, interpolation, size, pictures):
    stated = PreprocessSpec(resize_mode=resize_mode, interpolation=interpolation, fill_color=7, **HALF)
    plain = resize_mode == "shortest" and interpolation != "bilinear" and size[0] == size[1]
    if "resize_mode" not in signature(library.import_open_clip().image_transform).parameters and not plain:
        with pytest.raises(InputError, match="open_clip_torch>=2.24"):
            transform.build(stated, size)
        return
    apply = transform.build(stated, size)
    for file in pictures:
        found = np.asarray(apply(Image.open(file).convert("RGB")))
        assert np.abs(found - preprocess.expected_pixels(file, size, stated)).max() <= 1e-5, file.name


def test_modes_differ(pictures):
    """So that the gate can tell them apart: each is far from each other on a picture that is not square."""
    wide = next(file for file in pictures if file.stem == "300x201")
    found = [
        preprocess.expected_pixels(wide, (64, 64), PreprocessSpec(resize_mode=mode, interpolation=one, **HALF))
        for mode in ("shortest", "longest", "squash")
        for one in ("bicubic", "bilinear")
    ]
    for n, one in enumerate(found):
        assert all(np.abs(one - other).max() > 0.01 for other in found[:n])


def test_every_tags_transform_is_known():
    """58 of the 196 tags of open_clip 3.3 are not like its default."""
    open_clip = library.import_open_clip()
    found = [
        transform.of_config(library.tag_config(name, tag), transform.DEFAULT.source)
        for name, tag in open_clip.list_pretrained()
    ]
    other = [one for one in found if one != transform.DEFAULT]
    assert other
    if library.open_clip_version() == "3.3.0":
        assert (len(found), len(other)) == (196, 58)


def test_a_folder_brings_its_transform(tmp_path, seeded):
    import torch

    config = json.loads(Path(CONFIG).read_text(encoding="utf-8"))
    stated = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest", "size": 224}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": stated}), encoding="utf-8"
    )
    torch.save(seeded.module.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    for given in (str(tmp_path), f"local-dir:{tmp_path}"):
        found = weights.find_weights(CONFIG, given)
        assert (found.preprocess.mean, found.preprocess.std) == ((0.5,) * 3, (0.25,) * 3)
        assert found.quick_gelu is False
    name = f"local-dir:{tmp_path}"
    assert library.config(name)["embed_dim"] == config["embed_dim"]
    assert library.sizes(name)["vision"].row_shape == (3, 224, 224)


@pytest.fixture
def data(tmp_path):
    shapes.write(tmp_path / "data", count=3)
    return tmp_path / "data"


def prepared(data, tmp_path, *arguments):
    """The first array that `preprocess` writes."""
    command = ["preprocess", "--data-dir", data, "--save-dir", tmp_path / "out", "--workdir", tmp_path / "work"]
    assert cli.main([str(one) for one in (*command, *arguments)]) == 0
    return np.load(min((tmp_path / "out" / "images").iterdir()))[0]


def test_preprocess_takes_a_tags_transform_and_downloads_nothing(data, tmp_path, capsys):
    found = prepared(data, tmp_path, "--model-name", "ViT-L-14", "--pretrained", "laion2b_s32b_b82k")
    assert "mean 0.5 0.5 0.5" in capsys.readouterr().out
    plain = preprocess.expected_pixels(min(data.glob("*.jpg")), (224, 224), PreprocessSpec(**HALF))
    assert np.abs(found - plain).max() <= 1e-5


def test_preprocess_says_what_it_assumed(data, tmp_path, capsys):
    prepared(data, tmp_path, "--model-name", "ViT-B-16")
    assert "assumed" in capsys.readouterr().out


def test_preprocess_takes_the_specs_transform(data, tmp_path, capsys):
    preprocess = 'mean = [0.1, 0.2, 0.3]\nstd = [0.5, 0.5, 0.5]\nsource = "me"'
    tables = f'[model]\nname = "{CONFIG}"\n[data]\nname = "mine"\n[preprocess]\n{preprocess}\n'
    text = f'name = "mine"\ntitle = "Mine"\n{tables}'
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    prepared(data, tmp_path, "--spec", tmp_path / "mine.toml", "--pretrained", "random")
    assert "mean 0.1 0.2 0.3" in capsys.readouterr().out
