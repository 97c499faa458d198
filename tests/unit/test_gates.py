"""What a run promises, and how a figure is held to its bound."""

from importlib import import_module
from pathlib import Path

import numpy as np

from clipval import gates, spec
from clipval.backends import Identity
from clipval.gates.gate import Gate, judge

WHERE = Identity("onnx", "test", "cpu", "fp32")
SPEC = spec.load("vit-b-32-flickr30k")
ACCEPTANCE = Path(__file__).parents[1] / "acceptance"


def promised(found=SPEC, trained=True, baseline=False):
    return list(gates.promised(gates.Plan(found, ("pytorch", "onnx"), (1, 8), trained, baseline)))


def test_what_a_run_promises():
    both = promised()
    assert len(both) == len(set(both))
    assert {"parity/onnx/vision", "recall/pytorch/image_retrieval_recall@5", "throughput/onnx/text/8"} <= set(both)
    assert not [gate for gate in both if gate.startswith(("parity/pytorch", "paired/pytorch", "baseline"))]
    assert not [gate for gate in promised(trained=False) if gate.startswith(("recall", "paired"))]
    assert len([gate for gate in both if gate.startswith("throughput")]) == 8
    assert promised(baseline=True) == [*both, "baseline/rows"]


def test_only_a_spec_with_pins_promises_to_hold_to_them():
    pinned = [gate for gate in promised(spec.load("shapes")) if gate.startswith("golden")]
    assert pinned == ["golden/pytorch/vision", "golden/pytorch/text"]
    assert "golden" not in str(promised())


def test_each_gate_has_one_acceptance_test_and_each_acceptance_test_a_gate():
    named = []
    for file in ACCEPTANCE.glob("test_*.py"):
        for name, test in vars(import_module(f"tests.acceptance.{file.stem}")).items():
            if name.startswith("test_"):
                named += [mark.args[0] for mark in getattr(test, "pytestmark", ()) if mark.name == "gate"] or [name]
    assert sorted(named, key=str) == sorted(gates.CATALOGUE, key=str)


def test_an_id_is_its_check_and_the_values_of_its_parameters():
    gate = Gate("x", gates.PERF, ("tower_name", "batch_size"), lambda plan, tower, size: size > 1)
    assert gate.ids(gates.Plan(SPEC, ("pytorch",), (1, 8), True)) == ["x/vision/8", "x/text/8"]
    assert Gate("data/all", gates.ACCURACY).ids(gates.Plan(SPEC, (), (), True)) == ["data/all"]


def test_nan_never_passes():
    for bound in ("<=", ">=", "within"):
        found = judge("g/x/y", "m", np.nan, bound, 1, unit="u", count=1, where=WHERE, reference=0.0)
        assert (found.verdict, found.measured) == ("fail", None)
