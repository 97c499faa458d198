"""What a data set is once it is read: images, captions, and which caption is of which image."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Tuple

import numpy as np

from clipval.errors import InputError
from clipval.store import sha256


@dataclass(frozen=True)
class RetrievalDataset:
    """Images and their captions, paired by id.

    Attributes:
        folder: where it was read from.
        image_ids: n ids, the file names without ending; image_paths: n files.
        captions: m texts; caption_ids: `<image id>_<k>`, k counting an image's captions in annotation order.
        image_of_caption: int64 [m], index of each caption's image. Every image has a caption.

    Raises:
        InputError: it is empty, or ids, captions and images do not fit together.
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
            return f"{images} images and {captions} captions, expected some of both"
        if len(self.image_paths) != images or len(self.caption_ids) != captions or owner.shape != (captions,):
            return f"{images} images and {captions} captions, but not one path, id and image for each"
        if len(set(self.image_ids)) != images or len(set(self.caption_ids)) != captions:
            return "an id is there twice"
        if owner.dtype != np.int64 or sorted(set(owner.tolist())) != list(range(images)):
            return "an image has no caption, or a caption no image"
        for name, index in zip(self.caption_ids, owner.tolist()):
            if name.rpartition("_")[0] != self.image_ids[index]:
                return f"caption {name} is paired with image {self.image_ids[index]}"
        return ""

    def fingerprint(self) -> str:
        """sha256 over ids, captions and the bytes of every image.

        Raises:
            InputError: an image can no longer be read.
        """
        digest = hashlib.sha256()
        for text in (*self.image_ids, *self.caption_ids, *self.captions):
            encoded = text.encode("utf-8")
            digest.update(b"%d:" % len(encoded) + encoded)
        try:
            with ThreadPoolExecutor(4) as pool:
                for one in pool.map(sha256, self.image_paths):
                    digest.update(one.encode())
        except OSError as error:
            raise InputError(
                f"image {error.filename}: cannot be read ({error.strerror or error}); replace it"
            ) from error
        return digest.hexdigest()
