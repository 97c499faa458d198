"""PyTorch on a GPU as the reference. None is at hand: the CPU plays one, or the answers of torch are faked."""

import copy

import numpy as np
import pytest

from clipval import backends, chain, options, reference
from clipval.backends import pytorch
from clipval.embeddings import Embeddings
from clipval.errors import BackendUnavailable
from clipval.spec import FOLDER
from clipval.towers import TEXT, VISION
from tests import small


@pytest.fixture
def torch():
    """Imported late: collecting tests must not import it."""
    import torch

    return torch


def test_a_torch_without_cuda_is_said_in_one_line(monkeypatch, torch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        BackendUnavailable, match="--reference-device cuda: torch .* is a build without CUDA; install one"
    ):
        pytorch.PytorchBackend(TEXT, torch.nn.Identity(), device="cuda:0")


@pytest.mark.parametrize(("seen", "asked"), [(0, 0), (2, 2)])
def test_a_missing_gpu_is_said_in_one_line(monkeypatch, torch, seen, asked):
    play_gpus(monkeypatch, torch, seen)
    words = rf"\(CUDA 12.6\) sees {seen} GPUs, asked for number {asked}; see nvidia-smi and CUDA_VISIBLE_DEVICES"
    with pytest.raises(BackendUnavailable, match=words):
        pytorch.PytorchBackend(TEXT, torch.nn.Identity(), device=f"cuda:{asked}")


def play_gpus(monkeypatch, torch, count):
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"Played {number}")


@pytest.fixture
def switches(torch):
    """torch's switches of reduced precision, all on; put back afterwards."""
    cuda = torch.backends.cuda
    before = cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    fused = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()
    cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    yield
    cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    cuda.enable_flash_sdp(fused[0])
    cuda.enable_mem_efficient_sdp(fused[1])


def test_nothing_computes_in_less_than_fp32(monkeypatch, torch, switches):
    play_gpus(monkeypatch, torch, 2)
    assert pytorch._only_fp32(torch, "cuda:1") == "Played 1"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.flash_sdp_enabled()
    assert not torch.backends.cuda.mem_efficient_sdp_enabled()


class PlayedGpu(pytorch.PytorchBackend):
    """The processor under the name of a GPU: torch has it as cpu:0 too."""

    def __init__(self, *arguments, device="cpu", **rest):
        played = device.replace("cuda", "cpu")
        super().__init__(*arguments, device=played, **rest)
        self.identity = self.identity._replace(device=device)


def test_the_device_has_a_copy_of_its_own(monkeypatch, torch):
    monkeypatch.setattr(pytorch, "_only_fp32", lambda *_: "Played 0")
    encoder = torch.nn.Linear(77, 512)
    backend = PlayedGpu(TEXT, encoder, device="cuda:0")
    rows = np.ones((2, 77), np.float32)
    wanted = encoder(torch.from_numpy(rows)).detach().numpy()
    with torch.no_grad():
        encoder.weight.zero_()  # as an export that moves or changes the model
    assert np.allclose(backend.run(rows), wanted, atol=1e-6)
    assert str(backend.identity).startswith("pytorch torch ")
    assert "Played 0 on cuda:0, fp32" in str(backend.identity)
    assert backend.threads is None
    assert not backend.identity.on_host
    backend.product(8).call()


@pytest.fixture
def on_gpu(tmp_path, monkeypatch):
    """A chain whose reference is on the played GPU, and the embeddings of which the GPU makes something."""
    monkeypatch.setattr(pytorch, "_only_fp32", lambda *_: "Played 0")
    monkeypatch.setattr(pytorch, "PytorchBackend", PlayedGpu)
    spec = str(small.write_spec(tmp_path))
    found = chain.Chain(options.Settings(spec=spec, workdir=tmp_path / "work", reference_device="cuda", threads=1))
    yield found
    found.close()


def test_the_reference_of_a_gpu_is_held_to_the_cpu(on_gpu, monkeypatch):
    compared = []
    real = reference.hold
    monkeypatch.setattr(reference, "hold", lambda *given: (compared.append(given), real(*given)))
    made = on_gpu.embeddings(backends.REFERENCE, TEXT)
    assert made.identity.device == "cuda:0"
    ((tower, gpu, cpu, _, seed),) = compared
    assert (tower, len(gpu.ids), seed) == (TEXT, reference.DRAWN, on_gpu.probe_seed)
    assert gpu.ids == cpu.ids
    on_cpu = chain.Chain(options.Settings(spec=on_gpu.settings.spec, workdir=on_gpu.settings.workdir, threads=1))
    other = on_cpu.embeddings(backends.REFERENCE, TEXT)
    assert other.identity.device == "cpu"  # kept beside the GPU's, not taken for it
    assert np.allclose(other.embeddings.values, made.embeddings.values, atol=1e-6)


def test_a_gpu_that_computes_in_tf32_is_refused(on_gpu, monkeypatch):
    real = PlayedGpu.run

    def run(self, rows):
        found = real(self, rows)
        if self.identity.device == "cpu":
            return found
        return (found.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)  # ten bits of mantissa, as TF32

    monkeypatch.setattr(PlayedGpu, "run", run)
    with pytest.raises(
        BackendUnavailable, match=r"--reference-device cuda, text tower: .* does not compute in full fp32"
    ):
        on_gpu.embeddings(backends.REFERENCE, TEXT)


@pytest.mark.parametrize("tower", [VISION, TEXT], ids=lambda tower: tower.name)
def test_holding_to_the_cpu_sees_nan(tower):
    from clipval import spec

    bounds = spec.load(str(FOLDER / "shapes.toml")).bounds("onnx", "fp32", tower.name)
    values = np.random.default_rng(0).normal(size=(4, tower.width)).astype(np.float32)
    right, wrong = (Embeddings(("a", "b", "c", "d"), one) for one in (values, copy.copy(values)))
    reference.hold(tower, right, right, bounds, 0)
    wrong.values[2, 7] = np.nan
    with pytest.raises(BackendUnavailable, match=r"worst is c\)"):
        reference.hold(tower, wrong, right, bounds, 0)
