"""A dumped OM against the ONNX graph that it was compiled from: which operator exceeds its precision's error."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Dict, List, Mapping, Optional, Sequence, Set, Tuple

import numpy as np

from clipval.diagnose import evaluate, fusions, graph, pairs
from clipval.diagnose.bundle import Material
from clipval.diagnose.dump import Dump, Operator, Statistic
from clipval.diagnose.finding import DIVERGENCE, INPUT, NONE, Finding
from clipval.diagnose.graph import SAME_VALUES
from clipval.diagnose.locate import EXCESS, FLOOR, Rung, numbered, suspects
from clipval.diagnose.taps import relative
from clipval.diagnose.twin import LARGEST, PRECISIONS, Twin, overflows

SHOWN = 4
FUSED = 10  # nodes in a row that become one operator: a norm has nine
NEARER = 0.5  # a tensor is taken instead of a likelier one if its error is that much smaller
UNRELATED = 0.5  # so far off is a tensor of other inputs
KNOWN = 5  # of so many dumped tensors at least one is named after a node of the right file
SAME_FILE = "is this the file that it was compiled from? Else give --om-json"
SUMS = 1e-5  # noise of an fp32 OM, which sums in another order: ten times PyTorch's own in float32


@dataclass
class Compared:
    """Tensors of an ONNX graph that are in the dump.

    Attributes:
        rungs: by ONNX tensor, in order of computation.
        operators: ONNX tensor -> the operator that outputs it.
        without: names of operators in the dump's model whose tensors could not be compared.
        rows: the inputs; own: ONNX tensor -> the device's values, in the graph's order of axes.
        other_sizes: operator, number of values in the dump and in its ONNX tensor, where these differ.
        dumped: number of dumped tensors.
    """

    graph: graph.Graph
    rungs: Dict[str, Rung] = field(default_factory=dict)
    operators: Dict[str, Operator] = field(default_factory=dict)
    without: List[str] = field(default_factory=list)
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    own: Dict[str, np.ndarray] = field(default_factory=dict)
    other_sizes: List[Tuple[str, int, int]] = field(default_factory=list)
    dumped: int = 0


def candidates(whole: graph.Graph, one: Operator, output: int, fused: Mapping[str, Sequence[str]]) -> List[str]:
    """ONNX tensors that an output may be, the likeliest first: by the header, the fused list, or the name.

    The header may name the first of the fused nodes, whose tensor this is not, so it is only one of the candidates;
    without the fused list what follows it is, too (only fused operators have a name there).
    """
    nodes = {node.name: node for node in whole.nodes}
    plainer = {_sanitised(node.name): node.name for node in whole.nodes}
    told = one.outputs[output]
    named = [told.origin] if told.origin else []
    named += [name for name in reversed(list(fused.get(one.name, ()))) if name not in named]
    own = one.name if one.name in nodes else plainer.get(one.name, "")
    if own not in named and (not named or told.origin):
        named.append(own)
    found = []
    for name in named:
        made = nodes[name].outputs if name in nodes else ()
        first = told.origin_output if name == told.origin and told.origin_output is not None else output
        found += [*made[first : first + 1], *(tensor for tensor in made if len(made) == 1)]
    if told.origin in nodes and not fused.get(one.name):
        found += following(whole, told.origin)
    return [tensor for tensor in dict.fromkeys(found) if tensor in whole.moving]


def behind(whole: graph.Graph, one: Operator, fused: Mapping[str, Sequence[str]]) -> List[str]:
    """ONNX tensors after the node that an operator is named after: what was fused into it, where no list says that.

    These count only if the node's own tensor does not agree.
    """
    if fused.get(one.name) or any(output.origin for output in one.outputs):
        return []
    own = next((node.name for node in whole.nodes if one.name in (node.name, _sanitised(node.name))), None)
    return following(whole, own) if own is not None else []


def following(whole: graph.Graph, node: str) -> List[str]:
    """Tensors computed from a node's, as far as operators are fused."""
    start = next(n for n, one in enumerate(whole.nodes) if one.name == node)
    found, rest, seen = set(), {start}, {start}
    for _ in range(FUSED):
        rest = {n for number in rest for name in whole.nodes[number].outputs for n in whole.consumers.get(name, ())}
        rest -= seen
        seen |= rest
        found |= rest
    return [name for number in sorted(found) for name in whole.nodes[number].outputs]


def _sanitised(name: str) -> str:
    """The name in dump file names: space, dot and slashes become an underscore."""
    return "".join("_" if letter in " ./\\" else letter for letter in name)


