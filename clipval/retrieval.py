"""Image-text retrieval: exact ranks both ways, recall@k, and the paired comparison of two backends.

recall@k is the hit rate, as the recipe and CLIP_benchmark count it: the share of queries with any positive among
their k best candidates. `image_retrieval` has captions as queries, `text_retrieval` has images as queries.

Ties count against the model: a wrong candidate with the same score ranks above the positive. Counting only strictly
greater scores would give constant or NaN embeddings perfect recall.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Dict, List, Tuple

import numpy as np

from clipval.errors import InputError
from clipval.ranks import Unit, rank, unit_rows

KS = (1, 5, 10)
STANDARD_ERRORS = 1.959963984540054  # of a normal distribution, which hold 95 % of it
GATED_K = 5
IMAGE, TEXT = "image_retrieval", "text_retrieval"


@dataclass(frozen=True)
class Direction:
    """One direction of retrieval.

    Attributes:
        name: `image_retrieval` or `text_retrieval`.
        query_ids: n names; ranks: int64 [n], 1 is best, of the best positive.
        margins: float64 [n], score of the best positive minus that of the 5th wrong candidate: positive means a hit
            at 5, near zero that rounding decides. NaN with fewer wrong candidates.
            candidates: how many each query was ranked among; recall is higher with fewer.
    """

    name: str
    query_ids: Tuple[str, ...]
    ranks: np.ndarray
    margins: np.ndarray
    candidates: int

    def hits(self, k: int) -> int:
        """Queries with a positive among their k best candidates."""
        return int((self.ranks <= k).sum())

    def recall(self, k: int) -> float:
        """Share of queries with a positive among their k best candidates, in [0, 1]."""
        return self.hits(k) / len(self.ranks)


def interval(hits: int, count: int) -> Tuple[float, float]:
    """Wilson 95 % interval of a share, for independent queries.

    Captions of one image are not independent, so for image retrieval it is too narrow (by a factor of about 1.4 on a
    synthetic set with five captions per image).
    """
    square, share = STANDARD_ERRORS**2 / count, hits / count
    middle = share + square / 2
    half = math.sqrt(square * (share * (1 - share) + square / 4))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


@dataclass(frozen=True)
class Retrieval:
    """Both directions on one data set."""

    image: Direction
    text: Direction

    @property
    def directions(self) -> Tuple[Direction, Direction]:
        return self.image, self.text

    def metrics(self, ks: Tuple[int, ...] = KS) -> Dict[str, float]:
        """`{"image_retrieval_recall@5": ..., "text_retrieval_recall@5": ...}` for every k."""
        return {f"{one.name}_recall@{k}": one.recall(k) for k in ks for one in self.directions}


def check_embeddings(ids: Tuple[str, ...], values: np.ndarray, what: str) -> Unit:
    """Embeddings scaled to unit length, or an InputError that names the sample.

    Args:
        ids: n unique names; values: float [n, width]; what: for the message, e.g. `text embeddings`.

    Raises:
        InputError: wrong shape or dtype, an id that occurs twice, NaN, Inf, zero length, a constant vector, or all
            rows equal.
    """
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.floating) or not len(values) or values.shape[1] < 2:
        raise InputError(f"{what}: {values.dtype} {list(values.shape)}, expected floats [n, width]")
    if len(ids) != len(values) or len(set(ids)) != len(ids):
        raise InputError(f"{what}: {len(ids)} ids ({len(set(ids))} different) for {len(values)} rows")
    rows = unit_rows(values)
    flat = values[:, 0] == values[:, 1]  # true for hardly any row, so that few rows are read whole
    flat[flat] = np.ptp(values[flat], axis=1) == 0
    for wrong, word in (
        (~np.isfinite(rows.norm), "NaN or Inf in the embedding"),
        (rows.norm == 0, "embedding of length zero"),
        (flat, "every element of the embedding is equal"),
    ):
        if wrong.any():
            first = ids[int(np.argmax(wrong))]
            raise InputError(f"{what}: {word} of sample {first} ({int(wrong.sum())} of {len(ids)} samples)")
    unit = rows.unit[: len(ids)]
    alike = np.abs(unit[0] - unit[-1]).max() < 1e-6  # a quick check, which nearly always decides it
    if len(unit) > 1 and alike and np.ptp(unit, axis=0).max() < 1e-6:
        raise InputError(f"{what}: all {len(ids)} embeddings are equal (first sample {ids[0]}); the model collapsed")
    return rows


def evaluate(
    image_ids: Tuple[str, ...],
    images: np.ndarray,
    caption_ids: Tuple[str, ...],
    captions: np.ndarray,
    image_of_caption: np.ndarray,
) -> Retrieval:
    """Exact ranks in both directions.

    Args:
        images: float [n, width]; captions: float [m, width]; need not be of unit length.
        image_of_caption: int [m], index of each caption's image. Any number of captions per image, at least one.

    Raises:
        InputError: embeddings that `check_embeddings` rejects, different widths, captions without an image or images
            without a caption.
    """
    vision = check_embeddings(image_ids, images, "image embeddings")
    text = check_embeddings(caption_ids, captions, "text embeddings")
    owner = np.asarray(image_of_caption)
    if images.shape[1] != captions.shape[1]:
        raise InputError(f"image embeddings are {images.shape[1]} wide, text embeddings {captions.shape[1]}")
    if owner.shape != (len(captions),) or owner.min() < 0 or owner.max() >= len(images):
        raise InputError(
            f"caption to image map is {list(owner.shape)} for {len(captions)} captions, {len(images)} images"
        )
    lonely = np.flatnonzero(np.bincount(owner, minlength=len(images)) == 0)
    if len(lonely):
        raise InputError(f"image {image_ids[int(lonely[0])]} has no caption ({len(lonely)} such images)")
    by_caption, by_image = rank(vision, text, owner)
    return Retrieval(
        Direction(IMAGE, caption_ids, *by_caption, candidates=len(images)),
        Direction(TEXT, image_ids, *by_image, candidates=len(captions)),
    )


@dataclass(frozen=True)
class Paired:
    """Two backends on the same queries at recall@5.

    Attributes:
        name: the direction; gains, losses: queries that only the candidate, only the reference hits.
        difference: candidate's recall minus the reference's; p_value: exact two-sided McNemar test, which assumes
        independent queries.
        flips: one entry per query that changed, widest margin first: a flip with a margin near zero is rounding, one
        with a wide margin a fault.
    """

    name: str
    gains: int
    losses: int
    difference: float
    p_value: float
    flips: Tuple[Dict[str, Any], ...]


def pair(reference: Direction, candidate: Direction, k: int = GATED_K) -> Paired:
    """Compare hits at k query by query.

    Raises:
        InputError: the queries or the numbers of candidates differ.
    """
    if reference.query_ids != candidate.query_ids or reference.name != candidate.name:
        raise InputError(f"paired comparison of {candidate.name}: the two sides have different queries")
    if reference.candidates != candidate.candidates:
        raise InputError(
            f"paired comparison of {candidate.name}: {candidate.candidates} candidates on one side, "
            f"{reference.candidates} on the other"
        )
    was, now = reference.ranks <= k, candidate.ranks <= k
    gains, losses = int((now & ~was).sum()), int((was & ~now).sum())
    changed = np.flatnonzero(was != now)
    order = changed[np.argsort(-np.abs(np.nan_to_num(candidate.margins[changed])), kind="stable")]
    flips = tuple(
        {
            "id": candidate.query_ids[n],
            "was": int(reference.ranks[n]),
            "now": int(candidate.ranks[n]),
            "margin": float(candidate.margins[n]),
            "reference_margin": float(reference.margins[n]),
        }
        for n in order
    )
    return Paired(candidate.name, gains, losses, (gains - losses) / len(now), _sign_test(gains, losses), flips)


def _sign_test(gains: int, losses: int) -> float:
    """p-value of the exact two-sided sign test: how likely gains and losses differ that much by chance alone."""
    from scipy.special import bdtr  # importing scipy.stats for its binomtest would take half a second

    return min(1.0, 2 * float(bdtr(min(gains, losses), gains + losses, 0.5)))


def retrieved(query: np.ndarray, candidates: np.ndarray, ids: Tuple[str, ...], k: int = GATED_K) -> List[str]:
    """Ids of the k best candidates of one query.

    Args:
        query: [width]; candidates: [n, width]; neither need be of unit length.
    """
    wide = candidates.astype(np.float64)
    scores = wide @ query.astype(np.float64) / np.linalg.norm(wide, axis=1)
    return [ids[n] for n in np.argsort(-scores, kind="stable")[:k]]
