"""Checks before any tap is compared: inputs, weights, order, normalisation, batch, outputs.

Each check returns sentences; none if nothing was found.
"""

from __future__ import annotations

from typing import Dict, List, Mapping, Optional, Sequence

import numpy as np

from clipval.diagnose.graph import Graph
from clipval.diagnose.pairs import distance
from clipval.results import number

ALIKE = 0.98  # cosine above which two embeddings count as the same sample's
NEARER = 0.1  # a moved sample is nearer to its true place than that share of its distance from its own
ALIKE_VALUES = 0.05  # relative distance up to which an output is the embedding, with the noise of any precision
SAME_WEIGHTS = 2e-2  # relative distance up to which weights count as the same, rounded or edited


def inputs(ids: Sequence[str], prepared: np.ndarray, fresh: np.ndarray) -> List[str]:
    """Prepared rows against the model's own transform or tokenizer, run now on the same samples."""
    off = np.array([np.abs(a.astype(np.float64) - b).max() for a, b in zip(prepared, fresh)])
    if not (off > 0).any():
        return []
    n, what = int(np.argmax(off)), "tokens" if prepared.dtype.kind == "i" else "pixels"
    return [
        f"{what} differ from the model's own: {int((off > 0).sum())} of {len(ids)} samples, {ids[n]} by up to "
        f"{off[n]:.2g}{_how(prepared, fresh, n)}; every backend gets these, so parity cannot detect it. Prepare the "
        f"data again (--rebuild)"
    ]


def _how(prepared: np.ndarray, fresh: np.ndarray, n: int) -> str:
    """In which way inputs differ, if that is plain: a linear step per channel, channels in another order, tokens."""
    if prepared.dtype.kind == "i":
        place = int(np.argmax(prepared[n] != fresh[n]))
        return f" (token {place} is {prepared[n][place]}, the tokenizer gives {fresh[n][place]})"
    given, right = np.asarray(prepared[n], np.float64), np.asarray(fresh[n], np.float64)
    if given.ndim != 3 or given.shape != right.shape:
        return ""
    if np.allclose(given[::-1], right, atol=1e-5):
        return " (channels in reverse order: BGR for RGB)"
    fits = [np.polyfit(b.ravel(), a.ravel(), 1) for a, b in zip(given, right) if np.ptp(b) > 0]
    if not fits or any(np.abs(np.polyval(fit, b) - a).max() > 1e-3 for fit, a, b in zip(fits, given, right)):
        return ""
    slopes = [float(fit[0]) for fit in fits]
    word = (
        "normalised twice" if min(slopes) > 1.5 and max(slopes) < 10 else "not normalised" if max(slopes) < 0.7 else ""
    )
    return f" (as if {word})" if word else f" (scaled by {min(slopes):.3g} to {max(slopes):.3g})"


def swapped(outputs: Mapping[str, np.ndarray], taken: str, reference: np.ndarray) -> List[str]:
    """Another output of the file is the embedding, the one that is taken is not.

    Args:
        outputs: every output of the graph, of the same samples as the reference.
    """
    off = {name: distance(values, reference) for name, values in outputs.items() if values.size == reference.size}
    best = min(off, key=lambda name: off[name], default=taken)
    if best == taken or off[best] > ALIKE_VALUES or off.get(taken, np.inf) <= ALIKE_VALUES:
        return []
    return [f"outputs are swapped: {best} is PyTorch's embedding, but {taken} is taken; name the embedding as expected"]


def embeddings(ids: Sequence[str], reference: np.ndarray, candidate: np.ndarray) -> List[str]:
    """Check length, order and distinctness of a candidate's embeddings of a few samples.

    Args:
        reference, candidate: [n, width], of the same samples in the same order.
    """
    if candidate.shape != reference.shape:
        return [f"the output is {list(candidate.shape)}, the tower gives {list(reference.shape)}: another output?"]
    if not np.isfinite(candidate).all():
        return []  # the ladder finds where that starts
    wide, ours = candidate.astype(np.float64), reference.astype(np.float64)
    lengths, wanted = np.linalg.norm(wide, axis=1), np.linalg.norm(ours, axis=1)
    unit, true = wide / np.maximum(lengths, 1e-30)[:, None], ours / np.maximum(wanted, 1e-30)[:, None]
    said = []
    if np.abs(lengths - 1).max() > 1e-2 and np.abs(wanted - 1).max() < 1e-2:
        said.append(
            f"the embeddings are not normalised: their lengths are {lengths.min():.3g} to {lengths.max():.3g}, "
            f"expected 1. Export with clipval, or normalise in the graph"
        )
    near = unit @ true.T
    return said + _order(ids, near) + _repeated(ids, unit, true)


