"""Images and captions to the recipe's arrays, beside the recipe's own loop.

The loop is restated after `openclip_preprocess.py` of Ascend ModelZoo-PyTorch, ACL_PyTorch/built-in/foundation_models/
OpenCLIP at a91b44f: rows of the annotation file one by one, an image at its first caption, `np.save` for each array. It
is also timed with one thread of torch, whose threads only wait for each other where a machine has other work. All write
the same bytes, which is checked first. Pictures are noise of the texture and sizes of Flickr30k's.
"""

import argparse
import csv
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List

import numpy as np
import side_by_side
from PIL import Image

from clipval import arrays, preprocess
from clipval import model as models
from clipval.datasets import karpathy
from clipval.towers import towers

TOWERS = towers(224, 77, 512)
SIZES = ((500, 333), (333, 500), (500, 375), (375, 500), (500, 334), (500, 400), (400, 500), (500, 281))
WORDS = (
    "a man in a blue shirt",
    "two young dogs",
    "is standing on a ladder",
    "run across",
    "the green grass",
    "window",
)


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--workdir", type=Path, help="where both write; default: a temporary folder")


def run(args: argparse.Namespace) -> Dict[str, Any]:
    open_clip = models.import_open_clip()
    import torch

    transform = open_clip.transform.image_transform(224, is_train=False)
    model = SimpleNamespace(transform=transform, tokenize=open_clip.get_tokenizer("ViT-B-32"))
    with tempfile.TemporaryDirectory(dir=args.workdir) as work:
        data, out = Path(work) / "data", Path(work) / "out"
        draw(data, args.images)
        dataset = karpathy.read(data)

        def fresh(way: Callable[[Path], Any]) -> Callable[[], Any]:
            def timed() -> Any:
                shutil.rmtree(out, ignore_errors=True)
                return way(out)

            return timed

        ways = {
            "clipval": fresh(lambda folder: preprocess.prepare(dataset, model, TOWERS, folder)),
            "the recipe's loop": fresh(lambda folder: loop(data, model, folder, torch.get_num_threads())),
            "the same, one thread of torch": fresh(lambda folder: loop(data, model, folder, 1)),
        }
        contents = []
        for way in ways.values():
            way()
            contents.append({path.name: path.read_bytes() for path in out.rglob("*.npy")})
        assert contents[0] == contents[1] == contents[2], "they write different arrays"
        rows = side_by_side.measure(ways, args.rounds)
        steps = {name: each(way) for name, way in parts(dataset, model, out).items()}
    print(f"{args.images} images, {5 * args.images} captions, {preprocess.THREADS} threads")
    side_by_side.show(rows)
    print("milliseconds an image, one thread: " + ", ".join(f"{name} {one:.2f}" for name, one in steps.items()))
    return {"images": args.images, "ways": rows, "milliseconds": steps}


def draw(folder: Path, count: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    with open(folder / "set_karpathy.txt", "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("image", "caption"))
        for n in range(count):
            width, height = SIZES[n % len(SIZES)]
            rough, fine = (
                Image.fromarray(rng.integers(0, 256, (height // cell + 1, width // cell + 1, 3), np.uint8)).resize(
                    (width, height), Image.Resampling.BICUBIC
                )
                for cell in (16, 2)
            )
            Image.blend(rough, fine, 0.2).save(folder / f"{10**6 + n}.jpg", quality=92)
            writer.writerows((f"{10**6 + n}.jpg", " ".join(rng.choice(WORDS, 4))) for _ in range(5))


def loop(data: Path, model: Any, out: Path, threads: int) -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for name in ("images", "texts"):
        (out / name).mkdir(parents=True)
    seen: Dict[str, int] = {}
    with open(data / "set_karpathy.txt", encoding="utf-8", newline="") as stream:
        for name, caption in list(csv.reader(stream))[1:]:
            stem = name.rpartition(".")[0]
            if stem not in seen:
                with Image.open(data / name) as image:
                    np.save(out / "images" / f"{stem}.npy", model.transform(image).unsqueeze(0).numpy())
            seen[stem] = seen.get(stem, -1) + 1
            np.save(out / "texts" / f"{stem}_{seen[stem]}.npy", model.tokenize([caption]).numpy())
    torch.set_num_threads(before)


def parts(dataset: Any, model: Any, out: Path) -> Dict[str, List[Callable[[], Any]]]:
    """What an image and its captions take, step by step."""
    from clipval.datasets.images import open_rgb

    paths = dataset.image_paths[:40]
    decoded = [open_rgb(path) for path in paths]
    resized = []
    for image in decoded:
        for step in model.transform.transforms[:-2]:
            image = step(image)
        resized.append(image)
    scale = preprocess.Transform(SimpleNamespace(transforms=model.transform.transforms[-2:]))
    row = np.empty((1, 3, 224, 224), np.float32)
    captions = [dataset.captions[5 * n : 5 * n + 5] for n in range(len(paths))]
    folder = out / "parts"
    folder.mkdir()

    def resize(image: Any) -> None:
        for step in model.transform.transforms[:-2]:
            image = step(image)

    start, tokens = arrays.header("float32", row.shape), bytes(128 + 77 * 8)
    content = start + row.tobytes()
    return {
        "decode": [lambda path=path: open_rgb(path) for path in paths],
        "resize and crop": [lambda image=image: resize(image) for image in decoded],
        "normalise": [lambda image=image: scale(image, row[0]) for image in resized],
        "write": [lambda n=n: preprocess._write(folder / f"{n}.npy", content) for n in range(len(paths))],
        "tokenise five": [lambda some=some: model.tokenize(list(some)) for some in captions],
        "write five": [
            lambda n=n: [preprocess._write(folder / f"{n}_{k}.npy", tokens) for k in range(5)]
            for n in range(len(paths))
        ],
    }


def each(ways: List[Callable[[], Any]]) -> float:
    started = time.perf_counter()
    for way in ways:
        way()
    return 1000 * (time.perf_counter() - started) / len(ways)
