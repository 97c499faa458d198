"""Diagnose a candidate of a chain: choose file and samples, check inputs first, then compare tap by tap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import msgspec
import numpy as np

from clipval import backends, preprocess
from clipval.arrays import spread
from clipval.ascend.atc import DEFAULT_MODE
from clipval.chain import Chain
from clipval.diagnose import checks, evaluate, graph, ladder
from clipval.diagnose.bundle import Material
from clipval.diagnose.finding import DIVERGENCE, INPUT, NONE, Finding
from clipval.diagnose.locate import EXCESS
from clipval.diagnose.taps import relative
from clipval.errors import ClipvalError, UsageError, one_line
from clipval.export import read_metadata
from clipval.results import FAIL, Figure, ParityDetail
from clipval.towers import Tower

SAMPLES = 4
WORKED = 1e-4  # largest difference between a runtime's embedding and the node-by-node one; measured 4e-7


def samples(chain: Chain, tower: Tower, named: Sequence[str] = (), count: int = SAMPLES) -> np.ndarray:
    """Indices of the samples to use: the named ones first, then others spread over the data set.

    Raises:
        UsageError: a named one is not in it.
    """
    ids = chain.prepared.rows[tower.name].ids
    unknown = sorted(set(named) - set(ids))
    if unknown:
        raise UsageError(f"diagnose --sample {unknown[0]}: the {tower.name} data has no such id; its first is {ids[0]}")
    chosen = [*(ids.index(name) for name in named), *spread(len(ids), count).tolist()]
    return np.array(list(dict.fromkeys(chosen))[: max(count, 1)])


def locate(
    chain: Chain,
    backend: str,
    tower: Tower,
    picked: np.ndarray,
    *,
    file: Optional[Path] = None,
    keep: Optional[Path] = None,
    batch: int = 0,
) -> Finding:
    """Where a backend diverges from PyTorch, by the method for its kind; see `onnx` and `om`.

    Raises:
        UsageError: this backend's inner tensors are not accessible.
    """
    kind = backends.kind(backend)
    if kind.dumped:
        return om(chain, tower, picked, file=file, keep=keep, batch=batch, backend=backend)
    if kind.takes_onnx:
        return onnx(chain, tower, picked, file=file, backend=backend)
    raise UsageError(
        f"diagnose --backend {backend}: its inner tensors are not accessible; onnx and om can be diagnosed"
    )


def onnx(
    chain: Chain, tower: Tower, picked: np.ndarray, *, file: Optional[Path] = None, backend: str = "onnx"
) -> Finding:
    """Where an ONNX file diverges from PyTorch.

    Args:
        chain: of the settings under test; see `clipval.chain.Chain`.
        picked: indices of the samples.
        file: the candidate; default: the chain's own, which is validated and compiled.

    Raises:
        InputError: the file cannot be read or run.
    """
    rows = chain.prepared.rows[tower.name]
    ids, fed = [rows.ids[n] for n in picked], np.ascontiguousarray(rows[picked])
    own = chain.onnx(tower)
    validated = chain.pool.file(backend, tower, chain.accuracy_batch) if backends.kind(backend).takes_onnx else own
    candidate = graph.load(file or validated or own)
    if candidate.batch:  # the batch size that the file insists on
        picked = picked[np.arange(candidate.batch) % len(picked)]
        ids, fed = [rows.ids[n] for n in picked], np.ascontiguousarray(rows[picked])
    name = f"{backend} {tower.name} ({candidate.file.name}, {candidate.precision})"
    encoder = chain.encoder(tower).module
    found, bound = _run(chain, backend, tower, candidate.file, fed)  # first: it says if this is no file of the tower
    said = inputs_differ(chain, tower, picked, fed)
    climbed = ladder.climb(encoder, candidate, fed, graph.load(own) if candidate.precision != "fp32" else None)
    said += checks.file(
        candidate, read_metadata(candidate.file), _wanted(chain, tower, file), climbed.recorded.parameters("")
    )
    reference = climbed.recorded.taps[climbed.recorded.output].truth
    ids, fed, found = ids[: len(reference)], fed[: len(reference)], found[: len(reference)]
    if len(candidate.outputs) > 1:
        made = {name: one for name, one in evaluate.tensors(candidate, fed) if name in candidate.outputs}
        said += checks.swapped(made, taken(made, found), reference)
    said += checks.embeddings(ids, reference, found)
    said += _in_other_places(chain, backend, tower, candidate.file, ids, fed, found, bound)
    finding = ladder.judge(climbed, name)
    if said:
        return replace(
            finding, verdict=INPUT, sentence=f"{name}: not numerics: {said[0]}", causes=(*said, *finding.causes)
        )
    return _with_runtime(finding, climbed, found)


def taken(made: Mapping[str, np.ndarray], found: np.ndarray) -> str:
    """The output that the backend took for the embedding: the one with its values."""
    same = {name: np.abs(one - found).max() for name, one in made.items() if one.shape == found.shape}
    return min(same, key=lambda name: float(same[name]), default=next(iter(made)))


def om(
    chain: Chain,
    tower: Tower,
    picked: np.ndarray,
    *,
    file: Optional[Path] = None,
    backend: str = "om",
    keep: Optional[Path] = None,
    batch: int = 0,
) -> Finding:
    """Where an OM diverges: first its ONNX file is compared with PyTorch, then the OM with that file.

    Args:
        picked: indices of the samples; one batch of the OM is run.
        file: the OM; default: the chain's own; keep: folder for the dumps; batch: of `file`, 0 for the chain's own.

    Raises:
        BackendUnavailable: the OM cannot be run or dumped.
    """
    size = batch or chain.accuracy_batch
    made = _om_file(chain, backend, tower, size, file)
    before = onnx(chain, tower, picked[:SAMPLES], file=chain.onnx(tower))
    if before.found:
        return replace(before, sentence=f"{backend} {tower.name}: wrong before it was compiled: {before.sentence}")
    from clipval.diagnose import npu

    prepared = chain.prepared.rows[tower.name]
    filled = picked[np.arange(size) % len(picked)]
    rows, ids = np.ascontiguousarray(prepared[filled]), [prepared.ids[n] for n in filled]
    reference = np.asarray(chain.backend("pytorch", tower, size).run(rows))
    found, bound = _run(chain, backend, tower, made, rows)
    mode = chain.settings.precision_mode or DEFAULT_MODE
    name = f"{backend} {tower.name} ({made.name}, {mode})"
    count = len(set(ids))
    said = _compiled_from(chain, tower, made, file)
    said += checks.embeddings(ids[:count], reference[:count], found[:count])
    said += _in_other_places(chain, backend, tower, made, ids, rows, found, bound)
    if said:
        return Finding(INPUT, name, f"{name}: not numerics: {said[0]}", causes=tuple(said), samples=count)
    exact = precision_of(mode)
    whole = graph.load(chain.onnx(tower))
    located = npu.locate(
        made.resolve(), whole, rows, _device(chain, backend), exact, name, keep, chain.settings.om_runtime
    )
    own = {rung.tensor: rung.pytorch for rung in before.ladder if rung.tensor}
    rungs = tuple(replace(rung, pytorch=own.get(rung.tensor)) for rung in located.ladder)
    return replace(located, samples=count, ladder=rungs)


def precision_of(mode: str) -> str:
    """The precision that an atc precision mode rounds to."""
    from clipval.ascend import atc

    if atc.precision_class(mode) == "fp32":
        return "fp32"
    return "bf16" if "bf16" in mode or "bfloat16" in mode else "fp16"


def _device(chain: Chain, backend: str) -> int:
    number = backend.partition(":")[2]
    return int(number) if number else int(chain.settings.device_id[0])


def _om_file(chain: Chain, backend: str, tower: Tower, size: int, file: Optional[Path]) -> Path:
    made = file or chain.pool.file(backend, tower, size)
    assert made is not None  # OM backends always have an artifact
    return made


def _compiled_from(chain: Chain, tower: Tower, made: Path, file: Optional[Path]) -> List[str]:
    """Whether the OM may be from another ONNX file: the store's key ensures it; a ready one is checked by its age."""
    onnx_file = made.with_name(f"{tower.name}.onnx")
    ready = file is not None or chain.settings.om_dir is not None
    if not ready or not onnx_file.is_file() or onnx_file.stat().st_mtime <= made.stat().st_mtime:
        return []
    return [f"{made.name} is older than {onnx_file.name} next to it: it was not compiled from that; compile it again"]


