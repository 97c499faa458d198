"""open_clip's architectures: sizes, and whether their towers, with seeded weights, export and agree with PyTorch.

`python -m tests.sweep` runs every architecture that fits the machine and writes the shipped table.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Dict, List, Optional

import msgspec
import numpy as np

from clipval import environment, export, library, model, parity, probe
from clipval.arrays import spread
from clipval.backends.onnx import OnnxBackend
from clipval.backends.pytorch import PytorchBackend
from clipval.errors import ClipvalError, one_line
from clipval.library import TABLE
from clipval.towers import Tower
from clipval.weights import RANDOM, find_weights

SEEN = "ok"
SAMPLES = 10  # of a tower's probe inputs, evenly spread: enough to detect a wrong graph
END = {"eos": (2,)}  # text_cfg.eos_id's default, the token at which such towers pool


class Architecture(msgspec.Struct, frozen=True):
    """One row of the table.

    Attributes:
        model: open_clip's name.
        image, context, width: side in pixels, tokens, elements of an embedding.
        vocabulary: token ids; 0 if the text tower's config must be fetched from a hub.
        vision_gib, text_gib: fp32 weights of each tower in GiB, 0 if unknown. Above 2 GiB they are in a second file.
        transforms: mean, interpolation and resize mode of its weight tags, in words.
        needs: what is required besides open_clip; empty for nothing.
        export: `ok`, the reason why not, or empty if it was not tried.
        vision, text: largest cosine distance between PyTorch and ONNX Runtime on probe inputs; None: not measured.
        versions: of the libraries it was tried with.
    """

    model: str
    image: int
    context: int
    width: int
    vocabulary: int
    vision_gib: float
    text_gib: float
    transforms: str
    needs: str
    export: str = ""
    vision: Optional[float] = None
    text: Optional[float] = None
    versions: str = ""


def names() -> List[str]:
    """Every architecture of the installed open_clip."""
    found: List[str] = library.import_open_clip().list_models()
    return sorted(found)


def describe(name: str) -> Architecture:
    """Sizes and needs of an architecture, without allocating its weights.

    Raises:
        InputError: open_clip has no such architecture.
    """
    sizes, text = library.sizes(name), library.config(name)["text_cfg"]
    source = text.get("hf_tokenizer_name") or text.get("hf_model_name") or ""
    weights = model.tower_bytes(name)
    return Architecture(
        model=name,
        image=sizes["vision"].row_shape[-1],
        context=sizes["text"].row_shape[0],
        width=sizes["text"].width,
        vocabulary=0 if text.get("hf_model_name") else text.get("vocab_size", 49408),
        vision_gib=round(weights.get("vision", 0) / 2**30, 2),
        text_gib=round(weights.get("text", 0) / 2**30, 2),
        transforms=_transforms(name),
        needs=f"transformers; {source}" if source else "",
    )


def _transforms(name: str) -> str:
    """The distinct transforms of its weight tags, e.g. `mean 0.5 bicubic squash`."""
    open_clip = library.import_open_clip()
    found = set()
    for tag in open_clip.list_pretrained_tags_by_model(name):
        known: Dict[str, Any] = open_clip.get_pretrained_cfg(name, tag)
        mean = (known.get("mean") or (0.48,))[0]
        found.add(f"mean {mean:.2g} {known.get('interpolation') or 'bicubic'} {known.get('resize_mode') or 'shortest'}")
    return "; ".join(sorted(found))


def check(name: str, folder: Path, seed: int = 0) -> Architecture:
    """Export both towers of an architecture with seeded weights and compare them with PyTorch on probe inputs.

    Args:
        folder: the ONNX files are written and left there.
    """
    row = describe(name)
    versions = ", ".join(f"{package} {found}" for package, found in environment.library_versions().items())
    try:
        sizes = library.sizes(name)
        loaded = model.load(name, find_weights(name, RANDOM), sizes)
        far = {tower.name: _distance(loaded, name, tower, folder, seed) for tower in sizes.values()}
    except ClipvalError as error:
        return msgspec.structs.replace(row, export=one_line(error), versions=versions)
    return msgspec.structs.replace(row, export=SEEN, vision=far["vision"], text=far["text"], versions=versions)


def _distance(loaded: model.Model, name: str, tower: Tower, folder: Path, seed: int) -> float:
    file = folder / f"{name.replace('/', '_')}_{tower.name}.onnx"
    export.export(loaded, tower, file, metadata={"clipval.model": name})
    inputs = probe_inputs(loaded, name, tower, seed)
    picked = spread(len(inputs.ids), SAMPLES)
    reference, found = PytorchBackend(tower, model.encoder(loaded, tower)), OnnxBackend(tower, file)
    pairs = [(reference.run(inputs.rows[[n]]), found.run(inputs.rows[[n]])) for n in picked]
    found.close()
    ours, theirs = (np.concatenate(side) for side in zip(*pairs))
    return float(1 - parity.compare(tuple(inputs.ids[n] for n in picked), ours, theirs).cosine.min())


def probe_inputs(loaded: model.Model, name: str, tower: Tower, seed: int) -> probe.Probe:
    """Probe inputs; if the tokenizer is on a hub, rows of random words with the end token where the tower pools."""
    text = library.config(name)["text_cfg"]
    if tower.name == "vision" or not (text.get("hf_tokenizer_name") or text.get("hf_model_name")):
        return probe.inputs(loaded, tower, seed)
    layout = probe.TokenLayout((), END.get(text.get("pool_type", ""), ()), 1, model.vocabulary(loaded))
    return probe.captions(tower, layout, seed)


def read() -> List[Architecture]:
    """The shipped table; empty if there is none yet."""
    if not TABLE.exists():
        return []
    with open(TABLE, encoding="utf-8", newline="") as stream:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(stream)]
    blank = {"transforms": "", "needs": ""}
    return [msgspec.convert({**blank, **row}, Architecture, strict=False) for row in rows]


def write(rows: List[Architecture], file: Path = TABLE) -> None:
    """Write the table as CSV, sorted by name."""
    with open(file, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, Architecture.__struct_fields__, lineterminator="\n")
        writer.writeheader()
        for row in sorted(rows, key=lambda row: row.model.lower()):
            known = msgspec.structs.asdict(row)
            writer.writerow({**known, **{k: f"{known[k]:.1e}" for k in ("vision", "text") if known[k] is not None}})
