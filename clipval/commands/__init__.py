"""Common parts of the subcommands: their declaration, the chain, and what a file name implies."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Callable, NamedTuple, Optional

from clipval import backends, datasets
from clipval.datasets import RetrievalDataset
from clipval.options import Settings, add_options
from clipval.towers import Tower

if TYPE_CHECKING:
    from clipval.backends import Backend
    from clipval.chain import Chain

MODEL_OPTIONS = [
    *("--spec", "--model-name", "--pretrained", "--pretrained-cfg", "--resize-positions"),
    *("--workdir", "--threads"),
]


class Parser(argparse.ArgumentParser):
    """argparse's, whose `--help` ignores that its output cannot be written."""

    def print_help(self, file: Optional[IO[str]] = None) -> None:  # type: ignore[override]
        out = file or sys.stdout
        if out is not None:  # closed by the caller
            out.write(self.format_help())


class Command(NamedTuple):
    """A subcommand: `declare` adds its options, `run` returns the exit code."""

    declare: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]
    help: str


def chain_of(args: argparse.Namespace) -> Chain:
    """The chain for a command's options."""
    from clipval.chain import Chain

    return Chain(Settings.of(args))


def model_options(parser: Parser) -> None:
    """Add the options that select the model."""
    add_options(parser.add_argument, MODEL_OPTIONS)


def tower_of_onnx(file: Path) -> Tower:
    """The tower in an ONNX file."""
    from clipval import export

    return export.tower_of(file)


def given_data(args: argparse.Namespace) -> RetrievalDataset:
    """The data set of `--data-dir`."""
    return datasets.read(args.data_dir, named=args.data_format, captions_format=args.captions_format)


def say_notes(backend: Backend) -> None:
    """Print the notes on a backend's file."""
    for note in backend.notes:
        print(f"{backend.identity.name}: {note}", file=sys.stderr)


def batch_of_name(file: Optional[Path]) -> int:
    """Batch size in a file's name if the backend's is fixed; 0 for none."""
    name = backends.of_file(file) if file is not None else None
    digits = file.stem.rpartition("_bs")[2] if file is not None and name and backends.kind(name).fixed_batch else ""
    return int(digits) if digits.isdigit() else 0
