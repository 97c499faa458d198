"""A folder of images with one annotation file: find that file, locate its images, group its captions.

Common to all kinds of data sets; each kind's module reads its annotation file.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Callable, Dict, FrozenSet, Iterable, Iterator, List, NamedTuple, Tuple, Type, TypeVar

import msgspec
import numpy as np

from clipval.datasets import RetrievalDataset
from clipval.errors import InputError, UsageError, lfs_pointer, one_line

Parsed = TypeVar("Parsed")
ENDINGS = (".txt", ".csv", ".tsv", ".token", ".json")
CSV = "write one CSV with the columns image,caption"
# Of other layouts, with what to do about them, to be named where nothing is found.
OTHERS = {
    ".tar": f"a shard of webdataset, as of img2dataset: unpack all shards, and {CSV}",
    ".parquet": f"a table of Parquet, as of Hugging Face's datasets: write its images to files, and {CSV}",
    ".arrow": f"a table of Arrow, as of Hugging Face's datasets: write its images to files, and {CSV}",
    ".jsonl": f"JSON lines: {CSV}",
    ".xlsx": "a spreadsheet: save it as CSV with the columns image,caption",
    ".zip": "a zip archive: unpack it",
    ".gz": "a gzip file: unpack it",
}
COCOS = "annotations"  # sub-folder of COCO's own archive
ARCHIVES = ((b"PK\x03\x04", "a zip archive"), (b"\x1f\x8b", "a gzip file"), (b"7z\xbc\xaf", "a 7z archive"))
UTF16 = (b"\xff\xfe", b"\xfe\xff")
SHOWN = 3  # names in a message
ENOUGH = 1 << 16  # bytes of either end of a file that identify its kind


class Row(NamedTuple):
    """One annotation: its place in the file (`line 3`), the image's name as written, and the caption."""

    where: str
    image: str
    caption: str


def gather(folder: Path, annotations: Path, rows: Iterable[Row]) -> RetrievalDataset:
    """The data set of these rows. Rows of one image need not be adjacent, and it may have any number of captions.

    A caption may occur more than once, for one image or two (as in Flickr30k): each row is a caption with its own id.

    Args:
        folder: images may be in sub-folders, including linked ones; images without a caption are not part of the set.

    Raises:
        InputError: something is missing or wrong, with file and place.
    """
    kept = list(rows)
    if not kept:
        raise InputError(f"annotations {annotations}: no captions in it")
    paths = _place(folder, annotations, kept)
    grouped: Dict[str, List[str]] = {}
    for row in kept:
        grouped.setdefault(paths[row.image].stem, []).append(row.caption)
    by_id = {path.stem: path for path in paths.values()}
    ids = tuple(grouped)
    return RetrievalDataset(
        folder=folder,
        image_ids=ids,
        image_paths=tuple(by_id[name] for name in ids),
        captions=tuple(caption for name in ids for caption in grouped[name]),
        caption_ids=tuple(f"{name}_{k}" for name in ids for k in range(len(grouped[name]))),
        image_of_caption=np.repeat(np.arange(len(ids), dtype=np.int64), [len(grouped[name]) for name in ids]),
    )


def annotation_files(folder: Path, endings: Tuple[str, ...] = ENDINGS) -> List[Path]:
    """Files of a folder that may be annotations, by suffix; those of `annotations/` if it has none, as COCO's own.

    Raises:
        InputError: there is no such folder, or it cannot be listed.
    """
    if not os.path.isdir(folder):  # Path.is_dir raises if the name is too long
        raise InputError(f"data {folder}: no such folder; expected images and one annotation file")
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"data {folder}: cannot be listed ({error.strerror}); check its permissions") from error
    # Skip hidden files: macOS leaves a "._x" next to each x that it copies.
    found = [folder / name for name in names if name.lower().endswith(endings) and name[0] != "."]
    if not found and COCOS in names and (folder / COCOS).is_dir():
        return annotation_files(folder / COCOS, endings)
    return found


