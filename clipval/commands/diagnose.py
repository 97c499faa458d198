"""Where a candidate diverges from PyTorch, and why."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clipval import backends
from clipval.commands import Command, Parser, batch_of_name, chain_of, model_options, tower_of_onnx
from clipval.errors import InputError, UsageError
from clipval.options import add_options, at_least, to_path
from clipval.towers import TOWER_NAMES

if TYPE_CHECKING:
    from clipval.diagnose.finding import Finding


def _declare(parser: Parser) -> None:
    model_options(parser)
    names = ["--data-dir", "--captions-format", "--opset-version", "--onnx-providers", "--device-id", "--soc-version"]
    names += [
        "--om-dir",
        "--precision-mode",
        "--keep-dtype",
        "--atc-flags",
        "--om-runtime",
        "--device-timeout",
        "--allow-health",
        "--allow-simulated",
        "--rebuild",
        "--batch-sizes",
        "--perf-min-time",
        "--perf-max-time",
        "--perf-noise",
    ]
    add_options(parser.add_argument, names)
    parser.add_argument(
        "--backend", choices=backends.names()[1:], help="backend of the tower; default: by the suffix of --model"
    )
    parser.add_argument("--tower", choices=TOWER_NAMES, help="default: by the name of --model")
    parser.add_argument("--model", type=to_path, metavar="FILE", help="the candidate; default: the validated one")
    parser.add_argument("--samples", type=at_least(int, 1), default=4, metavar="N", help="default: %(default)s")
    parser.add_argument("--sample", action="append", default=[], metavar="ID", help="also use this sample")
    parser.add_argument(
        "--dump", type=to_path, metavar="DIR", help="analyse this dump of an NPU host; needs --onnx, no CANN"
    )
    parser.add_argument(
        "--onnx", type=to_path, metavar="FILE", help="for --dump: the file that the OM was compiled from"
    )
    parser.add_argument(
        "--input", type=to_path, metavar="FILE.npy", help="for --dump: the batch; default: --samples of the data"
    )
    parser.add_argument("--om-json", type=to_path, metavar="FILE", help="for --dump: output of atc --mode=1 for the OM")
    parser.add_argument("--keep-dump", type=to_path, metavar="DIR", help="keep the dumps of --backend om there")
    parser.add_argument(
        "--bundle", type=to_path, metavar="DIR", help="write the smallest part that shows the fault there, to send"
    )
    parser.add_argument(
        "--replay", type=to_path, metavar="DIR", help="run a bundle again; exit code 1 if it still shows"
    )
    parser.add_argument(
        "--precision-modes", metavar="LIST", help="compile an OM in each of atc's modes: parity, recall and throughput"
    )
    parser.add_argument(
        "--try-keep-dtype",
        type=to_path,
        metavar="FILE",
        help="write operators with an excess there, compile and confirm",
    )
    parser.add_argument("--ladder", action="store_true", help="print every tap, not only those around the first excess")
    parser.add_argument("--json", type=to_path, metavar="FILE", help="write the finding with its ladder")


def _diagnose(args: argparse.Namespace) -> int:
    """Report where a candidate diverges from PyTorch: module, node, whether the error starts there, what to try.

    Exit codes: 0 no excess, 1 something was found, 2 wrong usage or input.
    """
    from clipval.diagnose import finding, parts

    _check_outputs(args)
    if args.replay:
        return _replay(args)
    if args.precision_modes:
        return _modes(args)
    found = _of_dump(args) if args.dump else _of_candidate(args)
    print("\n".join(found.lines()))
    if args.ladder or found.first:
        print("\n".join(finding.table(found, 0 if args.ladder else 4)))
    if args.json:
        args.json.write_text(json.dumps(found.detail(), indent=1), encoding="utf-8")
    if args.bundle and found.found:
        print(parts.bundle(chain_of(args), "om" if args.dump else _backend(args), found, args.bundle))
    if args.try_keep_dtype and found.found:
        print(_try_keep(args, found))
    return int(found.found)


def _check_outputs(args: argparse.Namespace) -> None:
    """What cannot be written is said before minutes of work.

    Raises:
        UsageError: see there.
    """
    for name, file in (("--json", args.json), ("--try-keep-dtype", args.try_keep_dtype)):
        if file is not None and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
            raise UsageError(f"diagnose {name} {file}: cannot be written; give a file in a folder that exists")
    if args.try_keep_dtype is not None and not backends.kind(_backend(args)).dumped:
        raise UsageError("diagnose --try-keep-dtype: only an OM is compiled by atc; give --backend om")
    if args.bundle is not None and args.bundle.exists() and (args.bundle.is_file() or any(args.bundle.iterdir())):
        raise UsageError(f"diagnose --bundle {args.bundle}: not empty; give a new folder")


def _modes(args: argparse.Namespace) -> int:
    """The trials of some precision modes; exit code 1 if none is within the spec's bounds."""
    from dataclasses import replace

    from clipval.diagnose import trials
    from clipval.options import Settings

    settings, towers = Settings.of(args), [args.tower] if args.tower else TOWER_NAMES
    found = []
    for mode in trials.modes(args.precision_modes):
        print(f"diagnose: {mode}", file=sys.stderr)
        found.append(trials.trial(replace(settings, precision_mode=mode), _compiled_backend(args), towers))
    print("\n".join(trials.table(found)))
    return int(not any(one.good for one in found))


