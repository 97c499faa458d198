"""Run a backend over prepared rows, and read and write embeddings in the recipe's folders of `<id>_0.npy`.

Shapes and dtypes are checked at this border for every backend: some runtimes compare byte counts only. Values are not
judged here, so that the evidence is kept; the gates do that.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple

import numpy as np
from tqdm import tqdm

from clipval.backends import Backend
from clipval.errors import InputError

THREADS = 8


@dataclass(frozen=True)
class Embeddings:
    """One tower's embeddings as the backend gave them: ids, and float32 [n, width] in their order."""

    ids: Tuple[str, ...]
    values: np.ndarray


def embed(backend: Backend, ids: Sequence[str], rows: Any, batch_size: int) -> Embeddings:
    """Embed every row.

    Args:
        backend: an open backend; stays open.
        ids: n names.
        rows: n rows; a slice of it is an array [k, *row_shape] in the tower's dtype.
        batch_size: rows a call. Where the backend's is fixed, the last batch is filled up with copies of its last row,
            and what they give is dropped.

    Raises:
        InputError: rows or embeddings of another dtype, shape or number than the contract's.
    """
    tower = backend.tower
    if len(ids) != len(rows) or not len(ids):
        raise InputError(f"{tower.name} tower: {len(ids)} ids for {len(rows)} rows; nothing can be embedded")
    if backend.batch_size not in (None, batch_size):
        raise InputError(
            f"{backend.identity}: its {tower.name} model takes batches of {backend.batch_size}, asked for {batch_size}"
        )
    values = np.empty((len(ids), tower.width), np.float32)
    starts = range(0, len(ids), batch_size)
    for start in tqdm(starts, desc=f"{backend.identity.name} {tower.name}", disable=None, leave=False):
        batch = np.ascontiguousarray(rows[start : start + batch_size])
        count = len(batch)
        if backend.batch_size is not None and count < batch_size:
            batch = np.concatenate([batch, np.repeat(batch[-1:], batch_size - count, axis=0)])
        _check_rows(backend, batch, ids[start])
        found = backend.run(batch)
        _check_embeddings(backend, found, len(batch), ids[start])
        values[start : start + count] = found[:count]
    return Embeddings(tuple(ids), values)


def _check_rows(backend: Backend, batch: np.ndarray, first: str) -> None:
    tower = backend.tower
    if batch.shape[1:] != tower.row_shape or batch.dtype != np.dtype(tower.dtype):
        raise InputError(
            f"{backend.identity}, {tower.name} tower, batch from sample {first}: input {tower.input_name!r} is "
            f"{batch.dtype}{list(batch.shape)}, expected {tower.dtype}{['n', *tower.row_shape]}"
        )


def _check_embeddings(backend: Backend, found: Any, count: int, first: str) -> None:
    tower = backend.tower
    shape, kind = getattr(found, "shape", None), getattr(found, "dtype", type(found).__name__)
    if shape != (count, tower.width) or kind != np.float32:
        raise InputError(
            f"{backend.identity}, {tower.name} tower, batch from sample {first}: output {tower.output_name!r} is "
            f"{kind} {shape}, expected float32 {(count, tower.width)}"
        )


def read_array(path: Path, dtype: str, shape: Tuple[int, ...]) -> np.ndarray:
    """One .npy file of just this dtype and shape; pickles are never loaded.

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    array = _load(path)
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise InputError(f"{path}: {array.dtype.str} {array.shape}, expected {np.dtype(dtype).str} {shape}")
    return array


def _load(path: Path) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; run preprocess again") from error
    except Exception as error:  # numpy raises ValueError, EOFError, OSError, SyntaxError, ... by what is damaged
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: not an array that can be read ({reason}); make it again") from error
    if not isinstance(loaded, np.ndarray):
        raise InputError(f"{path}: an archive, expected one array")
    return loaded


def write(folder: Path, embeddings: Embeddings) -> None:
    """Write `<id>_0.npy`, float32 [1, width] each.

    Raises:
        InputError: the folder holds arrays of other samples, which would be evaluated with these.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {f"{name}_0.npy" for name in embeddings.ids}
    foreign = sorted(path.name for path in folder.glob("*.npy") if path.name not in names)
    if foreign:
        raise InputError(
            f"{folder}: holds {len(foreign)} arrays of other samples ({foreign[0]}); empty it or give another folder"
        )

    def save(n: int) -> None:
        np.save(folder / f"{embeddings.ids[n]}_0.npy", embeddings.values[n : n + 1])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(save, range(len(embeddings.ids))))


def read(folder: Path, width: Optional[int] = None) -> Embeddings:
    """Read a folder of `<id>_0.npy`, ais_bench's own too, in natural order of the ids.

    `<id>_1.npy` of one element is the recipe's second output, the logit scale, and is left out.

    Args:
        width: elements of an embedding; None takes the first file's.

    Raises:
        InputError: no embeddings, or a file that is not a float32 or float16 embedding of that width.
    """
    if not folder.is_dir():
        raise InputError(f"embeddings {folder}: no such folder; run embed, or give the folder of the .npy files")
    files = sorted(folder.glob("*.npy"), key=lambda path: natural(path.stem))
    outputs = [path for path in files if path.stem.endswith("_0")]
    with ThreadPoolExecutor(THREADS) as pool:
        others = [path for path in files if not path.stem.endswith("_0")]
        for path, array in zip(others, pool.map(_load, others)):
            if array.size != 1 or not path.stem.endswith("_1"):
                raise InputError(f"{path}: not an embedding <id>_0.npy; take it out of the folder")
        arrays = list(pool.map(_load, outputs))
    if not arrays:
        raise InputError(f"embeddings {folder}: no <id>_0.npy in it; give the folder that embed or ais_bench wrote")
    width = width if width is not None else arrays[0].shape[-1] if arrays[0].ndim else 0
    for path, array in zip(outputs, arrays):
        if array.dtype.str not in ("<f4", "<f2") or array.shape not in ((1, width), (width,)):
            raise InputError(f"{path}: {array.dtype.str} {array.shape}, expected <f4 or <f2 of shape (1, {width})")
    values = np.concatenate([array.reshape(1, -1) for array in arrays]).astype(np.float32)
    return Embeddings(tuple(path.stem[: -len("_0")] for path in outputs), values)


def align(embeddings: Embeddings, ids: Sequence[str]) -> Embeddings:
    """The same embeddings in the order of `ids`.

    Raises:
        InputError: ids that are missing, surplus or there twice.
    """
    row = {name: n for n, name in enumerate(embeddings.ids)}
    missing = [name for name in ids if name not in row]
    surplus = sorted(set(embeddings.ids) - set(ids))
    if missing or surplus or len(row) != len(embeddings.ids) or len(set(ids)) != len(ids):
        raise InputError(
            f"embeddings do not match the data: {len(missing)} missing {missing[:3]}, {len(surplus)} surplus "
            f"{surplus[:3]}, {len(embeddings.ids)} ids ({len(row)} different)"
        )
    return Embeddings(tuple(ids), embeddings.values[[row[name] for name in ids]])


def image_id_of(caption_id: str) -> str:
    """`<image id>_<k>` -> `<image id>`."""
    return caption_id.rpartition("_")[0]


def natural(name: str) -> List[Any]:
    """Sort key that orders numbers inside names by value: 9_2 before 10_1."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]
