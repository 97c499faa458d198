"""The gates, one module a family, named as the tests in `tests/acceptance/`: evidence in, judged figures out.

A gate is one `Gate` of a family's module, the function that judges its figures, and one acceptance test that names it.
What a run promises is the ids of all of them; no test needs to be collected to know it.
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
    """Id -> gate of everything that a run of this plan must evaluate, if nothing narrows it."""
    return {name: gate for gate in CATALOGUE for name in gate.ids(plan)}
