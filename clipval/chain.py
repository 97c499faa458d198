"""The chain: settings -> any artifact or embeddings, each built once. The only module that composes stages."""

from __future__ import annotations

import copy
import secrets
import time
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from clipval import backends, datasets, environment, export, library, preprocess, probe, reference, store, subject
from clipval import model as models
from clipval import spec as specs
from clipval.backends import REFERENCE, Backend, Encoder, Identity, Opening, base_name, providers
from clipval.backends.pool import ColdStart, Pool
from clipval.datasets import RetrievalDataset
from clipval.embeddings import Embeddings, Golden, Made, align, embed, read_golden
from clipval.errors import BackendUnavailable, UsageError
from clipval.options import Settings
from clipval.retrieval import IMAGE, Retrieval, evaluate, retrieved
from clipval.shards import files
from clipval.towers import Tower
from clipval.weights import Weights, find_weights, identify

PREFERRED_BATCH = 8  # batch size of accuracy: every default run has an OM for it


class Chain:
    """One run's artifacts. Nothing is built before it is needed.

    Args:
        settings: the run's options.
        rebuild_before: see `clipval.store.Store`; default: now if `--rebuild` is set.

    Raises:
        UsageError: the settings' backends cannot share a process, or a provider has no such options.
    """

    def __init__(self, settings: Settings, rebuild_before: Optional[float] = None) -> None:
        self.settings = settings
        if rebuild_before is None and settings.rebuild:
            rebuild_before = time.time()
        self.store = store.Store(settings.workdir, rebuild_before)
        self.pool = Pool(self)
        backends.check_acl(settings.validated, settings)
        providers.check(settings.onnx_providers, settings.onnx_provider_options)
        self._embeddings: Dict[Tuple[str, str], Made] = {}
        self._retrievals: Dict[str, Retrieval] = {}
        self._rows: Dict[Tuple[str, int], np.ndarray] = {}

    @cached_property
    def subject(self) -> subject.Subject:
        """What is under test, and which parts of the spec apply to it."""
        return subject.of(self.settings)

    @property
    def spec(self) -> specs.Spec:
        """The spec, with the command line's model instead of its own if one was given."""
        return self.subject.spec

    @cached_property
    def towers(self) -> Dict[str, Tower]:
        """Both towers' contracts: the spec's sizes, or those of the architecture that replaces the spec's."""
        return library.sizes(self.settings.model_name) if self.settings.model_name else self.spec.towers

    @property
    def batch_sizes(self) -> Tuple[int, ...]:
        """The requested ones, else those of given ready files, else the spec's."""
        of_files = map(self.pool.sizes, self.settings.validated)
        return self.settings.batch_sizes or next(filter(None, of_files), self.spec.throughput.batch_sizes)

    @property
    def accuracy_batch(self) -> int:
        """Batch size of the accuracy path."""
        return PREFERRED_BATCH if PREFERRED_BATCH in self.batch_sizes else max(self.batch_sizes)

    def check_inputs(self) -> None:
        """Find data and weights before anything is built.

        Raises:
            InputError, UsageError: what is missing, where to get it and the expected layout.
        """
        self.subject.check(self.settings.data_dir)
        self.store.check()
        if self.settings.data_dir is not None:
            self.dataset  # noqa: B018  reads the annotations and finds every image
        self.weights  # noqa: B018  resolves the tag or file
        models.tokenizer(library.architecture(self.spec.model.name))(["a"])  # may need a download

    def open_given(self, name: str) -> None:
        """Open the ONNX files that the user gave a backend, if any.

        Raises:
            InputError: one is not an ONNX file of its tower, or the spec has no bounds for its precision.
            UsageError: it takes batches of one size, and another one was asked for.
        """
        if backends.kind(name).takes_onnx and self.settings.onnx_prefix is not None:
            taken = self.pool.sizes(name)
            other = sorted(set(self.batch_sizes) - set(taken)) if taken else []
            if other:
                raise UsageError(
                    f"--batch-sizes: {self.settings.onnx_prefix} was exported for batches of {taken[0]}, not of "
                    f"{', '.join(map(str, other))}; leave the option out"
                )
            with suppress(BackendUnavailable):  # raised again at the first gate of the backend
                for tower in self.towers.values():
                    self.bounds(self.backend(name, tower, self.accuracy_batch).identity, tower)

    @cached_property
    def dataset(self) -> RetrievalDataset:
        """The data set of `--data-dir`, or the drawn one."""
        data, folder = self.spec.data, self.settings.data_dir
        if folder is None and not self.subject.drawn(None):
            self.subject.check(None)
        folder = folder or datasets.drawn(data.kind, data.images, self.store)
        captions = self.settings.captions_format
        dataset = datasets.read(folder, expected=data.kind, named=self.settings.data_format, captions_format=captions)
        datasets.expect(dataset, images=data.images, captions=data.captions)
        return dataset

    @cached_property
    def weights(self) -> Weights:
        return find_weights(*self.subject.weights_asked)

    @cached_property
    def model(self) -> models.Model:
        transform, resize = self.subject.transform_of(self.weights), self.spec.model.resize_positions
        return models.load(self.spec.model.name, self.weights, self.towers, transform, resize)

    @cached_property
    def inputs(self) -> models.Model:
        """The model's transform and tokenizer, without downloading its weights."""
        return models.inputs(self.spec.model.name, self.subject.transform_of(identify(*self.subject.weights_asked)))

    @cached_property
    def model_key(self) -> Dict[str, Any]:
        """What embeddings depend on besides the data: weights, architecture, code and library versions."""
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
            "weights": None,  # pixels and tokens depend only on the transform and the tokenizer
            "transform": str(self.model.transform),
        }
        write = partial(preprocess.prepare, self.dataset, self.model, self.towers)
        folder = self.store.get("prepared", key, write, resumes=True)
        return preprocess.opened(self.dataset, self.towers, folder)

    def onnx(self, tower: Tower) -> Path:
        """The ONNX file of a tower."""
        opset = self.settings.opset_version
        key = {**self.model_key, "tower": tower.name, "opset": opset, "code": store.code_hash("clipval.export")}
        metadata = export.origin(self.spec.model.name, self.weights.sha256)

        def build(folder: Path) -> None:
            export.export(self.model, tower, folder / f"{tower.name}.onnx", opset=opset, metadata=metadata)

        return self.store.get("onnx", key, build) / f"{tower.name}.onnx"

    def encoder(self, tower: Tower) -> Encoder:
        """The model's tower; see `clipval.model.encoder`."""
        return Encoder(models.encoder(self.model, tower), self.model.load_seconds)

    def backend(self, name: str, tower: Tower, batch_size: int) -> Backend:
        """An open backend; see `clipval.backends.pool.Pool.get`."""
        return self.pool.get(name, tower, batch_size)

    def cold_start(self, name: str, tower: Tower, batch_size: int) -> ColdStart:
        """A backend's cold start; see `clipval.backends.pool.Pool.cold_start`."""
        rows = self.prepared.rows[tower.name]
        batch = np.ascontiguousarray(rows[np.arange(batch_size) % len(rows)])
        return self.pool.cold_start(name, tower, batch, lambda: vars(self).pop("model", None))

    def embeddings(self, name: str, tower: Tower) -> Made:
        """A backend's embeddings of the whole data set, in the order of its ids.

        The reference's are cached in the store. A backend under test runs in every session: last week's embeddings do
        not show what the device computes today.
        """
        key = (name, tower.name)
        if key not in self._embeddings:
            self._embeddings[key] = self._reference(tower) if name == REFERENCE else self._embed(name, tower)
        return self._embeddings[key]

    def _embed(self, name: str, tower: Tower) -> Made:
        rows, backend = self.prepared.rows[tower.name], self.backend(name, tower, self.accuracy_batch)
        return Made(backend.identity, embed(backend, rows.ids, rows, self.accuracy_batch))

    def _reference(self, tower: Tower) -> Made:
        rows, device = self.prepared.rows[tower.name], self.settings.reference_device
        code = store.code_hash("clipval.reference", "clipval.backends.pytorch")
        made_by = {"tower": tower.name, "batch": reference.BATCH, "device": device, "code": code}
        key = {**self.model_key, **made_by, "prepared": rows.folder.parent.name}

        def build(folder: Path) -> None:
            reference.make(folder, key, rows, lambda: self.backend(REFERENCE, tower, reference.BATCH))
            if device != "cpu":
                made, seed = files.read(folder), self.probe_seed
                bounds = self.spec.bounds("onnx", self.precision(made.identity), tower.name)
                reference.hold_to_cpu(made.embeddings, rows, self._reference_on_cpu(tower), bounds, seed)

        made = files.read(self.store.get("reference", key, build, resumes=True))
        return made._replace(embeddings=align(made.embeddings, rows.ids))

    def _reference_on_cpu(self, tower: Tower) -> Backend:
        on_cpu = copy.copy(self)
        on_cpu.settings = replace(self.settings, reference_device="cpu")
        return backends.kind(REFERENCE).open(on_cpu, Opening(tower, None, reference.BATCH, 0))

    def golden(self, tower: Tower) -> Golden:
        """The spec's pinned embeddings."""
        return read_golden(self.subject.golden_file, tower)

    def bounds(self, where: Identity, tower: Tower) -> specs.ParityBounds:
        """The spec's tolerances for a tower of a backend in its precision."""
        owner = backends.kind(where.name).judged_as(where) or base_name(where.name)
        return self.spec.bounds(owner, self.precision(where), tower.name)

    def precision(self, where: Identity) -> str:
        """Which of the spec's bounds apply to an identity; see `clipval.backends.Kind.precision`."""
        return backends.kind(where.name).precision(where)

    def least_precise(self, name: str) -> Identity:
        """A backend's identity in the tower whose bounds are the widest: of a quantised one next to one that is not."""
        found = [self.embeddings(name, tower).identity for tower in self.towers.values()]
        return max(found, key=lambda where: specs.PRECISIONS.index(self.precision(where)))

    @cached_property
    def probe_seed(self) -> int:
        """The seed of this run's probe inputs: `--probe-seed`, else a new one."""
        return secrets.randbelow(10**6) if self.settings.probe_seed is None else self.settings.probe_seed

    def embed_probe(self, name: str, tower: Tower, seed: Optional[int] = None) -> Embeddings:
        """A backend's embeddings of probe inputs, computed now: of a seed, else of this run's, with every token id."""
        own = self.probe_seed if seed is None else seed
        ids, rows = probe.inputs(self.model, tower, own, every_id=seed is None)
        return embed(self.backend(name, tower, self.accuracy_batch), ids, rows, self.accuracy_batch)

    def embed_some(self, name: str, tower: Tower, picked: np.ndarray, batch_size: int) -> Embeddings:
        """A backend's embeddings of some samples, in the order picked, computed now."""
        rows = self.prepared.rows[tower.name]
        some = replace(rows, ids=tuple(rows.ids[n] for n in picked))
        backend = self.backend(name, tower, batch_size)
        found = embed(backend, some.ids, some, batch_size)
        backend.release()
        return found

    def reference_rows(self, tower: Tower, index: np.ndarray) -> np.ndarray:
        """The reference's embeddings of some samples, each computed once a run: float32 [n, width]."""
        missing = np.unique([n for n in index if (tower.name, int(n)) not in self._rows]).astype(int)
        if len(missing):
            found = self.embed_some(REFERENCE, tower, missing, min(32, len(missing))).values
            self._rows.update({(tower.name, int(n)): row for n, row in zip(missing, found)})
        return np.stack([self._rows[tower.name, int(n)] for n in index])

    def retrieval(self, name: str) -> Retrieval:
        """A backend's ranks on the whole data set."""
        if name not in self._retrievals:
            images, captions = (self.embeddings(name, tower).embeddings for tower in self.towers.values())
            owner = self.dataset.image_of_caption
            self._retrievals[name] = evaluate(images.ids, images.values, captions.ids, captions.values, owner)
        return self._retrievals[name]

    def retrieved(self, name: str, direction: str, query_id: str) -> List[str]:
        """Ids of a backend's best candidates for one query."""
        images, captions = (self.embeddings(name, tower).embeddings for tower in self.towers.values())
        queries, candidates = (captions, images) if direction == IMAGE else (images, captions)
        return retrieved(queries.values[queries.ids.index(query_id)], candidates.values, candidates.ids)

    def close(self) -> None:
        """Close every backend."""
        self.pool.close()
