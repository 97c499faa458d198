"""Run a backend over prepared rows, and read and write embeddings in the recipe's folders of `<id>_0.npy`.

Shapes and dtypes are checked here for every backend, since some runtimes only compare byte counts. Values are not
checked here: the gates do that, and keep the evidence.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from tqdm import tqdm

from clipval import arrays, result_files, store
from clipval.arrays import Rows
from clipval.backends import Backend, Identity
from clipval.errors import InputError, one_line
from clipval.towers import Tower

THREADS = 8


@dataclass(frozen=True)
class Embeddings:
    """One tower's embeddings as the backend gave them: ids, and float32 [n, width] in their order."""

    ids: Tuple[str, ...]
    values: np.ndarray


class Made(NamedTuple):
    """One backend's embeddings of one tower, with the backend's identity."""

    identity: Identity
    embeddings: Embeddings


def embed(backend: Backend, ids: Sequence[str], rows: Rows, batch_size: int) -> Embeddings:
    """Embed every row; see `batches`."""
    values = np.empty((len(ids), backend.tower.width), np.float32)
    start = 0
    for found in shown(batches(backend, ids, rows, batch_size), backend, len(ids), batch_size):
        values[start : start + len(found)] = found
        start += len(found)
    return Embeddings(tuple(ids), values)


def batches(backend: Backend, ids: Sequence[str], rows: Rows, batch_size: int) -> Iterator[np.ndarray]:
    """Embed rows batch by batch; neither rows nor embeddings pile up.

    Args:
        backend: an open backend; stays open.
        ids: n names.
        rows: [n, *row_shape] in the tower's dtype. Read batch by batch.
        batch_size: rows per call. If the backend's is fixed, the last batch is padded with copies of its last row, and
            their outputs are dropped.

    Yields:
        float32 [at most batch_size, width], which the backend may overwrite in its next call.

    Raises:
        InputError: rows or embeddings whose dtype, shape or number breaks the contract.
    """
    tower = backend.tower
    if len(ids) != len(rows) or not len(ids) or batch_size < 1:
        raise InputError(
            f"{tower.name} tower: {len(ids)} ids for {len(rows)} rows in batches of {batch_size}; nothing can be "
            f"embedded; expected equally many ids and rows, and batches of at least 1"
        )
    if backend.batch_size not in (None, batch_size):
        raise InputError(
            f"{backend.identity}: its {tower.name} model takes batches of {backend.batch_size}, asked for {batch_size}"
        )
    for start in range(0, len(ids), batch_size):
        count = min(batch_size, len(ids) - start)
        batch = np.ascontiguousarray(rows[start : start + count])
        _check_rows(backend, batch, count, ids[start])
        if backend.batch_size is not None and count < batch_size:
            batch = np.concatenate([batch, np.repeat(batch[-1:], batch_size - count, axis=0)])
        found = backend.run(batch)
        _check_embeddings(backend, found, len(batch), ids[start])
        del batch  # a large one should not stay while the next is read
        yield found[:count]


