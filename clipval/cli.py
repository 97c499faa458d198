"""The command line: the recipe's four scripts and what stands around them, as `python -m clipval COMMAND`.

Exit codes: 0 done or passed, 1 a gate failed, 2 wrong usage or input (one line on stderr says what).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from clipval.errors import ClipvalError, InputError, UsageError
from clipval.options import Settings, add_options, at_least
from clipval.towers import Tower

TRIES = 3  # of a baseline's row on a machine that is slowed down; what the last one gives counts

Parser = argparse.ArgumentParser


class Command(NamedTuple):
    """A subcommand: declares its options, runs, returns the exit code."""

    declare: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]
    help: str


def _chain(args: argparse.Namespace) -> Any:
    from clipval.chain import Chain

    return Chain(Settings.of(args))


def _model_options(parser: Parser) -> None:
    add_options(parser.add_argument, ["--spec", "--model-name", "--pretrained", "--workdir", "--threads"])


def _declare_preprocess(parser: Parser) -> None:
    _model_options(parser)
    add_options(parser.add_argument, ["--data-dir", "--captions-format"])
    parser.add_argument("--save-dir", type=Path, default=Path("prep_data"), metavar="DIR", help="default: %(default)s")


def _preprocess(args: argparse.Namespace) -> int:
    """Images and captions to arrays: prep_data/images/<id>.npy, prep_data/texts/<id>_<k>.npy."""
    from clipval import preprocess
    from clipval.datasets import karpathy

    if args.pretrained is None:
        args.pretrained = "random"  # the transform and the tokenizer need no weights
    chain = _chain(args)
    if args.data_dir is None and args.model_name is not None:
        raise UsageError("preprocess --model-name: say which images with --data-dir")
    given = args.data_dir is not None
    dataset = karpathy.read(args.data_dir, captions_format=args.captions_format) if given else chain.dataset
    wanted = {"images": set(dataset.image_ids), "texts": set(dataset.caption_ids)}
    for folder, ids in wanted.items():
        foreign = sorted(path.name for path in (args.save_dir / folder).glob("*.npy") if path.stem not in ids)
        if foreign:
            raise InputError(
                f"{args.save_dir / folder}: holds {len(foreign)} arrays of other data ({foreign[0]}); "
                f"empty it or give another --save-dir"
            )
    preprocess.prepare(dataset, chain.model, chain.towers, args.save_dir)
    print(f"{args.save_dir}: {len(dataset.image_ids)} images, {len(dataset.caption_ids)} texts")
    return 0


def _declare_export(parser: Parser) -> None:
    _model_options(parser)
    add_options(parser.add_argument, ["--opset-version"])
    parser.add_argument(
        "--onnx-prefix",
        type=Path,
        default=Path("models/vit_b_32"),
        metavar="PREFIX",
        help="files are PREFIX_vision.onnx, PREFIX_text.onnx (default: %(default)s)",
    )
    parser.add_argument("--image", help="accepted as the recipe's; the graph does not depend on the example")
    parser.add_argument("--text", help="accepted as the recipe's; the graph does not depend on the example")


def _export(args: argparse.Namespace) -> int:
    """Both towers to ONNX: <prefix>_vision.onnx and <prefix>_text.onnx."""
    import shutil

    chain = _chain(args)
    args.onnx_prefix.parent.mkdir(parents=True, exist_ok=True)
    for tower in chain.towers.values():
        file = args.onnx_prefix.with_name(f"{args.onnx_prefix.name}_{tower.name}.onnx")
        shutil.copyfile(chain.onnx(tower), file)
        print(f"{file}: {tower.input_name} -> {tower.output_name}, opset {args.opset_version}")
    return 0


def _declare_compile(parser: Parser) -> None:
    add_options(
        parser.add_argument, ["--precision-mode", "--keep-dtype", "--atc-flags", "--device-id", "--batch-sizes"]
    )
    parser.add_argument("--soc-version", "--soc_version", metavar="SOC", help="without it npu-smi is asked")
    parser.add_argument("--model", type=Path, help="one ONNX file")
    parser.add_argument("--output", type=Path, help="OM file without its ending; needs one batch size")
    parser.add_argument("--onnx-prefix", type=Path, metavar="PREFIX", help="both towers: PREFIX_{vision,text}.onnx")
    parser.add_argument("--input-shape", "--input_shape", metavar="SHAPE", help="as image:8,3,224,224")
    for flag in ("--framework", "--input_format", "--log"):
        parser.add_argument(flag, help="accepted as atc's; clipval sets it by the tower")


def _compile(args: argparse.Namespace) -> int:
    """ONNX to OM with atc: <prefix>_<tower>_bs<n>.om."""
    from clipval.ascend import atc, npu_smi

    files = [args.model] if args.model else []
    if args.onnx_prefix:
        files += [args.onnx_prefix.with_name(f"{args.onnx_prefix.name}_{name}.onnx") for name in ("vision", "text")]
    sizes = args.batch_sizes or _batch_of_shape(args.input_shape)
    if not files or not sizes or (args.output and (len(files) > 1 or len(sizes) > 1)):
        raise UsageError("compile: give --model FILE or --onnx-prefix PREFIX, and --batch-sizes (one with --output)")
    chosen = atc.AtcOptions(
        soc_version=args.soc_version or npu_smi.npu(args.device_id[0]).soc_version,
        precision_mode=args.precision_mode,
        keep_dtype=str(args.keep_dtype) if args.keep_dtype else "",
        extra=args.atc_flags,
    )
    for file in files:
        tower = _tower_of_onnx(file)
        for size in sizes:
            target = args.output or file.with_name(f"{file.stem}_bs{size}")
            target.parent.mkdir(parents=True, exist_ok=True)
            made = atc.compile_om(file, target.parent, target.name, tower, size, chosen, logs_folder=target.parent)
            print(f"{made}: {tower.name}, batch {size}, {chosen.soc_version}")
    return 0


def _batch_of_shape(shape: Optional[str]) -> Tuple[int, ...]:
    if not shape:
        return ()
    first = shape.partition(":")[2].split(",")[0]
    if not first.isdigit():
        raise UsageError(f"--input_shape {shape!r}: expected NAME:BATCH,... such as image:8,3,224,224")
    return (int(first),)


def _tower_of_onnx(file: Path) -> Tower:
    from clipval import export

    return export.tower_of(file)


def _declare_embed(parser: Parser) -> None:
    add_options(parser.add_argument, ["--device-id", "--threads", "--onnx-providers", "--precision-mode"])
    add_options(parser.add_argument, ["--model-name", "--pretrained", "--spec", "--workdir"])
    parser.add_argument("--backend", choices=("pytorch", "onnx", "om"), help="without it the model file's ending tells")
    parser.add_argument("--model", type=Path, metavar="FILE", help="ONNX or OM file; pytorch takes --pretrained")
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="prep_data/images or prep_data/texts")
    parser.add_argument("--output", type=Path, default=Path("om_outputs"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--output-dirname", "--output_dirname", metavar="NAME", help="folder inside --output")
    parser.add_argument(
        "--batch-size", "--batchsize", type=at_least(int, 1), metavar="N", help="default: the OM file's, else 8"
    )
    parser.add_argument("--outfmt", choices=("NPY",), default="NPY", help="default: %(default)s")


def _embed(args: argparse.Namespace) -> int:
    """Prepared arrays to embeddings: <output>/<dirname>/<id>_0.npy."""
    from clipval import embeddings, preprocess

    name = args.backend or {".onnx": "onnx", ".om": "om"}.get(args.model.suffix if args.model else "", "pytorch")
    chain = _chain(args)
    tower = chain.towers[_tower_of_input(args.input)]
    rows = preprocess.listed(args.input, tower)
    size = args.batch_size or _batch_of_name(args.model) or 8
    backend = chain.open_file(name, tower, args.model, size)
    try:
        found = embeddings.embed(backend, rows.ids, rows, size)
    finally:
        backend.close()
    target = args.output / (args.output_dirname or f"{tower.name}_embed_bs{size}")
    embeddings.write(target, found)
    print(f"{target}: {len(found.ids)} embeddings of the {tower.name} tower by {backend.identity}, batch {size}")
    return 0


def _tower_of_input(folder: Path) -> str:
    """A folder of token arrays is the text tower's, one of pixels the vision tower's."""
    first = next(iter(sorted(folder.glob("*.npy"))), None)
    if first is None:
        raise InputError(f"--input {folder}: no .npy files; give the images or texts folder that preprocess made")
    from clipval import embeddings

    return "text" if embeddings.load_array(first).dtype == np.int64 else "vision"


def _batch_of_name(file: Optional[Path]) -> int:
    digits = file.stem.rpartition("_bs")[2] if file is not None and file.suffix == ".om" else ""
    return int(digits) if digits.isdigit() else 0


def _declare_evaluate(parser: Parser) -> None:
    add_options(parser.add_argument, ["--data-dir", "--captions-format"])
    parser.add_argument("--vision-embeds", type=Path, required=True, metavar="DIR", help="<id>_0.npy files")
    parser.add_argument("--text-embeds", type=Path, required=True, metavar="DIR", help="<id>_<k>_0.npy files")
    parser.add_argument("--spec", metavar="NAME", help="hold the recall to this spec's figures; else it is only shown")
    parser.add_argument("--backend", default="om", help="whose figures of the spec (default: %(default)s)")


def _evaluate(args: argparse.Namespace) -> int:
    """Embeddings to recall@k both ways; prints the recipe's Metrics line."""
    from clipval import embeddings, gates, retrieval, spec
    from clipval.backends import Identity

    vision, text = (embeddings.read(folder, width=None) for folder in (args.vision_embeds, args.text_embeds))
    if args.data_dir is not None:
        from clipval.datasets import karpathy

        dataset = karpathy.read(args.data_dir, captions_format=args.captions_format)
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
    figures = [one for metric in gates.gated_metrics(wanted) for one in gates.recall(found, where, wanted, metric)]
    return _judged(figures)


