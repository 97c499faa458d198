"""Gates of what the chain builds on the way: prepared arrays and ONNX files."""

import pytest

from clipval.gates import artifacts


@pytest.mark.gate(artifacts.PREPARED_IMAGES)
def test_prepared_images(chain, record):
    rows = chain.prepared.rows["vision"]
    record(artifacts.prepared_images(rows, chain.dataset, chain.model, chain.spec, chain.prepared.digests(rows.tower)))


@pytest.mark.gate(artifacts.PREPARED_TEXTS)
def test_prepared_texts(chain, record):
    rows = chain.prepared.rows["text"]
    record(artifacts.prepared_texts(rows, chain.dataset, chain.model, chain.spec))


@pytest.mark.gate(artifacts.ARTIFACT)
def test_onnx_file(chain, record, backend_name, tower_name):
    tower = chain.towers[tower_name]
    file = chain.pool.file(backend_name, tower, chain.accuracy_batch)
    ready = chain.settings.onnx_prefix is not None
    metadata = artifacts.examine(file, tower, ready=ready)
    backend = chain.backend(backend_name, tower, chain.accuracy_batch)
    placement = getattr(backend, "placement", None)
    record(artifacts.artifact(file, metadata, tower, chain.weights.sha256, backend.identity, placement, ready=ready))
