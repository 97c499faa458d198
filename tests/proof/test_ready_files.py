"""Whole runs on ready ONNX files of somebody else: quantised ones, and ones of other weights."""

import pytest

from clipval import cli
from tests import small

pytestmark = pytest.mark.proof


def test_quantised_files_are_held_to_the_bounds_of_their_precision(small_spec, clean, tmp_path):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for tower in ("vision", "text"):
        (file,) = (clean / "onnx").glob(f"*/{tower}.onnx")
        quantize_dynamic(str(file), str(tmp_path / f"int8_{tower}.onnx"), weight_type=QuantType.QUInt8)
    done = small.run(small_spec, clean, "-m", "accuracy", f"--onnx-prefix={tmp_path / 'int8'}")
    parity = {one.gate: one for one in done.figures if one.metric == "minimum cosine" and "parity" in one.gate}
    assert {one.limit for one in parity.values()} == {0.95}
    assert {one.made_by.precision for one in parity.values()} == {"w8a8"}
    assert not [gate for gate in done.red if gate.startswith(("parity", "artifact", "values"))], done.output[-3000:]


def test_files_of_other_weights_fail(small_spec, clean, tmp_path):
    prefix = tmp_path / "other"
    given = ["export", "--spec", small_spec, "--pretrained", "random", "--onnx-prefix", prefix]
    assert cli.main([*map(str, given), "--workdir", str(tmp_path / "work")]) == 0
    done = small.run(small_spec, clean, "-m", "accuracy", f"--onnx-prefix={prefix}")
    assert done.code == 1
    assert "parity/onnx/vision" in done.red
