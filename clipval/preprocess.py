"""Data set -> arrays in the recipe's layout.

`images/<id>.npy` is float32 [1, 3, side, side], `texts/<id>_<k>.npy` int64 [1, 77].

Pixels are exactly what the model's own open_clip transform gives for the image as RGB.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, Iterable, List, Optional, Sequence, Tuple, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from clipval.arrays import PreparedRows
from clipval.datasets.images import open_rgb
from clipval.model import Model, check_tokens
from clipval.towers import Tower
from clipval.transform import PreprocessSpec

if TYPE_CHECKING:
    from clipval.datasets import RetrievalDataset

THREADS = 8
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class PreparedData:
    """Both towers' rows by tower name; `folder` holds `images` and `texts`."""

    folder: Path
    rows: Dict[str, PreparedRows]


def prepare(dataset: RetrievalDataset, model: Model, towers: Dict[str, Tower], folder: Path) -> PreparedData:
    """Write every image and caption as arrays; shows a progress bar on a terminal.

    Raises:
        InputError: an image cannot be read; the file is named.
    """
    vision, text = towers["vision"], towers["text"]
    (folder / vision.prepared).mkdir(parents=True, exist_ok=True)
    (folder / text.prepared).mkdir(parents=True, exist_ok=True)

    def write_image(item: Tuple[str, Path]) -> None:
        name, path = item
        np.save(folder / vision.prepared / f"{name}.npy", pixels(path, model)[None])

    def write_text(item: Tuple[str, np.ndarray]) -> None:
        name, row = item
        np.save(folder / text.prepared / f"{name}.npy", row[None])

    each_in_threads(
        write_image, zip(dataset.image_ids, dataset.image_paths), "preprocess images", len(dataset.image_ids)
    )
    rows = tokens(dataset.captions, model, text)
    each_in_threads(write_text, zip(dataset.caption_ids, rows), "preprocess texts", len(rows))
    return opened(dataset, towers, folder)


def opened(dataset: RetrievalDataset, towers: Dict[str, Tower], folder: Path) -> PreparedData:
    """Prepared data that is already on disk, in the order of the data set's ids."""
    ids = {"vision": dataset.image_ids, "text": dataset.caption_ids}
    rows = {name: PreparedRows(folder / tower.prepared, ids[name], tower) for name, tower in towers.items()}
    return PreparedData(folder, rows)


def pixels(path: Path, model: Model) -> np.ndarray:
    """One image through the model's own transform: float32 [3, side, side]."""
    return np.ascontiguousarray(model.transform(open_rgb(path)).numpy(), dtype=np.float32)


def expected_pixels(path: Path, size: Tuple[int, int], spec: PreprocessSpec) -> np.ndarray:
    """One image as its transform is stated, without the model's own code: float32 [3, height, width].

    Resized (antialiased), cropped or padded at the centre with offsets rounded half to even, pixel / 255, normalised.
    Source: open_clip 3.3's and torchvision's behaviour for RGB images.
    """
    with Image.open(path) as stored:  # not by open_rgb, so that a fault of it shows
        image = stored.convert("RGB")
    height, width = size
    bilinear = spec.interpolation == "bilinear" and (spec.resize_mode != "shortest" or height == width)
    kernel = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
    image = image.resize(_resized(image.size, (width, height), spec.resize_mode), kernel)
    image = _centred(image, (width, height), spec.fill_color)
    scaled = np.asarray(image, np.float32) / 255
    normal = (scaled - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1))


def _resized(found: Tuple[int, int], wanted: Tuple[int, int], mode: str) -> Tuple[int, int]:
    """Width and height after resizing; for a square, torchvision cuts the long edge to whole pixels."""
    if mode == "squash":
        return wanted
    if mode == "shortest" and wanted[0] == wanted[1]:
        short = min(found)
        return int(wanted[0] * found[0] / short), int(wanted[1] * found[1] / short)
    ratios = [has / needs for has, needs in zip(found, wanted)]
    ratio = max(ratios) if mode == "longest" else min(ratios)
    return round(found[0] / ratio), round(found[1] / ratio)


def _centred(image: Image.Image, wanted: Tuple[int, int], fill: int) -> Image.Image:
    """Cropped to the centre; what is smaller is padded first, the odd pixel to the right and the bottom."""
    width, height = image.size
    canvas = max(width, wanted[0]), max(height, wanted[1])
    if canvas != image.size:
        padded = Image.new("RGB", canvas, (fill, fill, fill))
        padded.paste(image, ((canvas[0] - width) // 2, (canvas[1] - height) // 2))
        image = padded
    left, top = (round((edge - needs) / 2) for edge, needs in zip(image.size, wanted))
    return image.crop((left, top, left + wanted[0], top + wanted[1]))


def tokens(captions: Sequence[str], model: Model, tower: Tower) -> np.ndarray:
    """Captions through the model's own tokenizer: int64 [n, context]."""
    return check_tokens(np.asarray(model.tokenize(list(captions)).numpy()), tower)


def each_in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], describe: str = "", total: Optional[int] = None
) -> List[Result]:
    """Map in threads (decoding, resizing and array I/O release the interpreter's lock), with a progress bar."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(
            tqdm(pool.map(function, items), desc=describe, total=total, disable=None if describe else True, leave=False)
        )