def recognised(folder: Path, recognises: Callable[[str], bool]) -> List[Path]:
    """Annotation files that `recognises` accepts, given both ends of the file as text."""
    return [path for path in annotation_files(folder) if recognises(_ends(path))]


def reader(
    find: Callable[[Path], List[Path]], holds: str, rows: Callable[[Path, Path], Iterable[Row]]
) -> Callable[[Path, str], RetrievalDataset]:
    """How to read a kind other than the recipe's: the `read` of its `clipval.datasets.Kind`.

    Args:
        find: annotation files of the kind in a folder; holds: see `Kind`.
        rows: the folder and its annotation file -> each caption with its image, in order.
    """

    def read(folder: Path, captions_format: str) -> RetrievalDataset:
        """Read the folder's annotation file.

        Raises:
            UsageError: a captions_format for the recipe's file.
            InputError: something is missing or wrong, with file and place.
        """
        if captions_format != "csv":
            raise UsageError(f"data {folder}: --captions-format {captions_format} is for *_karpathy.txt; leave it out")
        file = one_of(folder, find(folder), holds)
        return gather(folder, file, rows(folder, file))

    return read


def one_of(folder: Path, files: List[Path], holds: str) -> Path:
    """The only file, or the only one with the recipe's name.

    Raises:
        InputError: there is none, or there are several.
    """
    named = [path for path in files if path.stem.endswith("_karpathy")]
    for found in (named, files):
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"data {folder}: several annotation files ({_few(found)}); {_which(folder, found)}")
    raise InputError(f"data {folder}: no annotation file; expected images and {holds}{_unknown(folder)}")


def _few(files: List[Path]) -> str:
    names = ", ".join(path.name for path in files[:SHOWN])
    return f"{names} and {len(files) - SHOWN} more" if len(files) > SHOWN else names


def _which(folder: Path, files: List[Path]) -> str:
    pictures = {path.stem for path in _walk(folder) if not path.name.lower().endswith((*ENDINGS, *OTHERS))}
    if all(path.stem in pictures for path in files):
        return "each is of one image, as of img2dataset; gather them in one CSV with the columns image,caption"
    return "keep one"


def _unknown(folder: Path) -> str:
    """What else the folder or one below it holds that may be annotations, for a message."""
    other = next((path for path in _walk(folder) if path.name.lower().endswith(tuple(OTHERS))), None)
    if other is not None:
        what = OTHERS[other.suffix.lower()]
        return f"; {os.path.relpath(str(other), str(folder))} is {what}"
    texts = annotation_files(folder)
    return f"; {_few(texts)} {'is' if len(texts) == 1 else 'are'} of no known layout" if texts else ""


def _ends(path: Path) -> str:
    try:
        with open(path, "rb") as stream:
            data = stream.read(ENOUGH)
            size = os.fstat(stream.fileno()).st_size
            if size > ENOUGH:
                stream.seek(max(ENOUGH, size - ENOUGH))
                data += stream.read(ENOUGH)
    except OSError:
        return ""  # reading the whole file will report why
    return data.decode("utf-16" if data.startswith(UTF16) else "utf-8-sig", errors="replace")