def _judged(figures: Sequence[Any]) -> int:
    for figure in figures:
        print(f"{figure.verdict.upper():4}  {figure.metric} {figure.measured:.4f}, reference {figure.reference}")
        if figure.message:
            print(f"      {figure.message}")
    return int(any(figure.verdict == "fail" for figure in figures))


def _declare_pin(parser: Parser) -> None:
    _model_options(parser)
    add_options(parser.add_argument, ["--data-dir", "--captions-format"])
    parser.add_argument("--samples", type=at_least(int, 1), default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--save", type=Path, required=True, metavar="FILE", help="the .npz file to write")


def _pin(args: argparse.Namespace) -> int:
    """A few of PyTorch's embeddings into a file; prints the lines of a spec that hold later runs to them."""
    import hashlib

    from clipval import embeddings

    chain = _chain(args)
    chain.check_inputs()
    found = {}
    for name, tower in chain.towers.items():
        count = len(chain.prepared.rows[name])
        picked = np.unique(np.linspace(0, count - 1, min(count, args.samples)).round().astype(int))
        found[name] = chain.embed_some("pytorch", tower, picked, 1)
    embeddings.write_golden(args.save, found)
    captions = "".join(f"{caption}\n" for caption in chain.dataset.captions)
    print(f'[data]\ncaptions_sha256 = "{hashlib.sha256(captions.encode()).hexdigest()}"')
    if chain.spec.data.kind == "karpathy":  # drawn images are files of this machine's JPEG coder
        print(f'fingerprint = "{chain.dataset.fingerprint()}"')
    print(f'\n[golden]\nfile = "{args.save.name}"\ncosine_min = 0.9999')
    print(f'because = "PyTorch by {len(found["vision"].ids)} images and {len(found["text"].ids)} captions"')
    return 0


def _declare_reference(parser: Parser) -> None:
    parser.add_argument("--model-name", default="", metavar="NAME", help="open_clip architecture, as ViT-B-32")
    parser.add_argument("--pretrained", default="", metavar="TAG", help="weight tag, as laion2b_s34b_b79k")
    parser.add_argument("--dataset", default="", metavar="NAME", help="flickr30k, flickr8k or mscoco_captions")


def _reference(args: argparse.Namespace) -> int:
    """Published recall of open_clip models on Flickr30k, Flickr8k and COCO."""
    from clipval import spec

    rows = spec.published(args.model_name, args.pretrained, args.dataset)
    if not rows:
        raise InputError("reference: no published figures for that model, weights and data set")
    print(f"{'model':34} {'weights':30} {'data':10} {'image R@1 / 5 / 10':22} {'text R@1 / 5 / 10':22} source")
    for row in rows:
        cells = ["-" if value is None else f"{value:.4f}" for value in row.recalls.values()]
        image, text = " ".join(cells[:3]), " ".join(cells[3:])
        print(f"{row.model:34} {row.pretrained:30} {row.dataset:10} {image:22} {text:22} {row.source}")
    return 0


def _declare_bench(parser: Parser) -> None:
    _model_options(parser)
    names = ["--data-dir", "--backends", "--batch-sizes", "--onnx-providers", "--device-id", "--precision-mode"]
    names += ["--soc-version", "--om-dir", "--allow-simulated", "--perf-min-time", "--perf-max-time", "--perf-noise"]
    add_options(parser.add_argument, names)
    parser.add_argument("--model", type=Path, metavar="FILE", help="one ONNX or OM file, as ais_bench takes it")
    parser.add_argument(
        "--batchsize", "--batch-size", type=at_least(int, 1), metavar="N", help="of --model; default: the OM file's"
    )
    parser.add_argument("--loop", type=int, metavar="N", help="timed calls, instead of a time")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the rows as a baseline of one session")
    parser.add_argument(
        "--machine",
        type=at_least(float, 0),
        default=0.0,
        metavar="GFLOPS",
        help="of a matrix product that this machine is known to make; a row of --save waits until it does",
    )


def _bench(args: argparse.Namespace) -> int:
    """Throughput of one model file, or of every backend, tower and batch size of the spec.

    Exit code 1: --save was given, and a row computes something else, was disturbed, or has too few calls.
    """
    from clipval import baseline, bench, throughput
    from clipval.throughput import BAD_OUTPUT, BUSY, INSUFFICIENT

    if args.loop is not None and args.loop < 1:
        raise UsageError(f"bench --loop {args.loop}: at least 1")
    chain = _chain(args)
    rows: Dict[str, List[float]] = {}
    made_by: Dict[str, str] = {}
    pace = throughput.Pace(args.machine * 1e9)
    useless: List[str] = []
    print(
        "row                            samples/s  95 % interval          1000*bs/mean ms  undisturbed  rounds  verdict"
    )
    for backend, size in _benched(chain, args):
        for scope, (row, verdict, reason) in _bench_row(chain, backend, size, args, pace).items():
            name = baseline.row_name(backend.identity.name, backend.tower.name, size, scope)
            rows[name], made_by[backend.identity.name] = [row.undisturbed], str(backend.identity)
            useless += [f"{name} is {verdict}: {reason}"] if verdict in (BAD_OUTPUT, BUSY, INSUFFICIENT) else []
            low, high = row.interval
            print(
                f"{name:30} {row.samples_per_second:9.1f}  {low:9.1f} .. {high:9.1f}  "
                f"{row.samples_per_second_mean:15.1f}  {row.undisturbed:11.1f}  {row.rounds:6}  "
                f"{verdict} {reason}".rstrip()
            )
    chain.close()
    for identity in made_by.values():
        print(f"by {identity}")
    if args.save and useless:
        print(f"bench --save: no baseline is made of this session, {useless[0]}", file=sys.stderr)
        return 1
    if args.save:
        baseline.save(baseline.Baseline(bench.baseline_key(chain, made_by), rows, pace.best), args.save)
    return 0


def _benched(chain: Any, args: argparse.Namespace) -> Any:
    """Open backends one after the other, with the batch size to measure."""
    if args.model is None:
        for name in chain.settings.validated:
            for tower in chain.towers.values():
                for size in chain.batch_sizes:
                    yield chain.backend(name, tower, size), size
        return
    kind = {".onnx": "onnx", ".om": "om"}.get(args.model.suffix)
    size = args.batchsize or _batch_of_name(args.model) or 1
    if kind is None or not args.model.is_file():
        raise UsageError(f"bench --model {args.model}: no such .onnx or .om file")
    name = "text" if "text" in args.model.stem else "vision"
    tower = _tower_of_onnx(args.model) if kind == "onnx" else chain.towers[name]
    backend = chain.open_file(kind, tower, args.model, size)
    yield backend, size
    backend.close()


def _bench_row(chain: Any, backend: Any, size: int, args: argparse.Namespace, pace: Any) -> Dict[str, Any]:
    """One row; for a baseline once more, where the machine was slow before or after it."""
    from clipval import bench, perf, throughput
    from clipval.export import example_rows

    tower = backend.tower
    rows = chain.prepared.rows[tower.name] if args.model is None else example_rows(tower, 2 * size)
    limits: Dict[str, Any] = {"seconds": args.perf_min_time, "cap": args.perf_max_time}
    limits.update(rounds=args.loop, noise=args.perf_noise)
    feed = throughput.Feed(rows, size)
    if args.model is None and chain.spec.parity:  # PyTorch is at hand, and bounds to hold the outputs to it
        limits["check"] = lambda: bench.check_outputs(chain, backend, feed)
    for _ in range(TRIES):
        waited = args.save and perf.on_host(backend.identity)
        share = pace.settle(args.perf_max_time) if waited else 1.0
        found = throughput.measure(backend, feed, size, busy=lambda: chain.busy(backend.identity.name), **limits)
        if not waited or min(share, pace.now()) >= throughput.SETTLED:
            break
    return found


def _declare_baseline(parser: Parser) -> None:
    _declare_bench(parser)
    parser.add_argument("--sessions", type=int, default=5, metavar="N", help="fresh processes (default: %(default)s)")


def _make_baseline(args: argparse.Namespace) -> int:
    """Throughput of several fresh processes into one file, for pytest --baseline FILE."""
    import subprocess
    import tempfile

    from clipval import baseline

    if args.save is None or args.sessions < baseline.MIN_SESSIONS:
        raise UsageError(f"baseline: give --save FILE and at least --sessions {baseline.MIN_SESSIONS}")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{n}.json" for n in range(args.sessions)]
        fixed = [sys.executable, "-m", "clipval", "bench", *_without(args.given[1:], "--sessions")]
        machine = args.machine
        for number, file in enumerate(files, 1):
            print(f"session {number} of {args.sessions}", file=sys.stderr)
            # the later --save wins
            command = [*fixed, "--save", str(file), "--machine", str(machine)]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
            if done.returncode:
                raise InputError(f"baseline: session {number} ended with exit code {done.returncode}, see above")
            machine = max(machine, baseline.load(file).machine / 1e9)
        made = baseline.merge([baseline.load(file) for file in files])
    baseline.save(made, args.save)
    print(f"{args.save}: {len(made.rows)} rows, {args.sessions} sessions, noise {baseline.noise(made):.2%}")
    return 0


def _without(arguments: Sequence[str], flag: str) -> List[str]:
    """Arguments less one flag and its value."""
    kept = [one for one in arguments if not one.startswith(f"{flag}=")]
    if flag in kept:
        place = kept.index(flag)
        del kept[place : place + 2]
    return kept


def _declare_report(parser: Parser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="report.json", help="one to show, two to compare")


def _report(args: argparse.Namespace) -> int:
    """Show a run's table, or compare two runs: last night's and tonight's."""
    from clipval import report

    runs = [report.load(file) for file in args.runs]
    if len(runs) > 2:
        raise UsageError(f"report: {len(runs)} files, expected one or two")
    print(report.summary_table(runs[0]) if len(runs) == 1 else report.compare(runs[0], runs[1]))
    return 0


def _declare_doctor(parser: Parser) -> None:
    add_options(parser.add_argument, ["--device-id", "--backends"])


def _doctor(args: argparse.Namespace) -> int:
    """Say line by line what this machine lacks; exit 1 when something required is missing."""
    from clipval import doctor

    findings = doctor.check(args.backends, args.device_id[0])
    for finding in findings:
        mark = "ok " if finding.ok else "MISSING" if finding.required else "warning"
        print(f"{mark:8} {finding.name:14} {finding.detail}" + (f"; {finding.advice}" if not finding.ok else ""))
    return int(any(finding.required and not finding.ok for finding in findings))


COMMANDS: Dict[str, Command] = {
    "preprocess": Command(_declare_preprocess, _preprocess, "images and captions to arrays"),
    "export": Command(_declare_export, _export, "both towers to ONNX"),
    "compile": Command(_declare_compile, _compile, "ONNX to OM with atc"),
    "embed": Command(_declare_embed, _embed, "arrays to embeddings, by any backend"),
    "evaluate": Command(_declare_evaluate, _evaluate, "embeddings to recall"),
    "bench": Command(_declare_bench, _bench, "throughput"),
    "baseline": Command(_declare_baseline, _make_baseline, "throughput of several processes, to compare with"),
    "report": Command(_declare_report, _report, "show a run, or compare two"),
    "doctor": Command(_declare_doctor, _doctor, "what this machine lacks"),
    "pin": Command(_declare_pin, _pin, "embeddings that later runs are held to"),
    "reference": Command(_declare_reference, _reference, "published recall figures"),
}


def main(argv: Optional[List[str]] = None) -> int:
    """Run one command; the exit code."""
    parser = Parser(prog="clipval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.declare(commands.add_parser(name, help=command.help, description=command.run.__doc__))
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given, argparse.Namespace(given=given))
    try:
        return COMMANDS[args.command].run(args)
    except ClipvalError as error:
        print(f"clipval {args.command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where, what = error.filename or "a file", error.strerror or error
        print(f"clipval {args.command}: {where}: {what}; check the path, its permissions and its disk", file=sys.stderr)
        return 2


def console() -> None:
    """Entry point of the `clipval` command."""
    sys.exit(main())
