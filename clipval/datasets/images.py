"""Open one picture as RGB, whatever it is stored as."""

from __future__ import annotations

import re
import threading
import warnings
from pathlib import Path

from PIL import Image

from clipval.errors import InputError, one_line

MOST_PIXELS = 89_478_485  # where Pillow starts to warn of a decompression bomb: its MAX_IMAGE_PIXELS
# Named, so that no file is handed to a plugin that runs an outside program (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
# Their decoders differ, or Pillow has none: a picture would not be the same pixels everywhere.
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
    "packed by gzip": rb"\x1f\x8b",
    "a zip archive": rb"PK\x03\x04",
    "Photoshop's": rb"8BPS",
}
WIDE_MODES = ("I", "F")  # more than 8 bits a channel, which Pillow would clip to white instead of scaling
_opening = threading.Lock()


def open_rgb(path: Path) -> Image.Image:
    """A picture decoded to RGB, its first frame where it has several.

    It is converted before it is resized, as CLIP_benchmark does: a palette image would otherwise be resized without
    interpolation. EXIF orientation is ignored, as open_clip and CLIP_benchmark ignore it.

    Raises:
        InputError: not a picture, damaged, cut off, of more than 8 bits a channel, or too large to decode.
    """
    try:
        with _open(path) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise InputError(f"image {path}: {width} x {height} pixels, too large to decode; scale it down")
            if image.mode.split(";")[0] in WIDE_MODES:
                raise InputError(f"image {path}: pixels are {image.mode}, expected 8 bits a channel; convert it")
            image.load()
            image.info.pop("transparency", None)  # has no part in the colours, but makes convert() warn
            return image if image.mode == "RGB" else image.convert("RGB")  # a copy costs a tenth of decoding
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"image {path}: too large to decode; scale it down ({error})") from error
    except Exception as error:  # each of Pillow's format plugins raises its own
        codec = _codec(path)
        if codec:
            raise InputError(
                f"image {path}: is {codec}, which is not read; expected one of {', '.join(FORMATS)}"
            ) from error
        raise InputError(
            f"image {path}: cannot be read, not a picture or damaged ({one_line(error)}); replace it"
        ) from error


def _codec(path: Path) -> str:
    """What a file is that is none of `FORMATS`, by its first bytes; an empty string for what is not known."""
    try:
        with open(path, "rb") as stream:
            start = stream.read(64)
    except OSError:
        return ""
    return next((name for name, form in OTHERS.items() if re.match(form, start, re.S | re.I)), "")


def _open(path: Path) -> Image.Image:
    """Read a picture's header without Pillow's warnings; one thread at a time, as all share one list of filters."""
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(path, formats=FORMATS)
