"""What is validated: model, weights, data set, reference figures, tolerances. One TOML file is one spec."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from pathlib import Path
from typing import Dict, List, Literal, Optional, Tuple, Union, get_args

import msgspec

from clipval import datasets
from clipval.backends import REFERENCE, base_name
from clipval.errors import InputError, UsageError
from clipval.towers import Tower, towers
from clipval.transform import PreprocessSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
if sys.version_info >= (3, 9):
    from typing import Annotated
else:
    from typing_extensions import Annotated

FOLDER = Path(__file__).parent / "specs"
LEAST_COSINE, MOST_RECALL, LEAST_FLOOR, MOST_DUPLICATES = 0.9, 0.1, 0.1, 0.1
MOST = {"max_abs": 0.1, "norm": 0.1, "invariance": 0.1}
Between = Annotated[float, msgspec.Meta(gt=0, lt=1)]  # an open interval, so that a bound can both pass and fail
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Size = Annotated[int, msgspec.Meta(ge=1)]
Metric = Annotated[str, msgspec.Meta(pattern="^(image|text)_retrieval_recall@[1-9][0-9]*$")]


Precision = Literal["fp32", "fp16", "bf16", "w8a16", "w8a8"]
PRECISIONS: Tuple[str, ...] = get_args(Precision)  # from the tightest bounds to the widest


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the TOML file: a misspelt key or a wrong type is reported by name."""


class ModelSpec(_Table, frozen=True):
    """The model.

    Attributes:
        name: open_clip architecture, a JSON config in open_clip's format relative to the spec file, `local-dir:FOLDER`
            or `hf-hub:ORG/NAME`.
        pretrained: default weights: tag, file or folder relative to the spec file, or `random`.
        sha256: of files with these weights, to recognise them when given by path.
        activation: that these weights were trained with, if neither tag nor folder states it.
        image_size, context_length, embed_dim: sizes of the contract (pixels, tokens, elements).
        resize_positions: whether position embeddings of another image size may be resized.
    """

    name: str
    pretrained: str = ""
    sha256: Tuple[str, ...] = ()
    activation: Literal["", "gelu", "quick_gelu"] = ""
    image_size: Size = 224
    context_length: Size = 77
    embed_dim: Size = 512
    resize_positions: bool = False


class DataSpec(_Table, frozen=True):
    """The data set.

    Attributes:
        name: its name in published tables: `flickr30k`, `mscoco_captions`, `shapes`.
        kind: one of `clipval.datasets.MODULES`; a folder of another kind is still recognised.
        images, captions: expected numbers; 0 allows any.
        captions_sha256: of the captions in order and their images' ids, from `clipval pin`; not compared if empty.
        fingerprint: of ids, captions and the bytes of every image, from `clipval pin`; not compared if empty.
        duplicates: number of images that may be duplicates with another id.
        get: one sentence for users without the data: where to get it, and the expected layout.
    """

    name: str
    kind: str = "karpathy"
    images: Count = 0
    captions: Count = 0
    captions_sha256: str = ""
    fingerprint: str = ""
    duplicates: Count = 0
    get: str = ""


class GoldenSpec(_Table, frozen=True):
    """Pinned embeddings of a few samples, with which PyTorch is compared.

    Parity compares backends with PyTorch, so an error in the model itself, and thus in every backend, shows only here.
    Probe inputs come from a seed, so no decoder or tokenizer is involved.

    Attributes:
        file: written by `clipval pin`; relative to the spec file.
        vision_min, text_min: smallest allowed cosine for the probe inputs.
        cosine_min: smallest allowed cosine for the data set's own files, whose decoder may differ.
        because: the reason for these numbers.
    """

    file: str
    cosine_min: Between
    vision_min: Between
    text_min: Between
    because: str = ""


class Reference(_Table, frozen=True):
    """A published or pinned figure.

    Attributes:
        metric: `image_retrieval_recall@5` and the like, a share in [0, 1].
        backend: that it was measured with; a backend without a figure is compared with pytorch's.
        value: the figure; count: number of queries, so one query changes it by 1 / count.
        candidates: number that each query is ranked among; 0 for the data set's, else the other direction's count.
        within: allowed distance in both directions: too high means another metric or split, or leakage.
        None: shown, not gated.
        source: where the figure is from; because: the reason for `within`.
    """

    metric: Metric
    backend: str
    value: Share
    count: Size
    source: str
    candidates: Count = 0
    within: Optional[Between] = None
    because: str = ""


