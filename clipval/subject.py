"""What is validated: the spec with the command line's model, and which parts of the spec apply to it.

A spec's figures, pinned embeddings, transform and activation belong to its own weights and data. Weights are
identified by name, by hash, or by `--pretrained-cfg`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import List, NamedTuple, Optional, Tuple

import msgspec

from clipval import datasets
from clipval import spec as specs
from clipval.errors import InputError, UsageError
from clipval.library import QUICK, architecture, brings_weights, is_quick, tag_by_hash
from clipval.options import Settings
from clipval.spec import DataSpec, Reference, Spec
from clipval.store import sha256
from clipval.transform import DEFAULT, PreprocessSpec
from clipval.weights import RANDOM, Weights, given_file

ANOTHER_PIPELINE = (
    "another pipeline (its caption file, its precision); pipelines differ by 0.005 to 0.007 for one model"
)


class Subject(NamedTuple):
    """The spec, adapted to the model under test.

    Attributes:
        spec: with the given model name and weights, and without what applies to other weights only.
        fallback: the spec's transform, for unknown weights of the spec's architecture.
        left_out: which parts of the spec do not apply to these weights and data, and why; one line each.
        pretrained_cfg: the tag given by `--pretrained-cfg`, if any.
    """

    spec: Spec
    fallback: Optional[PreprocessSpec]
    left_out: Tuple[str, ...]
    pretrained_cfg: str = ""

    @property
    def trained(self) -> bool:
        """Whether recall is meaningful: the weights are not seeded."""
        return self.spec.model.pretrained != RANDOM

    @property
    def golden_file(self) -> Path:
        """The file of pinned embeddings; call it only if the spec names one."""
        assert self.spec.golden is not None
        return Path(self.spec.beside(self.spec.golden.file))

    @property
    def weights_asked(self) -> Tuple[str, str, str, str]:
        """Arguments of `clipval.weights.find_weights`."""
        model = self.spec.model
        return model.name, model.pretrained, self.pretrained_cfg, model.activation

    def drawn(self, data_dir: Optional[Path]) -> bool:
        """Whether the data are drawn scenes: by the spec, or for random weights without given data."""
        return data_dir is None and (datasets.draws(self.spec.data.kind) or not self.trained)

    def check(self, data_dir: Optional[Path]) -> None:
        """Check that the spec and the options name data and weights.

        Raises:
            InputError, UsageError: what is missing, and where to get it.
        """
        get = self.spec.data.get
        if data_dir is None and not self.drawn(None):
            raise UsageError(f"spec {self.spec.name} needs --data-dir. {get}".strip())
        if data_dir is not None and not data_dir.is_dir():
            raise InputError(f"--data-dir {data_dir}: no such folder. {get}".strip())
        if not self.spec.model.pretrained:
            raise UsageError(f"spec {self.spec.name} names no weights; give --pretrained a tag, a file or 'random'")

    def transform_of(self, found: Weights) -> PreprocessSpec:
        """The weights' own transform, else the spec's; else, assumed, the spec's for other weights or open_clip's.

        Raises:
            InputError: the spec's is another one than the weights' own.
        """
        own, stated = found.preprocess, self.spec.preprocess
        other = own.differs(stated) if own and stated else ""
        if own and stated and other:
            raise InputError(
                f"spec {self.spec.path}: [preprocess] has {other} {_said(stated, other)}, but the weights were trained "
                f"with {_said(own, other)} ({own.source}); correct it, or leave [preprocess] out"
            )
        return found.preprocess or self.spec.preprocess or self.fallback or DEFAULT

    def assumed(self, found: Weights) -> List[str]:
        """What was assumed about trained weights because nothing states it, one line each."""
        if not self.trained:
            return []
        nothing = "neither tag, folder nor spec states it"
        lines = []
        used = self.transform_of(found).describe() if found.preprocess is None else ""
        if used and self.spec.preprocess is None:
            lines.append(f"transform assumed: {used}; {nothing}")
        elif used and self.spec.golden is None:
            lines.append(f"transform: only the spec states it ({used}), so a wrong one shows in recall alone")
        if found.quick_gelu is None:
            quick = is_quick(self.spec.model.name)
            lines.append(f"activation assumed: {'quick_gelu' if quick else 'gelu'}; {nothing}")
        return lines


def of(settings: Settings) -> Subject:
    """The subject of a run. Reads the spec, and the weights' file if it replaces the spec's."""
    spec = specs.load(settings.spec)
    model = spec.model
    name = settings.model_name or spec.beside(model.name)
    brings = name if brings_weights(name) else ""
    pretrained = settings.pretrained or brings or spec.beside(model.pretrained)
    seeded = pretrained == RANDOM
    same_model = settings.model_name is None or _same(name, spec.beside(model.name))
    others = "" if same_model else f"another architecture, {Path(name).stem}"
    if same_model:
        others = _other_weights(spec, pretrained, settings.pretrained_cfg)
    drawn = datasets.draws(spec.data.kind)
    other_data = f"other data, --data-dir {settings.data_dir}" if drawn and settings.data_dir is not None else ""
    why = others or other_data
    speaks = not others or (same_model and seeded)  # for seeded weights no transform is wrong
    references = spec.references
    if why:
        tag = settings.pretrained_cfg.rpartition("/")[2] or _tag_of(name, pretrained, spec.data)
        references = [] if other_data else published(name, tag, spec.data, spec.references)
    replaced = msgspec.structs.replace(
        spec,
        model=msgspec.structs.replace(
            model,
            name=name,
            pretrained=pretrained,
            activation=model.activation if speaks else "",
            resize_positions=model.resize_positions or settings.resize_positions,
        ),
        preprocess=spec.preprocess if speaks else None,
        golden=None if why else spec.golden,
        references=references,
    )
    left_out = _left_out(spec, replaced, why, seeded)
    return Subject(replaced, spec.preprocess if same_model else None, left_out, settings.pretrained_cfg)


def _said(stated: PreprocessSpec, name: str) -> str:
    value = getattr(stated, name)
    return " ".join(f"{one:g}" for one in value) if isinstance(value, tuple) else str(value)


def _left_out(spec: Spec, replaced: Spec, why: str, seeded: bool) -> Tuple[str, ...]:
    lines: List[str] = []
    if replaced.golden is None:
        reason = f"the spec's embeddings are not for {why}" if spec.golden and why else "no embeddings were pinned"
        seen = "shows in recall alone" if replaced.references and not seeded else "is not seen"
        lines.append(f"golden: {reason}, so an error in the model itself {seen}")
    if seeded:
        lines.append("recall: the weights are random, so recall is meaningless")
    elif not spec.references:
        lines.append("recall: the spec has no [[references]], so recall is not gated")
    elif why:
        if replaced.references:
            lines.append(f"recall: the spec's figures are not of {why}; held to published ones of these weights")
        else:
            lines.append(f"recall: not gated, the spec's figures are not of {why}, and no published ones are")
    elif all(one.within is None for one in spec.references):
        lines.append("recall: shown and not gated, as no [[references]] of the spec gives within")
    if not seeded and not spec.paired:
        lines.append("paired: the spec has no [[paired]], so recall is not held to PyTorch's on the same samples")
    return tuple(lines)


def _same(name: str, own: str) -> bool:
    """Whether two names mean one architecture: equal names, or config files of equal content."""
    if name == own:
        return True
    try:
        one, two = (json.loads(Path(file).read_text(encoding="utf-8")) for file in (name, own))
    except (OSError, ValueError):
        return False
    return bool(one == two)


def _other_weights(spec: Spec, pretrained: str, says: str) -> str:
    """Why the weights are not known to be the spec's own; "" if they are."""
    own = spec.model.pretrained
    if not own or pretrained in (own, spec.beside(own)) or says.rpartition("/")[2] == own:
        return ""
    if pretrained == RANDOM:
        return "seeded weights"
    file = given_file(pretrained)
    if file is None:
        return f"other weights, {pretrained}"
    found = sha256(file)
    own_file = Path(spec.beside(own))
    known = (*spec.model.sha256, *((sha256(own_file),) if own_file.is_file() else ()))
    if found in known:
        return ""
    hint = "" if own_file.is_file() else " (use --pretrained-cfg if it is)"
    return f"{file.name} (sha256 {found[:12]}), which is not known to be {Path(own).name}{hint}"


