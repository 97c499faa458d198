"""What the protocol is given of the chain: the key of a baseline, and what a speed amounts to."""

from types import SimpleNamespace

import numpy as np
import pytest

from clipval.backends import Identity
from clipval.chain import Chain
from clipval.options import Settings
from clipval.throughput import rows
from clipval.throughput.row import Judged, Row
from clipval.throughput.statistics import summarise
from clipval.throughput.timing import WarmUp

HOST = Identity("onnx", "1", "cpu", "fp32")
NPU = Identity("om", "1", "Ascend910B4:0", "force_fp16")


def test_the_key_tells_om_files_apart(tmp_path):
    def key(backend="om", **chosen):
        chain = Chain(Settings(**chosen))
        chain.weights = SimpleNamespace(sha256="abc")
        return rows.baseline_key(chain, {backend: "identity"})

    (tmp_path / "text_bs8.om").write_bytes(b"one")
    ready = key(om_dir=tmp_path)
    assert ready != key()
    assert key(atc_flags=("--optypelist_for_implmode=Gelu",)) != key()
    assert key("onnx", om_dir=tmp_path) == key("onnx")
    (tmp_path / "text_bs8.om").write_bytes(b"another")
    assert key(om_dir=tmp_path) != ready


def test_operations_are_shares_of_the_hosts_peak_only():
    config = {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
        "text_cfg": {"context_length": 77, "width": 512, "layers": 12},
    }
    timing = summarise(np.full(20, 0.08), 8, "inference")
    warm = WarmUp(3, 1.0, 0.1, 0.08, True)
    row = Row(made_by=HOST, tower="vision", batch_size=8, clocks={"inference": Judged(timing, "VALID", "")},
              warm_up=warm, attempts=1)  # fmt: skip
    found = rows.operations(config, row, 8.82e12)
    assert found["flops_per_second"] == pytest.approx(8.82e11, rel=2e-3)
    assert found["peak_share"] == pytest.approx(0.1, rel=2e-3)
    assert rows.operations(config, row, None)["peak_share"] is None


@pytest.mark.parametrize(
    ("where", "here"), [(HOST, True), (NPU, False), (HOST._replace(device="CUDAExecutionProvider"), False)]
)
def test_backends_on_the_host(where, here):
    assert where.on_host is here
