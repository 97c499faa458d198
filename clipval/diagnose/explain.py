"""Why a part of an ONNX graph differs from its PyTorch module: weights, constants, operator variants, precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Container, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from clipval.diagnose.graph import NARROW, Graph, Node
from clipval.diagnose.pairs import aligned, distance
from clipval.diagnose.taps import Recorded, Tap, relative
from clipval.diagnose.twin import LARGEST, rounded

if TYPE_CHECKING:
    from clipval.diagnose.ladder import Ladder

RELATED = 0.7  # unrelated weights are 1.4 apart
ROUNDED = 2e-2  # up to which weights are the same ones, rounded
STEPS = 256  # of 8 bits
SAME = 1e-6  # relative distance of two copies of the same float32 weights


def weights(
    graph: Graph, region: Sequence[int], taps: Sequence[Tap], recorded: Recorded, folded: Container[str] = ()
) -> Tuple[List[str], List[str]]:
    """Weights of the region that differ from PyTorch's, and PyTorch's that are missing in it; names of the former.

    Args:
        folded: constants that are not looked at; see `clipval.diagnose.folded`.
    """
    modules = list(dict.fromkeys(path for tap in taps for path in tap.paths))
    wanted = {name: value for path in modules for name, value in recorded.parameters(path).items() if path}
    outer = {".".join(path.split(".")[:n]) for path in modules for n in range(path.count(".") + 1)} | {""}
    wanted.update({k: value for k, value in recorded.parameters("").items() if k.rpartition(".")[0] in outer})
    others = [value for name, value in recorded.parameters("").items() if name not in wanted and value.ndim == 1]
    said: List[str] = []
    seen: List[str] = []
    unlike: List[str] = []
    for number in region:
        node = graph.nodes[number]
        for name in node.inputs:
            held = None if name in graph.moving or name in folded else graph.constant(name)
            if held is None or held.size < 2 or held.dtype.kind not in "fiu":
                continue
            if held.ndim == 1 and any(np.array_equal(held, one) for one in others):
                continue  # in a region that reaches into other modules
            found = _weight(name, np.asarray(held), node, wanted)
            seen += found[0]
            said += found[1]
            unlike += found[0] if found[1] else []
    normed = any(graph.nodes[number].op == "BatchNormalization" for number in region)
    adding = [tap for tap in taps if normed or "batch_norm" not in tap.op]  # else it is folded into a layer
    return said + _lacking(graph, seen, adding, recorded, said), unlike


def held(graph: Graph, parameters: Mapping[str, np.ndarray], region: Sequence[int]) -> bool:
    """Whether any of a module's parameters, nearly or in another order, is a weight of the graph; or it has none.

    A matrix of the region that is as large as one of them is taken for it, whatever its values.

    One whose elements are all equal, as before training, says nothing.
    """
    sizes = {value.size for value in parameters.values()}
    large = {value.size for value in parameters.values() if value.ndim > 1}
    used = {name for number in region for name in graph.nodes[number].inputs if name in graph.weights}
    if any(int(np.prod(graph.weights[name].dims)) in large for name in used):
        return True
    by_size: Dict[int, List[np.ndarray]] = {}
    for name, one in graph.weights.items():
        size = int(np.prod(one.dims))
        near = name in graph.consumers and (size in sizes or 3 * size in sizes)
        values = graph.constant(name) if near else None
        if values is not None and values.dtype.kind == "f":
            by_size.setdefault(size, []).append(np.asarray(values, np.float32))
    known = [
        _unlike(values, part) <= ROUNDED
        for value in parameters.values()
        if np.ptp(value) > 0
        for values in (*by_size.get(value.size, ()), *by_size.get(value.size // 3, ()))
        for _, part in _parts(values, value)
    ]
    return any(known) or not parameters


def _weight(name: str, held: np.ndarray, node: Node, wanted: Dict[str, np.ndarray]) -> Tuple[List[str], List[str]]:
    """The parameter that a constant is a copy of, and how it differs."""
    if held.dtype.kind != "f":
        whole = f"weights {name} of {node.name} are {held.dtype}, PyTorch's are float32"
        return [], [whole] if held.dtype.itemsize == 1 else []
    values = np.asarray(held, np.float32)
    ranked = sorted(
        ((_unlike(part, one), which) for which, whole in wanted.items() for part, one in _parts(values, whole)),
        key=lambda one: one[0],
    )
    if not ranked or ranked[0][0] > RELATED:
        return [], []
    off, which = ranked[0]
    if off <= SAME:
        turned = _turned(values, wanted[which], which, node)
        return [which], [f"{name} of {node.name} is {which}, but transposed"] if turned else []
    exact = distance(*_parts(values, wanted[which])[0])
    return [which], [
        f"{name} of {node.name} differs from {which} by {exact:.2g} (relative){_how(values, wanted[which])}"
    ]


def _unlike(values: np.ndarray, truth: np.ndarray) -> float:
    """Distance of a constant from a parameter; small if it has the same values in another order."""
    off = distance(values, truth)
    if off > SAME and np.array_equal(np.sort(values.ravel()), np.sort(truth.ravel())) and np.ptp(truth) > 0:
        return 2 * SAME
    return off


def _parts(values: np.ndarray, whole: np.ndarray) -> List[Tuple[np.ndarray, np.ndarray]]:
    """The parameter, or the third of it that an exporter split off (query, key and value share one)."""
    if whole.size == values.size:
        return [(values, whole)]
    if whole.ndim and whole.shape[0] % 3 == 0 and whole.size == 3 * values.size:
        return [(values, one) for one in np.split(whole, 3)]
    return []


def _turned(values: np.ndarray, whole: np.ndarray, which: str, node: Node) -> bool:
    """Whether a square matrix is transposed for its node, where both orientations are valid."""
    if values.ndim != 2 or values.shape[0] != values.shape[1] or values.shape != whole.shape:
        return False
    rows_out = which.endswith("weight")  # Linear's and MultiheadAttention's are [out, in]; projections are [in, out]
    as_held = rows_out == bool(node.op == "Gemm" and node.attributes.get("transB", 0))
    if node.op not in ("MatMul", "Gemm") or np.array_equal(whole, whole.T):
        return False
    return not np.array_equal(values, whole if as_held else whole.T)


def _how(values: np.ndarray, truth: np.ndarray) -> str:
    """How weights differ, if recognisable."""
    if not values.any():
        return ": it is all zeros"
    if np.array_equal(np.sort(values.ravel()), np.sort(np.asarray(truth, np.float32).ravel())):
        return ": the same values in another order, shifted or transposed"
    flat = np.asarray(truth, np.float32)
    for precision in ("fp16", "bf16"):
        if distance(values, rounded(flat, precision)) <= SAME:
            return f": it is rounded to {precision}"
    if any(row.size > 2 * STEPS and len(np.unique(row)) <= STEPS for row in (values, values[0], values[..., 0])):
        return f": it has {len(np.unique(values))} distinct values, as after quantisation to 8 bits"
    ratio = float((values.ravel() * values.ravel()).sum() / max(1e-30, float((flat * flat).sum()))) ** 0.5
    return f": its length is {ratio:.3g} of PyTorch's" if abs(ratio - 1) > 0.02 else ""


def _lacking(
    graph: Graph, seen: Iterable[str], taps: Sequence[Tap], recorded: Recorded, said: Sequence[str]
) -> List[str]:
    """Biases that the graph lacks: of modules whose result is among the taps, and of layers whose weights are in the
    region. One that a node after the region adds is not missing."""
    lacking, held = [], set(seen)
    ended = [tap.module for tap in taps if tap.module in tap.ends]
    for path in dict.fromkeys([*ended, *(tap.module for tap in taps)]):
        for name, value in recorded.parameters(path).items():
            own = path in ended and name[len(path) + 1 :] in ("bias", "out_proj.bias")
            layer = name.endswith(".bias") and f"{name[:-4]}weight" in held and "norm" not in name
            if (own or layer) and name not in held and value.any() and not _is_used(graph, value):
                lacking.append(f"{name} is missing" if not said else f"{name} is missing too")
    return list(dict.fromkeys(lacking))


def _is_used(graph: Graph, value: np.ndarray) -> bool:
    used = [name for name, one in graph.weights.items() if name in graph.consumers and np.prod(one.dims) == value.size]
    held = [one for one in map(graph.constant, used) if one is not None]
    return any(np.array_equal(one.ravel(), value.ravel()) for one in held)


def constants(graph: Graph, region: Sequence[int], taps: Sequence[Tap], recorded: Recorded) -> List[Tuple[str, str]]:
    """Check epsilon, the variant of GELU, the softmax's axis: what differs, with its module."""
    nodes = [graph.nodes[number] for number in region]
    ops = {node.op for node in nodes}
    said: List[Tuple[str, str]] = []
    for tap in taps:
        found: List[str] = []
        if "layer_norm" in tap.op or "batch_norm" in tap.op:
            found += _epsilon(graph, nodes, recorded.setting(tap.module, "eps"))
        if tap.op == "gelu":
            exact = recorded.setting(tap.module, "approximate") in (None, "none")
            form = "x sigmoid(1.702 x)" if "Sigmoid" in ops else "tanh" if "Tanh" in ops else "erf"
            form = {"tanh": "tanh"}.get(_gelu(nodes), form)
            if (form == "erf") != exact:
                found.append(f"the graph has the {form} form of GELU, PyTorch the {'erf' if exact else 'tanh'} form")
        if "softmax" in tap.op:
            axes = [node.attributes.get("axis", -1) for node in nodes if node.op == "Softmax"]
            wrong = [axis for axis in axes if axis not in (-1, tap.truth.ndim - 1)]
            found += [f"its softmax is over axis {axis}, PyTorch's over the last" for axis in wrong]
        said += [(tap.module, one) for one in found]
    return said