def _tag_of(name: str, pretrained: str, data: DataSpec) -> str:
    """The weights' tag: as given, or by a file's hash if the published table has the data set."""
    builtin = not name.endswith(".json") and not brings_weights(name)
    file = given_file(pretrained) if builtin and specs.published(dataset=data.name) else None
    return pretrained if file is None else tag_by_hash(architecture(name), sha256(file))


def published(model: str, tag: str, data: DataSpec, own: List[Reference]) -> List[Reference]:
    """Published recall of a model's weights on a data set, as references; empty if the shipped table has none.

    Tolerances are the spec's own for the metric, but at least 0.01, since these figures come from another pipeline.
    """
    found: List[Reference] = []
    queries = {"image_retrieval": data.captions, "text_retrieval": data.images}
    names = dict.fromkeys((model, model[: -len(QUICK)] if model.endswith(QUICK) else model + QUICK))
    rows = [row for name in names for row in specs.published(name, tag, data.name) if tag]
    for row in rows:
        for metric, value in row.recalls.items():
            direction = metric.partition("_recall@")[0]
            if value is None or not queries.get(direction) or any(one.metric == metric for one in found):
                continue
            within = max([0.01, *(one.within or 0 for one in own if one.metric == metric)])
            found.append(
                Reference(
                    metric=metric,
                    backend="pytorch",
                    value=value,
                    count=queries[direction],
                    within=within,
                    source=row.source,
                    because=ANOTHER_PIPELINE,
                )
            )
    return found
