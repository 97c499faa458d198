"""Open one picture as RGB, whatever it is stored as."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image

from clipval.errors import InputError

MOST_PIXELS = 178_956_970  # where Pillow refuses a picture as a decompression bomb: twice its MAX_IMAGE_PIXELS


def open_rgb(path: Path) -> Image.Image:
    """A picture decoded to RGB, its first frame where it has several.

    It is converted before it is resized, as CLIP_benchmark does: a palette image would otherwise be resized without
    interpolation. EXIF orientation is ignored, as open_clip and CLIP_benchmark ignore it.

    Raises:
        InputError: not a picture, damaged, cut off, or too large to decode.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                width, height = image.size
                if width * height > MOST_PIXELS:
                    raise InputError(f"image {path}: {width} x {height} pixels, too large to decode; scale it down")
                return image.convert("RGB")
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"image {path}: too large to decode; scale it down ({error})") from error
    except Exception as error:  # each of Pillow's format plugins raises its own
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"image {path}: cannot be read, not a picture or damaged ({reason}); replace it") from error
