"""Sources of OM files: a folder of ready ones, or atc, cached in the store."""

from __future__ import annotations

import functools
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple, Union

from tqdm import tqdm

from clipval import store
from clipval.ascend import atc, npu_smi
from clipval.errors import ClipvalError, InputError
from clipval.towers import Tower


def ready(folder: Path, tower: Tower, batch_size: int) -> Path:
    """The file of a tower and batch size in a folder of ready ones, by the recipe's names.

    Raises:
        InputError: there is none, or there are several.
    """
    found = _ready(folder, tower).get(batch_size, [])
    if len(found) != 1:
        listed = ", ".join(path.name for path in found or sorted(folder.glob("*.om"))) or "none"
        raise InputError(f"--om-dir {folder}: expected one file *{tower.name}_bs{batch_size}.om, found {listed}")
    return found[0]


def sizes(folder: Path, towers: Sequence[Tower]) -> Tuple[int, ...]:
    """Batch sizes for which a folder of ready files has every tower.

    Raises:
        InputError: there is none.
    """
    found = [_ready(folder, tower) for tower in towers]
    common = set(found[0]).intersection(*found[1:])
    if not common:
        listed = ", ".join(path.name for path in sorted(folder.glob("*.om"))) or "none"
        names = " and ".join(f"*{tower.name}_bs<N>.om" for tower in towers)
        raise InputError(f"--om-dir {folder}: expected {names} of one batch size, found {listed}")
    return tuple(sorted(common))


def _ready(folder: Path, tower: Tower) -> Dict[int, List[Path]]:
    """Files of a tower by batch size. atc adds system and machine to some names: `..._linux_x86_64.om`."""
    if not folder.is_dir():
        raise InputError(f"--om-dir {folder}: no such folder")
    found: Dict[int, List[Path]] = {}
    for path in sorted(folder.iterdir()):
        match = re.search(rf"{tower.name}_bs(\d+)(_linux_\w+)?\.om$", path.name)
        if match:
            found.setdefault(int(match.group(1)), []).append(path)
    return found


@functools.lru_cache(maxsize=None)
def options(
    soc_version: Optional[str], device_id: int, precision_mode: str, keep_dtype: Optional[Path], flags: Tuple[str, ...]
) -> atc.AtcOptions:
    """atc's options.

    Args:
        soc_version: the chip; None for the device's, from npu-smi.

    Raises:
        UsageError, InputError: see `clipval.ascend.atc.AtcOptions`.
        BackendUnavailable, ToolFailed: see `clipval.ascend.npu_smi.npu`.
    """
    return atc.AtcOptions(
        soc_version=soc_version or npu_smi.npu(device_id).soc_version,
        precision_mode=precision_mode,
        keep_dtype=str(keep_dtype) if keep_dtype else "",
        extra=flags,
    )


def compiled(kept: store.Store, onnx: Path, tower: Tower, batch_size: int, options: atc.AtcOptions) -> Path:
    """The OM file compiled from an ONNX file, cached; its log is `<work>/logs/<tower>_bs<n>.log`.

    Args:
        onnx: a file of the store.
    """
    name = f"{tower.name}_bs{batch_size}"
    digests = {file: found["sha256"] for file, found in store.files(onnx.parent).items()}  # external data too

    def build(folder: Path) -> None:
        atc.compile_om(onnx, folder, name, tower, batch_size, options, logs_folder=kept.root / "logs")

    return kept.get("om", {"onnx": digests, **atc.key(tower, batch_size, options)}, build) / f"{name}.om"


def side_by_side(
    compilations: Sequence[Callable[[], Path]], jobs: Optional[int] = None
) -> List[Union[Path, ClipvalError]]:
    """Compile several files in parallel; returns each result or error. A failure does not stop the others.

    Args:
        jobs: how many at a time; None for an eighth of the cores, at least one: each atc starts 8 compilers itself
            (TE_PARALLEL_COMPILER in the CANN user guide).
    """

    def attempt(compilation: Callable[[], Path]) -> Union[Path, ClipvalError]:
        try:
            return compilation()
        except ClipvalError as error:
            return error

    atc.resume()
    with ThreadPoolExecutor(jobs or max(1, (os.cpu_count() or 1) // 8)) as pool:
        begun: List[Future[Union[Path, ClipvalError]]] = []
        try:
            begun.extend(pool.submit(attempt, one) for one in compilations)
            for _ in tqdm(as_completed(begun), desc="atc", total=len(begun), disable=None, leave=False):
                pass
        except BaseException:
            for one in begun:
                one.cancel()
            atc.stop()
            raise
    return [one.result() for one in begun]


def origin(folder: Optional[Path], keep_dtype: Optional[Path], flags: Sequence[str]) -> str:
    """What OM files depend on besides model, chip and precision: atc's other options, or the ready files."""
    if folder is not None:
        return " ".join(["ready", *(f"{file.name} {store.once(file)}" for file in sorted(folder.glob("*.om")))])
    kept = [f"keep {store.sha256(keep_dtype)}"] if keep_dtype else []
    return " ".join([*kept, *flags])
