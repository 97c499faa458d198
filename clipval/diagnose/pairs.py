"""Pair tensors of an ONNX graph with PyTorch's results: by module path if the names have it, and by value.

Layouts differ ([batch, tokens, width] or [tokens, batch, width], heads split or merged), so two tensors are compared
in every order of their axes and the closest one counts.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

import numpy as np

from clipval.diagnose.graph import Graph
from clipval.diagnose.taps import Tap, relative

PROBED = 96  # elements used to choose the order of axes
KEPT = 6  # candidates kept for each tap
ALIKE = 0.1  # tensors of other modules are considered if they may be this close
Axes = Optional[Tuple[bool, Tuple[int, ...]]]


@dataclass
class Pairs:
    """Candidates of each tap: [(error, tensor name)], closest first; related ones are from the tap's own module."""

    any: Dict[int, List[Tuple[float, str]]] = field(default_factory=dict)
    related: Dict[int, List[Tuple[float, str]]] = field(default_factory=dict)

    def best(self, tap: int, good: float) -> Optional[Tuple[float, str]]:
        """The closest of all if it is good, else the closest of the same module, else of all."""
        everywhere, here = self.any.get(tap, []), self.related.get(tap, [])
        if everywhere and (everywhere[0][0] <= good or not here):
            return everywhere[0]
        return here[0] if here else None


def pair(graph: Graph, taps: Sequence[Tap], tensors: Iterable[Tuple[str, np.ndarray]]) -> Pairs:
    """Candidates of every tap among a graph's tensors.

    Args:
        taps: with the truth for the same inputs as the tensors.
        tensors: name and values, in order of computation. Weights and what is computed from them alone are only
            candidates of taps that are so, too.
    """
    by_size: Dict[int, List[int]] = {}
    for number, tap in enumerate(taps):
        by_size.setdefault(tap.truth.size, []).append(number)
    sizes = [_size(tap.truth) for tap in taps]
    found = Pairs()
    for name, values in tensors:
        if values.dtype.kind != "f" and str(values.dtype) != "bfloat16":
            continue
        wide, module = np.asarray(values, np.float32), graph.around(name).module
        length = _size(wide)
        for number in by_size.get(values.size, ()):
            tap = taps[number]
            if name not in graph.moving and not tap.fixed:
                continue
            related = not graph.named or module in tap.paths
            # in any order of axes, two tensors differ at least as much as their norms
            least = abs(length - sizes[number]) / sizes[number] if sizes[number] else 0.0
            kept = (found.related if related else found.any).setdefault(number, [])
            limited = not (related and graph.named)  # a module has few tensors, and its output is determined later
            if (not related and least > ALIKE) or (limited and len(kept) >= KEPT and least >= kept[KEPT - 1][0]):
                continue
            error = relative(_moved(wide, tap.truth), tap.truth)
            if not related and error > ALIKE:
                continue
            for held in [found.any.setdefault(number, [])] + (
                [found.related.setdefault(number, [])] if related else []
            ):
                held.append((error, name))
                held.sort(key=lambda one: one[0])
                del held[KEPT:]
    return found


def distance(found: np.ndarray, truth: np.ndarray) -> float:
    """Relative L2 error of two tensors of equal size in the order of axes in which they are closest."""
    if found.size != truth.size:
        return float("inf")
    return relative(_moved(np.asarray(found, np.float32), truth), truth)


def aligned(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """A tensor in the shape and order of axes of another one of equal size."""
    return _moved(found, truth)


def _size(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)] if not np.isfinite(values).all() else values
    return float(np.linalg.norm(finite.astype(np.float64)))


def _moved(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """`found` with its axes in the order in which it is closest to `truth`, in truth's shape."""
    probe = truth.ravel()[_places(truth.size)]
    best, chosen = float("inf"), None
    flat = found.ravel()
    for axes, indices in _orders(found.shape, truth.shape):
        off = relative(flat[indices], probe)
        if off < best:
            best, chosen = off, axes
    if chosen is None:
        return found.reshape(truth.shape)
    of_truth, order = chosen
    if not of_truth:
        return found.transpose(order).reshape(truth.shape)
    back = np.argsort(order)
    return found.reshape([truth.shape[axis] for axis in order]).transpose(back)


@lru_cache(maxsize=4096)
def _orders(found: Tuple[int, ...], truth: Tuple[int, ...]) -> List[Tuple[Axes, np.ndarray]]:
    """Orders of axes, each with the offsets of the truth's probed elements in the found tensor's memory."""
    size = int(np.prod(truth, dtype=np.int64))
    places = _places(size)
    orders: List[Tuple[Axes, np.ndarray]] = [(None, places)]
    if len(found) <= 5:
        for order in _permutations(found):
            where = np.unravel_index(places, [found[axis] for axis in order])
            back = np.argsort(order)
            orders.append(((False, order), np.ravel_multi_index([where[one] for one in back], found)))
    if len(truth) <= 5 and truth != found:
        for order in _permutations(truth):
            where = np.unravel_index(places, truth)
            moved = [truth[axis] for axis in order]
            orders.append(((True, order), np.ravel_multi_index([where[axis] for axis in order], moved)))
    return orders


def _permutations(shape: Tuple[int, ...]) -> Iterator[Tuple[int, ...]]:
    """Orders of the axes that move an axis longer than one element."""
    seen: Set[Tuple[int, ...]] = {tuple(axis for axis, size in enumerate(shape) if size > 1)}
    for order in itertools.permutations(range(len(shape))):
        wide = tuple(axis for axis in order if shape[axis] > 1)
        if wide not in seen:
            seen.add(wide)
            yield order


@lru_cache(maxsize=256)
def _places(size: int) -> np.ndarray:
    """Indices spread over a tensor by a step that is no axis length."""
    count = min(size, PROBED)
    return np.unique((np.arange(count, dtype=np.int64) * 2654435761) % size)
