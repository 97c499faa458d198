"""PyTorch against an ONNX file: compare every tap, and find the first part with more error than its precision costs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import numpy as np

from clipval.diagnose import evaluate, folded, graph, pairs, taps
from clipval.diagnose.bundle import Material
from clipval.diagnose.finding import DIVERGENCE, NONE, Finding
from clipval.diagnose.locate import EXCESS, FLOOR, Rung, compared_inputs, numbered, suspects
from clipval.diagnose.part import Part
from clipval.diagnose.twin import Twin, overflows

PAIRED = 2  # samples that pair tensors with taps; torch uses other operators for one than for several
UNRELATED = 1.3  # unrelated tensors are 1.4 apart
PASSED_ON = 0.1  # what is computed from a tensor keeps at least this share of its error
SUMS = ("add", "add_", "sub", "cat")
SURE = 1e-4  # no tensor without its bias is as close as that
CLOSE = 0.3  # a tensor that feeds good ones belongs to this tap only if it is this close
# ONNX operators of a PyTorch operator, to choose a tensor if no value agrees.
KINDS = {
    "softmax": ("Softmax",),
    "layer_norm": ("LayerNormalization", "Add"),
    "batch_norm": ("BatchNormalization", "Conv", "FusedConv"),
    "gelu": ("Gelu", "Mul"),
    "convolution": ("Conv",),
    "embedding": ("Gather",),
    "cat": ("Concat",),
    "select": ("Gather", "Slice"),
    "index": ("GatherND", "Gather"),
    "bmm": ("MatMul", "Einsum"),
    "mm": ("Gemm", "MatMul", "Add"),
    "add": ("Add", "Sum"),
    "mul": ("Mul",),
    "div": ("Div",),
}


@dataclass
class Ladder:
    """A candidate compared with the truth.

    Attributes:
        rungs: by tap number, for the taps that lead to the embedding.
        tensors: tap number -> the graph's tensor for it.
    """

    recorded: taps.Recorded
    graph: graph.Graph
    rungs: Dict[int, Rung]
    tensors: Dict[int, str]

    def first(self) -> Optional[int]:
        """Number of the tap where the error of the embedding starts.

        An excess may not reach the embedding: it is hidden by the noise of later parts in 16 bits, or multiplied by
        zero. Then this is the tap with the largest excess; in float32, where a lone bad tap is a tensor that was taken
        for another one, only if what follows is bad too, or if it is too close for another one.
        """
        names = list(map(str, self.rungs))
        good = {str(n): None if rung.error is None else rung.good for n, rung in self.rungs.items()}
        above = {name: list(map(str, self.recorded.taps[int(name)].parents)) for name in names}
        output = str(self.recorded.output)
        start = suspects(good, above, output)
        if not start and good[output]:
            bad = [name for name in names if good[name] is False]
            if self.graph.precision == "fp32":
                known = compared_inputs(good, above)
                passed_on = {one for name in bad for one in known[name]}
                bad = [name for name in bad if name in passed_on or (self.rungs[int(name)].error or 0.0) < SURE]
            start = [name for name in bad if name in suspects(good, above, name)]
            start.sort(key=lambda name: -(self.rungs[int(name)].excess or 0))
        return int(start[0]) if start else None


def seen(rungs: Dict[int, Rung], recorded: taps.Recorded, number: int) -> bool:
    """Whether later taps show part of its error; else the graph lacks it, and the wrong tensor was chosen."""
    own, fixed = rungs[number].error or 0.0, recorded.taps[number].fixed
    overflowed = not np.isfinite(own)  # where all is NaN, nothing confirms a weight that is only off
    near: Dict[int, float] = {number: PASSED_ON * own}
    known: List[bool] = []
    while near and not known:
        after: Dict[int, float] = {}
        for n in rungs:
            shares = [near[one] * min(1.0, _share(recorded, one, n)) for one in recorded.taps[n].parents if one in near]
            error = rungs[n].error
            if shares and error is None:  # not compared: what is computed from it counts
                after[n] = max(shares)
            elif shares and error is not None:
                known.append(error > max(shares) if np.isfinite(error) else overflowed or not fixed)
        near = after
    return not known or any(known)


def _share(recorded: taps.Recorded, number: int, child: int) -> float:
    """Length of a summand over that of the sum: a small branch passes on a small part of its relative error."""
    tap, whole = recorded.taps[number], recorded.taps[child]
    if whole.op not in SUMS:
        return 1.0
    length = float(np.linalg.norm(whole.truth))
    return float(np.linalg.norm(tap.truth)) / length if np.isfinite(length) and length else 1.0


def climb(encoder: Any, candidate: graph.Graph, rows: np.ndarray, reference: Optional[graph.Graph] = None) -> Ladder:
    """Compare every tap of a tower with the candidate's tensor for it.

    Args:
        encoder: the PyTorch tower, see `clipval.model.encoder`.
        candidate: an ONNX graph of the same tower.
        rows: inputs [n, ...]; the first two are used to pair tensors with taps.
        reference: for a candidate in fp16 or bf16: the same tower's float32 graph, whose twin gives the noise.
    """
    one = taps.record(encoder, rows[: candidate.batch or PAIRED])
    twin = None if candidate.precision == "fp32" else Twinned(reference or candidate, one, candidate.precision)
    tensors = itertools.chain(_weights(candidate, one.taps), evaluate.tensors(candidate, one.rows))
    found = pairs.pair(candidate, one.taps, tensors)
    noise = noise_of(one, twin, candidate.precision)
    chosen = choose(candidate, found, [EXCESS * one for one in noise], one)
    end = candidate.outputs[0]
    if len(candidate.outputs) == 1 and end in candidate.producer:
        chosen.setdefault(one.output, end)  # whatever its values: of NaN no value is close
    if len(rows) > PAIRED and not candidate.batch:
        more = taps.record(encoder, rows)
        if [tap.op for tap in more.taps] == [tap.op for tap in one.taps]:
            one, noise = more, noise_of(more, twin, candidate.precision)
    return measure(one, candidate, chosen, noise)


def _weights(whole: graph.Graph, recorded: Sequence[taps.Tap]) -> Iterator[Tuple[str, np.ndarray]]:
    """Weights that may be a result of PyTorch's, computed from weights alone, that an optimiser has folded."""
    sizes = {tap.truth.size for tap in recorded if tap.fixed}
    for name, one in whole.weights.items():
        held = whole.constant(name) if name in whole.consumers and int(np.prod(one.dims)) in sizes else None
        if held is not None:
            yield name, held


