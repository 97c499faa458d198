"""Gates of a backend's embeddings, and of PyTorch's against pinned ones."""

from __future__ import annotations

from typing import Any, Dict, List, Sequence

import numpy as np

from clipval import arrays, parity
from clipval.backends import REFERENCE, Identity
from clipval.embeddings import Embeddings, Golden
from clipval.errors import InputError
from clipval.gates.gate import ACCURACY, Gate, judge
from clipval.results import Figure, ProbeDetail
from clipval.spec import GoldenSpec, ParityBounds
from clipval.towers import Tower

VALUES = Gate("values", ACCURACY, ("backend_name", "tower_name"))
DISTINCT = Gate("distinct", ACCURACY, ("backend_name", "tower_name"))
INVARIANCE = Gate("invariance", ACCURACY, ("backend_name", "tower_name"), also_in_batches_of=(1,))
GOLDEN = Gate(
    "golden",
    ACCURACY,
    ("backend_name", "tower_name"),
    lambda plan, backend, tower: backend == REFERENCE and plan.spec.golden is not None,
)
BATCHES = Gate("batches", ACCURACY, ("backend_name", "tower_name", "batch_size"))
PROBE = Gate("probe", ACCURACY, ("backend_name", "tower_name"), lambda plan, backend, tower: backend != REFERENCE)
INVARIANCE_SAMPLES = 32
SAME = 1e-7  # cosine distance below which two fp32 embeddings are equal; one more word in a caption changes it by 1e-4