class ParityBounds(_Table, frozen=True):
    """Bounds on a backend's embeddings against PyTorch's, per sample on unit-length vectors.

    Attributes:
        backend, precision: which embeddings these bounds apply to.
        tower: `vision` or `text`; empty for towers without bounds of their own.
        cosine_min: smallest cosine over samples; cosine_mean: mean cosine over samples.
        max_abs: largest absolute difference of one element.
        norm: largest |L2 norm - 1| of an embedding as returned by the backend.
        invariance: largest absolute difference of one element of a sample between two batches.
        because: the reason for these numbers.
    """

    backend: str
    precision: Precision
    cosine_min: Between
    cosine_mean: Between
    max_abs: Between
    norm: Between
    invariance: Between
    because: str
    tower: Literal["", "vision", "text"] = ""


class PairedBounds(_Table, frozen=True):
    """Allowed distance of a backend's recall@5 from PyTorch's on the same samples, as a share.

    Attributes:
        precision: of the backend; empty for precisions without bounds of their own.
    """

    metric: Metric
    within: Between
    because: str
    precision: Union[Precision, Literal[""]] = ""


class PublishedThroughput(_Table, frozen=True):
    """A published throughput curve, samples per second (1000 * batch / mean execute milliseconds)."""

    chip: str
    tower: Literal["vision", "text"]
    fps: Dict[int, float]
    source: str


class ThroughputSpec(_Table, frozen=True):
    """Batch sizes to measure, published curves, and the required share of a published figure on its chip."""

    batch_sizes: Annotated[Tuple[Size, ...], msgspec.Meta(min_length=1)] = (1, 4, 8, 16, 32, 64)
    floor: Share = 0.9
    because: str = ""
    published: List[PublishedThroughput] = []


class Spec(_Table, frozen=True):
    """A spec. `path` is the file it was read from."""

    name: str
    title: str
    model: ModelSpec
    data: DataSpec
    preprocess: Optional[PreprocessSpec] = None
    golden: Optional[GoldenSpec] = None
    references: List[Reference] = []
    parity: List[ParityBounds] = []
    paired: List[PairedBounds] = []
    throughput: ThroughputSpec = ThroughputSpec()
    path: str = ""

    @property
    def towers(self) -> Dict[str, Tower]:
        """Both towers' contracts by name."""
        return towers(self.model.image_size, self.model.context_length, self.model.embed_dim)

    def bounds(self, backend: str, precision: str, tower: str) -> ParityBounds:
        """Parity bounds of a backend in a precision, for one tower.

        Raises:
            InputError: the spec has none.
        """
        for wanted in (tower, ""):
            for bounds in self.parity:
                if (bounds.backend, bounds.precision, bounds.tower) == (backend, precision, wanted):
                    return bounds
        raise InputError(
            f"spec {self.path}: no [[parity]] for backend {backend!r}, precision {precision!r} and the {tower} tower; "
            f"add one"
        )

    def paired_bounds(self, metric: str, precision: str) -> PairedBounds:
        """Bounds of a paired metric for a precision: its own, else those for any precision."""
        found: Dict[str, PairedBounds] = {one.precision: one for one in self.paired if one.metric == metric}
        return found.get(precision) or found[""]

    def quantisation_loss(self, metric: str, precision: str) -> float:
        """Share of recall that a precision may lose to PyTorch by bounds of its own, at any k; 0 if it has none."""
        direction = metric.partition("@")[0]
        own = [one for one in self.paired if one.precision == precision and one.metric.partition("@")[0] == direction]
        return max((one.within for one in own), default=0.0)

    def reference(self, metric: str, backend: str) -> Optional[Reference]:
        """The figure of a metric for a backend: its own, else PyTorch's, else None."""
        for owner in (base_name(backend), REFERENCE):
            for reference in self.references:
                if (reference.metric, reference.backend) == (metric, owner):
                    return reference
        return None

    def size(self, reference: Reference) -> Tuple[int, int]:
        """Numbers of queries and candidates of a figure; 0 candidates if unknown."""
        by_image = reference.metric.startswith("image_")
        stated = self.data.images if by_image else self.data.captions
        other = "text_" if by_image else "image_"
        counts = [one.count for one in self.references if one.metric.startswith(other)]
        return reference.count, reference.candidates or stated or next(iter(counts), 0)

    def beside(self, name: str) -> str:
        """A path relative to the spec file; any other name unchanged."""
        beside = Path(self.path).parent / name
        return str(beside) if name and beside.is_file() else name


