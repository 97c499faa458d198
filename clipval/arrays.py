"""Arrays on disk and in memory: `.npy` files in and out, the natural order of their names, rows read when sliced."""

from __future__ import annotations

import hashlib
import io
import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Iterable, List, Protocol, Sequence, Tuple, Union

import numpy as np
from numpy.lib import format as npy

from clipval.errors import InputError, lfs_pointer, one_line, os_cause
from clipval.towers import Tower

Index = Union[slice, Sequence[int], np.ndarray]


class Source(Protocol):
    """Rows of one tower that are made or read when they are sliced.

    Attributes:
        ids: their names in order; tower: dtype and shape of a row.
    """

    @property
    def ids(self) -> Tuple[str, ...]: ...

    @property
    def tower(self) -> Tower: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Index) -> np.ndarray: ...

    def part(self, start: int, stop: int) -> Source:
        """The rows from `start` up to `stop`."""
        ...

    def stamp(self) -> str:
        """A digest that is another one where what a row is made of was changed."""
        ...


@dataclass(frozen=True)
class PreparedRows:
    """Rows of one tower on disk, read when sliced.

    Attributes:
        folder: holds one `<id>.npy` per row; ids: their names in order; tower: dtype and shape of a row.
    """

    folder: Path
    ids: Tuple[str, ...]
    tower: Tower

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Index) -> np.ndarray:
        """Rows [n, *row_shape], C-contiguous.

        Raises:
            InputError: a file is missing, damaged, or does not hold a row.
        """
        picked = self.ids[index] if isinstance(index, slice) else [self.ids[n] for n in index]
        rows = np.empty(self.tower.shape(len(picked)), self.tower.dtype)
        for n, name in enumerate(picked):
            _read_row(self.folder / f"{name}.npy", rows[n])
        return rows

    def part(self, start: int, stop: int) -> PreparedRows:
        """The rows from `start` up to `stop`."""
        return replace(self, ids=self.ids[start:stop])

    def stamp(self) -> str:
        """sha256 over the names, sizes and times of the files, which are not read."""
        return stamp(self.folder / f"{name}.npy" for name in self.ids)


def stamp(files: Iterable[Path]) -> str:
    """sha256 over the names, sizes and times of files, which are not read.

    Raises:
        InputError: a file is missing.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            found = os.stat(file)
        except OSError as error:
            raise InputError(os_cause(error)) from error
        digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


Rows = Union[Source, np.ndarray]


def listed(folder: Path, tower: Tower) -> PreparedRows:
    """Every array of a folder as rows of one tower, in natural order of their names.

    Raises:
        OSError: the folder cannot be listed.
    """
    return PreparedRows(folder, tuple(name[: -len(".npy")] for name in names(folder)), tower)


def names(folder: Path) -> List[str]:
    """The `.npy` files of a folder in natural order.

    Raises:
        OSError: the folder cannot be listed.
    """
    found = [name for name in os.listdir(folder) if name.endswith(".npy")]
    return sorted(found, key=lambda name: natural(name[: -len(".npy")]))


def read(path: Path, dtype: str, shape: Tuple[int, ...]) -> np.ndarray:
    """One .npy file of exactly this dtype and shape; pickles are never loaded.

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    array = load(path)
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        wanted = f"{np.dtype(dtype).str} {shape}"
        raise InputError(f"{path}: {array.dtype.str} {array.shape}, expected {wanted}; run preprocess again")
    return array


def _read_row(path: Path, row: np.ndarray) -> None:
    """Fill a row, C-contiguous, from its file.

    A file that starts as `np.save` writes it and has the right size is read in place: parsing its header would take
    longer than reading it.
    """
    start = header(row.dtype.name, (1, *row.shape))
    with suppress(OSError), open(path, "rb", buffering=0) as stream:
        content = row.reshape(-1).view(np.uint8).data
        if stream.read(len(start)) == start and stream.readinto(content) == row.nbytes and not stream.read(1):
            return
    row[:] = read(path, row.dtype.name, (1, *row.shape))[0]


@lru_cache(maxsize=None)
def header(dtype: str, shape: Tuple[int, ...]) -> bytes:
    """What `np.save` writes before an array."""
    stream = io.BytesIO()
    about = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(stream, about)
    return stream.getvalue()


def load(path: Path) -> np.ndarray:
    """One .npy file of any dtype and shape; pickles are never loaded.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with open(path, "rb") as stream:
            array: np.ndarray = npy.read_array(stream, allow_pickle=False)
            if stream.read(1):
                raise ValueError("more bytes than its header states")
            return array
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; run preprocess again") from error
    except Exception as error:  # numpy raises ValueError, SyntaxError, TypeError, ... depending on the damage
        cause = lfs_pointer(path) or f"not a readable array ({one_line(error)}); create it again"
        raise InputError(f"{path}: {cause}") from error


def natural(name: str) -> List[Union[str, Tuple[int, str]]]:
    """Sort key that orders numbers inside names by value: 9_2 before 10_1. Different names have different keys."""
    parts = enumerate(re.split(r"([0-9]+)", name))  # every second part is a number
    return [*((int(part), "") if n % 2 else (-1, part) for n, part in parts), (-1, name)]


def spread(count: int, most: int) -> np.ndarray:
    """At most `most` indices spread evenly over `count` samples, including the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length one, float64; a zero or infinite vector becomes NaN.

    Args:
        vectors: [n, width], any float dtype.
    """
    wide = vectors.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True))