def compare(
    whole: graph.Graph, dumped: Dump, rows: np.ndarray, precision: str, fused: Mapping[str, Sequence[str]]
) -> Compared:
    """Error of every dumped tensor against float32 ONNX, with that of the graph's twin.

    Args:
        whole: the file that the OM was compiled from.
        rows: the inputs of the dumped inference, a full batch.
        fused: operator -> ONNX nodes, see `clipval.diagnose.fusions.names`; may be empty.
    """
    places = [(one, n) for one in dumped.operators.values() for n, held in enumerate(one.outputs) if held.held]
    wanted: Dict[str, List[int]] = {}
    for number, (one, n) in enumerate(places):
        for name in [*candidates(whole, one, n, fused), *([] if n else behind(whole, one, fused))]:
            wanted.setdefault(name, []).append(number)
    floats: Set[str] = {name for name, values in evaluate.tensors(whole, rows) if values.dtype == np.float32}
    errors: Dict[int, List[Tuple[float, str]]] = {}
    held: Dict[Tuple[int, str], np.ndarray] = {}
    sizes: List[Tuple[str, int, int]] = []
    shapes = {whole.inputs[0]: rows}
    noise: Dict[str, float] = {}
    change = Twin(precision, floats) if precision in PRECISIONS else None
    twin = evaluate.tensors(whole, rows, change)
    for (name, truth), (_, rounded) in zip(evaluate.tensors(whole, rows), twin):
        if name in whole.measured:
            shapes[name] = truth
        if name in wanted and name in floats:
            # what is lost to an overflow is no noise: only what the operator's inputs bring along is
            before = [noise[one] for one in known_inputs(whole, name, set(noise))]
            lost = overflows(truth, precision)
            cost = max(before, default=0.0) if lost else pairs.distance(rounded, truth)
            noise[name] = max(cost, SUMS if change is None else FLOOR[precision])
            for number in wanted[name]:
                one, n = places[number]
                values = one.values(n)
                if values.size == truth.size:
                    values = pairs.aligned(values, truth)
                    held[number, name] = values
                    errors.setdefault(number, []).append((relative(values, truth), name))
                else:
                    sizes.append((one.name, values.size, truth.size))
    compared, numbers = _chosen(whole, places, errors, noise, fused)
    compared.other_sizes, compared.dumped = sizes, len(places)
    compared.rows, compared.own = rows, {name: held[number, name] for name, number in numbers.items()}
    _run_alone(compared, shapes, change)
    return compared


def _run_alone(compared: Compared, shapes: Mapping[str, np.ndarray], change: Optional[Twin]) -> None:
    """Add each rung's local excess: the part between it and its known inputs, run on the candidate's tensors."""
    if change is None:
        return
    given = {name: np.asarray(values, np.float32) for name, values in compared.own.items()}
    for name, rung in compared.rungs.items():
        fed = {**shapes, **{one: given[one] for one in rung.parents}}
        exact = evaluate.part(compared.graph, name, fed)
        own_cost = relative(evaluate.part(compared.graph, name, fed, change), exact)
        cost = max(0.0 if overflows(exact, change.precision) else own_cost, FLOOR[change.precision])
        compared.rungs[name] = replace(rung, local=relative(given[name], exact) / cost)


def _chosen(
    whole: graph.Graph,
    places: Sequence[Tuple[Operator, int]],
    errors: Mapping[int, List[Tuple[float, str]]],
    noise: Mapping[str, float],
    fused: Mapping[str, Sequence[str]],
) -> Tuple[Compared, Dict[str, int]]:
    """One ONNX tensor for each output: the one that agrees; if none does, the likeliest by name.

    A further output of an operator that nodes were fused into is often none of theirs, e.g. a norm's 1 / deviation.
    """
    found: Dict[str, Tuple[float, int]] = {}
    without = []
    for number, (one, n) in enumerate(places):
        tried = errors.get(number, [])
        good = [(off, name) for off, name in tried if off <= EXCESS * noise[name]]
        named = candidates(whole, one, n, fused)
        rank = {name: k for k, name in enumerate(dict.fromkeys([*named, *behind(whole, one, fused)]))}
        good = [(off, name) for off, name in good if name in named] or good
        likely = [(off, name) for off, name in tried if not n or len(whole.node_of(name).outputs) > n]
        best = min(good or sorted(likely, key=lambda one: rank[one[1]])[:1], default=None)
        if best is None:
            without.append(one.name)
            continue
        off, name = min([one for one in likely if one[0] < NEARER * best[0]], default=best) if not good else best
        if name not in found or off < found[name][0]:
            found[name] = (off, number)
    order = [name for name in whole.producer if name in found]
    result = Compared(whole, without=without)
    for name in order:
        off, number = found[name]
        result.operators[name] = places[number][0]
        result.rungs[name] = _rung(whole, name, off, noise[name], {key: value[0] for key, value in found.items()})
    for name, shown in zip(order, numbered([result.rungs[name].name for name in order])):
        result.rungs[name] = replace(result.rungs[name], name=shown)
    return result, {name: number for name, (_, number) in found.items()}