def values(found: Embeddings, where: Identity, tower: Tower, bounds: ParityBounds, ids: Sequence[str]) -> List[Figure]:
    """Every sample has one finite, unsaturated, unit-length embedding of the contract's width."""
    gate = VALUES.of(where.name, tower.name)
    wide = found.values.astype(np.float64)
    shape_ok = found.ids == tuple(ids) and wide.shape == (len(ids), tower.width)
    bad = ~np.isfinite(wide).all(axis=1) | (np.abs(wide) >= 65504).any(axis=1)
    norm = np.abs(np.linalg.norm(np.where(np.isfinite(wide), wide, 0), axis=1) - 1)
    common: Dict[str, Any] = {"where": where, "count": len(wide)}
    worst = int(np.argmax(norm))
    first = f"first bad sample {found.ids[int(np.argmax(bad))]}" if bad.any() else ""
    return [
        judge(gate, "wrong ids, count and width", float(not shape_ok), "<=", 0, unit="embeddings", **common),
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
    """Different inputs have different embeddings.

    A text tower whose ArgMax runs in fp16 pools at the start token, so every caption has the same embedding.

    Args:
        rows: one digest per input, equal for equal inputs: [n].
    """
    gate = DISTINCT.of(where.name, tower.name)
    unit = np.nan_to_num(arrays.unit(found.values))
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


def _nearest(unit: np.ndarray) -> Any:
    """The number of rows with another row within `SAME`, and one such pair."""
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
    """Indices spread over the data set, including the last sample, after which the batch is padded."""
    return arrays.spread(count, INVARIANCE_SAMPLES)


def invariance(
    whole: Embeddings, single: Embeddings, shuffled: Embeddings, where: Identity, tower: Tower, bounds: ParityBounds
) -> List[Figure]:
    """A sample's embedding depends neither on its batch size nor on the other samples of the batch.

    Args:
        whole: the accuracy run, in batches; single: some of its samples one at a time; shuffled: the same samples in
            another order, and so in other batches.
    """
    figures = []
    row = {name: n for n, name in enumerate(whole.ids)}
    for metric, other in (("in batches of 1", single), ("reordered", shuffled)):
        compared = parity.compare(other.ids, whole.values[[row[name] for name in other.ids]], other.values)
        worst = int(np.argmax(np.nan_to_num(compared.max_abs, nan=np.inf)))
        figures.append(
            judge(
                INVARIANCE.of(where.name, tower.name),
                f"|difference| {metric}",
                compared.max_abs[worst],
                "<=",
                bounds.invariance,
                unit="absolute",
                count=len(other.ids),
                where=where,
                worst=f"sample {other.ids[worst]}",
                because=bounds.because,
            )
        )
    return figures


def batch_samples(count: int, batch_size: int) -> np.ndarray:
    """Indices of two full batches and a partial one, spread over the data set; distinct if it is large enough."""
    wanted = 2 * batch_size + (batch_size // 2 or 1)
    return np.linspace(0, count - 1, wanted).round().astype(int) if wanted <= count else np.arange(wanted) % count


def batches(
    reference: Embeddings, found: Embeddings, where: Identity, tower: Tower, bounds: ParityBounds, batch_size: int
) -> List[Figure]:
    """A batch size agrees with the reference on every row of two full batches and a partial one.

    Each OM file has one batch size and is compiled separately, so each can be wrong.

    Args:
        reference, found: embeddings of the same rows in the same order.
    """
    gate = BATCHES.of(where.name, tower.name, batch_size)
    compared = parity.compare(found.ids, reference.values, found.values)
    far, off = (np.nan_to_num(one, nan=np.inf) for one in (1 - compared.cosine, compared.max_abs))
    common: Dict[str, Any] = {"where": where, "count": len(found.ids), "because": bounds.because}

    def row(n: int) -> str:
        return f"sample {found.ids[n]}, row {n % batch_size} of batch {n // batch_size}"

    worst, largest = int(np.argmax(far)), int(np.argmax(off))
    cosine = compared.cosine[worst]
    return [
        judge(gate, "minimum cosine", cosine, ">=", bounds.cosine_min, unit="cosine", worst=row(worst), **common),
        judge(
            gate, "max |difference|", off[largest], "<=", bounds.max_abs, unit="absolute", worst=row(largest), **common
        ),
    ]


def probe(
    reference: Embeddings, found: Embeddings, where: Identity, tower: Tower, bounds: ParityBounds, seed: int
) -> List[Figure]:
    """Inputs drawn for this run have PyTorch's embeddings, finite and within the bounds of parity.

    Token rows of every length over the whole vocabulary, and extreme pictures; see `clipval.probe`. A backend that
    returns stored results has none for them.
    """
    gate = PROBE.of(where.name, tower.name)
    compared = parity.compare(found.ids, reference.values, found.values)
    far, off = (np.nan_to_num(one, nan=np.inf) for one in (1 - compared.cosine, compared.max_abs))
    bad = ~np.isfinite(found.values).all(axis=1)
    again = f"repeat with --probe-seed {seed}"
    common: Dict[str, Any] = {"where": where, "count": len(found.ids)}

    def named(n: int) -> str:
        return f"input {found.ids[n]!r}; {again}"

    worst, largest = int(np.argmax(far)), int(np.argmax(off))
    wide: Dict[str, Any] = {"because": bounds.because, **common}
    return [
        judge(
            gate,
            "NaN or Inf",
            float(bad.sum()),
            "<=",
            0,
            unit="samples",
            worst=named(int(np.argmax(bad))) if bad.any() else "",
            detail=ProbeDetail(seed),
            **common,
        ),
        judge(
            gate,
            "minimum cosine",
            compared.cosine[worst],
            ">=",
            bounds.cosine_min,
            unit="cosine",
            worst=named(worst),
            **wide,
        ),
        judge(
            gate, "max |difference|", off[largest], "<=", bounds.max_abs, unit="absolute", worst=named(largest), **wide
        ),
    ]


def golden(
    pinned: Golden, found: Embeddings, inputs_sha256: str, where: Identity, tower: Tower, spec: GoldenSpec
) -> List[Figure]:
    """PyTorch still computes the pinned embeddings of the probe inputs of seed 0.

    Parity cannot detect what is wrong in every backend alike: another activation, epsilon or attention scale.

    Args:
        found: PyTorch's embeddings now; inputs_sha256: of the inputs.
    """
    least = {"vision": spec.vision_min, "text": spec.text_min}[tower.name]
    gate = GOLDEN.of(where.name, tower.name)
    same = judge(
        gate,
        "other probe inputs than the pinned ones",
        float(inputs_sha256 != pinned.probe_sha256),
        "<=",
        0,
        unit="files",
        count=len(found.ids),
        worst="the model's transform or tokenizer changed",
        failure="input",
    )
    return [same, _pinned(gate, "minimum cosine of probe inputs", pinned.of_probe, found, least, where, spec)]


def golden_of_data(
    pinned: Embeddings, reference: Embeddings, where: Identity, tower: Tower, spec: GoldenSpec
) -> List[Figure]:
    """PyTorch still computes the pinned embeddings of the data set's files, including decoder and tokenizer.

    Raises:
        InputError: a pinned sample is not in the data.
    """
    row = {name: n for n, name in enumerate(reference.ids)}
    lost = [name for name in pinned.ids if name not in row]
    if lost:
        raise InputError(f"golden embeddings {spec.file}: sample {lost[0]} is not in the data; run clipval pin again")
    found = Embeddings(pinned.ids, reference.values[[row[name] for name in pinned.ids]])
    gate = GOLDEN.of(where.name, tower.name)
    return [_pinned(gate, "minimum cosine of the data's files", pinned.values, found, spec.cosine_min, where, spec)]


def _pinned(
    gate: str, metric: str, pinned: np.ndarray, found: Embeddings, least: float, where: Identity, spec: GoldenSpec
) -> Figure:
    compared = parity.compare(found.ids, pinned, found.values)
    named = ", ".join(f"{one['id']} ({one['cosine']:.6f})" for one in compared.worst())
    return judge(
        gate,
        metric,
        compared.cosine.min(),
        ">=",
        least,
        unit="cosine",
        count=len(found.ids),
        where=where,
        worst=f"worst samples {named}",
        because=spec.because,
    )
