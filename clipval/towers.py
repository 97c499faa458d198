"""The contract of the two towers: node names, dtypes and shapes, spelled here and nowhere else.

Source: the OpenCLIP recipe of Ascend ModelZoo-PyTorch (table of inputs and outputs).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Dict, Tuple


@dataclass(frozen=True)
class Tower:
    """One encoder as every backend sees it.

    Attributes:
        name: `vision` or `text`; part of artifact file names.
        input_name: name of the only input node.
        dtype: numpy name of the input's dtype.
        row_shape: shape of one sample, without the batch axis.
        output_name: name of the only output node, float32 [batch, width].
        width: elements of one embedding.
        layout: `--input_format` of atc for this input.
        prepared: folder of the input rows inside `prep_data`.
    """

    name: str
    input_name: str
    dtype: str
    row_shape: Tuple[int, ...]
    output_name: str
    width: int
    layout: str
    prepared: str

    def shape(self, batch_size: int) -> Tuple[int, ...]:
        """Shape of a batch of inputs."""
        return (batch_size, *self.row_shape)


VISION = Tower("vision", "image", "float32", (3, 224, 224), "image_embed", 512, "NCHW", "images")
TEXT = Tower("text", "text", "int64", (77,), "text_embed", 512, "ND", "texts")
TOWER_NAMES = (VISION.name, TEXT.name)


def towers(image_size: int = 224, context_length: int = 77, width: int = 512) -> Dict[str, Tower]:
    """Both towers by name, for a model of other sizes than the recipe's ViT-B-32.

    Args:
        image_size: pixels of the square input image's side.
        context_length: tokens of one caption.
        width: elements of one embedding.
    """
    return {
        VISION.name: replace(VISION, row_shape=(3, image_size, image_size), width=width),
        TEXT.name: replace(TEXT, row_shape=(context_length,), width=width),
    }
