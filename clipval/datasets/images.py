"""Open a picture as RGB, whatever its format."""

from __future__ import annotations

import re
import threading
import warnings
from pathlib import Path

from PIL import Image

from clipval.errors import InputError, one_line

MOST_PIXELS = 89_478_485  # above this Pillow warns of a decompression bomb: its MAX_IMAGE_PIXELS
# Listed explicitly, so that no plugin runs an external program (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
# Decoders differ, or Pillow has none: pixels would not be the same everywhere.
OTHERS = {
    "AVIF": rb".{4}ftyp(avif|avis|mif1.{4}avif)",
    "HEIC": rb".{4}ftyp(hei[cfmsx]|hev[cx]|mif1|msf1)",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "a git-lfs pointer (run git lfs pull)": rb"version https://git-lfs",
    "a web page": rb"\s*(<!doctype html|<html)",
    "SVG": rb"\s*(<\?xml|<svg)",
    "a PDF": rb"%PDF",
    "PostScript": rb"%!PS",
    "a film": rb".{4}ftyp|\x1aE\xdf\xa3",
    "a gzip file": rb"\x1f\x8b",
    "a zip archive": rb"PK\x03\x04",
    "Photoshop's": rb"8BPS",
}
WIDE_MODES = ("I", "F")  # more than 8 bits a channel, which Pillow would clip to white instead of scaling
_opening = threading.Lock()


def open_rgb(path: Path) -> Image.Image:
    """A picture decoded to RGB; its first frame if it has several.

    It is converted before it is resized, as in CLIP_benchmark: a palette image would otherwise be resized without
    interpolation. EXIF orientation is ignored, as in open_clip and CLIP_benchmark.

    Raises:
        InputError: not a picture, damaged, truncated, more than 8 bits per channel, or too large to decode.
    """
    try:
        with _open(path) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise InputError(f"image {path}: {width} x {height} pixels, too large to decode; scale it down")
            if image.mode.split(";")[0] in WIDE_MODES:
                raise InputError(f"image {path}: pixels are {image.mode}, expected 8 bits per channel; convert it")
            image.load()
            image.info.pop("transparency", None)  # does not affect the colours, but makes convert() warn
            return image if image.mode == "RGB" else image.convert("RGB")  # copying takes a tenth of the decoding time
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"image {path}: too large to decode; scale it down ({error})") from error
    except Exception as error:  # each of Pillow's format plugins raises its own
        codec = _codec(path)
        if codec:
            raise InputError(
                f"image {path}: is {codec}, which is not supported; expected one of {', '.join(FORMATS)}"
            ) from error
        raise InputError(
            f"image {path}: cannot be read, not a picture or damaged ({one_line(error)}); replace it"
        ) from error


def _codec(path: Path) -> str:
    """The format of a file that is none of `FORMATS`, by its first bytes; empty if unknown."""
    try:
        with open(path, "rb") as stream:
            start = stream.read(64)
    except OSError:
        return ""
    return next((name for name, form in OTHERS.items() if re.match(form, start, re.S | re.I)), "")


def _open(path: Path) -> Image.Image:
    """Read a picture's header without Pillow's warnings; one thread at a time, since all share one list of filters."""
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(path, formats=FORMATS)
