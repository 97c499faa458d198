"""The reference backend: the open_clip model itself, fp32 on the CPU. The only backend that imports torch."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np

from clipval.backends import Backend, Identity, Kind, Materials, Opening, Product
from clipval.towers import Tower


class PytorchBackend(Backend):
    """See `clipval.backends.Backend`.

    Args:
        tower: the tower's contract.
        encoder: a torch module, inputs to unit-length embeddings; see `clipval.model.encoder`.
        threads: intra-op threads; None means torch's default.
        load_seconds: time to load the encoder's model.
    """

    def __init__(self, tower: Tower, encoder: Any, threads: Optional[int] = None, *, load_seconds: float = 0.0) -> None:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self.tower = tower
        self.load_seconds = load_seconds
        self.threads = torch.get_num_threads()
        self.identity = Identity("pytorch", f"torch {torch.__version__}", "cpu", "fp32")
        self._torch = torch
        self._encoder = encoder

    def run(self, rows: np.ndarray) -> np.ndarray:
        with self._torch.inference_mode():
            embedding: np.ndarray = self._encoder(self._torch.from_numpy(rows)).numpy()
        return embedding

    def product(self, side: int) -> Optional[Product]:
        square, into = (self._torch.ones(side, side) for _ in range(2))
        return Product(2.0 * side**3, lambda: self._torch.mm(square, square, out=into))

    def close(self) -> None:
        self._encoder = None


def _open(made: Materials, asked: Opening) -> Backend:
    encoder = made.encoder(asked.tower)
    return PytorchBackend(asked.tower, encoder.module, made.settings.threads, load_seconds=encoder.load_seconds)


KIND = Kind(_open)
