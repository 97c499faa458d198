"""Karpathy's own file, `dataset_flickr30k.json` (or `_flickr8k`, `_coco`): every split; the recipe's is `test`.

Source: cs.stanford.edu/people/karpathy/deepimagesent, caption_datasets.zip:
`images[].filename, split, sentences[].raw`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Iterator, List

import msgspec

from clipval.datasets import Kind
from clipval.datasets.folder import Row, parsed_json, reader, recognised
from clipval.errors import InputError

HOLDS = "Karpathy's dataset_flickr30k.json: images, each with filename, split and sentences"
SPLIT = "test"


class Sentence(msgspec.Struct):
    raw: str


class Image(msgspec.Struct):
    filename: str
    split: str
    sentences: List[Sentence]


class _Root(msgspec.Struct):
    images: List[Image]


def find(folder: Path) -> List[Path]:
    """JSON files whose images have sentences."""
    return recognised(folder, lambda ends: bool(re.match(r"\s*\{", ends)) and '"sentences"' in ends)


def split(file: Path) -> List[Image]:
    """The images of the test split.

    Raises:
        InputError: the file cannot be read, or has no such image.
    """
    return test_split(file, parsed_json(file, _Root).images)


def test_split(file: Path, images: List[Image]) -> List[Image]:
    """Those of the test split.

    Raises:
        InputError: there are none.
    """
    found = [image for image in images if image.split == SPLIT]
    if not found:
        others = ", ".join(sorted({image.split for image in images})) or "no images"
        raise InputError(
            f"annotations {file}: no image of the split {SPLIT!r} (it has {others}); get the complete file"
        )
    return found


def rows(file: Path, images: List[Image]) -> Iterator[Row]:
    """Each caption with its image, as written but for space at its ends.

    Raises:
        InputError: a caption is empty.
    """
    for image in images:
        where = f"image {image.filename}"
        for sentence in image.sentences:
            if not sentence.raw.strip():
                raise InputError(f"annotations {file}, {where}: the caption is empty")
            yield Row(where, image.filename, sentence.raw.strip())


def _rows(folder: Path, file: Path) -> Iterator[Row]:
    return rows(file, split(file))


KIND = Kind("karpathy_json", HOLDS, find, reader(find, HOLDS, _rows))
