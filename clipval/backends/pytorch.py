"""The reference backend: the open_clip model itself, fp32 on the CPU. The only backend that imports torch."""

from __future__ import annotations

from typing import Any, List, Optional

import numpy as np

from clipval.backends import Identity
from clipval.towers import Tower


class PytorchBackend:
    """See `clipval.backends.Backend`.

    Args:
        tower: the tower's contract.
        encoder: a torch module, inputs to unit-length embeddings; see `clipval.model.encoder`.
        threads: intra-op threads; None leaves torch's own choice.
        load_seconds: what loading the model of the encoder took.
    """

    batch_size: Optional[int] = None

    def __init__(self, tower: Tower, encoder: Any, threads: Optional[int] = None, *, load_seconds: float = 0.0) -> None:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self.tower = tower
        self.load_seconds = load_seconds
        self.threads: Optional[int] = torch.get_num_threads()
        self.identity = Identity("pytorch", f"torch {torch.__version__}", "cpu", "fp32")
        self._torch = torch
        self._encoder = encoder

    def run(self, rows: np.ndarray) -> np.ndarray:
        with self._torch.inference_mode():
            embedding: np.ndarray = self._encoder(self._torch.from_numpy(rows)).numpy()
        return embedding

    def execute_seconds(self) -> Optional[List[float]]:
        return None

    def close(self) -> None:
        self._encoder = None
