"""What a data set is once it is read: images, captions, and which caption is of which image."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Tuple

import numpy as np

from clipval.store import sha256


@dataclass(frozen=True)
class RetrievalDataset:
    """Images and their captions, paired by id.

    Attributes:
        folder: where it was read from.
        image_ids: n ids, the file names without ending; image_paths: n files.
        captions: m texts; caption_ids: `<image id>_<k>`, k counting an image's captions in annotation order.
        image_of_caption: int64 [m], index of each caption's image. Every image has a caption.
    """

    folder: Path
    image_ids: Tuple[str, ...]
    image_paths: Tuple[Path, ...]
    captions: Tuple[str, ...]
    caption_ids: Tuple[str, ...]
    image_of_caption: np.ndarray

    def fingerprint(self) -> str:
        """sha256 over ids, captions and the bytes of every image."""
        digest = hashlib.sha256()
        for text in (*self.image_ids, *self.caption_ids, *self.captions):
            encoded = text.encode("utf-8")
            digest.update(b"%d:" % len(encoded) + encoded)
        with ThreadPoolExecutor(4) as pool:
            for one in pool.map(sha256, self.image_paths):
                digest.update(one.encode())
        return digest.hexdigest()
