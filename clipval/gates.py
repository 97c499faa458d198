"""What a gate is: the ids that a run promises, and a figure held to its bound. A gate can fail, and says where and why.

A gate id is `<check>/<backend>/<tower or metric>[/<batch size>]`. `clipval.accuracy` and `clipval.perf` hold the gates.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from clipval.backends import REFERENCE, Identity, kind
from clipval.results import FAIL, PASS, Figure
from clipval.spec import Spec
from clipval.towers import TOWER_NAMES

ACCURACY, PERF = "accuracy", "perf"
TOWER_CHECKS = ("values", "distinct", "invariance")


def expected(
    spec: Spec, backends: Sequence[str], batch_sizes: Sequence[int], kinds: Sequence[str], trained: bool
) -> List[str]:
    """Gate ids that a run must evaluate: backend x tower x batch size x check.

    Args:
        kinds: of `accuracy` and `perf`.
        trained: the weights are not random, so recall applies.
    """
    ids: List[str] = []
    if ACCURACY in kinds:
        ids += [f"prepared/data/{tower}" for tower in TOWER_NAMES]
        for name in backends:
            checks = list(TOWER_CHECKS)
            checks += ["parity"] if name != REFERENCE else []
            checks += ["artifact"] if kind(name).takes_onnx else []
            checks += ["golden"] if name == REFERENCE and spec.golden else []
            ids += [f"{check}/{name}/{tower}" for check in checks for tower in TOWER_NAMES]
            if trained:
                ids += [f"recall/{name}/{metric}" for metric in gated_metrics(spec)]
                ids += [f"paired/{name}/{bounds.metric}" for bounds in spec.paired if name != REFERENCE]
    if PERF in kinds:
        ids += [f"throughput/{name}/{tower}/{n}" for name in backends for tower in TOWER_NAMES for n in batch_sizes]
    return ids


def gated_metrics(spec: Spec) -> List[str]:
    """Metrics that the spec has a figure for, in its order."""
    return list(dict.fromkeys(reference.metric for reference in spec.references))


def context(identity: Identity, **more: Any) -> Dict[str, Any]:
    """What made a figure, for its record."""
    return {
        "backend": identity.name,
        "version": identity.version,
        "device": identity.device,
        "precision": identity.precision,
        "simulated": identity.simulated,
        **more,
    }


def judge(
    gate: str,
    metric: str,
    measured: float,
    bound: str,
    limit: float,
    *,
    unit: str,
    count: int,
    where: Identity,
    because: str = "",
    worst: str = "",
    reference: Optional[float] = None,
    source: str = "",
    detail: Optional[Dict[str, Any]] = None,
    failure: str = "model",
) -> Figure:
    """One figure against its limit; a NaN fails.

    Args:
        bound: `>=`, `<=`, or `within` (limit around `reference`).
        worst: names the sample that decided; because: why the limit is what it is.
    """
    if bound == "within":
        assert reference is not None
        ok = abs(measured - reference) <= limit + 1e-9
        wanted = f"{reference:.4f} +- {limit:g}"
    else:
        ok = measured >= limit if bound == ">=" else measured <= limit
        wanted = f"{bound} {limit:g}"
    message = f"{gate}: {metric} is {measured:.7g} over {count}, expected {wanted}"
    message += f" ({worst})" if worst else ""
    message += f"; {because}" if because else ""
    message += f"; reference: {source}" if source else ""
    return Figure(
        gate=gate,
        metric=metric,
        unit=unit,
        measured=float(measured) if np.isfinite(measured) else None,
        count=count,
        reference=reference,
        source=source,
        bound=bound,
        limit=limit,
        verdict=PASS if ok else FAIL,
        failure="" if ok else failure,
        message="" if ok else f"{message}. Made by {where}",
        context=context(where),
        detail=detail or {},
    )
