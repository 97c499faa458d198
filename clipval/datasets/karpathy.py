"""The recipe's annotation file: one image and one caption per row, as CSV, TSV or with semicolons.

`csv` reads real CSV, as the recipe does. `clip_benchmark` reads as CLIP_benchmark does, with which published figures
were made: the first line is skipped, each line is split at ".jpg,", and a quoted caption keeps its quotes, which
changes its tokens. Source: CLIP_benchmark, clip_benchmark/datasets/flickr.py.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Iterator, List, Optional

from clipval.datasets import Kind, RetrievalDataset
from clipval.datasets.folder import Row, annotation_files, gather, one_of, recognised, text_of
from clipval.datasets.karpathy_csv import HEADER as LISTS
from clipval.errors import InputError, UsageError

HOLDS = "one *_karpathy.txt: CSV with the columns image,caption"
# The separator follows the first name of a file; open_clip's own training files have tabs and filepath, title.
FIRST = re.compile(r'\s*"?(?:image|filename|file_name|filepath|[^,;\t"\n{\[|#]*\.\w+)"?\s*([,;\t])\s*([^\n]*)', re.I)
NUMBERED = re.compile(r"[0-9]+\s*[,;\t]")  # an extra column: the caption's number
HEADERS = ("image", "filename", "file_name", "filepath")


def find(folder: Path) -> List[Path]:
    """Text files whose first row is an image and a caption."""
    return recognised(folder, _recognises)


def _recognises(ends: str) -> bool:
    first = FIRST.match(ends)
    return first is not None and not NUMBERED.match(first.group(2)) and not LISTS.match(ends)


def read(folder: Path, captions_format: str = "csv", annotations: Optional[Path] = None) -> RetrievalDataset:
    """Read a data set.

    Args:
        captions_format: `csv` or `clip_benchmark`.
        annotations: the annotation file; None for the folder's only one.

    Raises:
        UsageError: there is no such captions_format.
        InputError: something is missing or wrong, with file and line.
    """
    parsers = {"csv": _parse_csv, "clip_benchmark": _split_clip_benchmark}
    if captions_format not in parsers:
        raise UsageError(f"captions format {captions_format!r}: unknown; expected {' or '.join(parsers)}")
    if annotations is None:
        texts = [path for path in annotation_files(folder) if path.suffix.lower() != ".json"]
        annotations = one_of(folder, find(folder) or texts, HOLDS)
    rows = list(parsers[captions_format](annotations, text_of(annotations)))
    if captions_format != "csv" and rows and all(NUMBERED.match(row.caption) for row in rows):
        raise InputError(
            f"annotations {annotations}: three columns, the second numbers the captions; CLIP_benchmark would take "
            f"the number for the first word; leave out --captions-format"
        )
    return gather(folder, annotations, rows)


def _parse_csv(file: Path, text: str) -> Iterator[Row]:
    named = FIRST.match(text)
    separator = named.group(1) if named else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    started, first, swapped = 0, True, False
    try:
        for cells in reader:
            line, started = started + 1, reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            names = [cell.strip().lower() in HEADERS for cell in cells]
            if first and names == [False, True]:
                swapped = True  # caption,image
            header, first = first and any(names[:2]), False
            if len(cells) != 2:
                shown = separator.join(cells)[:60]
                titled = line == 1 and any(cell.strip().lower() in HEADERS for cell in cells)
                advice = f"put a caption with {separator!r} in double quotes"
                raise InputError(
                    f"annotations {file}, line {line}: {len(cells)} columns, expected 2 (image,caption): {shown!r}; "
                    f"{'keep those two alone, with one caption in each row' if titled else advice}"
                )
            image, caption = (cell.strip() for cell in (reversed(cells) if swapped else cells))
            if header:
                continue
            if not image or not caption:
                raise InputError(f"annotations {file}, line {line}: the {'caption' if image else 'image'} is empty")
            yield Row(f"line {line}", image, caption)
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
        yield Row(f"line {number}", parts[0] + ".jpg", parts[1])


KIND = Kind("karpathy", HOLDS, find, read)
