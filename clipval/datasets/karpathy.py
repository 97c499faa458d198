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
from typing import Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

from clipval.datasets import RetrievalDataset
from clipval.errors import InputError, UsageError

HOW = "expected images beside one *_karpathy.txt: CSV with the columns image,caption"


class Row(NamedTuple):
    """One annotation: where it stands, the image's name as written, and the caption."""

    line: int
    image: str
    caption: str


def read(folder: Path, *, captions_format: str = "csv", annotations: Optional[Path] = None) -> RetrievalDataset:
    """Read a data set. Rows of one image need not be adjacent, and an image may have any number of captions.

    A caption may be there twice, for one image or for two (Flickr30k has one): each row is a caption with its own id.

    Args:
        folder: images may lie in sub-folders, linked ones too; images without a caption are not part of the set.
        captions_format: `csv` or `clip_benchmark`.
        annotations: the annotation file; None finds the folder's only one.

    Raises:
        UsageError: there is no such captions_format.
        InputError: what is missing or wrong, with file and line.
    """
    parsers = {"csv": _parse_csv, "clip_benchmark": _split_clip_benchmark}
    if captions_format not in parsers:
        raise UsageError(f"captions format {captions_format!r}: unknown; expected {' or '.join(parsers)}")
    file = annotations if annotations is not None else _find(folder)
    rows = list(parsers[captions_format](file, _decode(file)))
    if not rows:
        raise InputError(f"annotations {file}: no captions in it; {HOW}")
    paths = _place(folder, file, rows)
    grouped: Dict[str, List[str]] = {}
    for row in rows:
        grouped.setdefault(paths[row.image].stem, []).append(row.caption)
    by_id = {path.stem: path for path in paths.values()}
    ids = tuple(grouped)
    return RetrievalDataset(
        folder=folder,
        image_ids=ids,
        image_paths=tuple(by_id[name] for name in ids),
        captions=tuple(caption for name in ids for caption in grouped[name]),
        caption_ids=tuple(f"{name}_{k}" for name in ids for k in range(len(grouped[name]))),
        image_of_caption=np.repeat(np.arange(len(ids), dtype=np.int64), [len(grouped[name]) for name in ids]),
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
    if not os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
        raise InputError(f"data {folder}: no such folder; {HOW}")
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"data {folder}: cannot be listed ({error.strerror}); {HOW}") from error
    for endings in (("_karpathy.txt",), (".csv", ".txt")):
        # Hidden files are not meant: macOS leaves a "._x" beside each x that it copies.
        found = [name for name in names if name.endswith(endings) and name[0] != "."]
        if len(found) == 1:
            return folder / found[0]
        if found:
            raise InputError(f"data {folder}: several annotation files ({', '.join(found)}); keep one")
    raise InputError(f"data {folder}: no annotation file; {HOW}")


def _decode(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"annotations {file}, line {line}: not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise InputError(f"annotations {file}: cannot be read ({error.strerror}); {HOW}") from error
    if "\0" in text:
        raise InputError(f"annotations {file}: holds NUL bytes, so it is not a text file; {HOW}")
    return text


def _parse_csv(file: Path, text: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    started, first = 0, True
    try:
        for cells in reader:
            line, started = started + 1, reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            header, first = first and cells[0].strip().lower() == "image", False
            if len(cells) != 2:
                shown = ",".join(cells)[:60]
                raise InputError(
                    f"annotations {file}, line {line}: {len(cells)} columns, expected 2 (image,caption): {shown!r}; "
                    f"put a caption with commas into double quotes"
                )
            image, caption = (cell.strip() for cell in cells)
            if header:
                continue
            if not image or not caption:
                raise InputError(f"annotations {file}, line {line}: the {'caption' if image else 'image'} is empty")
            yield Row(line, image, caption)
    except csv.Error as error:
        raise InputError(f"annotations {file}, line {started + 1}: not CSV ({error})") from error


def _split_clip_benchmark(file: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):  # all line ends count, as in a text file
        stripped = line.strip()
        if number == 1 or not stripped:
            continue
        parts = stripped.split(".jpg,")
        if len(parts) != 2:
            raise InputError(
                f"annotations {file}, line {number}: {len(parts) - 1} times '.jpg,', expected once in clip_benchmark's "
                f"format: {stripped[:60]!r}; read it with --captions-format csv"
            )
        yield Row(number, parts[0] + ".jpg", parts[1])


def _place(folder: Path, annotations: Path, rows: List[Row]) -> Dict[str, Path]:
    """The file of each image, by its name as the rows write it; no two files have one id."""
    files: Dict[str, List[Path]] = {}
    for path in _walk(folder):
        files.setdefault(path.name, []).append(path)
    placed: Dict[str, Path] = {}
    owners: Dict[str, Path] = {}
    for row in rows:
        if row.image in placed:
            continue
        path = placed[row.image] = _resolve(folder, files, annotations, row)
        known = owners.setdefault(path.stem, path)
        if known != path:
            where = f"annotations {annotations}, line {row.line}"
            raise InputError(f"{where}: {path} and {known} have one id, {path.stem!r}; rename one and its rows")
    return placed


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below the folder, through linked folders too: one walk, not one look-up a caption."""
    waiting: List[Tuple[str, FrozenSet[str]]] = [(str(folder), frozenset())]
    while waiting:
        parent, above = waiting.pop()
        real = os.path.realpath(parent)
        if real in above:  # a link back up
            continue
        try:
            entries = list(os.scandir(parent))
        except OSError:  # such as lost+found; an image in there is reported as missing
            continue
        for entry in entries:
            try:
                if entry.is_dir():
                    waiting.append((entry.path, above | {real}))
                elif entry.is_file():
                    yield Path(entry.path)
            except OSError:  # a link to itself
                continue


def _resolve(folder: Path, files: Dict[str, List[Path]], annotations: Path, row: Row) -> Path:
    where = f"annotations {annotations}, line {row.line}"
    written = Path(row.image.replace("\\", "/"))
    if not written.parts or ".." in written.parts or written.is_absolute():
        raise InputError(f"{where}: image {row.image[:80]!r} is not below the data folder; name it relative to that")
    found = files.get(written.name, [])
    if folder / written in found:
        return folder / written
    if len(written.parts) == 1 and len(found) == 1:
        return found[0]
    if len(written.parts) == 1 and found:
        one, other = sorted(found)[:2]
        raise InputError(f"{where}: image {row.image[:80]!r} lies in several folders: {one} and {other}; name its own")
    raise InputError(f"{where}: image {row.image[:80]!r} is not in {folder}; copy it there or take out its rows")
