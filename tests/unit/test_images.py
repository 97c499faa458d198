"""Pictures of every kind become RGB, and what is no picture is named."""

import io
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1", "is AVIF, which is not supported; expected one of JPEG, PNG"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0avifmiaf", "is AVIF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is HEIC"),
        (b"\xff\x0a\xfa\x1f", "is JPEG XL"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", r"is a git-lfs pointer \(run git lfs pull\)"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\n<svg xmlns='http://www.w3.org/2000/svg'>", "is SVG"),
        (b"\x1f\x8b\x08", "is a gzip file"),
    ],
)
def test_other_codecs_are_named(tmp_path, start, words):
    (tmp_path / "x.jpg").write_bytes(start + bytes(40))
    with pytest.raises(InputError, match=f"x.jpg: {words}"):
        open_rgb(tmp_path / "x.jpg")


def test_a_picture_too_large(tmp_path):
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match="bomb.png: .*too large to decode"):
        open_rgb(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("name", "array"), [("wide.png", PIXELS[..., 0].astype(np.uint16) * 257), ("float.tif", np.float32(PIXELS[..., 0]))]
)
def test_more_than_8_bits_would_be_clipped(tmp_path, name, array):
    Image.fromarray(array).save(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: pixels are .*, expected 8 bits per channel"):
        open_rgb(tmp_path / name)


def test_no_outside_program_is_run(tmp_path):
    (tmp_path / "page.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="page.jpg: is PostScript, which is not supported"):
        open_rgb(tmp_path / "page.jpg")


def test_threads_share_no_warnings(tmp_path):
    RGB.quantize(16).save(tmp_path / "p.png", transparency=bytes(range(16)))  # Pillow warns where it is converted
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(open_rgb, [tmp_path / "p.png"] * 400))
        assert list(warnings.filters) == before
    assert not caught
    assert all(np.array_equal(np.asarray(image), np.asarray(found[0])) for image in found)


JPEG = io.BytesIO()
RGB.save(JPEG, "JPEG")


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.integers(0, len(JPEG.getvalue())), st.booleans())
def test_any_bytes_give_a_picture_or_one_line(tmp_path, content, start, cut):
    whole = JPEG.getvalue()
    (tmp_path / "x.jpg").write_bytes(whole[:start] + content + (b"" if cut else whole[start + len(content) :]))
    try:
        message = ""
        mode = open_rgb(tmp_path / "x.jpg").mode
    except InputError as error:
        message = str(error)
    assert ("x.jpg" in message and "\n" not in message) if message else mode == "RGB"


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none.jpg: cannot be read"):
        open_rgb(tmp_path / "none.jpg")
