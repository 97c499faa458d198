"""Gates of intermediate artifacts: the prepared arrays and the ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from clipval import datasets
from clipval.arrays import PreparedRows
from clipval.backends import Identity, kind
from clipval.backends.placement import Placement
from clipval.datasets import RetrievalDataset
from clipval.environment import release_memory
from clipval.export import check, read_metadata
from clipval.gates.gate import ACCURACY, Gate, judge
from clipval.model import Model
from clipval.preprocess import each_in_threads, expected_pixels, pixels, tokens
from clipval.results import INFO, Figure, PlacementDetail
from clipval.spec import Spec
from clipval.towers import Tower

PREPARED_IMAGES = Gate("prepared/data/vision", ACCURACY, figures=3)
PREPARED_TEXTS = Gate("prepared/data/text", ACCURACY)
ARTIFACT = Gate(
    "artifact",
    ACCURACY,
    ("backend_name", "tower_name"),
    lambda plan, backend, tower: kind(backend).takes_onnx,
    data=False,
)
PIXELS = 1e-5  # a rounding of normalised float32 pixels; one grey level is 0.015


def prepared_images(
    data: PreparedRows, dataset: RetrievalDataset, model: Model, spec: Spec, digests: np.ndarray
) -> List[Figure]:
    """Prepared pixels are bit for bit the model's own transform of the images, and follow the spec's transform.

    The second comparison does not use the model's transform, so it detects a wrong mean, crop, channel order or resize.

    Args:
        digests: one per image, equal for equal pixels: [n].
    """
    size, stated = (data.tower.row_shape[1], data.tower.row_shape[2]), spec.preprocess or model.preprocess

    def compare(n: int) -> Tuple[float, float]:
        found, path = data[[n]][0], dataset.image_paths[n]
        return _furthest(found, pixels(path, model)), _furthest(found, expected_pixels(path, size, stated))

    off = np.array(each_in_threads(compare, range(len(data)), "check images", len(data)))
    _, first = np.unique(digests, return_index=True)
    again = np.setdiff1d(np.arange(len(digests)), first)
    figures = [
        _prepared(PREPARED_IMAGES, "|pixel - transform's|", off[:, 0], 0.0, data.ids),
        _prepared(PREPARED_IMAGES, "|pixel - the spec's|", off[:, 1], PIXELS, data.ids),
        judge(
            PREPARED_IMAGES.of(),
            "duplicate images",
            len(again),
            "<=",
            spec.data.duplicates,
            unit="images",
            count=len(data),
            worst=f"sample {data.ids[again[0]]}" if len(again) else "",
            because="an image with two ids has two right answers; the spec's data.duplicates allows some",
            failure="input",
        ),
    ]
    known = datasets.kind(spec.data.kind).off
    if known is not None:
        apart = known(dataset)
        figures.append(_prepared(PREPARED_IMAGES, "|picture - drawn| / JPEG tolerance", apart, 1.0, dataset.image_ids))
    if spec.data.fingerprint:
        other = np.array([dataset.fingerprint() != spec.data.fingerprint])
        figures.append(
            _prepared(PREPARED_IMAGES, "files that differ from the spec's", other, 0.0, ["some image or caption"])
        )
    return figures


def prepared_texts(data: PreparedRows, dataset: RetrievalDataset, model: Model, spec: Spec) -> List[Figure]:
    """Prepared tokens are those of the model's own tokenizer for every caption, and the captions are the spec's."""
    found = data[:]
    off = (found != tokens(dataset.captions, model, data.tower)).sum(axis=1)
    figures = [_prepared(PREPARED_TEXTS, "tokens that differ", off, 0.0, data.ids)]
    if spec.data.captions_sha256:
        same = np.array([dataset.captions_sha256() != spec.data.captions_sha256])
        figures.append(
            _prepared(
                PREPARED_TEXTS, "captions that differ from the spec's, or their images", same, 0.0, ["annotation file"]
            )
        )
    return figures


def _furthest(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest |difference|; of equal pixels, which nearly all are, it is not computed: that takes 20 times as long."""
    return 0.0 if np.array_equal(found, wanted) else float(np.abs(found - wanted).max())


def _prepared(gate: Gate, metric: str, off: np.ndarray, limit: float, ids: Sequence[str]) -> Figure:
    worst = int(np.argmax(np.nan_to_num(off, nan=np.inf)))
    return judge(
        gate.of(),
        metric,
        float(off.max()),
        "<=",
        limit,
        unit="absolute",
        count=len(off),
        worst=f"sample {ids[worst]}",
        failure="input",
    )


def examine(file: Path, tower: Tower, *, ready: bool = False) -> Dict[str, str]:
    """Metadata of an ONNX file that follows the contract; the user's own ready one need not.

    Reading it takes twice its size in memory, so it comes before a backend opens the file.
    """
    metadata = read_metadata(file)
    if not ready:
        check(file, tower)
    release_memory()
    return metadata


def artifact(
    file: Path,
    metadata: Dict[str, str],
    tower: Tower,
    weights: str,
    where: Identity,
    placement: Optional[Placement] = None,
    *,
    ready: bool = False,
) -> List[Figure]:
    """The ONNX file follows the contract and was exported from the weights under test.

    Args:
        metadata: of the file, as `examine` gave it.
        placement: which operators run where in the backend that opened it; only shown, since opening it checks them.
        ready: the user's own file: opening it checked that it can be this tower; if it does not state its weights, only
        parity can tell.
    """
    if ready and "clipval.weights" not in metadata:
        return [_ready(file, tower, where), *([] if placement is None else [_placed(placement, where, tower)])]
    same = metadata.get("clipval.weights") == weights and metadata.get("clipval.normalized") == "true"
    found = metadata.get("clipval.weights", "none")[:12]
    return [
        judge(
            ARTIFACT.of(where.name, tower.name),
            "not of the weights under test",
            float(not same),
            "<=",
            0,
            unit="files",
            count=1,
            where=where,
            worst=f"{file.name} is of weights {found}, under test are {weights[:12]}",
        ),
        *([] if placement is None else [_placed(placement, where, tower)]),
    ]


def _ready(file: Path, tower: Tower, where: Identity) -> Figure:
    return Figure(
        gate=ARTIFACT.of(where.name, tower.name),
        metric="ready file that does not state its weights",
        unit="files",
        measured=1,
        count=1,
        source=file.name,
        verdict=INFO,
        made_by=where,
    )


def _placed(placement: Placement, where: Identity, tower: Tower) -> Figure:
    strayed = sum(placement.strayed.values())
    listed = "; ".join(
        f"{provider}: " + ", ".join(f"{name} {count}" for name, count in sorted(found.items(), key=lambda one: -one[1]))
        for provider, found in placement.operators.items()
    )
    return Figure(
        gate=ARTIFACT.of(where.name, tower.name),
        metric="operators on the CPU instead of the provider",
        unit="operators",
        measured=strayed,
        count=sum(sum(found.values()) for found in placement.operators.values()),
        source=f"the session's {placement.witness}",
        verdict=INFO,
        message=listed,
        made_by=where,
        detail=PlacementDetail(placement.operators, placement.strayed, placement.witness),
    )
