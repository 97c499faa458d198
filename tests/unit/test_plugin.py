"""pytest's side of a run: what `-m` promises, and what a line that is narrowed by anything may still say."""

import pytest

from clipval import gates, promise
from clipval.gates.parity import PARITY
from clipval.gates.throughput import THROUGHPUT


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("", ["accuracy", "perf"]),
        ("not proof", ["accuracy", "perf"]),
        ("accuracy", ["accuracy"]),
        ("perf", ["perf"]),
        ("accuracy or perf", ["accuracy", "perf"]),
        ("accuracy and not perf", ["accuracy"]),
        ("not accuracy", ["perf"]),
        ("proof", []),
        ("(perf or proof) and not accuracy", ["perf"]),
        ("what is this", ["accuracy", "perf"]),
    ],
)
def test_what_an_expression_selects(expression, wanted):
    assert [gate.kind for gate in (PARITY, THROUGHPUT) if promise.selects(expression, gate)] == wanted
    assert {gate.kind for gate in gates.CATALOGUE} == {"accuracy", "perf"}
