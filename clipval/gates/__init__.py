"""The gates, one module per family, named like the tests in `tests/acceptance/`: evidence in, judged figures out.

A gate is a `Gate` in its family's module, the function that judges its figures, and an acceptance test that names it.
A run promises the ids of all gates, which are known without collecting tests.
"""

from __future__ import annotations

from typing import Dict

from clipval.gates import artifacts, embeddings, parity, retrieval, throughput
from clipval.gates.gate import ACCURACY as ACCURACY
from clipval.gates.gate import PERF as PERF
from clipval.gates.gate import Gate as Gate
from clipval.gates.gate import Plan as Plan
from clipval.gates.throughput import BASELINE as BASELINE

FAMILIES = (artifacts, embeddings, parity, retrieval, throughput)
CATALOGUE = tuple(found for family in FAMILIES for found in vars(family).values() if isinstance(found, Gate))


def promised(plan: Plan) -> Dict[str, Gate]:
    """Id -> gate for everything that a run of this plan must evaluate unless it is narrowed."""
    return {name: gate for gate in CATALOGUE for name in gate.ids(plan)}
