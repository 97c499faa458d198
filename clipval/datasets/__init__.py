"""The data set in memory, and the registry of kinds of data sets.

A kind is one file and one line of `MODULES`; the file holds a `KIND`, which defines how to find and read its folders.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from clipval.environment import version
from clipval.errors import InputError, UsageError
from clipval.store import Store, code_hash, once

# By name; `data.kind` of a spec and `--data-format` take these.
MODULES: Dict[str, str] = {
    "karpathy": "clipval.datasets.karpathy",
    "karpathy_json": "clipval.datasets.karpathy_json",
    "karpathy_csv": "clipval.datasets.karpathy_csv",
    "coco": "clipval.datasets.coco",
    "blip": "clipval.datasets.blip",
    "kaggle": "clipval.datasets.kaggle",
    "shapes": "clipval.datasets.shapes",
}
DRAWN = "shapes"  # used with random weights if no data was given


@dataclass(frozen=True)
class RetrievalDataset:
    """Images and their captions, paired by id.

    Attributes:
        folder: where it was read from.
        image_ids: n ids, the file names without suffix; image_paths: n files.
        captions: m texts; caption_ids: `<image id>_<k>`, k counting an image's captions in annotation order.
        image_of_caption: int64 [m], index of each caption's image. Every image has a caption.

    Raises:
        InputError: it is empty, or ids, captions and images are inconsistent.
    """

    folder: Path
    image_ids: Tuple[str, ...]
    image_paths: Tuple[Path, ...]
    captions: Tuple[str, ...]
    caption_ids: Tuple[str, ...]
    image_of_caption: np.ndarray

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise InputError(f"data {self.folder}: {problem}; check its annotation file")

    def _problem(self) -> str:
        images, captions, owner = len(self.image_ids), len(self.captions), self.image_of_caption
        if not images or not captions:
            return f"{images} images and {captions} captions, expected at least one of each"
        if len(self.image_paths) != images or len(self.caption_ids) != captions or owner.shape != (captions,):
            return f"{images} images and {captions} captions, but some lack a path, an id or an image"
        if len(set(self.image_ids)) != images or len(set(self.caption_ids)) != captions:
            return "an id is a duplicate"
        if owner.dtype != np.int64 or sorted(set(owner.tolist())) != list(range(images)):
            return "an image has no caption, or a caption no image"
        for name, index in zip(self.caption_ids, owner.tolist()):
            if name.rpartition("_")[0] != self.image_ids[index]:
                return f"caption {name} is paired with image {self.image_ids[index]}"
        return ""

    def image_path(self, image_id: str) -> Optional[Path]:
        """File of an image; None for an unknown id."""
        return dict(zip(self.image_ids, self.image_paths)).get(image_id)

    def caption(self, caption_id: str) -> Optional[str]:
        """Text of a caption; None for an unknown id."""
        return dict(zip(self.caption_ids, self.captions)).get(caption_id)

    def captions_sha256(self) -> str:
        """sha256 over the captions in order: the id of each one's image, a tab, the caption, a newline."""
        owners = (self.image_ids[index] for index in self.image_of_caption.tolist())
        lines = (f"{owner}\t{caption}\n" for owner, caption in zip(owners, self.captions))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def fingerprint(self) -> str:
        """sha256 over ids, captions and the bytes of every image, which are read once.

        Raises:
            InputError: an image can no longer be read.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for text in (*self.image_ids, *self.caption_ids, *self.captions):
            encoded = text.encode("utf-8")
            digest.update(b"%d:" % len(encoded) + encoded)
        try:
            with ThreadPoolExecutor(4) as pool:
                for one in pool.map(once, self.image_paths):
                    digest.update(one.encode())
        except OSError as error:
            raise InputError(
                f"image {error.filename}: cannot be read ({error.strerror or error}); replace it"
            ) from error
        return digest.hexdigest()


class Kind(NamedTuple):
    """A kind of data set.

    Attributes:
        name: its key in `MODULES`.
        holds: what such a folder holds, for messages.
        find: annotation files of this kind in a folder, recognised by content, not by name; empty for none.
        read: folder and captions format (`csv` or `clip_benchmark`) -> data set.
        draw: writes the first n images into a folder, if the kind is drawn; else None.
        off: deviation of each picture from what it must show, [n] as a share of what is allowed; None if unknown.
    """

    name: str
    holds: str
    find: Callable[[Path], List[Path]]
    read: Callable[[Path, str], RetrievalDataset]
    draw: Optional[Callable[[Path, int], None]] = None
    off: Optional[Callable[[RetrievalDataset], np.ndarray]] = None


def names() -> List[str]:
    """Every kind, in order."""
    return list(MODULES)


def kind(name: str) -> Kind:
    """One kind.

    Raises:
        UsageError: there is no such kind.
    """
    if name not in MODULES:
        raise UsageError(f"data format {name!r}: unknown; expected one of {', '.join(MODULES)}")
    found: Kind = import_module(MODULES[name]).KIND
    return found


def draws(name: str) -> bool:
    """Whether the kind is drawn instead of given by the user."""
    return kind(name).draw is not None


def drawn(name: str, images: int, kept: Store) -> Path:
    """The folder of a drawn data set, created once: of this kind, or of the one that replaces missing data.

    Args:
        images: how many.
    """
    name = name if draws(name) else DRAWN
    draw = kind(name).draw
    assert draw is not None
    key = {"code": code_hash(MODULES[name]), "kind": name, "images": images, "pillow": version("pillow")}
    return kept.get("dataset", key, lambda folder: draw(folder, images))


def read(
    folder: Path, *, expected: str = "karpathy", named: Optional[str] = None, captions_format: str = "csv"
) -> RetrievalDataset:
    """Read a folder, as the named kind, or as the kind that it holds.

    Args:
        expected: the spec's kind, used if the folder holds it or nothing is recognised.
        named: the user's choice, used whatever the folder holds.

    Raises:
        UsageError: there is no such kind or captions_format.
        InputError: the folder holds several other kinds, or something is missing or wrong, with file and place.
    """
    if named is None and not kind(expected).find(folder):
        others = {name: found for name in MODULES if name != expected and (found := kind(name).find(folder))}
        if len(others) > 1:
            listed = ", ".join(f"{found[0].name} ({name})" for name, found in others.items())
            raise InputError(f"data {folder}: annotations of several kinds: {listed}; name one with --data-format")
        expected = next(iter(others), expected)
    return kind(named or expected).read(folder, captions_format)


def expect(dataset: RetrievalDataset, *, images: int, captions: int) -> None:
    """Check a data set against the spec's counts; 0 allows any.

    Raises:
        InputError: the counts differ: another split, or an incomplete copy.
    """
    for what, found, wanted in (("images", dataset.image_ids, images), ("captions", dataset.captions, captions)):
        if wanted and len(found) != wanted:
            raise InputError(
                f"data {dataset.folder}: {len(found)} {what}, the spec says {wanted}; "
                f"it may be another split or an incomplete copy"
            )
