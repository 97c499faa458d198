"""Distance of a backend's embeddings from the reference's, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Tuple

import numpy as np

from clipval.errors import InputError

WORST = 5


@dataclass(frozen=True)
class Parity:
    """Per-sample differences; every array is float64 [n] in the order of `ids`.

    A mean over a flattened batch hides one bad row in a thousand, so nothing is flattened here.

    Attributes:
        ids: the samples.
        cosine: cosine of each pair; NaN where a vector is NaN or zero.
        max_abs: largest |difference| of one element, both vectors scaled to unit length.
        relative: |difference| / |reference|, Euclidean, on the vectors as they were given.
        norm: L2 norm of the candidate's vector as the backend gave it; reference_norm: of the reference's.
    """

    ids: Tuple[str, ...]
    cosine: np.ndarray
    max_abs: np.ndarray
    relative: np.ndarray
    norm: np.ndarray
    reference_norm: np.ndarray

    def worst(self, count: int = WORST) -> List[Dict[str, Any]]:
        """The samples of lowest cosine, NaN first, with their figures."""
        order = np.argsort(np.where(np.isnan(self.cosine), -2.0, self.cosine), kind="stable")[:count]
        return [
            {
                "id": self.ids[n],
                "cosine": float(self.cosine[n]),
                "max_abs": float(self.max_abs[n]),
                "relative": float(self.relative[n]),
                "norm": float(self.norm[n]),
            }
            for n in order
        ]


def compare(ids: Tuple[str, ...], reference: np.ndarray, candidate: np.ndarray) -> Parity:
    """Compare two sets of embeddings of the same samples in the same order.

    Args:
        ids: n names.
        reference, candidate: [n, width], any float dtype; computed in float64.

    Raises:
        InputError: nothing to compare, or the shapes differ.
    """
    if reference.shape != candidate.shape or reference.ndim != 2 or len(ids) != len(reference) or not ids:
        raise InputError(
            f"parity of {len(ids)} samples: reference is {list(reference.shape)}, candidate {list(candidate.shape)}; "
            f"both must be [n, width] with n >= 1"
        )
    ours, theirs = reference.astype(np.float64), candidate.astype(np.float64)
    norm, reference_norm = np.linalg.norm(theirs, axis=1), np.linalg.norm(ours, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit, reference_unit = theirs / norm[:, None], ours / reference_norm[:, None]
        return Parity(
            ids=ids,
            cosine=(unit * reference_unit).sum(axis=1),
            max_abs=np.abs(unit - reference_unit).max(axis=1),
            relative=np.linalg.norm(theirs - ours, axis=1) / reference_norm,
            norm=norm,
            reference_norm=reference_norm,
        )
