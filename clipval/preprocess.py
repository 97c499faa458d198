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

if TYPE_CHECKING:
    from clipval.datasets import RetrievalDataset
    from clipval.spec import PreprocessSpec

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


def expected_pixels(path: Path, side: int, spec: PreprocessSpec) -> np.ndarray:
    """One image as the spec says it must be preprocessed, without the model's transform: float32 [3, side, side].

    Shortest edge to `side` (bicubic, antialiased, the long edge cut to whole pixels), centre crop with offsets rounded
    half to even, pixel / 255, normalised. Source: open_clip's and torchvision's behaviour for RGB images.
    """
    with Image.open(path) as stored:  # not by open_rgb, so that a fault of it shows
        image = stored.convert("RGB")
    width, height = image.size
    short = min(width, height)
    image = image.resize((int(side * width / short), int(side * height / short)), Image.Resampling.BICUBIC)
    left, top = (round((edge - side) / 2) for edge in image.size)
    image = image.crop((left, top, left + side, top + side))
    scaled = np.asarray(image, np.float32) / 255
    normal = (scaled - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1))


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
