"""`embed --shards --devices` with a process for each half of the cores, beside one process with a thread a core.

Both as a user runs them, from the command to the checked shards, so that the start of each process, the libraries and
model that each loads for itself, and the second look at drawn samples count. The rate without all that is what the
shards' own manifests say. Results are compared to the bit with those of one process of half the threads.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import side_by_side

from clipval import environment, export, library, model, weights
from clipval.shards import files
from clipval.towers import Tower

PARENT = "two processes, half the cores each"
PEER = "one process, all cores"
PLAIN = "embed without shards"


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-name", default="ViT-B-32", help="open_clip architecture; default: %(default)s")
    parser.add_argument("--tower", choices=["vision", "text"], default="vision", help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--shards", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")


def run(args: argparse.Namespace) -> Dict[str, Any]:
    tower = library.sizes(args.model_name)[args.tower]
    cores = environment.usable_cores()
    half = max(1, cores // 2)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        arrange(folder, args, tower)
        cut = [f"--shards={args.shards}"]
        options = {
            PARENT: [*cut, "--devices=0,1", f"--threads={half}"],
            PEER: [*cut, f"--threads={cores}"],
            PLAIN: [f"--threads={cores}"],
        }
        ways = {name: embed(folder, args, name, more) for name, more in options.items()}
        embed(folder, args, "checked", [*cut, f"--threads={half}"])()
        rows = side_by_side.measure(ways, args.rounds)
        two, one = files.read_any(folder / PARENT), files.read_any(folder / "checked")
        assert two.ids == one.ids
        assert two.values.tobytes() == one.values.tobytes(), "not equal to the bit"
        rates = {name: rate(folder / name) for name in (PARENT, PEER)}
    print(f"{args.model_name} {args.tower}, {args.samples} samples, {args.shards} shards, batch {args.batch_size}")
    side_by_side.show(rows)
    told = ", ".join(f"{name} {found:.1f}" for name, found in rates.items())
    print(f"samples/s while embedding, all devices of the last round together: {told}")
    print(f"equal to the bit: {args.samples} embeddings of two processes and of one with {half} thread(s)")
    return {"ways": rows, "samples_per_second": rates}


def arrange(folder: Path, args: argparse.Namespace, tower: Tower) -> None:
    """Prepared rows of noise, and the tower's file with seeded weights."""
    (folder / "rows").mkdir()
    rng = np.random.default_rng(0)
    for n, example in enumerate(np.repeat(export.example_rows(tower, 1), args.samples, axis=0)):
        noise = rng.standard_normal(example.shape, dtype=np.float32) if tower.name == "vision" else example
        np.save(folder / "rows" / f"{n}_0.npy", noise[None])
    contract = library.sizes(args.model_name)
    loaded = model.load(args.model_name, weights.find_weights(args.model_name, weights.RANDOM), contract)
    export.export(loaded, tower, folder / f"bench_{tower.name}.onnx", metadata={})


def embed(folder: Path, args: argparse.Namespace, name: str, more: List[str]) -> Any:
    file = folder / f"bench_{args.tower}.onnx"
    command = [sys.executable, "-m", "clipval", "embed", f"--model={file}", f"--input={folder / 'rows'}"]
    command += [f"--output={folder}", f"--output-dirname={name}", f"--batch-size={args.batch_size}", *more]

    def timed() -> None:
        shutil.rmtree(folder / name, ignore_errors=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return timed


def rate(folder: Path) -> float:
    """Samples/s of all devices together while they embedded, from the index of the shards."""
    told = json.loads((folder / files.INDEX).read_text(encoding="utf-8"))["throughput"]
    return sum(one["samples_per_second"] for one in told)