def text_of(file: Path) -> str:
    """An annotation file's text.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        packed = next((what for start, what in ARCHIVES if data.startswith(start)), "")
        if packed:
            raise InputError(f"annotations {file}: {packed}; unpack it") from error
        line = error.object[: error.start].count(b"\n") + 1
        found = "not UTF-8 but UTF-16" if data.startswith(UTF16) else "not UTF-8"
        raise InputError(f"annotations {file}, line {line}: {found}; save the file as UTF-8") from error
    except OSError as error:
        raise InputError(f"annotations {file}: cannot be read ({error.strerror})") from error
    if lfs_pointer(file):
        raise InputError(f"annotations {file}: {lfs_pointer(file)}")
    if "\0" in text:
        raise InputError(f"annotations {file}: holds NUL bytes, so it is not a text file")
    return text


def parsed_json(file: Path, kind: Type[Parsed]) -> Parsed:
    """A JSON annotation file as a msgspec struct.

    Raises:
        InputError: it cannot be read, or a field is missing or of another type.
    """
    try:
        return msgspec.json.decode(text_of(file).encode("utf-8"), type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"annotations {file}: not the expected JSON ({one_line(error)})") from error


def _place(folder: Path, annotations: Path, rows: List[Row]) -> Dict[str, Path]:
    """The file of each image by its name in the rows; no two files may have the same id."""
    files: Dict[str, List[Path]] = {}
    for path in _walk(folder):
        files.setdefault(path.name, []).append(path)
    placed: Dict[str, Path] = {}
    owners: Dict[str, Path] = {}
    for row in rows:
        if row.image in placed:
            continue
        path = placed[row.image] = _resolve(folder, files, annotations, row)
        known = owners.setdefault(path.stem, path)
        if known != path:
            where = f"annotations {annotations}, {row.where}"
            raise InputError(f"{where}: {path} and {known} have the same id, {path.stem!r}; rename one and its rows")
    return placed


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below the folder, including linked folders: one walk instead of one look-up per caption."""
    waiting: List[Tuple[str, FrozenSet[str]]] = [(str(folder), frozenset())]
    while waiting:
        parent, above = waiting.pop()
        real = os.path.realpath(parent)
        if real in above:  # a link to a parent
            continue
        try:
            entries = list(os.scandir(parent))
        except OSError:  # e.g. lost+found; an image in there is reported as missing
            continue
        for entry in entries:
            try:
                if entry.is_dir():
                    waiting.append((entry.path, above | {real}))
                elif entry.is_file():
                    yield Path(entry.path)
            except OSError:  # a link to itself
                continue


def _resolve(folder: Path, files: Dict[str, List[Path]], annotations: Path, row: Row) -> Path:
    where = f"annotations {annotations}, {row.where}"
    written = Path(row.image.replace("\\", "/"))
    if written.is_absolute() and folder.absolute() in written.parents:
        written = written.relative_to(folder.absolute())
    if not written.parts or ".." in written.parts or written.is_absolute():
        raise InputError(
            f"{where}: image {row.image[:80]!r} is not below the data folder; give its path relative to that"
        )
    found = files.get(written.name, [])
    if folder / written in found:
        return folder / written
    if len(written.parts) == 1 and len(found) == 1:
        return found[0]
    if len(written.parts) == 1 and found:
        one, other = sorted(found)[:2]
        raise InputError(
            f"{where}: image {row.image[:80]!r} is in several folders: {one} and {other}; give its relative path"
        )
    raise InputError(f"{where}: image {row.image[:80]!r} is not in {folder}; {_near(folder, written, files)}")


def _near(folder: Path, written: Path, files: Dict[str, List[Path]]) -> str:
    """What to do about a missing image; shows one that differs only in case, suffix, folder or Unicode form."""
    link = str(folder / written)
    if os.path.islink(link):  # Path.is_symlink raises if the name is too long
        return f"it is a link to {os.readlink(link)}, which does not exist; copy the folder with cp -rL"
    if written.name in files:
        there = os.path.relpath(str(files[written.name][0]), str(folder))
        return f"{there!r} is there, which differs in its folder: change its rows, or leave the folder out"

    def form(name: str) -> str:
        return unicodedata.normalize("NFC", name)

    keys: Dict[str, Callable[[str], str]] = {
        "in its Unicode form": form,
        "in case": lambda name: form(name).casefold(),
        "in its suffix": lambda name: form(os.path.splitext(name)[0]).casefold(),
    }
    for differs, key in keys.items():
        near = sorted(name for name in files if key(name) == key(written.name))
        if near:
            return f"{near[0]!r} is there, which differs {differs}: rename it, or change its rows"
    return "copy it there or remove its rows"
