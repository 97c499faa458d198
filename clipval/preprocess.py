"""Data set -> arrays in the recipe's layout.

`images/<id>.npy` is float32 [1, 3, side, side], `texts/<id>_<k>.npy` int64 [1, 77].

Pixels are exactly those of the model's own open_clip transform on the image as RGB: its own steps resize and crop, and
a table of its last steps maps each grey level to its value. Threads share the work, since decoding, resizing and
writing release the GIL; neither rows nor tasks pile up in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Deque,
    Dict,
    Iterable,
    List,
    Optional,
    Sequence,
    Set,
    Tuple,
    TypeVar,
    Union,
)

import numpy as np
from PIL import Image
from tqdm import tqdm

from clipval import arrays, environment, store
from clipval.arrays import Index, PreparedRows
from clipval.datasets.images import open_rgb
from clipval.model import Model, check_tokens
from clipval.towers import Tower
from clipval.transform import PreprocessSpec

if TYPE_CHECKING:
    from clipval.datasets import RetrievalDataset

THREADS = max(2, min(32, environment.usable_cores()))
AHEAD = 4 * THREADS  # tasks that may wait
CAPTIONS = 256  # tokenised at once
UNFINISHED = "unfinished.json"
# The last steps of open_clip's transforms, all versions: each value depends only on its grey level and channel.
SCALING = ({"ToTensor", "MaybeToTensor"}, {"Normalize"})
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class PreparedData:
    """Both towers' rows by tower name; `folder` holds `images` and `texts`."""

    folder: Path
    rows: Dict[str, PreparedRows]

    def digests(self, tower: Tower) -> np.ndarray:
        """sha256 of each row, in order: equal for equal inputs."""
        files = store.files(self.folder)
        return np.array([files[f"{tower.prepared}/{name}.npy"]["sha256"] for name in self.rows[tower.name].ids])


class Transform:
    """A model's own transform, bit for bit, without torch if its last steps are known.

    Args:
        transform: open_clip's, PIL image -> float32 tensor [3, side, side].
    """

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self._whole = transform
        self._steps: List[Callable[[Any], Any]] = list(getattr(transform, "transforms", []))
        names = [type(step).__name__ for step in self._steps[-2:]]
        self._table: Optional[np.ndarray] = None
        if len(names) == 2 and all(name in known for name, known in zip(names, SCALING)):
            grey = np.arange(256, dtype=np.uint8)
            ramp: Any = Image.fromarray(np.repeat(grey[None, :, None], 3, axis=2))
            for step in self._steps[-2:]:
                ramp = step(ramp)
            self._table = np.ascontiguousarray(ramp.numpy()[:, 0], dtype=np.float32)  # [3, 256]

    def __call__(self, image: Image.Image, out: np.ndarray) -> None:
        """Fill `out`, float32 [3, side, side], from an RGB image."""
        if self._table is None:
            out[:] = self._whole(image).numpy()
            return
        for step in self._steps[:-2]:
            image = step(image)
        levels = np.asarray(image)
        for channel, values in enumerate(self._table):
            np.take(values, levels[:, :, channel], out=out[channel], mode="clip")


def prepare(dataset: RetrievalDataset, model: Model, towers: Dict[str, Tower], folder: Path) -> PreparedData:
    """Write every image and caption as arrays; shows a progress bar on a terminal.

    Files that a killed run left in the folder are reused if data, transform, tokenizer and code are the same.

    Raises:
        InputError: an image cannot be read; the file is named.
    """
    vision, text = towers["vision"], towers["text"]
    done = _begin(dataset, model, towers, folder)
    _write_images(dataset, model, vision, folder / vision.prepared, done["vision"])
    _write_texts(dataset, model, text, folder / text.prepared, done["text"])
    (folder / UNFINISHED).unlink()
    return opened(dataset, towers, folder)