def _gelu(nodes: Sequence[Node]) -> str:
    return next((str(node.attributes.get("approximate", "none")) for node in nodes if node.op == "Gelu"), "")


def _epsilon(graph: Graph, nodes: Sequence[Node], wanted: Optional[float]) -> List[str]:
    if wanted is None:
        return []
    found = [node.attributes.get("epsilon", 1e-5) for node in nodes if "Normalization" in node.op]
    roots = {name for node in nodes if node.op in ("Sqrt", "Pow", "Rsqrt") for name in node.inputs}
    for node in nodes:
        if node.op == "Add" and roots & set(node.outputs):
            held = [graph.constant(name) for name in node.inputs if name not in graph.moving]
            found += [float(one.ravel()[0]) for one in held if one is not None and one.size == 1]
    return [f"its epsilon is {one:g}, PyTorch's is {wanted:g}" for one in found if abs(one / wanted - 1) > 1e-3]


def missing(ladder: Ladder, numbers: Sequence[int], region: Sequence[int]) -> List[str]:
    """PyTorch operators with two inputs of which the graph's region uses only one."""
    graph, said = ladder.graph, []
    taken = {name for number in region for name in graph.nodes[number].inputs}
    for n in numbers:
        tap, parents = ladder.recorded.taps[n], ladder.recorded.taps[n].parents
        held = [one for one in parents if ladder.tensors.get(one)]
        lost = [one for one in held if ladder.tensors[one] not in taken]
        if ladder.rungs[n].error is None and len(parents) > 1 and lost and len(lost) < len(held):
            names = " and ".join(ladder.recorded.taps[one].name for one in lost)
            said.append(f"PyTorch's {tap.op} also takes {names}, which the graph leaves out here")
        elif ladder.rungs[n].error is None and len(parents) == 1 and tap.op in ("add", "mul", "sub", "div"):
            said.append(f"PyTorch's {tap.op} in {tap.module or 'the tower'} has no counterpart in the graph")
    return said


