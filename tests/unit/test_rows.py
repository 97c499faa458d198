"""What the protocol is given of the chain: the key of a baseline, and what a speed amounts to."""

from types import SimpleNamespace

import pytest

from clipval.backends import Identity
from clipval.chain import Chain
from clipval.options import Settings
from clipval.throughput import rows

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


@pytest.mark.parametrize(
    ("where", "here"), [(HOST, True), (NPU, False), (HOST._replace(device="CUDAExecutionProvider"), False)]
)
def test_backends_on_the_host(where, here):
    assert where.on_host is here
