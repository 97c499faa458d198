"""Gates of a backend's embeddings, and of PyTorch's against pinned ones."""

from __future__ import annotations

from functools import partial
from typing import List, Optional, Sequence, Tuple

import numpy as np

from clipval import arrays, parity
from clipval.backends import REFERENCE, Identity
from clipval.embeddings import Embeddings, Golden
from clipval.errors import InputError
from clipval.gates.gate import ACCURACY, Gate, judge
from clipval.results import Figure, ProbeDetail, number
from clipval.spec import GoldenSpec, ParityBounds
from clipval.towers import Tower

VALUES = Gate("values", ACCURACY, ("backend_name", "tower_name"), figures=3)
DISTINCT = Gate("distinct", ACCURACY, ("backend_name", "tower_name"), figures=2)
INVARIANCE = Gate("invariance", ACCURACY, ("backend_name", "tower_name"), also_in_batches_of=(1,), figures=2)
GOLDEN = Gate(
    "golden",
    ACCURACY,
    ("backend_name", "tower_name"),
    lambda plan, backend, tower: backend == REFERENCE and plan.spec.golden is not None,
    figures=3,
)
BATCHES = Gate("batches", ACCURACY, ("backend_name", "tower_name", "batch_size"), figures=2)
PROBE = Gate(
    "probe",
    ACCURACY,
    ("backend_name", "tower_name"),
    lambda plan, backend, tower: backend != REFERENCE,
    figures=3,
    data=False,
)
INVARIANCE_SAMPLES = 32
SAME = 1e-7  # cosine distance below which two fp32 embeddings are equal; one more word in a caption changes it by 1e-4
RAW = 0.1  # a length further off in every sample is no rounding: no bound is wider (`clipval.spec.MOST`)
SPREAD = 1e-3  # of the embeddings of a trained tower, at least; of untrained ones see `distinct`
ROUNDING = 1e-12  # cosine distance below which one input in two batches may lie in fp32 (measured: 2e-13)
BLOCK = 1024  # rows of a block of distances: 8 MiB in float64
COLLAPSED = 100  # times nearer than the reference has it: two inputs that a backend took for one


def values(found: Embeddings, where: Identity, tower: Tower, bounds: ParityBounds, ids: Sequence[str]) -> List[Figure]:
    """Every sample has one finite, unsaturated, unit-length embedding of the contract's width."""
    gate = VALUES.of(where.name, tower.name)
    wide = found.values.astype(np.float64)
    shape_ok = found.ids == tuple(ids) and wide.shape == (len(ids), tower.width)
    bad = ~np.isfinite(wide).all(axis=1) | (np.abs(wide) >= 65504).any(axis=1)
    norm = np.abs(np.linalg.norm(np.where(np.isfinite(wide), wide, 0), axis=1) - 1)
    judged = partial(judge, gate, where=where, count=len(wide))
    worst = int(np.argmax(norm))
    first = f"first bad sample {found.ids[int(np.argmax(bad))]}" if bad.any() else ""
    raw = norm.min() > RAW
    return [
        judged("wrong ids, count and width", float(not shape_ok), "<=", 0, unit="embeddings"),
        judged("NaN, Inf or +-65504", float(bad.sum()), "<=", 0, unit="samples", worst=first),
        judged(
            "|L2 norm - 1|",
            norm[worst],
            "<=",
            bounds.norm,
            unit="absolute",
            worst=f"sample {found.ids[worst]}",
            because="no embedding is of unit length: the file ends before the normalisation" if raw else bounds.because,
        ),
    ]