def values(found: np.ndarray, ladder: Ladder, number: int, known: Mapping[int, Tap]) -> List[str]:
    """How a tensor differs from its truth: saturated, scaled, or another tap's values."""
    tap = ladder.recorded.taps[number]
    if not np.isfinite(found).all() and np.isfinite(tap.truth).all():
        return [f"{int((~np.isfinite(found)).sum())} of its {found.size} values are NaN or Inf"]
    if (np.abs(found) >= LARGEST).any() and np.abs(tap.truth[np.isfinite(tap.truth)]).max() < 1e4 * LARGEST:
        return [
            f"{int((np.abs(found) >= LARGEST).sum())} of its {found.size} values are at +-65504, fp16's largest value"
        ]
    for other in known.values():
        if other.truth.size == found.size and distance(found, other.truth) < 1e-4:
            return [f"it is {other.name} again, as if {tap.op} were left out"]
    if "softmax" in tap.op:
        return _sharper(found, tap.truth)
    return _another_token(found, ladder, tap) or _another_scale(found, tap) or _another_order(found, tap)


def _sharper(found: np.ndarray, truth: np.ndarray) -> List[str]:
    """Whether a softmax's argument was multiplied by a number."""
    with np.errstate(divide="ignore"):
        ours, theirs = (np.log(one.astype(np.float64)) for one in (aligned(found, truth), truth))
    kept = np.isfinite(ours) & np.isfinite(theirs)
    ours, theirs = (np.where(kept, one, 0) for one in (ours, theirs))
    count = np.maximum(kept.sum(axis=-1, keepdims=True), 1)
    ours, theirs = (np.where(kept, one - one.sum(axis=-1, keepdims=True) / count, 0) for one in (ours, theirs))
    size = float((theirs * theirs).sum())
    slope = float((ours * theirs).sum()) / size if size else 1.0
    if not size or abs(slope - 1) < 1e-3 or relative(ours, slope * theirs) > 1e-2:
        return []
    return [f"its argument is PyTorch's times {slope:.4g}: another scale of attention"]


