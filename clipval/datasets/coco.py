"""COCO's captions, `captions_val2014.json` or `coco_test_karpathy.json`.

With Karpathy's `dataset_coco.json` next to it, only its test split; else every image that it lists. Source: COCO's
caption format (`images[].id, file_name`, `annotations[].image_id, id, caption`), cocodataset.org/#format-data.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, Iterator, List

import msgspec

from clipval.datasets import Kind, karpathy_json
from clipval.datasets.folder import Row, one_of, parsed_json, reader, recognised
from clipval.errors import InputError

HOLDS = "COCO's captions as JSON: images with id and file_name, annotations with image_id and caption"


class _Image(msgspec.Struct):
    id: int
    file_name: str


class _Annotation(msgspec.Struct):
    image_id: int
    caption: str
    id: int = 0


class _Root(msgspec.Struct):
    images: List[_Image]
    annotations: List[_Annotation]


def find(folder: Path) -> List[Path]:
    """JSON files with captions of numbered images; none next to Karpathy's own file, which has captions too."""
    return [] if karpathy_json.find(folder) else _files(folder)


def _files(folder: Path) -> List[Path]:
    def recognises(ends: str) -> bool:
        return bool(re.match(r"\s*\{", ends)) and '"image_id"' in ends and '"caption"' in ends

    return recognised(folder, recognises)


def _rows(folder: Path, file: Path) -> Iterator[Row]:
    """Captions of the images that are meant; those of one image are ordered by id."""
    root = parsed_json(file, _Root)
    splits = karpathy_json.find(folder)
    if splits:
        chosen = one_of(folder, splits, karpathy_json.HOLDS)
        names = [image.filename for image in karpathy_json.split(chosen)]
    else:
        names = [image.file_name for image in root.images]
    captions: Dict[int, List[_Annotation]] = {}
    for annotation in root.annotations:
        captions.setdefault(annotation.image_id, []).append(annotation)
    by_name = {image.file_name: image.id for image in root.images}
    for name in names:
        found = captions.get(by_name.get(name, -1), [])
        if not found:
            raise InputError(
                f"annotations {file}: no caption of image {name}; it may be the file of another year or split"
            )
        for annotation in sorted(found, key=lambda one: one.id):
            if not annotation.caption.strip():
                raise InputError(f"annotations {file}, annotation {annotation.id}: the caption is empty")
            yield Row(f"annotation {annotation.id}", name, annotation.caption.strip())


KIND = Kind("coco", HOLDS, find, reader(_files, HOLDS, _rows))