def noise_of(recorded: taps.Recorded, twin: Optional[Twinned], precision: str) -> List[float]:
    """The noise of a precision at each tap: the twin's error, or PyTorch's own in float32."""
    found = twin.errors(recorded) if twin else {n: tap.noise for n, tap in enumerate(recorded.taps)}
    noise: List[float] = []
    for n, tap in enumerate(recorded.taps):
        before = max([noise[one] for one in tap.parents if one >= 0], default=0.0)
        lost = overflows(tap.truth, precision)  # what is lost so is no noise: only what its inputs bring along is
        noise.append(max(before if lost else found.get(n, 0.0), FLOOR[precision]))
    return noise


class Twinned:
    """The twin of a float32 graph, with its tensors paired with taps once.

    Args:
        whole: a float32 graph of the same tower.
        recorded: taps of one sample.
        precision: `fp16` or `bf16`.
    """

    def __init__(self, whole: graph.Graph, recorded: taps.Recorded, precision: str) -> None:
        floats: Set[str] = set()

        def noted() -> Iterator[Tuple[str, np.ndarray]]:
            for name, values in evaluate.tensors(whole, recorded.rows):
                if values.dtype == np.float32:
                    floats.add(name)
                yield name, values

        found = pairs.pair(whole, recorded.taps, noted())
        bounds = [EXCESS * max(tap.noise, FLOOR["fp32"]) for tap in recorded.taps]
        best = {n: found.best(n, bounds[n]) for n in recorded.leading()}
        self.whole = whole
        self.chosen = {n: one[1] for n, one in best.items() if one is not None and one[0] <= bounds[n]}
        self.twin = Twin(precision, floats)

    def errors(self, recorded: taps.Recorded) -> Dict[int, float]:
        """Distance of the twin's tensors from the truth, by tap."""
        return errors_of(self.whole, recorded, self.chosen, self.twin)