def _try_keep(args: argparse.Namespace, found: Finding) -> str:
    from clipval.chain import Chain
    from clipval.diagnose import candidate, trials
    from clipval.options import Settings

    backend, name = _compiled_backend(args), args.tower or _tower_of(args.model)

    def look(settings: Settings) -> Finding:
        chain = Chain(settings)
        try:
            tower = chain.towers[name]
            return candidate.locate(chain, backend, tower, candidate.samples(chain, tower, args.sample, args.samples))
        finally:
            chain.close()

    settings = Settings.of(args)
    _, said = trials.keep(settings, backend, name, found, args.try_keep_dtype, look)
    return said


def _compiled_backend(args: argparse.Namespace) -> str:
    """The backend whose files are compiled; OM, unless another one was named."""
    name = args.backend or "om"
    if not backends.kind(name).dumped:
        raise UsageError(f"diagnose: backend {name} is not compiled by atc; give --backend om")
    return str(name)


def _replay(args: argparse.Namespace) -> int:
    from clipval.diagnose import parts

    chain = chain_of(args)
    try:
        still, said = parts.replay(chain, _backend(args), args.replay)
    finally:
        chain.close()
    print(said)
    return int(still)


def _backend(args: argparse.Namespace) -> str:
    return args.backend or (backends.of_file(args.model) if args.model else None) or "onnx"


def _of_candidate(args: argparse.Namespace) -> Finding:
    from clipval.diagnose import candidate

    if args.model is not None and not args.model.is_file():
        raise UsageError(f"diagnose --model {args.model}: no such file")
    chain = chain_of(args)
    chain.check_inputs()
    name = _backend(args)
    tower = chain.towers[args.tower or _tower_of(args.model)]
    picked = candidate.samples(chain, tower, args.sample, args.samples)
    try:
        given = {"file": args.model, "keep": args.keep_dump, "batch": batch_of_name(args.model)}
        return candidate.locate(chain, name, tower, picked, **given)
    finally:
        chain.close()


def _of_dump(args: argparse.Namespace) -> Finding:
    """Diagnose a dump from an NPU host, on a machine without CANN and without the model."""
    import numpy as np

    from clipval import arrays
    from clipval.ascend.atc import DEFAULT_MODE
    from clipval.diagnose import candidate, dump, fusions, graph, om

    if args.onnx is None:
        raise UsageError("diagnose --dump: give --onnx FILE, the file that the OM was compiled from")
    whole, dumped = graph.load(args.onnx), dump.read(args.dump)
    if args.input is not None:
        rows = arrays.load(args.input)
    else:
        chain = chain_of(args)
        tower = chain.towers[tower_of_onnx(args.onnx).name]
        picked = candidate.samples(chain, tower, args.sample, args.samples)
        rows = np.ascontiguousarray(chain.prepared.rows[tower.name][picked])
    fused = fusions.names(args.om_json) if args.om_json else {}
    precision = candidate.precision_of(args.precision_mode or DEFAULT_MODE)
    compared = om.compare(whole, dumped, rows, precision, fused)
    passes = fusions.passes(args.om_json) if args.om_json else {}
    found = om.judge(compared, dumped, precision, f"dump {args.dump.name} against {args.onnx.name}", passes)
    if not compared.rungs:
        raise InputError(found.sentence)
    return found


def _tower_of(model: Path) -> str:
    if model is None or ("text" in model.stem) == ("vision" in model.stem):
        raise UsageError("diagnose: give --tower vision or --tower text")
    return "text" if "text" in model.stem else "vision"


COMMANDS = {"diagnose": Command(_declare, _diagnose, "where a candidate diverges from PyTorch, and why")}