def _rung(whole: graph.Graph, name: str, off: float, noise: float, errors: Mapping[str, float]) -> Rung:
    node = whole.node_of(name)
    before = known_inputs(whole, name, set(errors))
    return Rung(
        name=f"{node.module or node.name} ({node.op})",
        error=off,
        noise=noise,
        error_in=max([errors[one] for one in before], default=None),
        parents=tuple(before),
        tensor=name,
        node=node.name,
        op=node.op,
        module=node.module,
    )


def known_inputs(whole: graph.Graph, name: str, known: Set[str]) -> List[str]:
    """Compared tensors that a tensor is computed from, directly or through tensors that were not compared."""
    found: List[str] = []
    seen, rest = set(), whole.parents(name)
    while rest:
        one = rest.pop()
        if one in known:
            found.append(one)
        elif one not in seen:
            seen.add(one)
            rest += whole.parents(one)
    return list(dict.fromkeys(found))


def first(compared: Compared) -> Optional[str]:
    """The tensor where the error starts; the worst such tensor if the last compared tensors are good."""
    rungs = compared.rungs
    if not rungs:
        return None
    good: Dict[str, Optional[bool]] = {name: rung.good for name, rung in rungs.items()}
    above = {name: rung.parents for name, rung in rungs.items()}
    last = [name for name in rungs if not any(name in rung.parents for rung in rungs.values())]
    start = [one for name in last for one in suspects(good, above, name)]
    if not start:
        start = [name for name in rungs if good[name] is False and name in suspects(good, above, name)]
        start.sort(key=lambda name: -(rungs[name].excess or 0))
    return start[0] if start else None


def judge(
    compared: Compared,
    dumped: Dump,
    precision: str,
    candidate: str,
    passes: Mapping[str, List[str]] = MappingProxyType({}),
    applied: Mapping[str, int] = MappingProxyType({}),
) -> Finding:
    """The finding of a dump.

    Args:
        passes, applied: see `clipval.diagnose.fusions`; for the advice.
    """
    rungs = tuple(compared.rungs.values())
    name, notes = first(compared), (*saturation(compared.graph, dumped), *dumped.notes)
    if not rungs:
        why = notes[0] if notes else _other_batch(compared) or f"no operator name is in the ONNX file: {SAME_FILE}"
        return Finding(INPUT, candidate, f"{candidate}: nothing could be compared: {why}", causes=notes)
    if name is None:
        sentence = _no_excess(compared, precision, candidate)
        return Finding(NONE, candidate, sentence, causes=notes, ladder=rungs, precision=precision)
    if KNOWN * len(rungs) < compared.dumped:
        few = f"only {len(rungs)} of {compared.dumped} dumped tensors are named after a node: {SAME_FILE}"
        return Finding(INPUT, candidate, f"{candidate}: not numerics: {few}", causes=(few, *notes))
    rung, operator = compared.rungs[name], compared.operators[name]
    good = {one for one, held in compared.rungs.items() if held.good}
    region = [compared.graph.nodes[n] for n in compared.graph.between(name, good)]
    said = [f"{node.op} {node.name}" for node in region if node.op not in ("Constant", "Shape", "Identity")]
    nodes = ", ".join(said) if len(said) <= SHOWN else f"{said[0]} to {said[-1]} ({len(said)} nodes)"
    start = "no input of it was dumped" if rung.error_in is None else f"input {rung.error_in:.1e} off"
    own = [node for node in region if node.op not in SAME_VALUES and node.op != "Constant"] or region
    module = own[0].module
    wide = f" to {rung.module or 'the tower itself'}" if rung.module != module else ""
    if rung.error_in is None and (rung.error or 0) > UNRELATED:
        notes = (*notes, "or these are not the inputs of the dumped inference: nothing before it was compared")
    form, keep = operator.outputs[0].form, tuple(_own_excess(compared))
    alone = "" if rung.local is None else f", and {rung.local:.3g} times when run on its own inputs"
    sentence = (
        f"{candidate}: diverges in PyTorch module {module or 'the tower itself'}{wide}, ONNX {nodes}, OM operator "
        f"{operator.name} ({operator.kind}): {start}, output {rung.error:.1e} off, {rung.excess:.3g} times what "
        f"{precision} costs there{alone}, so the error starts there; computed in {operator.outputs[0].dtype} ({form})"
    )
    return Finding(
        verdict=DIVERGENCE,
        candidate=candidate,
        sentence=sentence + (f"; {notes[0]}" if notes else ""),
        module=module,
        node=rung.node,
        operator=operator.name,
        causes=notes,
        advice=tuple(_advice(keep, operator, passes, applied)),
        ladder=rungs,
        first=rung.name,
        precision=precision,
        keep=keep,
        material=Material(
            compared.graph, compared.rows, name, rung.noise, precision, frozenset(good), device=compared.own
        ),
    )