def choose(
    candidate: graph.Graph, found: pairs.Pairs, bounds: Sequence[float], recorded: taps.Recorded
) -> Dict[int, str]:
    """The tensor of each tap: the closest one if it is good, else one that no other tap has."""
    best = {n: one for n in recorded.leading() for one in [found.best(n, bounds[n])] if one is not None}
    chosen = {n: name for n, (error, name) in best.items() if error <= bounds[n]}
    used = {candidate.root(name) for name in chosen.values()}
    feeding = _ancestors(candidate, set(chosen.values()))
    for n in best:
        if n in chosen:
            continue
        rest = [one for one in [*found.related.get(n, []), *found.any.get(n, [])] if candidate.root(one[1]) not in used]
        tap = recorded.taps[n]
        kinds = next((kinds for word, kinds in KINDS.items() if word in tap.op), ())
        ends = [name for _, name in rest if candidate.around(name).module in tap.ends]
        exits = [name for name in ends if candidate.leaves(name, candidate.around(name).module)]
        alike = [name for _, name in rest if candidate.around(candidate.root(name)).op in kinds and candidate.named]
        close = [name for error, name in rest if error < UNRELATED and (error < CLOSE or name not in feeding)]
        if exits or alike or close:
            name = [*exits, *alike, *close][0]
            if not folded.hidden(candidate, name, n, recorded):
                chosen[n] = name
    return chosen


def _ancestors(candidate: graph.Graph, tensors: Set[str]) -> Set[str]:
    found: Set[str] = set()
    rest = list(tensors)
    while rest:
        name = rest.pop()
        if name not in found:
            found.add(name)
            rest += candidate.parents(name)
    return found


def measure(recorded: taps.Recorded, candidate: graph.Graph, chosen: Dict[int, str], noise: Sequence[float]) -> Ladder:
    """The rungs of all taps that lead to the embedding, over all samples."""
    errors = errors_of(candidate, recorded, chosen)
    names = numbered([tap.name for tap in recorded.taps])
    rungs = {}
    for n in recorded.leading():
        tap, name = recorded.taps[n], chosen.get(n, "")
        node = candidate.around(name) if name else None
        rungs[n] = Rung(
            name=names[n],
            error=errors.get(n),
            noise=noise[n],
            parents=tuple(names[one] for one in tap.parents),
            pytorch=tap.noise,
            tensor=name,
            node=node.name if node else "",
            op=node.op if node else "",
            module=tap.module,
        )
    for n in [n for n, rung in rungs.items() if rung.error is not None and not rung.good]:
        if not seen(rungs, recorded, n):
            rungs[n] = replace(rungs[n], error=None, tensor="", node="", op="")
    for n in rungs:
        before = [rungs[one].error for one in recorded.taps[n].parents if one in rungs]
        rungs[n] = replace(rungs[n], error_in=max([one for one in before if one is not None], default=None))
    return Ladder(recorded, candidate, rungs, {n: name for n, name in chosen.items() if n in rungs and rungs[n].tensor})