def distinct(
    found: Embeddings, where: Identity, tower: Tower, rows: np.ndarray, untrained: Optional[Embeddings] = None
) -> List[Figure]:
    """Different inputs have different embeddings.

    A text tower whose ArgMax runs in fp16 pools at the start token, so every caption has the same embedding.

    Args:
        rows: one digest per input, equal for equal inputs: [n].
        untrained: the reference's embeddings of the same inputs where the weights are seeded. Some networks spread
            nothing before they are trained (a seeded FastViT gives two pictures a cosine of 1 - 4e-8), so that no
            fixed bound holds: a backend must keep apart what the reference does, the reference more than rounding.
    """
    gate = DISTINCT.of(where.name, tower.name)
    _, first = np.unique(rows, return_index=True)
    picked = np.sort(first)
    unit = np.nan_to_num(arrays.unit(found.values[picked]))
    names = [found.ids[n] for n in picked]
    near, other = _nearest(unit)
    limits, because = (np.full(len(unit), SAME), SPREAD), ""
    if untrained is not None:
        seeded = np.nan_to_num(arrays.unit(untrained.values[picked]))
        limits = (np.maximum(ROUNDING, _nearest(seeded)[0] / COLLAPSED), max(ROUNDING, _spread(seeded) / 2))
        because = "seeded weights: rounding adds to the distances that the reference has, only a collapse takes from it"
    twins = near < limits[0]
    first_twin = int(np.argmax(twins))
    worst = f"samples {names[first_twin]} and {names[other[first_twin]]}" if twins.any() else ""
    judged = partial(judge, gate, where=where, count=len(unit), because=because)
    return [
        judged("inputs with one embedding", float(twins.sum()), "<=", 0, unit="samples", worst=worst),
        judged("spread (1 - |mean|^2)", _spread(unit), ">=", limits[1], unit="absolute"),
    ]


def _spread(unit: np.ndarray) -> float:
    return float(1 - np.square(unit.mean(axis=0)).sum())


def _nearest(unit: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Each row's cosine distance to the nearest other row, and which row that is: [n], [n]."""
    near, other = np.full(len(unit), np.inf), np.zeros(len(unit), int)

    def keep(start: int, far: np.ndarray, first: int) -> None:
        """Of rows from `start`, with their distances to the rows from `first`."""
        best, rows = far.argmin(axis=1), np.arange(len(far))
        nearer = far[rows, best] < near[start : start + len(far)]
        near[start + rows[nearer]], other[start + rows[nearer]] = far[rows, best][nearer], first + best[nearer]

    for start in range(0, len(unit), BLOCK):
        for after in range(start, len(unit), BLOCK):  # each pair once: half the products
            far = 1 - unit[start : start + BLOCK] @ unit[after : after + BLOCK].T
            if after == start:
                np.fill_diagonal(far, np.inf)
            else:
                keep(after, far.T, start)
            keep(start, far, after)
    return near, other


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
    return arrays.spread(count, wanted) if wanted <= count else np.arange(wanted) % count


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
    judged = partial(judge, gate, where=where, count=len(found.ids), because=bounds.because)

    def row(n: int) -> str:
        return f"sample {found.ids[n]}, row {n % batch_size} of batch {n // batch_size}"

    worst, largest = int(np.argmax(far)), int(np.argmax(off))
    cosine = compared.cosine[worst]
    return [
        judged("minimum cosine", cosine, ">=", bounds.cosine_min, unit="cosine", worst=row(worst)),
        judged("max |difference|", off[largest], "<=", bounds.max_abs, unit="absolute", worst=row(largest)),
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
    judged = partial(judge, gate, where=where, count=len(found.ids))

    def named(n: int) -> str:
        return f"input {found.ids[n]!r}; {again}"

    worst, largest = int(np.argmax(far)), int(np.argmax(off))
    return [
        judged(
            "NaN or Inf",
            float(bad.sum()),
            "<=",
            0,
            unit="samples",
            worst=named(int(np.argmax(bad))) if bad.any() else "",
            detail=ProbeDetail(seed),
        ),
        judged(
            "minimum cosine",
            compared.cosine[worst],
            ">=",
            bounds.cosine_min,
            unit="cosine",
            worst=named(worst),
            because=bounds.because,
        ),
        judged(
            "max |difference|",
            off[largest],
            "<=",
            bounds.max_abs,
            unit="absolute",
            worst=named(largest),
            because=bounds.because,
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
    named = ", ".join(f"{one['id']} ({number(one['cosine'], 'cosine')})" for one in compared.worst())
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
