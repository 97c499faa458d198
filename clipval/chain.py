"""The chain itself: settings -> any artifact or embeddings, each built once. The only module that composes stages."""

from __future__ import annotations

import secrets
import time
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

import msgspec
import numpy as np

from clipval import backends, datasets, environment, export, library, preprocess, store, subject
from clipval import model as models
from clipval import probe as probes
from clipval import spec as specs
from clipval.backends import REFERENCE, Backend, Encoder, Identity, Opening, base_name
from clipval.backends.pool import ColdStart, Pool
from clipval.datasets import RetrievalDataset
from clipval.embeddings import Embeddings, Golden, embed, read_golden
from clipval.errors import InputError, UsageError
from clipval.options import Settings
from clipval.retrieval import IMAGE, Retrieval, evaluate, retrieved
from clipval.towers import Tower
from clipval.transform import DEFAULT, PreprocessSpec
from clipval.weights import RANDOM, Weights, find_weights, identify

REFERENCE_BATCH = 32  # fewer calls: torch's threads wait for each other at every operator, the more so on a busy host
PREFERRED_BATCH = 8  # the batch that accuracy is measured with: a tower's OM exists for it in every default run


class Opened(NamedTuple):
    """What one backend made of one tower: its identity and the embeddings."""

    identity: Identity
    embeddings: Embeddings