def errors_of(
    whole: graph.Graph, recorded: taps.Recorded, chosen: Dict[int, str], change: Optional[Twin] = None
) -> Dict[int, float]:
    """Relative distance from the truth of the tensors chosen for the taps."""
    wanted: Dict[str, List[int]] = {}
    for n, name in chosen.items():
        wanted.setdefault(name, []).append(n)
    held = ((name, whole.constant(name)) for name in wanted if name in whole.weights)
    return {
        n: pairs.distance(np.asarray(values), recorded.taps[n].truth)
        for name, values in itertools.chain(held, evaluate.tensors(whole, recorded.rows, change))
        for n in wanted.get(name, ())
    }


def judge(ladder: Ladder, candidate: str) -> Finding:
    """The finding of a ladder.

    Args:
        candidate: name for the sentence.
    """
    rungs = tuple(ladder.rungs.values())
    first = ladder.first()
    if first is None:
        sentence, samples = _no_excess(ladder, candidate), len(ladder.recorded.rows)
        return Finding(NONE, candidate, sentence, ladder=rungs, samples=samples, precision=ladder.graph.precision)
    part = Part.of(ladder, first)
    rung = ladder.rungs[first]
    causes, recorded, precision = tuple(part.causes()), ladder.recorded, ladder.graph.precision
    where = f"PyTorch module {part.module or 'the tower itself'} ({part.operators})"
    start = f"its input is within {rung.noise:.1g}" if rung.error_in is None else f"input {rung.error_in:.1e} off"
    if recorded.taps[first].fixed:
        start = "computed from weights alone"
    excess = rung.excess or 0.0
    sentence = (
        f"{candidate}: diverges in {where}, ONNX {part.nodes}: {start}, output {rung.error:.1e} off, {excess:.3g} "
        f"times what {ladder.graph.precision} costs there, so the error starts there; computed in {part.precision}"
    )
    end = ladder.rungs[recorded.output]
    if end.good:
        sentence += f"; it does not reach the embedding ({end.error:.1e} off)"
    if causes:
        sentence += f"; {causes[0]}"
    return Finding(
        verdict=DIVERGENCE,
        candidate=candidate,
        sentence=sentence,
        module=part.module,
        node=part.graph_node,
        causes=causes,
        advice=tuple(part.advice(causes)),
        ladder=rungs,
        first=rung.name,
        samples=len(ladder.recorded.rows),
        precision=precision,
        material=_material(ladder, first),
    )


def _material(ladder: Ladder, first: int) -> Material:
    """What a bundle is cut from; if the first bad tensor is one of weights alone, up to the first that it spoils."""
    recorded, whole = ladder.recorded, ladder.graph
    bad = [n for n, rung in ladder.rungs.items() if n > first and rung.tensor in whole.moving and not rung.good]
    end = first if ladder.rungs[first].tensor in whole.moving or not bad else bad[0]
    rung, truth = ladder.rungs[end], recorded.taps[end].truth
    good = frozenset(ladder.tensors[n] for n, one in ladder.rungs.items() if one.good)
    return Material(whole, recorded.rows, rung.tensor, rung.noise, whole.precision, good, truth)


def _no_excess(ladder: Ladder, candidate: str) -> str:
    compared = [rung for rung in ladder.rungs.values() if rung.error is not None]
    good = [rung for rung in compared if rung.good]
    worst = max(good, key=lambda rung: rung.excess or 0.0)
    lone = len(compared) - len(good)
    other = f", but {lone} that nothing which follows confirms" if lone else ""
    end = ladder.rungs[ladder.recorded.output]
    return (
        f"{candidate}: no excess: {len(compared)} of {len(ladder.rungs)} taps compared, none is over {EXCESS:g} times "
        f"what {ladder.graph.precision} costs{other} (worst {worst.excess:.2g}, {worst.name}); a fault shows from "
        f"{EXCESS * min(rung.noise for rung in compared):.1e} (relative) on at the quietest tap, from "
        f"{EXCESS * end.noise:.1e} on at the embedding"
    )