def shown(blocks: Iterable[np.ndarray], backend: Backend, count: int, batch_size: int) -> Iterable[np.ndarray]:
    """The same, with a progress bar on a terminal."""
    named, total = f"{backend.identity.name} {backend.tower.name}", -(-count // max(1, batch_size))
    progress: Iterable[np.ndarray] = tqdm(blocks, desc=named, total=total, disable=None, leave=False)
    return progress


def _check_rows(backend: Backend, batch: np.ndarray, count: int, first: str) -> None:
    tower = backend.tower
    if batch.shape != tower.shape(count) or batch.dtype != np.dtype(tower.dtype):
        raise InputError(
            f"{backend.identity}, {tower.name} tower, batch from sample {first}: input {tower.input_name!r} is "
            f"{batch.dtype}{list(batch.shape)}, expected {tower.dtype}{list(tower.shape(count))}; run preprocess again"
        )


def _check_embeddings(backend: Backend, found: object, count: int, first: str) -> None:
    tower = backend.tower
    shape, kind = getattr(found, "shape", None), getattr(found, "dtype", type(found).__name__)
    if shape != (count, tower.width) or kind != np.float32:
        raise InputError(
            f"{backend.identity}, {tower.name} tower, batch from sample {first}: output {tower.output_name!r} is "
            f"{kind} {shape}, expected float32 {(count, tower.width)}; the model breaks the contract"
        )


def write(folder: Path, embeddings: Embeddings) -> None:
    """Write embeddings; see `write_blocks`."""
    write_blocks(folder, embeddings.ids, [embeddings.values])


def write_blocks(folder: Path, ids: Sequence[str], blocks: Iterable[np.ndarray]) -> None:
    """Write `<id>_0.npy`, float32 [1, width] each, block by block; a new folder appears only when it is complete.

    Args:
        ids: n names; blocks: their embeddings in order, float32 [any number, width] each, written as they come.

    Raises:
        InputError: an id is a duplicate, the folder cannot be written, or it holds arrays of other samples, which
            would be evaluated together with these.
    """
    names = {f"{name}_0.npy" for name in ids}
    if len(names) != len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise InputError(f"{folder}: sample {twice} is a duplicate; one file would replace the other")
    try:
        foreign = sorted(set(arrays.names(folder)) - names) if os.path.isdir(folder) else []
        if foreign:
            raise InputError(
                f"{folder}: holds {len(foreign)} arrays of other samples ({foreign[0]}); empty it or give another"
            )
        _publish(folder.resolve(), ids, blocks)
    except OSError as error:
        reason = error.strerror or error  # numpy reports a full disk without an errno
        raise InputError(f"{folder}: cannot be written ({reason}); free space or give another folder") from error


def _publish(folder: Path, ids: Sequence[str], blocks: Iterable[np.ndarray]) -> None:
    """Write next to the folder, then rename: a partial folder would be evaluated as a smaller data set."""
    new = [parent for parent in folder.parents if not parent.exists()]
    try:
        with store.aside(folder) as scratch, ThreadPoolExecutor(THREADS) as pool:
            left = iter(ids)
            for block in blocks:
                places = [scratch / f"{name}_0.npy" for name in islice(left, len(block))]
                list(pool.map(np.save, places, block[:, None]))
            if not folder.exists():
                os.replace(scratch, folder)
                return
            for path in scratch.iterdir():
                os.replace(path, folder / path.name)
    except BaseException:  # also of the rows, which are read meanwhile
        for parent in new:
            with suppress(OSError):
                parent.rmdir()
        raise


def read(folder: Path, width: Optional[int] = None) -> Embeddings:
    """Read a folder of `<id>_0.npy`, or one that ais_bench wrote in any format, in natural order of the ids.

    `<id>_1.npy` of one element is the recipe's second output, the logit scale, and is ignored. For ais_bench's
    timestamped folder its parent may be given; its per-device folders are read together.

    Args:
        width: elements of an embedding; None takes the width of most files.

    Raises:
        InputError: no embeddings, or a file that is not a float32 or float16 embedding of that width.
    """
    if not os.path.isdir(folder):  # Path.is_dir raises if the name is too long
        raise InputError(f"embeddings {folder}: no such folder; run embed, or give the folder of the .npy files")
    files = result_files.listed(folder)
    outputs, found = [], []
    for path, array in zip(files, result_files.load(files)):
        if path.stem.endswith("_0"):
            outputs.append(path)
            found.append(array)
        elif array.size != 1 or not path.stem.endswith("_1"):
            raise InputError(f"{path}: not an embedding <id>_0.npy; remove it, or give the folder of embeddings")
    if not found:
        raise InputError(f"embeddings {folder}: no <id>_0.npy in it; give the folder that embed or ais_bench wrote")
    if width is None:
        width = max(1, Counter(array.shape[-1] if array.ndim else 0 for array in found).most_common(1)[0][0])
    for path, array in zip(outputs, found):
        if array.dtype.str not in ("<f4", "<f2") or array.shape not in ((1, width), (width,)):
            wanted = f"<f4 or <f2 of shape (1, {width})"
            raise InputError(f"{path}: {array.dtype.str} {array.shape}, expected {wanted}; run embed again")
    values = np.concatenate([array.reshape(1, -1) for array in found]).astype(np.float32)
    return Embeddings(tuple(path.stem[: -len("_0")] for path in outputs), values)


class Golden(NamedTuple):
    """Pinned embeddings of one tower.

    Attributes:
        of_data: of a few samples of the data set.
        of_probe: of the probe inputs of seed 0, float32 [n, width]; probe_sha256: of these inputs.
    """

    of_data: Embeddings
    of_probe: np.ndarray
    probe_sha256: str


def write_golden(file: Path, towers: Dict[str, Golden]) -> None:
    """Write the pinned embeddings of each tower as one .npz.

    `<tower>_ids` and `<tower>` [n, width] are of the data, `<tower>_probe` and `<tower>_probe_sha256` of probe inputs.
    """
    stored: Dict[str, Any] = {}
    for name, one in towers.items():
        stored[name], stored[f"{name}_ids"] = one.of_data.values, np.array(one.of_data.ids)
        stored[f"{name}_probe"], stored[f"{name}_probe_sha256"] = one.of_probe, np.array(one.probe_sha256)
    file.absolute().parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as stream:  # given a name, numpy would append .npz
        np.savez_compressed(stream, **stored)


def read_golden(file: Path, tower: Tower) -> Golden:
    """One tower's embeddings from a file of `write_golden`; pickles are never loaded.

    Raises:
        InputError: the file is missing, damaged, or not of this tower's width.
    """
    name = tower.name
    try:
        with np.load(file, allow_pickle=False) as stored:
            ids, values, probe = stored[f"{name}_ids"], stored[name], stored[f"{name}_probe"]
            digest = str(stored[f"{name}_probe_sha256"])
    except Exception as error:  # zipfile's, zlib's and numpy's own
        raise InputError(f"golden embeddings {file}: cannot be read ({one_line(error)}); run clipval pin") from error
    for found, count in ((values, len(np.atleast_1d(ids))), (probe, len(np.atleast_1d(probe)))):
        if ids.ndim != 1 or found.dtype != np.float32 or found.shape != (count, tower.width) or not count:
            wanted = f"float32 ({count}, {tower.width})"
            raise InputError(
                f"golden embeddings {file}: {found.dtype} {found.shape}, expected {wanted}; run clipval pin"
            )
    return Golden(Embeddings(tuple(map(str, ids)), values), probe, digest)


def align(embeddings: Embeddings, ids: Sequence[str]) -> Embeddings:
    """The same embeddings in the order of `ids`.

    Raises:
        InputError: ids that are missing, surplus or duplicates.
    """
    if embeddings.ids == tuple(ids) and len(set(ids)) == len(ids):
        return embeddings  # without a copy
    row = {name: n for n, name in enumerate(embeddings.ids)}
    missing = [name for name in ids if name not in row]
    surplus = sorted(set(embeddings.ids) - set(ids))
    twice = [name for given in (embeddings.ids, ids) for name, count in Counter(given).items() if count > 1]
    if missing or surplus or twice:
        raise InputError(
            f"embeddings do not match the data: of {len(ids)} samples {len(missing)} missing {missing[:3]}, "
            f"{len(surplus)} surplus {surplus[:3]}, {len(twice)} duplicates {twice[:3]}; embed this data set again"
        )
    return Embeddings(tuple(ids), embeddings.values[[row[name] for name in ids]])


def image_id_of(caption_id: str) -> str:
    """The image id of a caption id: `<image id>_<k>` -> `<image id>`.

    Raises:
        InputError: the id has another form.
    """
    name, _, k = caption_id.rpartition("_")
    if not name or not re.fullmatch("[0-9]+", k):
        raise InputError(f"text embedding {caption_id!r}: expected the id <image id>_<k>; give the texts' embeddings")
    return name
