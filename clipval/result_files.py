"""Result folders of ais_bench and `clipval embed`: one file per sample and output, `<id>_<output>.npy`.

Source: `save_data_to_files` and the folders of `--output` and `--device` in ais_bench of Ascend/tools at 9d6da90 (A),
of sync-ait at 7348f67 and c432ed5 (B), and of Yanguan619/aclruntime at df1f9a4 (C); each was run.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, Sequence

import numpy as np

from clipval import arrays
from clipval.errors import InputError

THREADS = 8
# ais_bench's folders: of a run without --output_dirname, and of each device if there are several (A has no number).
RUN = re.compile(r"[0-9]{4}_[0-9]{2}_[0-9]{2}-[0-9]{2}_[0-9]{2}_[0-9]{2}$")
DEVICE = re.compile(r"device[0-9]+(_[0-9]+)?$")
RESULT = re.compile(r"\.npy$|_[0-9]+\.(bin|txt)$")  # from --outfmt NPY, BIN and TXT
UNIT_WITHIN = (
    0.02  # float16 keeps a unit vector's length within 0.001; bytes of another dtype are off by orders of magnitude
)


def listed(folder: Path) -> List[Path]:
    """The files of a folder in natural order, else of ais_bench's device folders or its only run in it.

    Raises:
        InputError: there are none; or several runs, formats, or devices that computed one sample.
    """
    found = _of_one_format(folder, [folder])
    if found:
        return found
    inside = sorted(name for name in os.listdir(folder) if (folder / name).is_dir())
    runs = [name for name in inside if RUN.match(name)]
    if len(runs) > 1:
        raise InputError(f"embeddings {folder}: several runs of ais_bench ({', '.join(runs)}); give the folder of one")
    if runs:
        return listed(folder / runs[0])
    found = _of_one_format(folder, [folder / name for name in inside if DEVICE.match(name)])
    if not found:
        raise InputError(f"embeddings {folder}: no <id>_0.npy in it; give the folder that embed or ais_bench wrote")
    name, count = Counter(path.name for path in found).most_common(1)[0]
    if count > 1:
        where = ", ".join(path.parent.name for path in found if path.name == name)
        raise InputError(f"embeddings {folder}: {name} was computed on several devices ({where}); give one's folder")
    return found


def _of_one_format(folder: Path, parts: Sequence[Path]) -> List[Path]:
    paths = [part / name for part in parts for name in os.listdir(part) if RESULT.search(name)]
    counts = Counter(path.suffix for path in paths)
    if len(counts) > 1:
        said = ", ".join(f"{count} {ending}" for ending, count in sorted(counts.items()))
        raise InputError(f"embeddings {folder}: results of several runs ({said} files); keep those of one")
    return sorted(paths, key=lambda path: arrays.natural(path.stem))


def load(paths: Sequence[Path]) -> List[np.ndarray]:
    """Each file's array; for `.bin` and `.txt`, which have no shape, [1, elements].

    `.txt` has six decimals. `.bin` has no dtype either: it is the one of float32 and float16 for which the embeddings
    are of unit length, as the recipe's model normalises them.

    Raises:
        InputError: a file is damaged; or `.bin` files are of unit length in neither dtype.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(_load, paths))
    if not paths or paths[0].suffix != ".bin":
        return found
    dtype = _dtype(paths, found)
    for path, raw in zip(paths, found):
        if raw.nbytes % np.dtype(dtype).itemsize:
            raise InputError(f"{path}: {raw.nbytes} bytes, not a whole number of {dtype} like the others; truncated")
    return [raw.view(dtype).reshape(1, -1) for raw in found]


def _load(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return arrays.load(path)
    if path.suffix == ".bin":
        return np.frombuffer(path.read_bytes(), np.uint8)
    try:
        return np.array([path.read_text(encoding="ascii").split()], np.float32)
    except ValueError as error:
        raise InputError(f"{path}: not the numbers of an embedding ({error}); run ais_bench again") from error


def _dtype(paths: Sequence[Path], found: Sequence[np.ndarray]) -> str:
    outputs = [raw for path, raw in zip(paths, found) if path.stem.endswith("_0")]
    fitting = []
    for dtype in ("<f4", "<f2"):
        whole = [raw.view(dtype).astype(np.float64) for raw in outputs if raw.nbytes % np.dtype(dtype).itemsize == 0]
        with np.errstate(all="ignore"):  # bytes of another dtype may be any number
            lengths = [float(np.sqrt(np.sum(values * values))) for values in whole]
        # most of them: a single wrong sample is judged by the gates
        if lengths and sum(abs(one - 1) < UNIT_WITHIN for one in lengths) > len(outputs) / 2:
            fitting.append(dtype)
    if len(fitting) != 1:
        raise InputError(
            f"embeddings {paths[0].parent}: {len(paths)} .bin files, which have no dtype and are of unit length "
            "neither as float32 nor as float16; run ais_bench again with --outfmt NPY"
        )
    return fitting[0]
