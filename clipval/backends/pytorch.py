"""The reference backend: the open_clip model itself, fp32 on the CPU or a GPU. The only backend that imports torch."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from clipval.backends import Backend, Identity, Kind, Materials, Opening, Product
from clipval.errors import BackendUnavailable
from clipval.towers import Tower

if TYPE_CHECKING:
    import torch


class PytorchBackend(Backend):
    """See `clipval.backends.Backend`.

    Args:
        tower: the tower's contract.
        encoder: a torch module on the CPU, inputs to unit-length embeddings; see `clipval.model.encoder`.
        threads: intra-op threads; None means torch's default.
        load_seconds: time to load the encoder's model.
        device: `cpu`, or `cuda:N` for a copy of the encoder there.

    Raises:
        BackendUnavailable: torch has no such device.
    """

    def __init__(
        self,
        tower: Tower,
        encoder: torch.nn.Module,
        threads: Optional[int] = None,
        *,
        load_seconds: float = 0.0,
        device: str = "cpu",
    ) -> None:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self.tower = tower
        self.load_seconds = load_seconds
        version = f"torch {torch.__version__}"
        if device == "cpu":
            self.threads = torch.get_num_threads()
        else:
            chip = _only_fp32(torch, device)
            version += f", CUDA {torch.version.cuda}, {chip}"
            encoder = copy.deepcopy(encoder).to(device)  # the model itself is exported on the CPU
        self.identity = Identity("pytorch", version, device, "fp32")
        self._torch = torch
        self._device = device
        self._encoder: Any = encoder

    def run(self, rows: np.ndarray) -> np.ndarray:
        with self._torch.inference_mode():
            # .cpu() waits for the device
            embedding: np.ndarray = self._encoder(self._torch.from_numpy(rows).to(self._device)).cpu().numpy()
        return embedding

    def product(self, side: int) -> Optional[Product]:
        square, into = (self._torch.ones(side, side, device=self._device) for _ in range(2))

        def call() -> None:
            self._torch.mm(square, square, out=into)
            into[:1, :1].cpu()

        on_cpu = self._device == "cpu"
        return Product(2.0 * side**3, (lambda: self._torch.mm(square, square, out=into)) if on_cpu else call)

    def close(self) -> None:
        self._encoder = None


def _only_fp32(torch: Any, device: str) -> str:
    """Switch off all that computes fp32 in less than fp32 on a GPU; the GPU's name.

    Source: torch's notes on CUDA semantics: TF32 in matrix products (off by default since 1.12) and in cuDNN's
    convolutions (on by default). Fused attention kernels of fp32 may use TF32 too, so attention is the plain one.

    Raises:
        BackendUnavailable: this torch has no CUDA, or the machine has no such GPU.
    """
    if torch.version.cuda is None:
        raise BackendUnavailable(
            f"--reference-device cuda: torch {torch.__version__} is a build without CUDA; install one with it, or "
            f"leave the option out for the CPU"
        )
    number = torch.device(device).index or 0
    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise BackendUnavailable(
            f"--reference-device cuda: torch {torch.__version__} (CUDA {torch.version.cuda}) sees {count} GPUs, asked "
            f"for number {number}; see nvidia-smi and CUDA_VISIBLE_DEVICES, or leave the option out for the CPU"
        )
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    return str(torch.cuda.get_device_name(number))


def _open(made: Materials, asked: Opening) -> Backend:
    encoder, chosen = made.encoder(asked.tower), made.settings
    device = "cpu" if chosen.reference_device == "cpu" else f"{chosen.reference_device}:{asked.device}"
    return PytorchBackend(asked.tower, encoder.module, chosen.threads, load_seconds=encoder.load_seconds, device=device)


KIND = Kind(_open, accelerator=lambda asked: "" if asked.reference_device == "cpu" else "GPU")