def _another_token(found: np.ndarray, ladder: Ladder, tap: Tap) -> List[str]:
    """Whether a pooled vector is from another position than PyTorch's."""
    for number in tap.parents:
        whole = ladder.recorded.taps[number].truth
        if whole.ndim == 3 and whole.size == found.size * whole.shape[1]:
            near = [n for n in range(whole.shape[1]) if distance(found, whole[:, n]) < 1e-2]
            ours = [n for n in range(whole.shape[1]) if distance(tap.truth, whole[:, n]) < 1e-6]
            if near and near != ours:
                where = f"PyTorch's is position {ours[0]}" if ours else "PyTorch's is a position of each sample's own"
                return [f"it is position {near[0]} of {ladder.recorded.taps[number].name}; {where}"]
    return []


def _another_order(found: np.ndarray, tap: Tap) -> List[str]:
    ours, theirs = np.sort(found.ravel()), np.sort(tap.truth.ravel())
    moved = relative(ours, theirs) < 1e-3 and relative(found.ravel(), tap.truth.ravel()) > 0.05
    return ["its values are PyTorch's in another order"] if moved and distance(found, tap.truth) > 0.05 else []


def _another_scale(found: np.ndarray, tap: Tap) -> List[str]:
    truth = np.where(np.isfinite(tap.truth), tap.truth, 0)
    ours, theirs = np.linalg.norm(found.astype(np.float64)), np.linalg.norm(truth.astype(np.float64))
    if ours and theirs and distance(found * (theirs / ours), truth) < 1e-3 and abs(ours / theirs - 1) > 1e-3:
        return [f"it is PyTorch's times {ours / theirs:.4g}"]
    return []


def casts(graph: Graph, region: Sequence[int], tensors: Mapping[str, str]) -> List[str]:
    """Good results that the region rounds.

    Args:
        tensors: names of the good results by the graph's tensor.
    """
    nodes = [graph.nodes[number] for number in region if graph.nodes[number].op == "Cast"]
    return [
        f"{node.name} rounds the result of {tensors[node.inputs[0]]} to {NARROW[node.attributes['to']]}"
        for node in nodes
        if graph.precision == "fp32" and node.attributes.get("to") in NARROW and node.inputs[0] in tensors
    ]


def precision(graph: Graph, region: Sequence[int], dtype: Any) -> str:
    """The precision of the region."""
    casts = [graph.nodes[number].attributes.get("to") for number in region if graph.nodes[number].op == "Cast"]
    narrow = [NARROW[one] for one in casts if one in NARROW]
    if narrow and graph.precision == "fp32":
        return f"{narrow[0]} (the graph casts to it here)"
    return {"float16": "fp16", "float32": "fp32", "bfloat16": "bf16"}.get(str(dtype), str(dtype))
