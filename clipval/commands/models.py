"""open_clip's architectures: sizes, requirements, and whether their export was tested."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from clipval.commands import Command, Parser
from clipval.errors import InputError

if TYPE_CHECKING:
    from clipval.architectures import Architecture


def _declare(parser: Parser) -> None:
    parser.add_argument(
        "name", nargs="?", default="", metavar="PART", help="only architectures with this in their name"
    )


def _models(args: argparse.Namespace) -> int:
    """List architectures: sizes, requirements, and whether both towers export and agree with PyTorch."""
    from clipval import architectures, library
    from clipval.results import columns

    rows = [row for row in architectures.read() if args.name.lower() in row.model.lower()]
    if not rows:
        raise InputError(f"models: no architecture has {args.name!r} in its name; see open_clip.list_models()")
    installed = library.installed_names()
    lines = [["model", "image", "tokens", "width", "ids", "GiB", "export and worst 1 - cosine"]]
    for row in rows:
        weights = f"{row.vision_gib:.2f} + {row.text_gib:.2f}" if row.vision_gib else "unknown"
        sizes = [str(row.image), str(row.context), str(row.width), str(row.vocabulary or ""), weights]
        newer = installed and row.model not in installed
        needs = [f"an open_clip newer than {library.open_clip_version()}"] if newer else []
        lines.append([row.model, *sizes, "; ".join(filter(None, (_seen(row), row.transforms, row.needs, *needs)))])
    print("\n".join(columns(lines, right=range(1, 6))))
    return 0


def _seen(row: Architecture) -> str:
    if row.vision is None or row.text is None:
        return row.export or "not tried"
    return f"{row.export}, {row.vision:.0e} vision, {row.text:.0e} text"


COMMANDS = {"models": Command(_declare, _models, "architectures and whether their export was tested")}
