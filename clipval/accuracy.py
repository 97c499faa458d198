"""The gates of accuracy: evidence in, judged figures out, from the prepared arrays to recall.

Each says what was found, in which sample, and what was expected.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np

from clipval import parity, retrieval
from clipval.backends import Identity
from clipval.datasets import RetrievalDataset
from clipval.embeddings import Embeddings
from clipval.errors import InputError
from clipval.export import check, read_metadata
from clipval.gates import context, judge
from clipval.model import Model
from clipval.preprocess import PreparedRows, each_in_threads, expected_pixels, pixels, tokens
from clipval.results import INFO, Figure
from clipval.spec import GoldenSpec, PairedBounds, ParityBounds, Reference, Spec, published
from clipval.towers import Tower

INVARIANCE_SAMPLES = 32
SHOWN_FLIPS = 20
COMPARED_IMAGES = 400
PIXELS = 1e-5  # a rounding of normalised float32 pixels; one grey level is 0.015
SAME = 1e-7  # cosine distance below which two fp32 embeddings are one; two captions of one word more differ by 1e-4


def prepared_images(
    data: PreparedRows, dataset: RetrievalDataset, model: Model, spec: Spec, digests: np.ndarray
) -> List[Figure]:
    """Prepared pixels are bit for bit the model's own transform of the images, and what the spec says they must be.

    The second comparison does not use the transform, so a wrong mean, crop, channel order or resize cannot hide in it.
    Of more than 400 images, 400 spread over the set are compared; the store's hashes guard all of them afterwards.

    Args:
        digests: one per image, equal for equal pixels: [n].
    """
    picked = np.unique(np.linspace(0, len(data) - 1, min(len(data), COMPARED_IMAGES)).round().astype(int))
    side, stated = data.tower.row_shape[-1], spec.preprocess

    def compare(n: int) -> Tuple[float, float]:
        found, path = data[[n]][0], dataset.image_paths[n]
        own = np.abs(found - pixels(path, model)).max()
        return float(own), float(np.abs(found - expected_pixels(path, side, stated)).max()) if stated else 0.0

    off = np.array(each_in_threads(compare, picked.tolist(), "check images", len(picked)))
    ids = [data.ids[n] for n in picked]
    _, first = np.unique(digests, return_index=True)
    again = np.setdiff1d(np.arange(len(digests)), first)
    figures = [
        _prepared(data, "|pixel - transform's|", off[:, 0], 0.0, ids),
        _prepared(data, "|pixel - the spec's|", off[:, 1], PIXELS, ids),
        judge(
            f"prepared/data/{data.tower.name}",
            "images there a second time",
            len(again),
            "<=",
            spec.data.duplicates,
            unit="images",
            count=len(data),
            where=_prepared_by(data),
            worst=f"sample {data.ids[again[0]]}" if len(again) else "",
            because="one image under two ids has two right answers; the spec's data.duplicates allows some",
            failure="input",
        ),
    ]
    if spec.data.fingerprint:
        other = np.array([dataset.fingerprint() != spec.data.fingerprint])
        figures.append(_prepared(data, "files that differ from the spec's", other, 0.0, ["some image or caption"]))
    return figures


def prepared_texts(data: PreparedRows, dataset: RetrievalDataset, model: Model, spec: Spec) -> List[Figure]:
    """Prepared tokens are the model's own tokenizer's for every caption, and the captions are the spec's."""
    found = data[:]
    off = (found != tokens(dataset.captions, model, data.tower)).sum(axis=1)
    figures = [_prepared(data, "tokens that differ", off, 0.0, data.ids)]
    if spec.data.captions_sha256:
        digest = hashlib.sha256("".join(f"{caption}\n" for caption in dataset.captions).encode()).hexdigest()
        same = np.array([digest != spec.data.captions_sha256])
        figures.append(_prepared(data, "captions that differ from the spec's", same, 0.0, ["annotation file"]))
    return figures


def _prepared(data: PreparedRows, metric: str, off: np.ndarray, limit: float, ids: Sequence[str]) -> Figure:
    worst = int(np.argmax(np.nan_to_num(off, nan=np.inf)))
    return judge(
        f"prepared/data/{data.tower.name}",
        metric,
        float(off.max()),
        "<=",
        limit,
        unit="absolute",
        count=len(off),
        where=_prepared_by(data),
        worst=f"sample {ids[worst]}",
        failure="input",
    )


def _prepared_by(data: PreparedRows) -> Identity:
    return Identity("data", "prepared arrays", "disk", data.tower.dtype)