def _run(chain: Chain, backend: str, tower: Tower, file: Path, rows: np.ndarray) -> Tuple[np.ndarray, float]:
    """The candidate's embeddings from the validated backend, not node by node, and the bound of one element.

    Any file of the tower is taken, whatever it calls its input and output.
    """
    opened = chain.pool.open_file(backend, tower, file, len(rows), ready=True)
    try:
        return np.asarray(opened.run(rows)), chain.bounds(opened.identity, tower).max_abs
    finally:
        opened.close()


def _in_other_places(
    chain: Chain,
    backend: str,
    tower: Tower,
    file: Path,
    ids: Sequence[str],
    rows: np.ndarray,
    found: np.ndarray,
    bound: float,
) -> List[str]:
    """The same batch once more, its samples one place on."""
    if len(set(ids)) < 2:
        return []
    moved, _ = _run(chain, backend, tower, file, np.ascontiguousarray(np.roll(rows, 1, axis=0)))
    return checks.batches(ids, found, np.roll(moved, -1, axis=0), bound)


def _wanted(chain: Chain, tower: Tower, file: Optional[Path]) -> Dict[str, str]:
    """The expected metadata of the file; the opset only for a file of the chain."""
    wanted = {"clipval.weights": chain.weights.sha256, "clipval.tower": tower.name, "clipval.normalized": "true"}
    return wanted if file else {**wanted, "opset": str(chain.settings.opset_version)}


