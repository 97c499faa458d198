"""Open one picture as RGB, whatever it is stored as."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

from PIL import Image

from clipval.errors import InputError, one_line

MOST_PIXELS = 89_478_485  # where Pillow starts to warn of a decompression bomb: its MAX_IMAGE_PIXELS
# Named, so that no file is handed to a plugin that runs an outside program (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
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
            return image.convert("RGB")
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"image {path}: too large to decode; scale it down ({error})") from error
    except Exception as error:  # each of Pillow's format plugins raises its own
        raise InputError(
            f"image {path}: cannot be read, not a picture or damaged ({one_line(error)}); replace it"
        ) from error


def _open(path: Path) -> Image.Image:
    """Read a picture's header without Pillow's warnings; one thread at a time, as all share one list of filters."""
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(path, formats=FORMATS)
