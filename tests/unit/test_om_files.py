"""Where OM files come from: a folder of ready ones, or the store, once for each ONNX with all its weights."""

import pytest

from clipval.ascend import atc, om_files
from clipval.errors import InputError
from clipval.store import Store
from clipval.towers import TEXT

OPTIONS = atc.AtcOptions("Ascend910B4")


def test_the_weights_beside_an_onnx_file_count(tmp_path, monkeypatch):
    """Of a tower over 2 GiB the ONNX file itself is the same whatever the weights are."""
    compiled = []

    def compile_om(onnx, folder, name, *arguments, **more):
        compiled.append(name)
        (folder / f"{name}.om").write_bytes(b"om")

    monkeypatch.setattr(atc, "compile_om", compile_om)
    kept = Store(tmp_path)

    def om(weights):
        def build(folder):
            (folder / "text.onnx").write_bytes(b"graph")
            (folder / "text.onnx.data").write_bytes(weights)

        onnx = kept.get("onnx", {"weights": weights.decode()}, build) / "text.onnx"
        return om_files.compiled(kept, onnx, TEXT, 8, OPTIONS)

    first = om(b"1")
    assert om(b"1") == first
    assert om(b"2") != first
    assert compiled == ["text_bs8", "text_bs8"]


def test_ready_files_are_found_by_the_recipes_names(tmp_path):
    (tmp_path / "vit_b_32_text_bs8.om").write_bytes(b"om")
    assert om_files.ready(tmp_path, TEXT, 8).name == "vit_b_32_text_bs8.om"
    with pytest.raises(InputError, match=r"expected one file \*text_bs1.om, found none"):
        om_files.ready(tmp_path, TEXT, 1)
    (tmp_path / "other_text_bs8.om").write_bytes(b"om")
    with pytest.raises(InputError, match="found other_text_bs8.om, vit_b_32_text_bs8.om"):
        om_files.ready(tmp_path, TEXT, 8)
