"""Definition of a gate: its id, the cases that a run promises, and how a figure is judged."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

import msgspec
import numpy as np

from clipval.backends import Identity
from clipval.results import FAIL, PASS, Detail, Figure, number, wanted
from clipval.spec import Spec
from clipval.towers import TOWER_NAMES

ACCURACY, PERF = "accuracy", "perf"


class Plan(NamedTuple):
    """What a run validates: what its gates depend on.

    Attributes:
        trained: the weights are not random, so recall applies; baseline: `--baseline` was given.
    """

    spec: Spec
    backends: Tuple[str, ...]
    batch_sizes: Tuple[int, ...]
    trained: bool
    baseline: bool = False


def _always(plan: Plan, *case: object) -> bool:
    return True


@dataclass(frozen=True)
class Gate:
    """One check. Its acceptance test names it, `@pytest.mark.gate(VALUES)`, and runs once for each of its cases.

    Attributes:
        check: first part of its ids: `parity` of `parity/onnx/vision`.
        kind: `accuracy` or `perf`, for `-m`.
        params: the test's parameters, among `backend_name`, `tower_name`, `batch_size` and `metric`; their values, in
        this order, are the rest of the id.
        also_in_batches_of: further batch sizes for which its test opens a backend.
        applies: the plan and the values of one case -> whether a run of this plan promises it.
        after: checks whose failure, for the same backend or the data, explains a failure of this one.
        figures: how many its function gives at least; with fewer it counts as not evaluated.
        data: its test reads the data set.
    """

    check: str
    kind: str
    params: Tuple[str, ...] = ()
    applies: Callable[..., bool] = _always
    also_in_batches_of: Tuple[int, ...] = ()
    after: Tuple[str, ...] = ()
    figures: int = 1
    data: bool = True

    def of(self, *values: object) -> str:
        """The gate's id for the values of its parameters."""
        return "/".join([self.check, *map(str, values)])

    def cases(self, plan: Plan) -> List[Tuple[Any, ...]]:
        """Parameter values, one tuple for each id that the plan promises."""
        spec = plan.spec
        axes: Dict[str, Iterable[object]] = {
            "backend_name": plan.backends,
            "tower_name": TOWER_NAMES,
            "batch_size": plan.batch_sizes,
            "metric": dict.fromkeys([*(one.metric for one in spec.references), *(one.metric for one in spec.paired)]),
        }
        product = itertools.product(*(axes[name] for name in self.params))
        return [case for case in product if self.applies(plan, *case)]

    def ids(self, plan: Plan) -> List[str]:
        """The ids that the plan promises."""
        return [self.of(*case) for case in self.cases(plan)]


def judge(
    gate: str,
    metric: str,
    measured: float,
    bound: str,
    limit: float,
    *,
    unit: str,
    count: int,
    where: Optional[Identity] = None,
    because: str = "",
    worst: str = "",
    reference: Optional[float] = None,
    source: str = "",
    detail: Optional[Detail] = None,
    failure: str = "model",
) -> Figure:
    """Judge a figure by its limit; a NaN fails.

    Args:
        bound: `>=`, `<=`, or `within` (limit around `reference`).
        where: the backend; None for a figure of files or data.
        worst: the sample that decided; because: the reason for the limit.
    """
    assert bound != "within" or reference is not None
    off = abs(measured - (reference or 0.0))
    ok = {">=": measured >= limit, "<=": measured <= limit, "within": off <= limit + 1e-9}[bound]
    found = Figure(
        gate=gate,
        metric=metric,
        unit=unit,
        measured=float(measured) if np.isfinite(measured) else None,
        count=count,
        reference=reference,
        source=source,
        bound=bound,
        limit=limit,
        because=because,
        verdict=PASS if ok else FAIL,
        failure="" if ok else failure,
        worst=worst,
        made_by=where,
        detail=detail,
    )
    return found if ok else msgspec.structs.replace(found, message=_message(found))


def _message(figure: Figure) -> str:
    """The message of a failed figure: what was found, where, what was expected and why, and the backend."""
    said = f"{figure.gate}: {figure.metric} is {number(figure.measured, figure.unit)} over {figure.count}"
    said += f", expected {wanted(figure)}"
    said += f" ({figure.worst})" if figure.worst else ""
    said += f"; {figure.because}" if figure.because else ""
    said += f"; reference: {figure.source}" if figure.source else ""
    return f"{said}. Made by {figure.made_by}" if figure.made_by else said