class Chain:
    """One run's artifacts. Nothing is built before it is asked for.

    Args:
        settings: what was asked for.
        rebuild_before: see `clipval.store.Store`; by default now, where the settings ask to rebuild.
    """

    def __init__(self, settings: Settings, rebuild_before: Optional[float] = None) -> None:
        self.settings = settings
        if rebuild_before is None and settings.rebuild:
            rebuild_before = time.time()
        self.store = store.Store(settings.workdir, rebuild_before)
        self.pool = Pool(self._open, allow_simulated=settings.allow_simulated)
        self._expected: Dict[str, Set[Tuple[str, int]]] = {}
        self._embeddings: Dict[Tuple[str, str], Opened] = {}
        self._retrievals: Dict[str, Retrieval] = {}

    @cached_property
    def subject(self) -> subject.Subject:
        """What is under test, and what of the spec holds for it."""
        return subject.of(self.settings)

    @property
    def spec(self) -> specs.Spec:
        """The spec, with the command line's model in place of its own where one was given."""
        return self.subject.spec

    @cached_property
    def towers(self) -> Dict[str, Tower]:
        """Both towers' contracts: the spec's sizes, or those of the architecture that replaces the spec's."""
        if self.settings.model_name is None:
            return self.spec.towers
        return library.sizes(self.settings.model_name)

    @property
    def batch_sizes(self) -> Tuple[int, ...]:
        """Those asked for, else those of ready files that were given, else the spec's."""
        if self.settings.batch_sizes:
            return self.settings.batch_sizes
        of_files = (backends.kind(name).sizes for name in self.settings.validated)
        given = [sizes(self.settings, list(self.towers.values())) for sizes in of_files]
        return next((found for found in given if found), self.spec.throughput.batch_sizes)

    @property
    def accuracy_batch(self) -> int:
        """Batch size of the accuracy path."""
        return PREFERRED_BATCH if PREFERRED_BATCH in self.batch_sizes else max(self.batch_sizes)

    def smallest_batch(self, name: str) -> int:
        """The smallest batch size that a backend has: 1, unless ready files were given and none is of it."""
        given = backends.kind(name).sizes(self.settings, list(self.towers.values()))
        return min(given) if given else 1

    @property
    def trained(self) -> bool:
        """Recall means something: the weights are not seeded ones."""
        return self.spec.model.pretrained != RANDOM

    @property
    def drawn(self) -> bool:
        """The drawn scenes are the data: the spec says so, or random weights are fed and no data was given."""
        return self.settings.data_dir is None and (self._draws or not self.trained)

    @property
    def _draws(self) -> bool:
        """The spec's own data are drawn."""
        return datasets.kind(self.spec.data.kind).draw is not None

    def check_inputs(self) -> None:
        """Find data and weights before anything is built.

        Raises:
            InputError, UsageError: what is missing, from where to get it and how it must lie.
        """
        data = self.spec.data
        folder = self.settings.data_dir
        if folder is None and not self.drawn:
            raise UsageError(f"spec {self.spec.name} needs --data-dir. {data.get}".strip())
        if folder is not None and not folder.is_dir():
            raise InputError(f"--data-dir {folder}: no such folder. {data.get}".strip())
        if not self.spec.model.pretrained:
            raise UsageError(f"spec {self.spec.name} names no weights; give --pretrained a tag, a file or 'random'")
        self.store.check()
        if folder is not None:
            self.dataset  # noqa: B018  reads the annotations and finds every image
        self.weights  # noqa: B018  resolves the tag or file
        models.tokenizer(self.spec.model.name)(["a"])  # may have to be fetched

    @cached_property
    def dataset(self) -> RetrievalDataset:
        """The data set of `--data-dir`, or the drawn one."""
        data, folder = self.spec.data, self.settings.data_dir
        if folder is None and not self.drawn:
            self.check_inputs()
        if folder is None:
            folder = self._draw(data.kind if self._draws else datasets.DRAWN)
        chosen = self.settings
        dataset = datasets.read(
            folder, expected=data.kind, named=chosen.data_format, captions_format=chosen.captions_format
        )
        datasets.expect(dataset, images=data.images, captions=data.captions)
        return dataset

    def _draw(self, kind: str) -> Path:
        draw, images = datasets.kind(kind).draw, self.spec.data.images
        assert draw is not None
        code = store.code_hash(datasets.MODULES[kind])
        key = {"code": code, "kind": kind, "images": images, "pillow": environment.version("pillow")}
        return self.store.get("dataset", key, lambda path: draw(path, images))

    @cached_property
    def weights(self) -> Weights:
        return find_weights(*self._weights_asked)

    @property
    def _weights_asked(self) -> Tuple[str, str, str, str]:
        model = self.spec.model
        return model.name, model.pretrained, self.settings.pretrained_cfg, model.activation

    @cached_property
    def model(self) -> models.Model:
        transform, resize = self._transform_of(self.weights), self.spec.model.resize_positions
        return models.load(self.spec.model.name, self.weights, self.towers, transform, resize)

    @cached_property
    def inputs(self) -> models.Model:
        """The model's transform and tokenizer without its weights, which are not downloaded for them."""
        return models.inputs(self.spec.model.name, self._transform_of(identify(*self._weights_asked)))

    def _transform_of(self, found: Weights) -> PreprocessSpec:
        """The weights' own transform, else the spec's; else the spec's of other weights or open_clip's, assumed."""
        return found.preprocess or self.spec.preprocess or self.subject.fallback or DEFAULT

    def assumed(self, found: Weights) -> List[str]:
        """What nothing states of trained weights and was assumed, one line each."""
        if not self.trained:
            return []
        nothing = "neither tag, folder nor spec states it"
        lines = []
        if found.preprocess is None and self.spec.preprocess is None:
            lines.append(f"transform assumed: {self._transform_of(found).describe()}; {nothing}")
        if found.quick_gelu is None:
            quick = library.is_quick(self.spec.model.name)
            lines.append(f"activation assumed: {'quick_gelu' if quick else 'gelu'}; {nothing}")
        return lines

    @cached_property
    def model_key(self) -> Dict[str, Any]:
        """What embeddings depend on besides data: weights, architecture, code and library versions."""
        return {
            "weights": self.weights.sha256,
            "config": library.config(self.spec.model.name),
            "versions": environment.library_versions(),
            "code": store.code_hash("clipval.model"),
        }

    @cached_property
    def prepared(self) -> preprocess.PreparedData:
        """The data set as arrays in the recipe's layout."""
        key = {
            **self.model_key,
            "data": self.dataset.fingerprint(),
            "code": store.code_hash("clipval.preprocess"),
            "weights": None,  # pixels and tokens depend on the transform and the tokenizer only
            "transform": str(self.model.transform),
        }

        def build(folder: Path) -> None:
            preprocess.prepare(self.dataset, self.model, self.towers, folder)

        folder = self.store.get("prepared", key, build, resumes=True)
        return preprocess.opened(self.dataset, self.towers, folder)

    def input_digests(self, tower: Tower) -> np.ndarray:
        """sha256 of each prepared row, in order: equal for equal inputs."""
        rows = self.prepared.rows[tower.name]
        files = store.files(self.prepared.folder)
        return np.array([files[f"{tower.prepared}/{name}.npy"]["sha256"] for name in rows.ids])

    def onnx(self, tower: Tower) -> Path:
        """The ONNX file of a tower."""
        opset = self.settings.opset_version
        key = {**self.model_key, "tower": tower.name, "opset": opset, "code": store.code_hash("clipval.export")}
        metadata = {
            "clipval.weights": self.weights.sha256,
            "clipval.model": self.spec.model.name,
            "clipval.versions": str(environment.library_versions()),
        }

        def build(folder: Path) -> None:
            export.export(self.model, tower, folder / f"{tower.name}.onnx", opset=opset, metadata=metadata)
            export.check(folder / f"{tower.name}.onnx", tower)

        return self.store.get("onnx", key, build) / f"{tower.name}.onnx"

    def encoder(self, tower: Tower) -> Encoder:
        """A tower as the model has it; see `clipval.model.encoder`."""
        return Encoder(models.encoder(self.model, tower), self.model.load_seconds)

    def file(self, name: str, tower: Tower, batch_size: int) -> Optional[Path]:
        """The artifact that a backend opens; None where it opens the model itself."""
        kind = backends.kind(name)
        expected = self._expected.pop(base_name(name), None)
        if kind.ahead and expected:
            kind.ahead(self, [(self.towers[tower_name], size) for tower_name, size in sorted(expected)])
        return kind.artifact(self, tower, batch_size) if kind.artifact else None

    def expect(self, name: str, tower_name: str, batch_size: int) -> None:
        """Say that this run will open a backend for a tower and batch size, so that files are built side by side."""
        self._expected.setdefault(base_name(name), set()).add((tower_name, batch_size))

    def backend(self, name: str, tower: Tower, batch_size: int) -> Backend:
        """An open backend; see `clipval.backends.pool.Pool.get`."""
        return self.pool.get(name, tower, batch_size)

    def _open(self, name: str, tower: Tower, batch_size: int) -> Backend:
        return self.open_file(name, tower, self.file(name, tower, batch_size), batch_size)

    def open_file(self, name: str, tower: Tower, file: Optional[Path], batch_size: int) -> Backend:
        """A backend on a given file; one that opens the model itself needs none.

        Raises:
            UsageError: the backend needs a file.
        """
        kind, number = backends.kind(name), name.partition(":")[2]
        if file is None and kind.suffix:
            raise UsageError(f"backend {name} needs --model with an {kind.suffix} file")
        return kind.open(self, Opening(tower, file, batch_size, int(number) if number else self.settings.device_id[0]))

    def cold_start(self, name: str, tower: Tower, batch_size: int) -> ColdStart:
        """How a backend starts from cold; see `clipval.backends.pool.Pool.cold_start`."""
        rows = self.prepared.rows[tower.name]
        batch = np.ascontiguousarray(rows[np.arange(batch_size) % len(rows)])
        self.file(name, tower, batch_size)
        of_model = not backends.kind(name).suffix
        return self.pool.cold_start(name, tower, batch, self._forget_model if of_model else lambda: None)

    def _forget_model(self) -> None:
        """Load the model again when it is next asked for."""
        self.__dict__.pop("model", None)

    def embeddings(self, name: str, tower: Tower) -> Opened:
        """A backend's embeddings of the whole data set, in the order of its ids.

        The reference's are kept in the store. A backend under test runs anew in every session: embeddings of last
        week say nothing of the device today.
        """
        key = (name, tower.name)
        if key not in self._embeddings:
            if name == REFERENCE:
                self._embeddings[key] = self._reference(tower)
            else:
                backend = self.backend(name, tower, self.accuracy_batch)
                self._embeddings[key] = Opened(backend.identity, self._embed(backend, tower, self.accuracy_batch))
        return self._embeddings[key]

    def _embed(self, backend: Backend, tower: Tower, batch_size: int) -> Embeddings:
        rows = self.prepared.rows[tower.name]
        return embed(backend, rows.ids, rows, batch_size)

    def _reference(self, tower: Tower) -> Opened:
        rows = self.prepared.rows[tower.name]
        key = {
            **self.model_key,
            "tower": tower.name,
            "prepared": rows.folder.parent.name,
            "batch": REFERENCE_BATCH,
            "code": store.code_hash("clipval.embeddings", "clipval.backends.pytorch"),
        }

        def build(folder: Path) -> None:
            backend = self.backend(REFERENCE, tower, self.accuracy_batch)
            np.save(folder / "values.npy", self._embed(backend, tower, REFERENCE_BATCH).values)
            (folder / "identity.json").write_bytes(msgspec.json.encode(backend.identity))

        folder = self.store.get("reference", key, build)
        identity = Identity(*msgspec.json.decode((folder / "identity.json").read_bytes()))
        return Opened(identity, Embeddings(rows.ids, np.load(folder / "values.npy")))

    def golden(self, tower: Tower) -> Golden:
        """The embeddings that the spec's model is known to make."""
        assert self.spec.golden is not None
        return read_golden(Path(self.spec.beside(self.spec.golden.file)), tower)

    def bounds(self, where: Identity, tower: Tower) -> specs.ParityBounds:
        """The spec's tolerances for a tower of a backend in the precision it computes in."""
        kind = backends.kind(where.name)
        return self.spec.bounds(kind.judged_as(where) or base_name(where.name), kind.precision(where), tower.name)

    @cached_property
    def probe_seed(self) -> int:
        """The seed of this run's probe inputs: `--probe-seed`, else a new one."""
        given = self.settings.probe_seed
        return secrets.randbelow(10**6) if given is None else given

    def probe(self, tower: Tower, seed: Optional[int] = None) -> probes.Probe:
        """Fresh inputs of a tower; see `clipval.probe`. Without a seed, of this run's."""
        seed = self.probe_seed if seed is None else seed
        if tower.dtype == "float32":
            return probes.pictures(tower, partial(models.transformed, self.model), seed)
        layout = probes.token_layout(self.model.tokenize, models.vocabulary(self.model))
        return probes.captions(tower, layout, seed)

    def embed_probe(self, name: str, tower: Tower, seed: Optional[int] = None) -> Embeddings:
        """A backend's embeddings of probe inputs, computed now."""
        ids, rows = self.probe(tower, seed)
        return embed(self.backend(name, tower, self.accuracy_batch), ids, rows, self.accuracy_batch)

    def embed_some(self, name: str, tower: Tower, picked: np.ndarray, batch_size: int) -> Embeddings:
        """A backend's embeddings of some samples, in the order picked, computed now."""
        rows = self.prepared.rows[tower.name]
        ids = tuple(rows.ids[n] for n in picked)
        return embed(self.backend(name, tower, batch_size), ids, rows[picked], batch_size)

    def busy(self, name: str) -> str:
        """What else uses the device of a backend; see `clipval.backends.pool.Pool.busy`."""
        return self.pool.busy(name)

    def retrieval(self, name: str) -> Retrieval:
        """A backend's ranks on the whole data set."""
        if name not in self._retrievals:
            images, captions = (self.embeddings(name, tower).embeddings for tower in self.towers.values())
            self._retrievals[name] = evaluate(
                images.ids, images.values, captions.ids, captions.values, self.dataset.image_of_caption
            )
        return self._retrievals[name]

    def retrieved(self, name: str, direction: str, query_id: str) -> List[str]:
        """Ids of the best candidates that a backend finds for one query."""
        images, captions = (self.embeddings(name, tower).embeddings for tower in self.towers.values())
        queries, candidates = (captions, images) if direction == IMAGE else (images, captions)
        return retrieved(queries.values[queries.ids.index(query_id)], candidates.values, candidates.ids)

    def image_path(self, image_id: str) -> Optional[Path]:
        """File of an image, for a report's thumbnails; None for an id that is no image's."""
        return dict(zip(self.dataset.image_ids, self.dataset.image_paths)).get(image_id)

    def caption(self, caption_id: str) -> Optional[str]:
        """Text of a caption; None for an id that is no caption's."""
        return dict(zip(self.dataset.caption_ids, self.dataset.captions)).get(caption_id)

    def close(self) -> None:
        """Close every backend."""
        self.pool.close()

    def not_validated(self) -> List[str]:
        """What this run does not say anything about, one line each."""
        listed = {base_name(name) for name in self.settings.validated}
        left = [f"{name}: not listed in --backends" for name in backends.names() if name not in listed]
        left += self.subject.left_out
        left += self.assumed(self.weights) if "weights" in vars(self) else []
        if not self.trained:
            left.append("recall: the weights are random, so figures of recall mean nothing")
            if self.drawn and not self._draws:
                left.append(f"data: drawn scenes stand in for {self.spec.data.name}, as no --data-dir was given")
        return left