def names() -> List[str]:
    """The specs that ship with clipval."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Spec:
    """Read a shipped spec by name, or a TOML file by path.

    Raises:
        UsageError: there is no such spec or file.
        InputError: the file is not TOML, or a key is unknown, missing or of a wrong type.
    """
    path = FOLDER / f"{name}.toml" if name in names() else Path(name)
    if not path.is_file():
        raise UsageError(f"spec {name!r}: no such spec or file; shipped specs: {', '.join(names())}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        spec = msgspec.convert({**table, "path": str(path)}, Spec, str_keys=True)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise InputError(f"spec {path}: {error}") from error
    _check(spec)
    return spec


def _check(spec: Spec) -> None:
    problems = []
    if spec.data.kind not in datasets.names():
        problems.append(f"data.kind is {spec.data.kind!r}, expected one of {', '.join(datasets.names())}")
    for reference in spec.references:
        if not spec.size(reference)[1]:
            kind = "images" if reference.metric.startswith("image_") else "captions"
            problems.append(f"reference {reference.metric}: give the number of its candidates, or data.{kind}")
    for metric in dict.fromkeys(one.metric for one in spec.paired):
        if not any(one.metric == metric and not one.precision for one in spec.paired):
            problems.append(f"paired {metric}: each has a precision; add one without, for any other precision")
    means = [one for one in spec.parity if one.cosine_mean < one.cosine_min]
    problems += [f"parity {one.backend}: cosine_mean {one.cosine_mean} is below cosine_min" for one in means]
    problems += [*_duplicates(spec), *_cannot_fail(spec)]
    if problems:
        raise InputError(f"spec {spec.path}: {problems[0]}")


def _duplicates(spec: Spec) -> List[str]:
    """Duplicate tables, of which only the first would be used."""
    keys = [
        *(f"[[parity]] of {one.backend}, {one.precision}, {one.tower or 'both towers'}" for one in spec.parity),
        *(f"[[references]] of {one.metric}, {one.backend}" for one in spec.references),
        *(f"[[paired]] of {one.metric}{', ' * bool(one.precision)}{one.precision}" for one in spec.paired),
        *(f"[[throughput.published]] of {one.chip}, {one.tower}" for one in spec.throughput.published),
    ]
    return [f"two {key}; keep one" for key, count in Counter(keys).items() if count > 1]


def _cannot_fail(spec: Spec) -> List[str]:
    """Bounds so wide that a broken model is within them.

    Embeddings of two different samples have a cosine of 0.3 to 0.9 in a CLIP model, unit vectors of width 512 differ by
    0.1 to 0.3 in one element, and a recall that is 0.1 off means another model. A tenth of the published speed means
    another machine, and a tenth of the images with two ids another data set.
    """
    wide = [
        f"parity {one.backend}: cosine_min {one.cosine_min:g}" for one in spec.parity if one.cosine_min < LEAST_COSINE
    ]
    for name, most in MOST.items():
        found = [(one.backend, getattr(one, name)) for one in spec.parity]
        wide += [f"parity {backend}: {name} {value:g}" for backend, value in found if value > most]
    if spec.golden is not None:
        least = min(spec.golden.cosine_min, spec.golden.vision_min, spec.golden.text_min)
        wide += [f"golden: cosine {least:g}"] if least < LEAST_COSINE else []
    within = [(one.metric, one.within) for one in spec.references if one.within is not None]
    within += [(pair.metric, pair.within) for pair in spec.paired]
    wide += [f"{metric}: within {value:g}" for metric, value in within if value >= MOST_RECALL]
    wide += [f"throughput: floor {spec.throughput.floor:g}"] if spec.throughput.floor < LEAST_FLOOR else []
    duplicates, images = spec.data.duplicates, spec.data.images
    wide += [f"data: duplicates {duplicates}"] if images and duplicates > MOST_DUPLICATES * images else []
    return [
        f"{one} cannot fail: a broken model is within it; see the shipped specs for suitable bounds" for one in wide
    ]


class PublishedRecall(msgspec.Struct, frozen=True):
    """A row of the table of published recall figures; a missing figure is None."""

    source: str
    model: str
    pretrained: str
    dataset: str
    recalls: Dict[str, Optional[float]]


def published(model: str = "", pretrained: str = "", dataset: str = "") -> List[PublishedRecall]:
    """Published recall of open_clip models on Flickr30k, Flickr8k and COCO, filtered by the given names.

    The table ships as `clipval/specs/reference_recall.csv`; each row names its source.
    """
    with open(FOLDER / "reference_recall.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    wanted = {"model": model, "pretrained": pretrained, "dataset": dataset}
    return [
        PublishedRecall(
            row["source"],
            row["model"],
            row["pretrained"],
            row["dataset"],
            {name: float(value) if value else None for name, value in row.items() if "recall@" in name},
        )
        for row in rows
        if all(not value or row[name] == value for name, value in wanted.items())
    ]
