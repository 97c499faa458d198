"""The recipe's steps with its flags: preprocess, export, compile, evaluate; `embed` has its own module."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Sequence, Tuple

import numpy as np

from clipval.commands import Command, Parser, chain_of, given_data, model_options, tower_of_onnx
from clipval.errors import ClipvalError, InputError, UsageError
from clipval.options import Settings, add_options, expanded, to_path

if TYPE_CHECKING:
    from clipval.ascend.atc import AtcOptions
    from clipval.results import Figure
    from clipval.towers import Tower


def _declare_preprocess(parser: Parser) -> None:
    model_options(parser)
    add_options(parser.add_argument, ["--data-dir", "--data-format", "--captions-format"])
    parser.add_argument(
        "--save-dir", type=to_path, default=Path("prep_data"), metavar="DIR", help="default: %(default)s"
    )


def _preprocess(args: argparse.Namespace) -> int:
    """Images and captions to arrays: prep_data/images/<id>.npy, prep_data/texts/<id>_<k>.npy."""
    from clipval import preprocess
    from clipval.library import brings_weights

    if args.pretrained is None and args.model_name is not None and not brings_weights(args.model_name):
        args.pretrained = "random"  # no weights are given; their transform is assumed
    chain = chain_of(args)
    if args.data_dir is None and args.model_name is not None:
        raise UsageError("preprocess --model-name: give the images with --data-dir")
    given = args.data_dir is not None
    dataset = given_data(args) if given else chain.dataset
    wanted = {"images": set(dataset.image_ids), "texts": set(dataset.caption_ids)}
    for folder, ids in wanted.items():
        foreign = sorted(path.name for path in (args.save_dir / folder).glob("*.npy") if path.stem not in ids)
        if foreign:
            raise InputError(
                f"{args.save_dir / folder}: holds {len(foreign)} arrays of other data ({foreign[0]}); "
                f"empty it or give another --save-dir"
            )
    model = chain.inputs
    preprocess.prepare(dataset, model, chain.towers, args.save_dir)
    print(f"{args.save_dir}: {len(dataset.image_ids)} images, {len(dataset.caption_ids)} texts")
    print(f"transform: {model.preprocess.describe()} ({model.preprocess.source})")
    return 0


def _declare_export(parser: Parser) -> None:
    model_options(parser)
    add_options(parser.add_argument, ["--opset-version"])
    parser.add_argument(
        "--onnx-prefix",
        type=to_path,
        default=Path("models/vit_b_32"),
        metavar="PREFIX",
        help="files are PREFIX_vision.onnx, PREFIX_text.onnx (default: %(default)s)",
    )
    parser.add_argument("--image", help="accepted as the recipe's; the graph does not depend on the example")
    parser.add_argument("--text", help="accepted as the recipe's; the graph does not depend on the example")


def _export(args: argparse.Namespace) -> int:
    """Both towers to ONNX: <prefix>_vision.onnx and <prefix>_text.onnx."""
    from clipval import export

    chain = chain_of(args)
    args.onnx_prefix.parent.mkdir(parents=True, exist_ok=True)
    for tower in chain.towers.values():
        file = args.onnx_prefix.with_name(f"{args.onnx_prefix.name}_{tower.name}.onnx")
        export.copy(chain.onnx(tower), file)
        print(f"{file}: {tower.input_name} -> {tower.output_name}, opset {args.opset_version}")
    return 0


def _declare_compile(parser: Parser) -> None:
    add_options(
        parser.add_argument,
        ["--precision-mode", "--keep-dtype", "--atc-flags", "--device-id", "--batch-sizes", "--jobs"],
    )
    parser.add_argument("--soc-version", "--soc_version", metavar="SOC", help="default: from npu-smi")
    parser.add_argument("--model", type=to_path, help="one ONNX file")
    parser.add_argument("--output", type=to_path, help="OM file without its suffix; needs a single batch size")
    parser.add_argument("--onnx-prefix", type=to_path, metavar="PREFIX", help="both towers: PREFIX_{vision,text}.onnx")
    parser.add_argument("--input-shape", "--input_shape", metavar="SHAPE", help="as image:8,3,224,224")
    for flag in ("--framework", "--input_format", "--log"):
        parser.add_argument(flag, help="accepted for compatibility with atc; clipval sets it by the tower")


def _compile(args: argparse.Namespace) -> int:
    """ONNX to OM with atc: <prefix>_<tower>_bs<n>.om."""
    from clipval.ascend import om_files
    from clipval.backends.om import atc_options

    files = [args.model] if args.model else []
    if args.onnx_prefix:
        files += [args.onnx_prefix.with_name(f"{args.onnx_prefix.name}_{name}.onnx") for name in ("vision", "text")]
    sizes = args.batch_sizes or _batch_of_shape(args.input_shape)
    if not files or not sizes or (args.output and (len(files) > 1 or len(sizes) > 1)):
        raise UsageError("compile: give --model FILE or --onnx-prefix PREFIX, and --batch-sizes (one with --output)")
    chosen = atc_options(Settings.of(args))
    towers = [(file, tower_of_onnx(file)) for file in files]
    wanted = [(file, tower, size) for file, tower in towers for size in sizes]
    compilations = [partial(_compile_one, args.output, chosen, *one) for one in wanted]
    failed = [one for one in om_files.side_by_side(compilations, args.jobs) if isinstance(one, ClipvalError)]
    for error in failed:
        print(f"clipval compile: {error}", file=sys.stderr)
    return 2 if failed else 0


def _compile_one(output: Optional[Path], chosen: AtcOptions, file: Path, tower: Tower, size: int) -> Path:
    from clipval.ascend import atc

    target = output or file.with_name(f"{file.stem}_bs{size}")
    target.parent.mkdir(parents=True, exist_ok=True)
    made = atc.compile_om(file, target.parent, target.name, tower, size, chosen, logs_folder=target.parent)
    print(f"{made}: {tower.name}, batch {size}, {chosen.soc_version}")
    return made


def _batch_of_shape(shape: Optional[str]) -> Tuple[int, ...]:
    if not shape:
        return ()
    first = shape.partition(":")[2].split(",")[0]
    if not first.isdigit():
        raise UsageError(f"--input_shape {shape!r}: expected NAME:BATCH,... such as image:8,3,224,224")
    return (int(first),)


def _declare_evaluate(parser: Parser) -> None:
    add_options(parser.add_argument, ["--data-dir", "--data-format", "--captions-format"])
    parser.add_argument(
        "--vision-embeds", type=to_path, required=True, metavar="DIR", help="<id>_0.npy files or shards"
    )
    parser.add_argument(
        "--text-embeds", type=to_path, required=True, metavar="DIR", help="<id>_<k>_0.npy files or shards"
    )
    parser.add_argument(
        "--spec", type=expanded, metavar="NAME", help="gate recall by this spec's figures; default: only show it"
    )
    parser.add_argument(
        "--backend", default="om", help="backend whose figures of the spec apply (default: %(default)s)"
    )


def _evaluate(args: argparse.Namespace) -> int:
    """Embeddings to recall@k in both directions; prints the recipe's Metrics line."""
    from clipval import embeddings, retrieval, spec
    from clipval.backends import Identity
    from clipval.gates.retrieval import gated_metrics, recall
    from clipval.shards import files

    vision, text = (files.read_any(folder) for folder in (args.vision_embeds, args.text_embeds))
    if args.data_dir is not None:
        dataset = given_data(args)
        vision, text = embeddings.align(vision, dataset.image_ids), embeddings.align(text, dataset.caption_ids)
    row = {name: n for n, name in enumerate(vision.ids)}
    owners = [embeddings.image_id_of(name) for name in text.ids]
    stray = [name for name, owner in zip(text.ids, owners) if owner not in row]
    if stray:
        raise InputError(
            f"{args.text_embeds}: caption {stray[0]} belongs to image {embeddings.image_id_of(stray[0])}, which is not "
            f"in {args.vision_embeds} ({len(stray)} such captions)"
        )
    owner = np.array([row[name] for name in owners])
    found = retrieval.evaluate(vision.ids, vision.values, text.ids, text.values, owner)
    recipe = found.metrics((retrieval.GATED_K,))
    print(f"Metrics: {recipe}")
    for direction in found.directions:
        shown = ", ".join(f"R@{k} {direction.recall(k):.4f} ({direction.hits(k)})" for k in retrieval.KS)
        print(f"{direction.name}: {shown}, median rank {np.median(direction.ranks):g}, {len(direction.ranks)} queries")
    if args.spec is None:
        return 0
    wanted, where = spec.load(args.spec), Identity(args.backend, "saved embeddings", str(args.vision_embeds), "unknown")
    figures = [one for metric in gated_metrics(wanted) for one in recall(found, where, wanted, metric)]
    return _judged(figures)


def _judged(figures: Sequence[Figure]) -> int:
    for figure in figures:
        print(f"{figure.verdict.upper():4}  {figure.metric} {figure.measured:.4f}, reference {figure.reference}")
        if figure.message:
            print(f"      {figure.message}")
    return int(any(figure.verdict == "fail" for figure in figures))


COMMANDS = {
    "preprocess": Command(_declare_preprocess, _preprocess, "images and captions to arrays"),
    "export": Command(_declare_export, _export, "both towers to ONNX"),
    "compile": Command(_declare_compile, _compile, "ONNX to OM with atc"),
    "evaluate": Command(_declare_evaluate, _evaluate, "embeddings to recall"),
}
