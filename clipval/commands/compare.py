"""Compare any two of an ONNX file, an OM file, a folder of embeddings and the model itself, sample by sample."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Optional, Sequence, Tuple

from clipval import backends
from clipval.backends import Identity
from clipval.commands import Command, Parser, batch_of_name, chain_of, model_options, say_notes
from clipval.errors import InputError, UsageError
from clipval.options import add_options, at_least, expanded, to_path
from clipval.spec import PRECISIONS
from clipval.towers import TOWER_NAMES, Tower

if TYPE_CHECKING:
    from clipval.arrays import Rows
    from clipval.chain import Chain
    from clipval.embeddings import Embeddings

BATCH = 8


def _declare(parser: Parser) -> None:
    model_options(parser)
    add_options(parser.add_argument, ["--device-id", "--precision-mode", "--om-runtime", "--device-timeout"])
    add_options(parser.add_argument, ["--allow-health", "--allow-simulated", "--onnx-providers", "--probe-seed"])
    for name in ("first", "second"):
        parser.add_argument(
            name, type=expanded, metavar="ONNX|OM|DIR|pytorch", help="what is compared; the first is the reference"
        )
    parser.add_argument("--tower", choices=TOWER_NAMES, help="default: by the files' names")
    parser.add_argument("--input", type=to_path, metavar="DIR", help="prepared arrays; default: drawn inputs")
    parser.add_argument("--precision", choices=PRECISIONS, help="bounds to apply; default: of the less precise one")
    parser.add_argument("--batch-size", type=at_least(int, 1), metavar="N", help="default: the OM file's, else 8")


def _compare(args: argparse.Namespace) -> int:
    """Cosine per sample and largest difference of one element, checked against the spec's bounds; exit 1 outside."""
    from clipval import embeddings
    from clipval.gates.parity import agreement, lengths
    from clipval.results import number

    for name in (args.first, args.second):
        known = (
            name == backends.REFERENCE or Path(name).is_dir() or (Path(name).is_file() and backends.of_file(Path(name)))
        )
        if not known:
            raise InputError(f"compare {name}: neither an ONNX or OM file, nor a folder of embeddings, nor 'pytorch'")
    chain = chain_of(args)
    opened = [backends.of_file(Path(name)) for name in (args.first, args.second) if Path(name).is_file()]
    backends.check_acl(filter(None, opened), chain.settings)
    tower = chain.towers[args.tower or _tower_of(args)]
    try:
        (first, one), (second, other) = (_made(chain, args, name, tower) for name in (args.first, args.second))
    finally:
        chain.close()
    other = embeddings.align(other, one.ids)
    known = [_precision(chain, where) for where in (first, second)]
    precision = args.precision or max(filter(None, known), key=PRECISIONS.index, default="")
    if not precision:
        raise UsageError("compare: the precision of two folders is unknown; give --precision")
    bounds = chain.spec.bounds("onnx", precision, tower.name)
    figures = [judged for of in (agreement, lengths) for judged in of(one, other, second, tower, bounds)]
    print(f"{args.first} ({first})\n{args.second} ({second})\n{len(one.ids)} samples, bounds of {precision}")
    for figure in figures:
        said = figure.message or f"{figure.metric} {number(figure.measured, figure.unit)}"
        print(f"{figure.verdict.upper():4}  {said}")
    return int(any(figure.verdict == "fail" for figure in figures))


def _made(chain: Chain, args: argparse.Namespace, name: str, tower: Tower) -> Tuple[Identity, Embeddings]:
    """The embeddings computed or held by a source, and their identity."""
    from clipval import embeddings
    from clipval.shards import files

    path = Path(name)
    if files.here(path):
        return files.read(path, tower.width)
    if path.is_dir():
        return Identity("embeddings", "saved", name, "unknown"), embeddings.read(path, tower.width)
    kind = name if name == backends.REFERENCE else backends.of_file(path)
    file = None if kind == backends.REFERENCE else path
    assert kind is not None  # seen by the caller
    size = args.batch_size or max(batch_of_name(Path(one)) for one in (args.first, args.second)) or BATCH
    ids, rows = _inputs(chain, args, tower)
    backend = chain.pool.open_file(kind, tower, file, size, ready=True)
    say_notes(backend)
    try:
        chain.pool.require_real(backend)
        return backend.identity, embeddings.embed(backend, ids, rows, backend.batch_size or size)
    finally:
        backend.close()


def _inputs(chain: Chain, args: argparse.Namespace, tower: Tower) -> Tuple[Sequence[str], Rows]:
    from clipval import arrays, probe

    if args.input is not None:
        rows = arrays.listed(args.input, tower)
        return rows.ids, rows
    others = [name for name in (args.first, args.second) if Path(name).is_dir()]
    if others:
        raise UsageError(f"compare: {others[0]} holds embeddings; give --input with the arrays they were computed from")
    return probe.inputs(chain.model, tower, chain.probe_seed)


def _precision(chain: Chain, where: Identity) -> Optional[str]:
    return None if where.precision == "unknown" else chain.precision(where)


def _tower_of(args: argparse.Namespace) -> str:
    named: Dict[str, bool] = {
        tower: any(tower in Path(name).name for name in (args.first, args.second)) for tower in TOWER_NAMES
    }
    found = [tower for tower, there in named.items() if there]
    if len(found) != 1:
        raise UsageError("compare: give --tower vision or --tower text")
    return found[0]


COMMANDS = {"compare": Command(_declare, _compare, "compare any two of ONNX, OM, embeddings and pytorch")}
