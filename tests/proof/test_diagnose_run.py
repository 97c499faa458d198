"""--diagnose on the acceptance run: the finding stands in the failure and in the results, and changes no verdict."""

import pytest

from tests import simulator, small

pytestmark = pytest.mark.proof


def test_a_red_parity_gate_says_where_and_why(small_spec, workdir):
    done = small.run(small_spec, workdir, "-m", "accuracy", "--diagnose", CLIPVAL_FAULT="mask_lost")
    assert done.code == 1
    assert (
        "diagnosis: onnx text (text.onnx, fp32): diverges in PyTorch module transformer.resblocks.0.attn" in done.output
    )
    (figure,) = [figure for figure in done.figures if figure.diagnosis]
    assert figure.gate == "parity/onnx/text"
    assert figure.diagnosis["module"] == "transformer.resblocks.0.attn"
    assert len(figure.diagnosis["ladder"]) > 50


def test_a_green_run_is_as_it_was(small_spec, workdir):
    done = small.run(small_spec, workdir, "-m", "accuracy", "--diagnose")
    assert done.code == 0
    assert "diagnosis" not in done.output


def test_an_om_is_dumped_on_the_simulated_npu(small_spec, workdir):
    variables = simulator.environment(fault="wrong_layer")
    variables["PYTHONPATH"] += f":{small.ROOT}"
    arguments = ["-m", "accuracy", "--diagnose", "--backends=pytorch,onnx,om", "--allow-simulated", "-k", "parity"]
    done = small.run(small_spec, workdir, *arguments, **variables)
    assert done.code == 1
    assert "OM operator /visual/transformer/resblocks.1/mlp/c_fc/MatMul" in done.output
