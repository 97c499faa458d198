"""Make the table of architectures: python -m tests.sweep [--max-gib 6] [NAME ...]

Each architecture runs in a process of its own, smallest first, and its row is written as it comes, so that a sweep
that was stopped goes on where it was. Writes clipval/specs/models.csv and docs/models.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Dict, List

from tqdm import tqdm

from clipval import architectures
from clipval.architectures import Architecture
from tests.sweep.one import run

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Architectures

Every architecture of open_clip, with seeded weights: its sizes, and whether both towers export (opset 14)
and agree with PyTorch in ONNX Runtime on the CPU. Distance is the largest 1 - cosine over probe inputs: token rows
of every length over the whole vocabulary, and extreme pictures. "not tried" means too large for the machine, or files
from a hub are needed. Made by `python -m tests.sweep`; `python -m clipval models` prints the same.

| {columns} |
|{rule}|"""
COLUMNS = ("model", "image", "tokens", "width", "vocabulary", "vision GiB", "text GiB", "transforms of its weights")
COLUMNS = (*COLUMNS, "needs", "export", "vision", "text")


def page(rows: List[Architecture]) -> str:
    """The table in Markdown."""
    lines = [HEAD.format(columns=" | ".join(COLUMNS), rule="|".join(["---"] * len(COLUMNS)))]
    for row in sorted(rows, key=lambda row: row.model.lower()):
        far = [f"{value:.0e}" if value is not None else "" for value in (row.vision, row.text)]
        sizes = [str(one or "") for one in (row.image, row.context, row.width, row.vocabulary)]
        gib = [f"{one:.2f}" if one else "" for one in (row.vision_gib, row.text_gib)]
        seen = row.export or "not tried"
        lines.append(f"| {' | '.join([row.model, *sizes, *gib, row.transforms, row.needs, seen, *far])} |")
    versions = sorted({row.versions for row in rows if row.versions})
    return "\n".join([*lines, "", *(f"Seen with {one}." for one in versions)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.sweep", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument(
        "--max-gib", type=float, default=4.0, help="largest weights of both towers; default %(default)s"
    )
    args = parser.parse_args()
    known: Dict[str, Architecture] = (
        {row.model: row for row in architectures.read()} if architectures.TABLE.exists() else {}
    )
    for name in architectures.names():
        if name not in known:
            known[name] = architectures.describe(name)
    todo = [known[name] for name in args.names] or [row for row in known.values() if not row.export]
    fits = [row for row in todo if 0 < row.vision_gib + row.text_gib <= args.max_gib]
    for row in tqdm(sorted(fits, key=lambda row: row.vision_gib + row.text_gib)):
        known[row.model] = run(row.model)
        architectures.write(list(known.values()))
    architectures.write(list(known.values()))
    PAGE.write_text(page(list(known.values())), encoding="utf-8")


if __name__ == "__main__":
    main()
