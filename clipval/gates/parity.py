"""The parity gate: a backend's embeddings against PyTorch's, sample by sample."""

from __future__ import annotations

from functools import partial
from typing import List, Optional

import numpy as np

from clipval import parity
from clipval.backends import REFERENCE, Identity
from clipval.embeddings import Embeddings
from clipval.gates.gate import ACCURACY, Gate, judge
from clipval.results import Figure, ParityDetail, Worst, number
from clipval.spec import ParityBounds
from clipval.towers import Tower

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
UNIT = 0.01  # from a length of 1: an embedding that was normalised, in any precision
PARITY = Gate(
    "parity", ACCURACY, ("backend_name", "tower_name"), lambda plan, backend, tower: backend != REFERENCE, figures=3
)


def agreement(
    reference: Embeddings, found: Embeddings, where: Identity, tower: Tower, bounds: ParityBounds
) -> List[Figure]:
    """Parity with the reference: minimum and mean cosine over samples, largest difference of one element."""
    gate = PARITY.of(where.name, tower.name)
    compared = parity.compare(found.ids, reference.values, found.values)
    worst = compared.worst()
    named = "worst samples " + ", ".join(f"{one['id']} ({number(one['cosine'], 'cosine')})" for one in worst)
    largest = int(np.argmax(np.nan_to_num(compared.max_abs, nan=np.inf)))
    judged = partial(judge, gate, where=where, count=len(found.ids), because=bounds.because)
    return [
        judged(
            "minimum cosine",
            compared.cosine.min(),
            ">=",
            bounds.cosine_min,
            unit="cosine",
            worst=named,
            detail=_detail(compared),
        ),
        judged("mean cosine", compared.cosine.mean(), ">=", bounds.cosine_mean, unit="cosine"),
        judged(
            "max |difference|",
            compared.max_abs[largest],
            "<=",
            bounds.max_abs,
            unit="absolute",
            worst=f"sample {found.ids[largest]}",
        ),
    ]


def lengths(
    reference: Embeddings, found: Embeddings, where: Identity, tower: Tower, bounds: ParityBounds
) -> List[Figure]:
    """If one of the two has unit length and the other has not, the distance of its lengths from 1; else nothing.

    Cosines do not show it, and software that takes the dot product for the cosine would be wrong by the length.
    """
    off = [np.abs(np.linalg.norm(one.values.astype(np.float64), axis=1) - 1) for one in (reference, found)]
    worst = int(np.argmax(np.nan_to_num(np.maximum(*off), nan=np.inf)))
    if (off[0].max() <= UNIT) == (off[1].max() <= UNIT):
        return []
    return [
        judge(
            PARITY.of(where.name, tower.name),
            "max |length - 1|, of one of the two alone",
            float(np.maximum(*off)[worst]),
            "<=",
            bounds.norm,
            unit="absolute",
            count=len(found.ids),
            where=where,
            worst=f"sample {found.ids[worst]}",
        )
    ]


def _detail(compared: parity.Parity) -> ParityDetail:
    """Evidence for reports; NaN becomes None."""

    def finite(value: float) -> Optional[float]:
        return float(value) if np.isfinite(value) else None

    far = np.where(np.isnan(compared.cosine), 2, 1 - compared.cosine)  # NaN is drawn as the farthest
    counts, edges = np.histogram(-np.log10(np.clip(far, 1e-16, 2)), bins=66, range=(-0.5, 16))
    return ParityDetail(
        percentiles={str(p): finite(np.percentile(compared.cosine, p)) for p in PERCENTILES},
        mean=finite(compared.cosine.mean()),
        relative_error=finite(compared.relative.max()),
        edges=edges.tolist(),
        counts=counts.tolist(),
        smallest_norm=finite(compared.norm.min()),
        largest_norm=finite(compared.norm.max()),
        worst=[Worst(one["id"], finite(one["cosine"]), finite(one["max_abs"])) for one in compared.worst()],
    )
