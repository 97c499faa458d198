"""Retrieval gates: recall against published figures, and against PyTorch's on the same samples."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Tuple

import msgspec
import numpy as np

from clipval import retrieval
from clipval.backends import REFERENCE, Identity, base_name
from clipval.gates.gate import ACCURACY, Gate, judge
from clipval.results import FAIL, INFO, Figure, Flip, PairedDetail, Published, RecallDetail
from clipval.spec import PairedBounds, Reference, Spec, published

SHOWN_FLIPS = 20
CAUSES = ("prepared", "artifact", "golden", "values", "distinct", "parity")


def gated_metrics(spec: Spec) -> List[str]:
    """Metrics for which the spec has a figure, in its order."""
    return list(dict.fromkeys(reference.metric for reference in spec.references))


RECALL = Gate(
    "recall",
    ACCURACY,
    ("backend_name", "metric"),
    lambda plan, backend, metric: plan.trained and metric in gated_metrics(plan.spec),
    after=CAUSES,
)
PAIRED = Gate(
    "paired",
    ACCURACY,
    ("backend_name", "metric"),
    lambda plan, backend, metric: (
        plan.trained and backend != REFERENCE and metric in [bounds.metric for bounds in plan.spec.paired]
    ),
    after=CAUSES,
)


def recall(
    found: retrieval.Retrieval, where: Identity, spec: Spec, metric: str, precision: str = "fp32"
) -> List[Figure]:
    """A recall figure against its published or pinned one; too high is as suspicious as too low.

    Args:
        precision: of the backend. If the figure is of another backend, what the precision may lose to PyTorch is added
            to what is allowed.
    """
    direction, k = _direction(found, metric)
    measured = direction.recall(k)
    reference = spec.reference(metric, where.name)
    gate = RECALL.of(where.name, metric)
    assert reference is not None
    if reference.within is None:
        figure = _shown(gate, metric, measured, direction, reference, where, spec)
    else:
        off = round((measured - reference.value) * len(direction.ranks))
        lost = 0.0 if base_name(where.name) == reference.backend else spec.quantisation_loss(metric, precision)
        more = f"; {precision} may lose {lost:g} to {REFERENCE}" if lost else ""
        figure = judge(
            gate,
            metric,
            measured,
            "within",
            reference.within + lost,
            unit="share",
            count=len(direction.ranks),
            where=where,
            reference=reference.value,
            source=reference.source,
            worst=f"{off:+d} of {len(direction.ranks)} queries",
            because=f"{reference.because}{more}",
            detail=_published(spec, metric),
        )
    return [_of_its_size(figure, direction, spec.size(reference), where)]


def _of_its_size(figure: Figure, direction: retrieval.Direction, size: Tuple[int, int], where: Identity) -> Figure:
    """Fail the figure if its reference has other numbers of queries or candidates: recall is higher with fewer."""
    found = (len(direction.ranks), direction.candidates)
    if found == size:
        return figure
    worst = f"{found[0]} queries among {found[1]} candidates, but the reference has {size[0]} among {size[1]}"
    message = f"{figure.gate}: {worst}, so they cannot be compared; use the whole data set; "
    message += f"reference: {figure.source}. Made by {where}"
    return msgspec.structs.replace(figure, verdict=FAIL, failure="input", worst=worst, message=message)


def _published(spec: Spec, metric: str) -> RecallDetail:
    """Every published figure of this model for the metric."""
    figures = [Published(one.value, one.source, one.backend) for one in spec.references if one.metric == metric]
    rows = published(spec.model.name, spec.model.pretrained, spec.data.name)
    others = [(row.recalls.get(metric), row.source) for row in rows]
    return RecallDetail([*figures, *(Published(value, source) for value, source in others if value)])


def _shown(
    gate: str,
    metric: str,
    measured: float,
    direction: retrieval.Direction,
    reference: Reference,
    where: Identity,
    spec: Spec,
) -> Figure:
    return Figure(
        gate=gate,
        metric=metric,
        unit="share",
        measured=measured,
        count=len(direction.ranks),
        reference=reference.value,
        source=reference.source,
        verdict=INFO,
        made_by=where,
        detail=_published(spec, metric),
    )


def paired(
    reference: retrieval.Retrieval,
    found: retrieval.Retrieval,
    where: Identity,
    bounds: PairedBounds,
    retrieved: Callable[[str, str], List[str]] = lambda direction, query_id: [],
) -> List[Figure]:
    """Recall against PyTorch's on the same samples, with the queries that flipped.

    Args:
        retrieved: direction and query id -> ids of the best candidates, for the queries that flipped.
    """
    direction, k = _direction(found, bounds.metric)
    base, _ = _direction(reference, bounds.metric)
    result = retrieval.pair(base, direction, k)
    flips = ", ".join(f"{one['id']} (margin {one['margin']:+.1e})" for one in result.flips[:5])
    figure = judge(
        PAIRED.of(where.name, bounds.metric),
        "recall less pytorch's",
        result.difference,
        "within",
        bounds.within,
        unit="share",
        count=len(direction.ranks),
        where=where,
        reference=0.0,
        worst=f"{result.gains} gained, {result.losses} lost, McNemar p {result.p_value:.3g}, flipped {flips or 'none'}",
        because=bounds.because,
        detail=PairedDetail(
            result.gains,
            result.losses,
            result.p_value,
            [_flip(one, retrieved(result.name, one["id"])) for one in result.flips[:SHOWN_FLIPS]],
        ),
    )
    return [figure]


def _flip(one: Dict[str, Any], found: List[str]) -> Flip:
    margin = one["margin"] if np.isfinite(one["margin"]) else None
    return Flip(one["id"], one["was"], one["now"], margin, found)


def _direction(found: retrieval.Retrieval, metric: str) -> Tuple[retrieval.Direction, int]:
    """The direction and k of a metric such as `image_retrieval_recall@5`."""
    name, _, k = metric.partition("_recall@")
    return {one.name: one for one in found.directions}[name], int(k)
