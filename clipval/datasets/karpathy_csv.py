"""Karpathy's annotations as one CSV row per image, as on the Hugging Face hub: `flickr_annotations_30k.csv`.

Columns `filename`, `raw` (a JSON list of captions in the cell) and `split`, in any order among others; a file without
`split` (`test_1k_flickr.csv`) holds the test split alone. Source: the hub's data set nlphuji/flickr30k.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Iterator, List

import msgspec

from clipval.datasets import Kind
from clipval.datasets.folder import Row, reader, recognised, text_of
from clipval.datasets.karpathy_json import SPLIT, Image, Sentence, rows, test_split
from clipval.errors import InputError, one_line

HOLDS = "a CSV file with the columns filename and raw, which has a JSON list of captions"
HEADER = re.compile(r'\s*(?=[^\n]*\braw\b)(?=[^\n]*\bfilename\b)["\w]*(?:,["\w]*)+\r?\n')


def find(folder: Path) -> List[Path]:
    """CSV files whose first row names the columns `raw` and `filename`."""
    return recognised(folder, lambda ends: HEADER.match(ends) is not None)


def _images(file: Path) -> Iterator[Image]:
    reader = csv.DictReader(io.StringIO(text_of(file), newline=""), strict=True)
    try:
        for cells in reader:
            line, raw = reader.line_num, cells["raw"] or ""
            try:
                captions = msgspec.json.decode(raw, type=List[str])
            except (msgspec.DecodeError, RecursionError) as error:
                why = f"raw is not a JSON list of captions ({one_line(error)}): {raw[:60]!r}"
                raise InputError(f"annotations {file}, line {line}: {why}") from error
            yield Image(cells["filename"] or "", cells.get("split") or SPLIT, [Sentence(one) for one in captions])
    except csv.Error as error:
        raise InputError(f"annotations {file}, line {reader.line_num}: not CSV ({error})") from error


def _rows(folder: Path, file: Path) -> Iterator[Row]:
    return rows(file, test_split(file, list(_images(file))))


KIND = Kind("karpathy_csv", HOLDS, find, reader(find, HOLDS, _rows))