def inputs_differ(chain: Chain, tower: Tower, picked: np.ndarray, prepared: np.ndarray) -> List[str]:
    """Prepared rows that differ from the model's own transform or tokenizer, run now."""
    if tower.dtype == "float32":
        fresh = np.stack([preprocess.pixels(chain.dataset.image_paths[n], chain.model) for n in picked])
    else:
        fresh = preprocess.tokens([chain.dataset.captions[n] for n in picked], chain.model, tower)
    return checks.inputs([chain.prepared.rows[tower.name].ids[n] for n in picked], prepared, fresh)


def _with_runtime(finding: Finding, climbed: ladder.Ladder, found: np.ndarray) -> Finding:
    """A finding for a graph that is right node by node, although the runtime's result is not."""
    truth = climbed.recorded.taps[climbed.recorded.output].truth
    noise = climbed.rungs[climbed.recorded.output].noise
    off = relative(found, truth)
    if finding.verdict != NONE or off <= max(WORKED, EXCESS * noise):
        return finding
    sentence = (
        f"{finding.candidate}: the graph agrees with PyTorch at every tap when it is run node by node, but the "
        f"backend's own result is {off:.1e} off: the error is in the runtime: its optimisations or its provider"
    )
    advice = ("--onnx-providers cpu", "another onnxruntime; report this with what --bundle DIR writes")
    end, rows = climbed.tensors[climbed.recorded.output], climbed.recorded.rows
    wrong = Material(climbed.graph, rows, end, max(noise, WORKED / EXCESS), climbed.graph.precision, runtime=True)
    return replace(finding, verdict=DIVERGENCE, sentence=sentence, advice=advice, material=wrong)


def annotated(chain: Chain, backend: str, tower: Tower, figures: Sequence[Figure]) -> List[Figure]:
    """The figures of a parity gate; a failed one gets the diagnosis in its message if that was requested.

    A diagnosis that fails states why, and changes no verdict: no error of its own may take the gate's place.
    """
    failed = [n for n, figure in enumerate(figures) if figure.verdict == FAIL]
    if not failed or not chain.settings.diagnose:
        return list(figures)
    details = [figure.detail for figure in figures if isinstance(figure.detail, ParityDetail)]
    named = [one.id for detail in details for one in detail.worst]
    try:
        found = locate(chain, backend, tower, samples(chain, tower, named))
        said, detail = "; ".join([found.sentence, *(f"try: {one}" for one in found.advice)]), found.detail()
    except ClipvalError as error:
        said, detail = f"failed: {error}", {}
    except Exception as error:  # a defect of the diagnosis; `clipval diagnose` shows its traceback
        said = f"failed with {type(error).__name__}: {one_line(error)}; python -m clipval diagnose shows where"
        detail = {}
    first = figures[failed[0]]
    told = msgspec.structs.replace(first, message=f"{first.message}\ndiagnosis: {said}", diagnosis=detail)
    return [told if n == failed[0] else figure for n, figure in enumerate(figures)]
