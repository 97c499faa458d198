"""Pictures of every kind become RGB, and what is no picture is named."""

import numpy as np
import pytest
from PIL import Image

from clipval.datasets.images import open_rgb
from clipval.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
RGB = Image.fromarray(PIXELS)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("grey.png", RGB.convert("L")),
        ("palette.png", RGB.quantize(16)),
        ("bits.png", RGB.convert("1")),
        ("alpha.png", RGB.convert("RGBA")),
        ("cmyk.jpg", RGB.convert("CMYK")),
        ("animated.gif", RGB.quantize(16)),
    ],
)
def test_kinds(tmp_path, name, image):
    more = {"save_all": True, "append_images": [image.rotate(90, expand=False)]} if name.endswith("gif") else {}
    image.save(tmp_path / name, **more)
    found = open_rgb(tmp_path / name)
    assert (found.mode, found.size) == ("RGB", (30, 20))
    with Image.open(tmp_path / name) as wanted:
        assert np.array_equal(np.asarray(found), np.asarray(wanted.convert("RGB")))


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    RGB.save(tmp_path / "turned.jpg", exif=exif)
    assert open_rgb(tmp_path / "turned.jpg").size == (30, 20)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xd8\xff\xe0", None])
def test_what_is_no_picture(tmp_path, content):
    file = tmp_path / "x.jpg"
    if content is None:
        RGB.save(file)
        content = file.read_bytes()[:300]
    file.write_bytes(content)
    with pytest.raises(InputError, match="image .*x.jpg: cannot be read") as caught:
        open_rgb(file)
    assert "\n" not in str(caught.value)


def test_a_picture_too_large(tmp_path):
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match="bomb.png: .*too large to decode"):
        open_rgb(tmp_path / "bomb.png")


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none.jpg: cannot be read"):
        open_rgb(tmp_path / "none.jpg")