def _write_images(dataset: RetrievalDataset, model: Model, tower: Tower, folder: Path, done: Set[str]) -> None:
    transform, shape = Transform(model.transform), tower.shape(1)
    start = arrays.header("float32", shape)
    own = threading.local()

    def write(item: Tuple[str, Path]) -> None:
        name, path = item
        if not hasattr(own, "content"):  # one buffer per thread: allocating memory costs as much as decoding
            own.content = bytearray(start) + bytearray(4 * int(np.prod(shape)))
            own.row = np.frombuffer(own.content, np.float32, offset=len(start)).reshape(shape)
        transform(open_rgb(path), own.row[0])
        _write(folder / f"{name}.npy", own.content)

    items = [item for item in zip(dataset.image_ids, dataset.image_paths) if item[0] not in done]
    each_in_threads(write, items, "preprocess images", len(items))


def _write_texts(dataset: RetrievalDataset, model: Model, tower: Tower, folder: Path, done: Set[str]) -> None:
    left = [n for n, name in enumerate(dataset.caption_ids) if name not in done]
    parts = [left[start : start + CAPTIONS] for start in range(0, len(left), CAPTIONS)]

    def write(part: List[int]) -> None:
        rows = tokens([dataset.captions[n] for n in part], model, tower)
        for n, row in zip(part, rows):
            content = arrays.header(rows.dtype.name, (1, *row.shape)) + row.tobytes()
            _write(folder / f"{dataset.caption_ids[n]}.npy", content)

    each_in_threads(write, parts, "preprocess texts", len(parts))


def _write(file: Path, content: Union[bytes, memoryview]) -> None:
    """Write a file; a truncated one is recognised by its size. After a short write the next one gives the cause."""
    left = memoryview(content)
    try:
        with open(file, "wb", buffering=0) as stream:
            while left:
                left = left[stream.write(left) :]
    except OSError as error:
        error.filename = str(file)
        raise


def _begin(dataset: RetrievalDataset, model: Model, towers: Dict[str, Tower], folder: Path) -> Dict[str, Set[str]]:
    """Names of the rows, by tower, that a killed run with the same inputs wrote; rows of other inputs are removed."""
    key, marker = _key(dataset, model, towers["text"]), folder / UNFINISHED
    same = marker.is_file() and marker.read_bytes() == key
    done: Dict[str, Set[str]] = {}
    for name, ids in (("vision", dataset.image_ids), ("text", dataset.caption_ids)):
        rows, wanted, tower = folder / towers[name].prepared, set(ids), towers[name]
        rows.mkdir(parents=True, exist_ok=True)
        whole = len(arrays.header(tower.dtype, tower.shape(1))) + np.dtype(tower.dtype).itemsize * int(
            np.prod(tower.row_shape)
        )
        with os.scandir(rows) as entries:
            found = {entry.name[: -len(".npy")]: entry for entry in entries if entry.name.endswith(".npy")}
        done[name] = {one for one in wanted & set(found) if same and found[one].stat().st_size == whole}
        for one in (wanted & set(found)) - done[name]:
            os.unlink(found[one].path)
    if not same:
        store.write(marker, key)
    return done


