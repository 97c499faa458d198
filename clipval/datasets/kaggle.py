"""Flickr's annotation files with numbered captions: Kaggle's `results.csv` and `captions.txt`, the authors' `.token`.

`results.csv` has pipes and no quotes, `captions.txt` is CSV of three columns, `results_20130124.token` has
`<image>#<number>`, a tab and the caption. They hold all of Flickr30k, of which the recipe's test split is a part.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

from clipval.datasets import Kind
from clipval.datasets.folder import Row, reader, recognised, text_of
from clipval.errors import InputError

HOLDS = "Kaggle's results.csv or captions.txt, or a .token file: image, number of the caption, caption"
HEADER = re.compile(r"\s*(image|image_name|filename)\s*[|,;]\s*(comment_number|caption_number|number)\s*[|,;]", re.I)
# In Kaggle's file, a row of 2199200615.jpg lacks the second pipe.
PIPES = re.compile(r"\s*([^|]+?)\s*\|\s*([0-9]+)\s*(?:\||\s)\s*(.*?)\s*$")
TOKEN = re.compile(r"\s*(.+?)#([0-9]+)\t\s*(.*?)\s*$")
COMMAS = re.compile(r"[^,;\t|\"\n]+\.\w+\s*([,;])\s*[0-9]+\s*\1")


def find(folder: Path) -> List[Path]:
    """Text files whose first rows number the captions."""
    return recognised(folder, _recognises)


def _recognises(ends: str) -> bool:
    lines = ends.lstrip().split("\n", 2)
    return bool(HEADER.match(lines[0])) or any(form.match(lines[0].rstrip("\r")) for form in (PIPES, TOKEN, COMMAS))


def _by_line(file: Path, text: str) -> Iterator[Tuple[int, Row]]:
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip() or (line == 1 and HEADER.match(content)):
            continue
        found = PIPES.match(content) or TOKEN.match(content)
        if not found or not found.group(3):
            raise InputError(
                f"annotations {file}, line {line}: expected image, number and caption as in the lines above: "
                f"{content[:60]!r}"
            )
        yield int(found.group(2)), Row(f"line {line}", found.group(1), found.group(3))


def _by_comma(file: Path, text: str) -> Iterator[Tuple[int, Row]]:
    separator = ";" if ";" in text.lstrip().split("\n", 1)[0] else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    started = 0
    try:
        for cells in reader:
            line, started = started + 1, reader.line_num
            if not any(cell.strip() for cell in cells) or (line == 1 and HEADER.match(separator.join(cells))):
                continue
            parts = [cell.strip() for cell in cells]
            if len(parts) != 3 or not parts[1].isdigit() or not parts[0] or not parts[2]:
                raise InputError(
                    f"annotations {file}, line {line}: expected image, number and caption: "
                    f"{separator.join(cells)[:60]!r}; put a caption with {separator!r} in double quotes"
                )
            yield int(parts[1]), Row(f"line {line}", parts[0], parts[2])
    except csv.Error as error:
        raise InputError(f"annotations {file}, line {started + 1}: not CSV ({error})") from error


def _rows(folder: Path, file: Path) -> Iterator[Row]:
    """An image's captions are ordered by their numbers."""
    text = text_of(file)
    first = text.lstrip().split("\n", 1)[0]
    rows = list(_by_line(file, text) if "|" in first or TOKEN.match(first) else _by_comma(file, text))
    place: Dict[str, int] = {}
    for _, row in rows:
        place.setdefault(row.image, len(place))
    return (row for _, row in sorted(rows, key=lambda one: (place[one[1].image], one[0])))


KIND = Kind("kaggle", HOLDS, find, reader(find, HOLDS, _rows))
