"""Shards on disk: `<number>-of-<count>/values.npy` and `shard.json` each; `shards.json` once all are checked.

A shard consists of whole batches of the complete run, so that it is bit-identical to that run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import msgspec
import numpy as np
from numpy.lib import format as npy

from clipval import arrays, embeddings, store
from clipval.arrays import Source
from clipval.backends import Backend, Identity
from clipval.embeddings import Embeddings, Made
from clipval.errors import InputError, one_line
from clipval.towers import Tower

MANIFEST, VALUES, INDEX = "shard.json", "values.npy", "shards.json"
SHARD = re.compile(r"(\d{5,})-of-(\d{5,})$")
BUILDING = ".building"
BLOCK = 1 << 22  # bytes read at once


@dataclass(frozen=True)
class Plan:
    """What is embedded, divided into shards.

    Attributes:
        folder: of the shards.
        tower: of the model; ids: n names, in order.
        batch_size: rows per call; edges: where the shards begin in `ids`, and n; all but n are multiples of it.
        key: everything the embeddings depend on besides the inputs, JSON-serialisable.
        stamps: of each shard's inputs; see `clipval.arrays.Source.stamp`.
    """

    folder: Path
    tower: Tower
    ids: Tuple[str, ...]
    batch_size: int
    edges: Tuple[int, ...]
    key: Dict[str, Any]
    stamps: Tuple[str, ...]

    def __len__(self) -> int:
        return len(self.stamps)

    def place(self, number: int) -> Path:
        """The folder of a shard."""
        return self.folder / f"{number:05}-of-{len(self):05}"

    def samples(self, number: int) -> Tuple[str, ...]:
        """The ids of a shard."""
        return self.ids[self.edges[number] : self.edges[number + 1]]

    def number(self, sample: int) -> int:
        """The shard that holds a sample, by its index in `ids`."""
        return bisect_right(self.edges, sample) - 1


class Shard(msgspec.Struct, frozen=True):
    """The manifest of a shard.

    Attributes:
        key, stamp: see `Plan`; ids: its samples; sha256: of its `values.npy`.
        made_by: the backend; where: device and host, as text.
        seconds: of embedding including reading inputs, without opening the backend; threads: CPU threads if known.
    """

    key: Dict[str, Any]
    stamp: str
    ids: Tuple[str, ...]
    sha256: str
    made_by: Dict[str, Any]
    where: str
    seconds: float
    threads: Optional[int]

    def __post_init__(self) -> None:
        """Refuse what no run writes, e.g. a manifest that was edited."""
        if not self.ids or not self.seconds > 0:
            raise ValueError("no ids, or no seconds")
        self.identity  # noqa: B018  raises if a part is missing

    @property
    def identity(self) -> Identity:
        """The backend that made it."""
        return Identity(**self.made_by)


def plan(folder: Path, rows: Source, batch_size: int, count: int, key: Dict[str, Any]) -> Plan:
    """Divide rows into at most `count` shards of whole batches, as equal as possible.

    Raises:
        InputError: there are no rows, or a file of them is missing.
    """
    if not len(rows):
        raise InputError(f"{folder}: nothing to embed; give inputs of at least one sample")
    batches = -(-len(rows) // batch_size)
    count = min(count, batches)
    edges = [min(len(rows), n * batches // count * batch_size) for n in range(count + 1)]
    stamps = tuple(rows.part(start, stop).stamp() for start, stop in zip(edges, edges[1:]))
    return Plan(folder, rows.tower, rows.ids, batch_size, tuple(edges), json.loads(json.dumps(key)), stamps)


def prepare(planned: Plan) -> List[int]:
    """Numbers of the missing shards; incomplete ones of a killed run are removed.

    Raises:
        InputError: the folder holds something else, which would be mixed with them.
    """
    planned.folder.mkdir(parents=True, exist_ok=True)
    for name in os.listdir(planned.folder):
        match, path = SHARD.match(name), planned.folder / name
        if name.endswith(BUILDING):
            shutil.rmtree(path, ignore_errors=True)
        elif match and int(match[2]) != len(planned):
            raise InputError(
                f"{planned.folder}: holds shards of another cut, {name}, this run makes {len(planned)}; give the same "
                f"--shards and inputs, empty it, or give another folder"
            )
        elif name.endswith(".npy"):
            raise InputError(f"{planned.folder}: holds embeddings that are not shards ({name}); give another folder")
    left = [number for number in range(len(planned)) if usable(planned, number) is None]
    for number in left:
        shutil.rmtree(planned.place(number), ignore_errors=True)
    if left:
        with suppress(FileNotFoundError):
            os.unlink(planned.folder / INDEX)
    return left


def usable(planned: Plan, number: int) -> Optional[Shard]:
    """A shard that is complete and from these inputs; None if it is missing, damaged, or its inputs changed.

    Raises:
        InputError: it is from another model, or of other samples.
    """
    place = planned.place(number)
    try:
        shard = _manifest(place)
    except InputError:
        return None
    differ = [name for name in {**planned.key, **shard.key} if planned.key.get(name) != shard.key.get(name)]
    if differ:
        was, now = (json.dumps(one.get(differ[0])) for one in (shard.key, planned.key))
        raise InputError(
            f"{place}: of another run, whose {differ[0]} is {was:.200}, here {now:.200}; empty the folder or give "
            f"another"
        )
    if shard.ids != planned.samples(number):
        raise InputError(f"{place}: of other samples ({shard.ids[0]}, ...); empty the folder or give another")
    same = shard.stamp == planned.stamps[number] and (place / VALUES).is_file()
    return shard if same and store.once(place / VALUES) == shard.sha256 else None


def _manifest(place: Path) -> Shard:
    try:
        return msgspec.json.decode((place / MANIFEST).read_bytes(), type=Shard)
    except (OSError, msgspec.MsgspecError) as error:
        raise InputError(f"{place / MANIFEST}: cannot be read ({one_line(error)}); run embed again") from error


def make(planned: Plan, number: int, backend: Backend, rows: Source, where: str) -> Shard:
    """Embed one shard and publish it by renaming; embeddings are written batch by batch.

    Args:
        backend: open, for the plan's tower; rows: all rows of the plan; where: this device, as text.

    Raises:
        InputError: a row or an embedding breaks the tower's contract.
    """
    start, stop = planned.edges[number], planned.edges[number + 1]
    place, ids = planned.place(number), planned.samples(number)
    scratch = Path(tempfile.mkdtemp(prefix=f"{place.name}.", suffix=BUILDING, dir=str(planned.folder)))
    scratch.chmod(0o755)  # mkdtemp's folders are private; these may be read by others
    try:
        started = time.perf_counter()
        with open(scratch / VALUES, "wb") as stream:
            blocks = embeddings.batches(backend, ids, rows.part(start, stop), planned.batch_size)
            digest = _write(stream, (stop - start, planned.tower.width), blocks)
        seconds = time.perf_counter() - started
        shard = Shard(
            planned.key,
            planned.stamps[number],
            ids,
            digest,
            backend.identity._asdict(),
            where,
            seconds,
            backend.threads,
        )
        (scratch / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(shard), indent=1))
        _publish(planned, number, scratch)
        return shard
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a write that fails does not name its file
            error.filename = str(place)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(stream: BinaryIO, shape: Tuple[int, int], blocks: Iterator[np.ndarray]) -> str:
    """Write an array block by block in `np.save`'s format; returns the file's sha256."""
    npy.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    stream.flush()
    digest = hashlib.sha256(Path(stream.name).read_bytes())
    for block in blocks:
        content = np.ascontiguousarray(block, "<f4").tobytes()
        digest.update(content)
        stream.write(content)
    return digest.hexdigest()


def _publish(planned: Plan, number: int, scratch: Path) -> None:
    """Rename a shard into place; keep one that a process thought dead has published in the meantime."""
    try:
        os.replace(scratch, planned.place(number))
    except OSError:
        if usable(planned, number) is None:
            raise


class Rate(NamedTuple):
    """The work of one device: samples, and seconds of embedding."""

    where: str
    samples: int
    seconds: float

    @property
    def per_second(self) -> float:
        return self.samples / self.seconds


def rates(shards: Sequence[Shard]) -> List[Rate]:
    """Throughput by device, sorted by name."""
    found: Dict[str, Rate] = {}
    for shard in shards:
        _, samples, seconds = found.get(shard.where, Rate(shard.where, 0, 0.0))
        found[shard.where] = Rate(shard.where, samples + len(shard.ids), seconds + shard.seconds)
    return [found[name] for name in sorted(found, key=arrays.natural)]


def complete(planned: Plan) -> List[Shard]:
    """All shards: every id exactly once, and all made by one backend.

    Raises:
        InputError: a shard is missing or damaged, an id is missing, surplus or a duplicate, or shards were made by
            different versions, precisions or kinds of device.
    """
    shards = [usable(planned, number) for number in range(len(planned))]
    missing = [planned.place(number).name for number, shard in enumerate(shards) if shard is None]
    if missing:
        raise InputError(
            f"{planned.folder}: {len(missing)} of {len(planned)} shards missing or damaged ({missing[0]}); run embed "
            f"again, and on several hosts give a folder that all of them share"
        )
    found = [shard for shard in shards if shard is not None]
    _one_maker(planned.folder, found)
    return found


SLOW = 0.9  # of the others' median: equal devices with equal inputs differ by a few percent
TELLING = 1.0  # minimum seconds of work to compare rates: less is start-up


def slow(found: Sequence[Rate]) -> List[str]:
    """Messages on devices that are slower than the others."""
    said = []
    for one in found:
        others = [other.per_second for other in found if other is not one and other.seconds >= TELLING]
        others = others if one.seconds >= TELLING else []
        share = one.per_second / float(np.median(others)) if others else 1.0
        if share < SLOW:
            said.append(f"{one.where} is slow: {one.per_second:.1f} samples/s, {share:.2f} of the others' median")
    return said


def publish_index(planned: Plan, shards: Sequence[Shard], more: Mapping[str, object]) -> None:
    """Record in `shards.json` that the shards are complete.

    Args:
        more: further content, JSON-serialisable.
    """
    about = {
        "shards": len(planned),
        "samples": len(planned.ids),
        "width": planned.tower.width,
        "key": planned.key,
        "made_by": shards[0].made_by,
        "throughput": [{**one._asdict(), "samples_per_second": one.per_second} for one in rates(shards)],
    }
    store.write(planned.folder / INDEX, json.dumps({**about, **more}, indent=1).encode())


def _one_maker(folder: Path, shards: Sequence[Shard]) -> None:
    first = shards[0].identity
    for shard in shards:
        one = shard.identity
        if one._replace(device="") != first._replace(device="") or _chip(one) != _chip(first):
            raise InputError(f"{folder}: shards from two backends, {first} and {one}; empty it and embed all with one")


def _chip(made_by: Identity) -> str:
    """`Ascend910B4` of `Ascend910B4:1`."""
    return made_by.device.rpartition(":")[0] or made_by.device


def here(folder: Path) -> bool:
    """Whether the folder holds shards, complete or not."""
    with suppress(OSError):
        return any(name == INDEX or SHARD.match(name) for name in os.listdir(folder))
    return False


def read(folder: Path, width: Optional[int] = None) -> Made:
    """Embeddings of a folder of shards, read in blocks into one array, with the backend's identity.

    Args:
        width: elements of an embedding; None for any.

    Raises:
        InputError: shards are missing, damaged, incomplete or of another width, or an id is a duplicate.
    """
    index = folder / INDEX
    try:
        about = json.loads(index.read_bytes())
        count, samples, found = (int(about[name]) for name in ("shards", "samples", "width"))
    except FileNotFoundError as error:
        raise InputError(f"embeddings {folder}: shards without {INDEX}, not complete yet; run embed again") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index}: cannot be read ({one_line(error)}); run embed again") from error
    if width not in (None, found):
        raise InputError(f"embeddings {folder}: {found} wide, expected {width}")
    values, shards, start = np.empty((samples, found), np.float32), [], 0
    for number in range(count):
        place = folder / f"{number:05}-of-{count:05}"
        shard = _manifest(place)
        stop = start + len(shard.ids)
        _read(place, shard, values[start:stop])
        shards.append(shard)
        start = stop
    ids = tuple(name for shard in shards for name in shard.ids)
    if len(ids) != samples or len(set(ids)) != samples:
        raise InputError(f"embeddings {folder}: {len(set(ids))} different ids for {samples} samples; run embed again")
    _one_maker(folder, shards)
    return Made(shards[0].identity, Embeddings(ids, values))


def _read(place: Path, shard: Shard, into: np.ndarray) -> None:
    """Fill rows of an array with a shard's, checking them against its manifest."""
    file, digest = place / VALUES, hashlib.sha256()
    room = into.reshape(-1).view(np.uint8)
    try:
        with open(file, "rb") as stream:
            npy.read_magic(stream)
            shape, _, dtype = npy.read_array_header_1_0(stream)
            head = stream.tell()
            stream.seek(0)
            digest.update(stream.read(head))
            whole = shape == into.shape and dtype == np.dtype("<f4")
            for start in range(0, len(room) if whole else 0, BLOCK):
                block = room[start : start + BLOCK]
                block[:] = np.frombuffer(stream.read(len(block)), np.uint8)
                digest.update(block.tobytes())
            digest.update(stream.read(1))  # nothing may follow
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({one_line(error)}); run embed again") from error
    if digest.hexdigest() != shard.sha256:
        raise InputError(f"{file}: differs from its manifest, damaged; run embed again")


def read_any(folder: Path, width: Optional[int] = None) -> Embeddings:
    """Embeddings of a folder of shards, or of one of `<id>_0.npy` files; see `read` and `clipval.embeddings.read`."""
    return read(folder, width).embeddings if here(folder) else embeddings.read(folder, width)