def artifact(file: Path, tower: Tower, weights: str, where: Identity) -> List[Figure]:
    """The ONNX file keeps the contract and was made of the weights under test."""
    check(file, tower)
    metadata = read_metadata(file)
    same = metadata.get("clipval.weights") == weights and metadata.get("clipval.normalized") == "true"
    found = metadata.get("clipval.weights", "none")[:12]
    return [
        judge(
            f"artifact/{where.name}/{tower.name}",
            "of the weights under test",
            float(same),
            ">=",
            1,
            unit="share",
            count=1,
            where=where,
            worst=f"{file.name} is of weights {found}, under test are {weights[:12]}",
        )
    ]


def values(found: Embeddings, where: Identity, tower: Tower, bounds: ParityBounds, ids: Sequence[str]) -> List[Figure]:
    """Every sample has one finite embedding of the contract's width and of length one, none saturated."""
    gate = f"values/{where.name}/{tower.name}"
    wide = found.values.astype(np.float64)
    shape_ok = found.ids == tuple(ids) and wide.shape == (len(ids), tower.width)
    bad = ~np.isfinite(wide).all(axis=1) | (np.abs(wide) >= 65504).any(axis=1)
    norm = np.abs(np.linalg.norm(np.where(np.isfinite(wide), wide, 0), axis=1) - 1)
    common: Dict[str, Any] = {"where": where, "count": len(wide)}
    worst = int(np.argmax(norm))
    first = f"first bad sample {found.ids[int(np.argmax(bad))]}" if bad.any() else ""
    return [
        judge(gate, "ids, count and width", float(shape_ok), ">=", 1, unit="share", **common),
        judge(gate, "NaN, Inf or +-65504", float(bad.sum()), "<=", 0, unit="samples", worst=first, **common),
        judge(
            gate,
            "|L2 norm - 1|",
            norm[worst],
            "<=",
            bounds.norm,
            unit="absolute",
            worst=f"sample {found.ids[worst]}",
            because=bounds.because,
            **common,
        ),
    ]


def distinct(found: Embeddings, where: Identity, tower: Tower, rows: np.ndarray) -> List[Figure]:
    """Different inputs give different embeddings.

    A text tower whose ArgMax runs in fp16 pools at the start token and gives every caption the same embedding.

    Args:
        rows: one digest per input, equal for equal inputs: [n].
    """
    gate = f"distinct/{where.name}/{tower.name}"
    unit = _unit(found.values)
    _, first = np.unique(rows, return_index=True)
    unit = unit[np.sort(first)]
    names = [found.ids[n] for n in np.sort(first)]
    twins, example = _nearest(unit)
    worst = f"samples {names[example[0]]} and {names[example[1]]}" if twins else ""
    limit = 0.0
    spread = float(1 - np.square(unit.mean(axis=0)).sum())
    common: Dict[str, Any] = {"where": where, "count": len(unit)}
    return [
        judge(gate, "inputs with one embedding", twins, "<=", limit, unit="samples", worst=worst, **common),
        judge(gate, "spread (1 - |mean|^2)", spread, ">=", 1e-3, unit="absolute", **common),
    ]


def _unit(values_: np.ndarray) -> np.ndarray:
    wide = values_.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit: np.ndarray = np.nan_to_num(wide / np.linalg.norm(wide, axis=1, keepdims=True))
    return unit


def _nearest(unit: np.ndarray) -> Any:
    """How many rows have another row within `SAME`, and one such pair."""
    twins, example = 0, (0, 0)
    for start in range(0, len(unit), 1024):
        block = unit[start : start + 1024] @ unit.T
        block[np.arange(len(block)), start + np.arange(len(block))] = -1
        near = block.max(axis=1)
        close = near > 1 - SAME
        twins += int(close.sum())
        if close.any():
            row = int(np.argmax(close))
            example = (start + row, int(block[row].argmax()))
    return twins, example


def invariance_samples(count: int) -> np.ndarray:
    """Indices spread over the set, the last sample among them: it is the one that padding stands behind."""
    return np.unique(np.linspace(0, count - 1, min(count, INVARIANCE_SAMPLES)).round().astype(int))


def invariance(
    whole: Embeddings, single: Embeddings, shuffled: Embeddings, where: Identity, tower: Tower, bounds: ParityBounds
) -> List[Figure]:
    """A sample's embedding depends neither on its batch size nor on its neighbours.

    Args:
        whole: the accuracy run, in batches; single: some of its samples one at a time; shuffled: the same samples in
            another order and so with other neighbours.
    """
    figures = []
    row = {name: n for n, name in enumerate(whole.ids)}
    for metric, other in (("in batches of 1", single), ("reordered", shuffled)):
        compared = parity.compare(other.ids, whole.values[[row[name] for name in other.ids]], other.values)
        worst = int(np.argmax(np.nan_to_num(compared.max_abs, nan=np.inf)))
        figures.append(
            judge(
                f"invariance/{where.name}/{tower.name}",
                f"|difference| {metric}",
                compared.max_abs[worst],
                "<=",
                bounds.max_abs,
                unit="absolute",
                count=len(other.ids),
                where=where,
                worst=f"sample {other.ids[worst]}",
                because=bounds.because,
            )
        )
    return figures