def _key(dataset: RetrievalDataset, model: Model, text: Tower) -> bytes:
    """Everything that the rows depend on; of images only size and time, to avoid reading them all twice."""
    digest = hashlib.sha256()
    for name, path in zip(dataset.image_ids, dataset.image_paths):
        stat = os.stat(path)
        digest.update(f"{name} {path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    for name, caption in zip(dataset.caption_ids, dataset.captions):
        digest.update(f"{name} {caption}\n".encode())
    known = {
        "transform": str(model.transform),
        "tokens": hashlib.sha256(tokens(dataset.captions[:32], model, text).tobytes()).hexdigest(),
        "data": digest.hexdigest(),
        "code": store.code_hash("clipval.preprocess"),
        "versions": environment.library_versions(),
    }
    return json.dumps(known, indent=1).encode()


def opened(dataset: RetrievalDataset, towers: Dict[str, Tower], folder: Path) -> PreparedData:
    """Prepared data that is already on disk, in the order of the data set's ids."""
    ids = {"vision": dataset.image_ids, "text": dataset.caption_ids}
    rows = {name: PreparedRows(folder / tower.prepared, ids[name], tower) for name, tower in towers.items()}
    return PreparedData(folder, rows)


@dataclass(frozen=True)
class RawRows:
    """Rows of one tower, made of images or captions when they are sliced, so that no array need lie on the disk.

    Attributes:
        ids: their names in order; items: image files or captions; tower: dtype and shape of a row.
        model: whose transform and tokenizer make them; None where none is sliced.
    """

    ids: Tuple[str, ...]
    items: Tuple[Any, ...]
    tower: Tower
    model: Optional[Model] = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Index) -> np.ndarray:
        """Rows [n, *row_shape], what `prepare` would have written.

        Raises:
            InputError: an image cannot be read; the file is named.
        """
        assert self.model is not None
        picked = self.items[index] if isinstance(index, slice) else [self.items[n] for n in index]
        if self.tower.name == "text":
            return tokens(picked, self.model, self.tower)
        rows = np.empty(self.tower.shape(len(picked)), np.float32)
        each_in_threads(lambda n: self._transform(open_rgb(picked[n]), rows[n]), range(len(picked)))
        return rows

    @cached_property
    def _transform(self) -> Transform:
        assert self.model is not None
        return Transform(self.model.transform)

    def part(self, start: int, stop: int) -> RawRows:
        """The rows from `start` up to `stop`."""
        return replace(self, ids=self.ids[start:stop], items=self.items[start:stop])

    def stamp(self) -> str:
        """sha256 over captions, or over names, sizes and times of images, which are not read."""
        if self.tower.name == "text":
            return hashlib.sha256(json.dumps(self.items).encode()).hexdigest()
        return arrays.stamp(self.items)


def raw(dataset: RetrievalDataset, tower: Tower, model: Optional[Model] = None) -> RawRows:
    """A data set's images or captions as rows of a tower, in the order of its ids."""
    if tower.name == "text":
        return RawRows(dataset.caption_ids, dataset.captions, tower, model)
    return RawRows(dataset.image_ids, dataset.image_paths, tower, model)


def pixels(path: Path, model: Model) -> np.ndarray:
    """One image through the model's own transform: float32 [3, side, side]."""
    return np.ascontiguousarray(model.transform(open_rgb(path)).numpy(), dtype=np.float32)


def expected_pixels(path: Path, size: Tuple[int, int], spec: PreprocessSpec) -> np.ndarray:
    """One image by the stated transform, without the model's own code: float32 [3, height, width].

    Resized (antialiased), cropped or padded at the centre with offsets rounded half to even, pixel / 255, normalised.
    Source: open_clip 3.3's and torchvision's behaviour for RGB images.
    """
    with Image.open(path) as stored:  # without open_rgb, so that a fault in it is noticed
        image = stored.convert("RGB")
    height, width = size
    bilinear = spec.interpolation == "bilinear" and (spec.resize_mode != "shortest" or height == width)
    kernel = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
    image = image.resize(_resized(image.size, (width, height), spec.resize_mode), kernel)
    levels = np.asarray(_centred(image, (width, height), spec.fill_color))
    scaled = np.arange(256, dtype=np.float32) / 255
    out = np.empty((3, height, width), np.float32)
    for channel, (mean, std) in enumerate(zip(spec.mean, spec.std)):
        normal = (scaled - np.float32(mean)) / np.float32(std)
        np.take(normal, levels[:, :, channel], out=out[channel], mode="clip")
    return out


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
    """Cropped to the centre; smaller images are padded first, the odd pixel at the right and bottom."""
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
    """Map in threads, with a progress bar; only a few items are taken ahead."""
    results: List[Result] = []
    waiting: Deque[Future[Result]] = deque()
    hidden = None if describe else True
    with ThreadPoolExecutor(THREADS) as pool, tqdm(desc=describe, total=total, disable=hidden, leave=False) as bar:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= AHEAD:
                    results.append(waiting.popleft().result())
                    bar.update()
            while waiting:
                results.append(waiting.popleft().result())
                bar.update()
        finally:
            for left in waiting:
                left.cancel()
    return results
