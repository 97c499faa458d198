"""Read the recipe's folder: images beside one annotation file of `image,caption` rows.

`csv` reads real CSV, as the recipe does. `clip_benchmark` reads as CLIP_benchmark does, which published figures were
made with: the first line is skipped, each line is split at ".jpg,", and a quoted caption keeps its quotes, which gives
other tokens. Source: CLIP_benchmark, clip_benchmark/datasets/flickr.py.
"""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

from clipval.datasets import RetrievalDataset
from clipval.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
HOW = "expected images beside one *_karpathy.txt: CSV with the columns image,caption"


class Row(NamedTuple):
    """One annotation: where it stands, the image's name as written, and the caption."""

    line: int
    image: str
    caption: str


def read(folder: Path, *, captions_format: str = "csv", annotations: Optional[Path] = None) -> RetrievalDataset:
    """Read a data set. Rows of one image need not be adjacent, and an image may have any number of captions.

    Args:
        folder: images may lie in sub-folders; images without a caption are not part of the set.
        captions_format: `csv` or `clip_benchmark`.
        annotations: the annotation file; None finds the folder's only one.

    Raises:
        InputError: what is missing or wrong, with file and line.
    """
    file = annotations if annotations is not None else _find(folder)
    text = _decode(file)
    rows = list(_split_clip_benchmark(file, text) if captions_format == "clip_benchmark" else _parse_csv(file, text))
    if not rows:
        raise InputError(f"annotations {file}: no captions in it; {HOW}")
    files = _images(folder)
    grouped: Dict[str, List[str]] = {}
    paths: Dict[str, Path] = {}
    for row in rows:
        path = _resolve(folder, files, file, row)
        known = paths.setdefault(path.stem, path)
        if known != path:
            raise InputError(f"annotations {file}, line {row.line}: {path} and {known} have one id, {path.stem!r}")
        grouped.setdefault(path.stem, []).append(row.caption)
    ids = tuple(grouped)
    return RetrievalDataset(
        folder=folder,
        image_ids=ids,
        image_paths=tuple(paths[name] for name in ids),
        captions=tuple(caption for name in ids for caption in grouped[name]),
        caption_ids=tuple(f"{name}_{k}" for name in ids for k in range(len(grouped[name]))),
        image_of_caption=np.repeat(np.arange(len(ids)), [len(grouped[name]) for name in ids]),
    )


def expect(dataset: RetrievalDataset, *, images: int, captions: int) -> None:
    """Hold a data set to the spec's counts; 0 takes any.

    Raises:
        InputError: another split, or an incomplete copy.
    """
    for what, found, wanted in (("images", dataset.image_ids, images), ("captions", dataset.captions, captions)):
        if wanted and len(found) != wanted:
            raise InputError(
                f"data {dataset.folder}: {len(found)} {what}, the spec says {wanted}; "
                f"it is another split or an incomplete copy"
            )


def _find(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"data {folder}: no such folder; {HOW}")
    for pattern in ("*_karpathy.txt", "*.csv", "*.txt"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found)
            raise InputError(f"data {folder}: several annotation files ({names}); keep one")
    raise InputError(f"data {folder}: no annotation file; {HOW}")


def _decode(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise InputError(f"annotations {file}, line {line}: not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise InputError(f"annotations {file}: cannot be read ({error.strerror}); {HOW}") from error


def _parse_csv(file: Path, text: str) -> Iterator[Row]:
    if "\0" in text:
        raise InputError(f"annotations {file}: holds NUL bytes, so it is not a text file; {HOW}")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    started = 0
    try:
        for cells in reader:
            line, started = started + 1, reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != 2:
                shown = ",".join(cells)[:60]
                raise InputError(
                    f"annotations {file}, line {line}: {len(cells)} columns, expected 2 (image,caption): {shown!r}; "
                    f"put a caption with commas into double quotes"
                )
            image, caption = (cell.strip() for cell in cells)
            if line == 1 and image.lower() == "image":
                continue
            if not image or not caption:
                raise InputError(f"annotations {file}, line {line}: the {'caption' if image else 'image'} is empty")
            yield Row(line, image, caption)
    except csv.Error as error:
        raise InputError(f"annotations {file}, line {started + 1}: not CSV ({error})") from error


def _split_clip_benchmark(file: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n")[1:], 2):
        stripped = line.strip()
        if not stripped:
            continue
        parts = stripped.split(".jpg,")
        if len(parts) != 2:
            raise InputError(
                f"annotations {file}, line {number}: {len(parts) - 1} times '.jpg,', expected once in clip_benchmark's "
                f"format: {stripped[:60]!r}; read it with --captions-format csv"
            )
        yield Row(number, parts[0] + ".jpg", parts[1])


def _images(folder: Path) -> Dict[str, List[Path]]:
    """Every image below the folder, by bare file name: one walk, not one look-up a caption."""
    found: Dict[str, List[Path]] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.lower().endswith(SUFFIXES):
                found.setdefault(name, []).append(Path(parent) / name)
    return found


def _resolve(folder: Path, files: Dict[str, List[Path]], annotations: Path, row: Row) -> Path:
    where = f"annotations {annotations}, line {row.line}"
    written: Tuple[str, ...] = Path(row.image.replace("\\", "/")).parts
    if not written or ".." in written or Path(row.image).is_absolute():
        raise InputError(f"{where}: image {row.image[:80]!r} is not below the data folder")
    direct = folder.joinpath(*written)
    found = files.get(written[-1], [])
    if direct in found:
        return direct
    if len(written) == 1 and len(found) == 1:
        return found[0]
    if len(found) > 1:
        raise InputError(f"{where}: image {row.image!r} lies in several folders: {found[0]} and {found[1]}")
    raise InputError(f"{where}: image {row.image[:80]!r} is not in {folder}; copy it there or take out its rows")