def agreement(
    reference: Embeddings, found: Embeddings, where: Identity, tower: Tower, bounds: ParityBounds
) -> List[Figure]:
    """Per-sample parity with the reference: minimum and mean cosine, largest difference of one element."""
    gate = f"parity/{where.name}/{tower.name}"
    compared = parity.compare(found.ids, reference.values, found.values)
    worst = compared.worst()
    named = "worst samples " + ", ".join(f"{one['id']} ({one['cosine']:.6f})" for one in worst)
    largest = int(np.argmax(np.nan_to_num(compared.max_abs, nan=np.inf)))
    common: Dict[str, Any] = {"where": where, "count": len(found.ids), "because": bounds.because}
    return [
        judge(
            gate,
            "minimum cosine",
            compared.cosine.min(),
            ">=",
            bounds.cosine_min,
            unit="cosine",
            worst=named,
            detail=compared.detail(),
            **common,
        ),
        judge(gate, "mean cosine", compared.cosine.mean(), ">=", bounds.cosine_mean, unit="cosine", **common),
        judge(
            gate,
            "max |difference|",
            compared.max_abs[largest],
            "<=",
            bounds.max_abs,
            unit="absolute",
            worst=f"sample {found.ids[largest]}",
            **common,
        ),
    ]


def golden(pinned: Embeddings, reference: Embeddings, where: Identity, tower: Tower, spec: GoldenSpec) -> List[Figure]:
    """PyTorch still makes what it once made of a few samples: parity cannot see what is wrong in every backend alike.

    Raises:
        InputError: a pinned sample is not in the data.
    """
    row = {name: n for n, name in enumerate(reference.ids)}
    lost = [name for name in pinned.ids if name not in row]
    if lost:
        raise InputError(f"golden embeddings {spec.file}: sample {lost[0]} is not in the data; run clipval pin again")
    found = reference.values[[row[name] for name in pinned.ids]]
    compared = parity.compare(pinned.ids, pinned.values, found)
    named = ", ".join(f"{one['id']} ({one['cosine']:.6f})" for one in compared.worst())
    return [
        judge(
            f"golden/{where.name}/{tower.name}",
            "minimum cosine with pinned embeddings",
            compared.cosine.min(),
            ">=",
            spec.cosine_min,
            unit="cosine",
            count=len(pinned.ids),
            where=where,
            worst=f"worst samples {named}",
            because=spec.because,
        )
    ]


def recall(found: retrieval.Retrieval, where: Identity, spec: Spec, metric: str) -> List[Figure]:
    """One recall figure against its published or pinned one; too good is as suspect as too bad."""
    direction, k = _direction(found, metric)
    measured = direction.recall(k)
    reference = spec.reference(metric, where.name)
    gate = f"recall/{where.name}/{metric}"
    assert reference is not None
    if reference.within is None:
        return [_shown(gate, metric, measured, direction, reference, where, spec)]
    off = round((measured - reference.value) * len(direction.ranks))
    return [
        judge(
            gate,
            metric,
            measured,
            "within",
            reference.within,
            unit="share",
            count=len(direction.ranks),
            where=where,
            reference=reference.value,
            source=reference.source,
            worst=f"{off:+d} of {len(direction.ranks)} queries",
            because=reference.because,
            detail=_recall_detail(direction, spec, metric),
        )
    ]


def _recall_detail(direction: retrieval.Direction, spec: Spec, metric: str) -> Dict[str, Any]:
    """What a report shows beside a recall: other k, the interval, and every published figure of this model."""
    figures: List[Dict[str, Any]] = [
        {"backend": one.backend, "value": one.value, "source": one.source}
        for one in spec.references
        if one.metric == metric
    ]
    rows = published(spec.model.name, spec.model.pretrained, spec.data.name)
    figures += [{"value": row.recalls[metric], "source": row.source} for row in rows if row.recalls.get(metric)]
    return {**direction.detail(), "published": figures}


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
        context=context(where),
        detail=_recall_detail(direction, spec, metric),
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
        f"paired/{where.name}/{bounds.metric}",
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
        detail={
            "gains": result.gains,
            "losses": result.losses,
            "p_value": result.p_value,
            "flips": [{**one, "retrieved": retrieved(result.name, one["id"])} for one in result.flips[:SHOWN_FLIPS]],
        },
    )
    return [figure]


def _direction(found: retrieval.Retrieval, metric: str) -> Any:
    """`image_retrieval_recall@5` -> (that direction, 5)."""
    name, _, k = metric.partition("_recall@")
    return {one.name: one for one in found.directions}[name], int(k)
