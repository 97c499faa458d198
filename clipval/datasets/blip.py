"""BLIP's and ALBEF's annotations, `flickr30k_test.json` or `coco_karpathy_test.json`: one split of Karpathy's.

Source: the data sets that salesforce/BLIP downloads: a list of `{"image": "flickr30k-images/1.jpg", "caption": [...]}`,
for training with one caption in each entry.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Iterator, List, Union

import msgspec

from clipval.datasets import Kind
from clipval.datasets.folder import Row, parsed_json, reader, recognised
from clipval.errors import InputError

HOLDS = "BLIP's flickr30k_test.json: a list of entries with image and caption"
FIRST = re.compile(r'\s*\[\s*\{(?=[^}]*"image"\s*:\s*")(?=[^}]*"caption"\s*:\s*["\[])')
TEST = "test"  # in the name of the file that is meant, next to those of other splits


class _Entry(msgspec.Struct):
    image: str
    caption: Union[str, List[str]]


def find(folder: Path) -> List[Path]:
    """JSON lists whose first entry has an image and captions; those of the test split if any is."""
    found = recognised(folder, lambda ends: FIRST.match(ends) is not None)
    return [file for file in found if TEST in file.stem.lower()] or found


def _rows(folder: Path, file: Path) -> Iterator[Row]:
    for number, entry in enumerate(parsed_json(file, List[_Entry]), 1):
        where = f"entry {number}"
        # images may be in a folder of another name than `flickr30k-images/` or `val2014/`
        image = entry.image if (folder / entry.image).is_file() else entry.image.rpartition("/")[2]
        captions = [entry.caption] if isinstance(entry.caption, str) else entry.caption
        for caption in captions:
            if not caption.strip():
                raise InputError(f"annotations {file}, {where}: the caption is empty")
            yield Row(where, image, caption.strip())


KIND = Kind("blip", HOLDS, find, reader(find, HOLDS, _rows))