def _order(ids: Sequence[str], near: np.ndarray) -> List[str]:
    """Samples that have another sample's embedding."""
    own, best = np.diag(near), near.argmax(axis=1)
    # captions of one image are so alike that an error may bring one nearer to another
    far, least = 1 - own, 1 - near.max(axis=1)
    moved = [n for n in range(len(ids)) if least[n] < min(1 - ALIKE, far[n] - 1e-3, NEARER * far[n])]
    if not moved:
        return []
    n = moved[0]
    return [
        f"samples are in another order: {ids[n]} has the embedding of {ids[best[n]]} (cosine "
        f"{number(near[n, best[n]], 'cosine')}, its own {number(own[n], 'cosine')}), "
        f"{len(moved)} of {len(ids)} are affected"
    ]


def _repeated(ids: Sequence[str], unit: np.ndarray, true: np.ndarray) -> List[str]:
    """Samples with the same embedding although PyTorch's differ: a batch padded with copies, or wrong pooling."""
    same = (unit @ unit.T > 1 - 1e-7) & (true @ true.T < 1 - 1e-5)
    pairs = np.argwhere(np.triu(same, 1))
    if not len(pairs):
        return []
    a, b = pairs[0]
    return [f"samples {ids[a]} and {ids[b]} have the same embedding, PyTorch's differ: padding, or wrong pooling"]


def batches(ids: Sequence[str], here: np.ndarray, elsewhere: np.ndarray, bound: float) -> List[str]:
    """Whether a sample's embedding depends on its batch.

    Args:
        here, elsewhere: [n, width], of the same samples, the second time at other places in the batch.
        bound: largest difference of one element, e.g. that of parity.
    """
    if here.shape != elsewhere.shape or not np.isfinite(here).all():
        return []
    off = np.abs(here.astype(np.float64) - elsewhere).max(axis=1)
    n = int(np.nan_to_num(off, nan=np.inf).argmax())
    if not off[n] > bound:
        return []
    return [
        f"sample {ids[n]} depends on its batch: at another place in it the embedding differs by {off[n]:.2g} (bound "
        f"{bound:.2g}): a batch size that is fixed in the graph, padding, or a mix of samples"
    ]


def file(
    graph: Graph, metadata: Mapping[str, str], wanted: Mapping[str, str], parameters: Dict[str, np.ndarray]
) -> List[str]:
    """Check that an ONNX file is for the model under test, with the expected metadata.

    Args:
        metadata: the file's own properties; missing ones are not an error.
        wanted: expected values by name: `clipval.weights`, `clipval.tower`, `opset`, ...
        parameters: PyTorch's weights by path.
    """
    said = []
    for name, value in wanted.items():
        found = metadata.get(name)
        if found is not None and found != value:
            said.append(f"the file has {name} {found[:40]}, under test is {value[:40]}: a stale or different file")
    return said + other_weights(graph, parameters)


def other_weights(graph: Graph, parameters: Dict[str, np.ndarray]) -> List[str]:
    """Check whether most matrices are no PyTorch parameter, which means another checkpoint, not one bad layer."""
    by_size: Dict[int, List[np.ndarray]] = {}
    for value in parameters.values():
        parts = [value, *(np.split(value, 3) if value.ndim == 2 and value.shape[0] % 3 == 0 else ())]
        for part in parts:
            by_size.setdefault(part.size, []).append(part)
    found = [_is_held(graph.constant(name), by_size) for name, one in graph.weights.items() if len(one.dims) == 2]
    known = [one for one in found if one is not None]
    if len(known) < 4 or 2 * sum(known) >= len(known):
        return []
    return [
        f"the file holds other weights: {len(known) - sum(known)} of {len(known)} matrices are not PyTorch's. "
        f"Export it from the checkpoint under test"
    ]


def _is_held(values: Optional[np.ndarray], by_size: Dict[int, List[np.ndarray]]) -> Optional[bool]:
    """Whether a matrix is, at least nearly, one of PyTorch's; None if its size does not occur, e.g. after folding."""
    if values is None or values.dtype.kind != "f" or values.size not in by_size:
        return None
    return any(distance(np.asarray(values, np.float32), one) < SAME_WEIGHTS for one in by_size[values.size])
