"""Ranks, all k and margins both ways, beside CLIP_benchmark's evaluation of k = 5 and bare float32 products.

CLIP_benchmark's own `evaluate` runs on a model that hands out stored embeddings (`pip install --no-deps
clip_benchmark`; measured with 1.6.2). At other sizes than the recipe's its memory does not suffice, so that only the
bare product in blocks is the peer.
"""

import argparse
import contextlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict

import numpy as np
import side_by_side

from clipval import retrieval

WIDTH = 512
BLOCK = 4096
RECIPE = (1000, 5000)


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=RECIPE[0], help="default: %(default)s")
    parser.add_argument("--captions", type=int, default=RECIPE[1], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=11, help="default: %(default)s; give 1 for large sizes")
    parser.add_argument("--alone", action="store_true", help="clipval only, for sizes that take many minutes")


def run(args: argparse.Namespace) -> Dict[str, Any]:
    images, captions, owner = drawn(args.images, args.captions)
    image_ids, caption_ids = (tuple(map(str, range(len(rows)))) for rows in (images, captions))
    ways = {"clipval": lambda: retrieval.evaluate(image_ids, images, caption_ids, captions, owner).metrics()}
    if not args.alone:
        ways["bare float32 product, numpy, blocks of 4096"] = lambda: product(images, captions)
    if (args.images, args.captions) == RECIPE and not args.alone:
        import torch

        one, other = torch.from_numpy(images), torch.from_numpy(captions)
        ways["two float32 products, torch"] = lambda: (other @ one.T, one @ other.T)
        ways["CLIP_benchmark, k = 5"] = theirs = peer(images, captions, owner)
        ours, found = ways["clipval"](), theirs()
        assert all(abs(ours[name] - found[name]) < 1e-6 for name in found), (ours, found)
    before = peak_mib(reset=True)
    rows = side_by_side.measure(ways, args.rounds)
    print(f"{args.images} images, {args.captions} captions, width {WIDTH}")
    side_by_side.show(rows)
    extra = peak_mib() - before
    print(f"peak memory beside the embeddings, of all of these: {extra:.0f} MiB")
    return {"images": args.images, "captions": args.captions, "ways": rows, "peak_mib": extra}


def drawn(images: int, captions: int) -> Any:
    """Embeddings of which about half the captions find their image among the five best of 1000."""
    rng = np.random.default_rng(0)
    vision = rng.standard_normal((images, WIDTH), dtype=np.float32)
    owner = rng.permutation(np.concatenate([np.arange(images), rng.integers(0, images, captions - images)]))
    text = rng.standard_normal((captions, WIDTH), dtype=np.float32)
    for start in range(0, captions, BLOCK):
        text[start : start + BLOCK] += 0.12 * vision[owner[start : start + BLOCK]]
    return vision, text, owner


def product(images: np.ndarray, captions: np.ndarray) -> None:
    scores = np.empty((min(BLOCK, len(captions)), len(images)), np.float32)
    for start in range(0, len(captions), BLOCK):
        rows = captions[start : start + BLOCK]
        np.matmul(rows, images.T, out=scores[: len(rows)])


def peer(images: np.ndarray, captions: np.ndarray, owner: np.ndarray) -> Any:
    """CLIP_benchmark's `evaluate`, in float32, with its default batches of 64; its captions are row numbers here."""
    import torch
    from clip_benchmark.metrics import zeroshot_retrieval

    vision, text = torch.from_numpy(images), torch.from_numpy(captions)
    of_image = np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner))[:-1])
    batches = [(vision[start : start + 64], of_image[start : start + 64]) for start in range(0, len(images), 64)]
    model = SimpleNamespace(encode_image=lambda batch: batch, encode_text=lambda rows: text[rows])

    def evaluate() -> Any:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            return zeroshot_retrieval.evaluate(model, batches, torch.tensor, "cpu", amp=False, recall_k_list=[5])

    return evaluate


def peak_mib(reset: bool = False) -> float:
    """Largest resident memory of this process, since the last reset; Linux only."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