def _other_batch(compared: Compared) -> str:
    """That the dump is of another number of samples than the inputs, if sizes say so."""
    if not compared.other_sizes:
        return ""
    name, found, wanted = compared.other_sizes[0]
    count, rest = divmod(found * len(compared.rows), wanted)
    other = f"; the dump has {count} samples: --samples {count}, or --input" if count and not rest else ""
    return f"{name} has {found} values in the dump, {wanted} of these {len(compared.rows)} inputs{other}"


def _own_excess(compared: Compared) -> List[str]:
    """ONNX nodes of the operators in which an error starts, in order; what is fed with an error is not judged.

    These are the original model's names, which `--keep_dtype` takes and fused operators inherit from.
    """
    rungs, known, found = compared.rungs, set(compared.rungs), set()
    fed: Set[str] = set()  # what is computed from a start, directly or not
    for name, rung in rungs.items():
        if fed & set(rung.parents) or not all(rungs[one].good for one in rung.parents):
            fed.add(name)
        elif not rung.good:
            fed.add(name)
            found.update(compared.graph.between(name, known - {name}))
    nodes = [compared.graph.nodes[n] for n in sorted(found)]
    return [node.name for node in nodes if node.op not in (*SAME_VALUES, "Constant", "Shape")]


def _advice(
    keep: Sequence[str], operator: Operator, passes: Mapping[str, List[str]], applied: Mapping[str, int]
) -> List[str]:
    shown = ", ".join(keep[:SHOWN]) + (f" and {len(keep) - SHOWN} more" if len(keep) > SHOWN else "")
    return [
        f"keep the precision of {shown}: --try-keep-dtype FILE writes the list for --keep-dtype, compiles and confirms",
        "other precision modes: --precision-modes force_fp16,allow_mix_precision,must_keep_origin_dtype",
        *fusions.advice(operator.name, passes, applied),
    ]


def _no_excess(compared: Compared, precision: str, candidate: str) -> str:
    rungs = list(compared.rungs.values())
    worst = max(rungs, key=lambda rung: rung.excess or 0)
    least, last = min(rungs, key=lambda rung: rung.noise), rungs[-1]
    return (
        f"{candidate}: no excess: {len(rungs)} tensors compared, none is over {EXCESS:g} times what {precision} costs "
        f"(worst {worst.excess:.2g}, {worst.name}); a fault is below that unless it is {EXCESS * least.noise:.1e} "
        f"(relative) at {least.name}, {EXCESS * last.noise:.1e} at {last.name}"
    )


def saturation(whole: graph.Graph, dumped: Dump) -> List[str]:
    """The first operators whose statistics have NaN, Inf or fp16's largest value, in order."""
    order = {_sanitised(node.name): n for n, node in enumerate(whole.nodes)}
    found = []
    for name, rows in dumped.statistics.items():
        masked = _feeds_softmax(whole, order.get(_sanitised(name)))
        bad = [row for row in rows if row.side.lower() == "output" and _beyond(row, masked)]
        if bad:
            found.append((order.get(_sanitised(name), len(order)), name, bad[0]))
    found.sort(key=lambda one: one[0])
    return [
        f"{name} (OM operator) has values at the limit of {row.dtype or 'its type'}: max {row.largest}, "
        f"min {row.least}, NaN {row.nan}, Inf {row.infinite}"
        for _, name, row in found[:SHOWN]
    ]


def _beyond(row: Statistic, masked: bool) -> bool:
    """NaN, Inf or fp16's largest value; a softmax's input may be -65504, which is how a mask excludes a position."""
    high, low = row.largest or 0.0, row.least or 0.0
    if row.dtype not in ("", "DT_FLOAT16"):
        return bool(row.nan) or bool(row.infinite and not masked)
    if masked:
        return bool(row.nan) or not high < LARGEST
    return bool(row.nan) or bool(row.infinite) or not high < LARGEST or not low > -LARGEST


def _feeds_softmax(whole: graph.Graph, number: Optional[int]) -> bool:
    """Whether a softmax takes a node's result, directly or after adding a mask."""
    if number is None:
        return False
    near = [one for name in whole.nodes[number].outputs for one in whole.consumers.get(name, ())]
    near += [one for n in near for name in whole.nodes[n].outputs for one in whole.consumers.get(name, ())]
    return any(whole.nodes[n].op == "Softmax" for n in near)
