"""Gates of what the chain builds on the way: prepared arrays and ONNX files."""

import pytest

from clipval import accuracy

pytestmark = pytest.mark.accuracy


def test_prepared_images(chain, record):
    rows = chain.prepared.rows["vision"]
    record(accuracy.prepared_images(rows, chain.dataset, chain.model, chain.spec, chain.input_digests(rows.tower)))


def test_prepared_texts(chain, record):
    rows = chain.prepared.rows["text"]
    record(accuracy.prepared_texts(rows, chain.dataset, chain.model, chain.spec))


def test_onnx_file(chain, record, onnx_backend, tower_name):
    tower = chain.towers[tower_name]
    where = chain.backend(onnx_backend, tower, chain.accuracy_batch).identity
    record(accuracy.artifact(chain.onnx(tower), tower, chain.weights.sha256, where))
