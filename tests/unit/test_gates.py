"""What a run promises, and how a figure is held to its bound."""

import numpy as np

from clipval import gates, spec
from clipval.backends import Identity

WHERE = Identity("onnx", "test", "cpu", "fp32")
SPEC = spec.load("vit-b-32-flickr30k")


def test_what_a_run_promises():
    both = gates.expected(SPEC, ("pytorch", "onnx"), (1, 8), ("accuracy", "perf"), trained=True)
    assert len(both) == len(set(both))
    assert {"parity/onnx/vision", "recall/pytorch/image_retrieval_recall@5", "throughput/onnx/text/8"} <= set(both)
    assert not [gate for gate in both if gate.startswith(("parity/pytorch", "paired/pytorch"))]
    untrained = gates.expected(SPEC, ("pytorch", "onnx"), (1, 8), ("accuracy",), trained=False)
    assert not [gate for gate in untrained if gate.startswith(("recall", "paired", "throughput"))]
    assert len([gate for gate in both if gate.startswith("throughput")]) == 8


def test_nan_never_passes():
    for bound in ("<=", ">=", "within"):
        found = gates.judge("g/x/y", "m", np.nan, bound, 1, unit="u", count=1, where=WHERE, reference=0.0)
        assert (found.verdict, found.measured) == ("fail", None)


def test_only_a_spec_with_pins_promises_to_hold_to_them():
    promised = gates.expected(spec.load("shapes"), ("pytorch", "onnx"), (1,), ("accuracy",), trained=True)
    assert [gate for gate in promised if gate.startswith("golden")] == ["golden/pytorch/vision", "golden/pytorch/text"]
    assert "golden" not in str(gates.expected(SPEC, ("pytorch", "onnx"), (1,), ("accuracy",), trained=True))
