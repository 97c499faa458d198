"""Embeddings of a data set by any backend: one device into the recipe's files, or several devices into shards."""

from __future__ import annotations

import argparse
import secrets
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Union

from clipval import backends
from clipval.commands import Command, Parser, batch_of_name, chain_of, given_data, say_notes, tower_of_onnx
from clipval.errors import InputError, UsageError
from clipval.options import ONNX_OPTIONS, Settings, add_options, at_least, listed_devices, to_path
from clipval.towers import TOWER_NAMES, Tower

if TYPE_CHECKING:
    from clipval.arrays import Source
    from clipval.chain import Chain
    from clipval.shards.again import Drawn
    from clipval.shards.cluster import Cluster
    from clipval.shards.files import Plan, Shard
    from clipval.shards.pool import Processes
    from clipval.shards.work import Device, Worker

BATCH = 8
SHARD_SAMPLES = 1024  # per shard by default
DRAWN = 16  # samples that are embedded a second time on another device


def _declare(parser: Parser) -> None:
    add_options(parser.add_argument, ["--device-id", "--threads", *ONNX_OPTIONS, "--precision-mode"])
    add_options(parser.add_argument, ["--om-runtime", "--device-timeout", "--allow-health", "--reference-device"])
    add_options(parser.add_argument, ["--model-name", "--pretrained", "--pretrained-cfg", "--spec", "--workdir"])
    add_options(parser.add_argument, ["--data-dir", "--data-format", "--captions-format"])
    parser.add_argument("--backend", choices=backends.names(), help="default: by the model file's suffix")
    parser.add_argument("--model", type=to_path, metavar="FILE", help="ONNX or OM file; pytorch takes --pretrained")
    parser.add_argument("--input", type=to_path, metavar="DIR", help="prep_data/images or prep_data/texts")
    parser.add_argument("--tower", choices=TOWER_NAMES, help="for --data-dir; default: by the model file")
    parser.add_argument(
        "--output", type=to_path, default=Path("om_outputs"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--output-dirname", "--output_dirname", metavar="NAME", help="folder inside --output")
    size = at_least(int, 1)
    parser.add_argument("--batch-size", "--batchsize", type=size, metavar="N", help="default: the OM file's, else 8")
    parser.add_argument("--outfmt", choices=("NPY",), default="NPY", help="default: %(default)s")
    parser.add_argument(
        "--shards",
        type=size,
        metavar="N",
        help=f"write N shards (with --devices: one for {SHARD_SAMPLES} samples)",
    )
    parser.add_argument(
        "--devices",
        type=listed_devices,
        metavar="LIST",
        help="one process each, e.g. 0,1,2,3; on the CPU sets of cores",
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="embed on every device of this Ray cluster")
    parser.add_argument(
        "--again",
        type=at_least(int, 0),
        default=DRAWN,
        metavar="N",
        help="samples embedded a second time (default: %(default)s)",
    )


def _embed(args: argparse.Namespace) -> int:
    """Embed a data set: <output>/<dirname>/<id>_0.npy, or shards made by several devices."""
    from clipval import embeddings

    asked = _asked(args)
    if args.shards or args.devices or args.ray:
        return _in_shards(args, asked)
    chain = chain_of(args)
    rows = _filled(asked.rows, chain)
    backend = chain.pool.open_file(asked.name, asked.tower, asked.file, asked.batch_size)
    say_notes(backend)
    try:
        blocks = embeddings.batches(backend, rows.ids, rows, asked.batch_size)
        shown = embeddings.shown(blocks, backend, len(rows), asked.batch_size)
        embeddings.write_blocks(asked.target, rows.ids, shown)
    finally:
        backend.close()
    print(
        f"{asked.target}: {len(rows)} embeddings of the {asked.tower.name} tower by {backend.identity}, "
        f"batch {asked.batch_size}"
    )
    return 0


@dataclass(frozen=True)
class Asked:
    """The inputs, the model and the output folder."""

    name: str
    file: Optional[Path]
    tower: Tower
    rows: Source
    batch_size: int
    target: Path


def _asked(args: argparse.Namespace) -> Asked:
    from clipval import arrays, preprocess

    name = args.backend or (backends.of_file(args.model) if args.model else None) or backends.REFERENCE
    towers = chain_of(args).towers
    if (args.input is None) == (args.data_dir is None):
        raise UsageError("embed: give either --input with prepared arrays or --data-dir with a data set")
    rows: Source
    if args.input is not None:
        rows = arrays.listed(args.input, towers[_tower_of_input(args.input)])
    else:
        rows = preprocess.raw(given_data(args), towers[args.tower or _tower_of_model(args.model)])
    size = args.batch_size or batch_of_name(args.model) or BATCH
    target = args.output / (args.output_dirname or f"{rows.tower.name}_embed_bs{size}")
    return Asked(name, args.model, rows.tower, rows, size, target)


def _tower_of_input(folder: Path) -> str:
    """The tower for a folder of arrays: text for tokens, vision for pixels."""
    from clipval import arrays

    first = next(iter(sorted(folder.glob("*.npy"))), None)
    if first is None:
        raise InputError(f"--input {folder}: no .npy files; give the images or texts folder written by preprocess")
    one = arrays.load(first)
    return "text" if one.dtype.kind in "iu" and one.ndim <= 2 else "vision"


def _tower_of_model(file: Optional[Path]) -> str:
    if file is None:
        raise UsageError("embed --data-dir: give --tower vision or --tower text")
    name = backends.of_file(file)
    if name is not None and backends.kind(name).takes_onnx:
        return tower_of_onnx(file).name
    return "text" if "text" in file.stem else "vision"


def _filled(rows: Source, chain: Chain) -> Source:
    """The rows with the model that computes them from images and captions, which is not sent to other processes."""
    from clipval.preprocess import RawRows

    return replace(rows, model=chain.inputs) if isinstance(rows, RawRows) else rows


@dataclass(frozen=True)
class Job:
    """Opens a worker: `clipval.shards.work.Opener`."""

    settings: Settings
    name: str
    file: Optional[Path]
    rows: Source
    planned: Plan

    def __call__(self, device: Device) -> Worker:
        from clipval.chain import Chain
        from clipval.shards.work import Worker

        chain = Chain(replace(self.settings, threads=self.settings.threads or len(device.cores) or None))
        rows, size = _filled(self.rows, chain), self.planned.batch_size
        backend = chain.pool.open_file(f"{self.name}:{device.number}", rows.tower, self.file, size)
        return Worker(self.planned, backend, rows, device.where)


def _in_shards(args: argparse.Namespace, asked: Asked) -> int:
    from filelock import FileLock, Timeout

    from clipval.shards import files

    _check_devices(args, asked)
    asked.target.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(str(asked.target / ".lock"), timeout=0):
            count = args.shards or -(-len(asked.rows) // SHARD_SAMPLES)
            planned = files.plan(asked.target.absolute(), asked.rows, asked.batch_size, count, _key(args, asked))
            left = files.prepare(planned)
            if not left and (planned.folder / files.INDEX).is_file():
                print(f"{asked.target}: all {len(planned)} shards are complete")
                return 0
            return _made(args, asked, planned, left)
    except Timeout:
        raise UsageError(
            f"{asked.target}: another run is writing its shards; wait for it, or give another folder"
        ) from None


def _check_devices(args: argparse.Namespace, asked: Asked) -> None:
    if args.ray and args.devices:
        raise UsageError("embed: --ray uses every device of the cluster; leave out --devices")
    if "device_id" in dict(args.onnx_provider_options):
        raise UsageError("embed --shards: select devices with --devices, not with the provider's option device_id")
    if asked.file is not None and not asked.file.is_file():
        raise InputError(
            f"--model {asked.file}: no such file; give the ONNX or OM file of the {asked.tower.name} tower"
        )


def _key(args: argparse.Namespace, asked: Asked) -> Dict[str, Any]:
    """Everything that the embeddings depend on besides the inputs."""
    from clipval import environment, export, store
    from clipval.preprocess import RawRows

    chain, known = chain_of(args), backends.kind(asked.name)
    if asked.file is None:
        model: Any = chain.model_key
    else:
        outside = export.data_files(asked.file) if known.takes_onnx else []
        model = [store.sha256(file) for file in (asked.file, *outside)]
    return {
        "model": model,
        "backend": [asked.name, *(getattr(args, name) for name in ("onnx_providers", "onnx_provider_options"))],
        "precision_mode": args.precision_mode,
        "runs_on": known.accelerator(chain.settings) or "CPU",
        "tower": asked.tower.name,
        "batch_size": asked.batch_size,
        "inputs": str(chain.inputs.transform) if isinstance(asked.rows, RawRows) else "prepared",
        "versions": environment.library_versions(),
        "code": store.code_hash("clipval.shards.files", backends.MODULES[asked.name]),
    }


def _made(args: argparse.Namespace, asked: Asked, planned: Plan, left: Sequence[int]) -> int:
    """Make the missing shards, check all, and report the result."""
    from clipval.shards import again, files
    from clipval.shards.work import Task

    with _workers(args, asked, planned) as workers:
        for _ in workers.run([Task(number) for number in left], f"{asked.name} {asked.tower.name}, shards"):
            pass
        shards = files.complete(planned)
        seed = secrets.randbelow(10**6)
        drawn = again.draw(planned, shards, args.again, seed)
        found: List[again.Drawn] = []
        for task, where, value in workers.run(list(drawn), "embedded again"):
            found += again.compare(planned, task, drawn[task], where, value)
    _check_unchanged(args, asked, planned)
    for note in workers.notes:
        print(f"{asked.name}: {note}", file=sys.stderr)
    _say(asked, planned, shards, len(left))
    off = [one for one in found if one.off]
    print(_twice(found, seed))
    if off:
        one = off[0]
        first = f"sample {one.id} by {one.made} and by {one.again}: cosine {one.cosine:.9f}"
        print(
            f"clipval embed: {len(off)} of {len(found)} samples differ between devices ({first}); find the faulty "
            f"device, remove its shards (`where` in their manifests) and run embed again without it",
            file=sys.stderr,
        )
        return 1
    files.publish_index(planned, shards, {"again": again.summary(found, seed), "failed_devices": workers.retired})
    for where, message in workers.retired.items():
        print(f"clipval embed: all samples are embedded, but {where} failed: {message}", file=sys.stderr)
    return int(bool(workers.retired))


def _check_unchanged(args: argparse.Namespace, asked: Asked, planned: Plan) -> None:
    """Check that what the manifests state is still true: workers open the model and read the inputs later.

    Raises:
        InputError: the model or an input was changed in the meantime.
    """
    from clipval.shards import files

    now = files.plan(planned.folder, asked.rows, asked.batch_size, len(planned), _key(args, asked))
    other = [name for name in planned.key if planned.key[name] != now.key[name]]
    if other:
        raise InputError(
            f"{planned.folder}: the {other[0]} was changed while it was used, so shards may be of either; empty the "
            f"folder and run embed again"
        )
    stale = [number for number in range(len(planned)) if planned.stamps[number] != now.stamps[number]]
    if stale:
        raise InputError(
            f"{planned.place(stale[0])}: its inputs were changed while they were embedded ({len(stale)} of "
            f"{len(planned)} shards); run embed again"
        )


def _workers(args: argparse.Namespace, asked: Asked, planned: Plan) -> Union[Processes, Cluster]:
    settings, known = Settings.of(args), backends.kind(asked.name)
    accelerator = known.accelerator(settings)
    job = Job(settings, asked.name, asked.file, asked.rows, planned)
    if args.ray:
        from clipval.shards.cluster import Cluster

        cores = settings.threads or 1
        job = _elsewhere(job if accelerator else replace(job, settings=replace(settings, threads=cores)))
        return Cluster(args.ray, job, accelerator, cores)
    from clipval.shards.pool import Processes, devices

    numbers = args.devices or settings.device_id
    return Processes(job, devices(asked.name, numbers, on_host=not accelerator))


def _elsewhere(job: Job) -> Job:
    """The same with absolute paths, for processes with another working directory."""
    from clipval.arrays import PreparedRows

    def absolute(value: Any) -> Any:
        exists = isinstance(value, (str, Path)) and str(value) and Path(value).exists()
        return type(value)(Path(value).absolute()) if exists or isinstance(value, Path) else value

    own: Dict[str, Any] = {one.name: absolute(getattr(job.settings, one.name)) for one in fields(job.settings)}
    rows = replace(job.rows, folder=job.rows.folder.absolute()) if isinstance(job.rows, PreparedRows) else job.rows
    return replace(job, settings=Settings(**own), file=absolute(job.file), rows=rows)


def _say(asked: Asked, planned: Plan, shards: Sequence[Shard], made: int) -> None:
    from clipval.shards import files

    print(
        f"{asked.target}: {len(planned.ids)} embeddings of the {asked.tower.name} tower in {len(planned)} shards "
        f"({made} made now) by {shards[0].identity}, batch {asked.batch_size}"
    )
    rates = files.rates(shards)
    for one in rates:
        print(f"{one.where}: {one.samples} samples, {one.per_second:.1f} samples/s")
    if len(rates) > 1:
        found = [one.per_second for one in rates]
        print(f"spread: the slowest device is at {min(found) / max(found):.2f} of the fastest")
    for line in files.slow(rates):
        print(line)


def _twice(found: Sequence[Drawn], seed: int) -> str:
    elsewhere, same = sum(one.made != one.again for one in found), sum(one.same for one in found)
    lowest = min((one.cosine for one in found), default=1.0)
    return (
        f"embedded a second time: {len(found)} samples drawn by seed {seed}, {elsewhere} on another device, "
        f"{same} bit-identical, lowest cosine {lowest:.9f}"
    )


COMMANDS = {"embed": Command(_declare, _embed, "arrays or a data set to embeddings, with any backend and devices")}
