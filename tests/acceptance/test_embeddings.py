"""Gates of the embeddings: each backend by itself, and PyTorch against what it was pinned to."""

import numpy as np
import pytest

from clipval.gates import embeddings


@pytest.mark.gate(embeddings.VALUES)
def test_values(chain, record, backend_name, tower_name):
    tower = chain.towers[tower_name]
    where, found = chain.embeddings(backend_name, tower)
    ids = chain.prepared.rows[tower_name].ids
    record(embeddings.values(found, where, tower, chain.bounds(where), ids))


@pytest.mark.gate(embeddings.DISTINCT)
def test_distinct_inputs_give_distinct_embeddings(chain, record, backend_name, tower_name):
    tower = chain.towers[tower_name]
    where, found = chain.embeddings(backend_name, tower)
    record(embeddings.distinct(found, where, tower, chain.input_digests(tower)))


@pytest.mark.gate(embeddings.INVARIANCE)
def test_batch_invariance(chain, record, backend_name, tower_name):
    tower = chain.towers[tower_name]
    where, whole = chain.embeddings(backend_name, tower)
    picked = embeddings.invariance_samples(len(whole.ids))
    order = np.random.default_rng(0).permutation(len(picked))
    single = chain.embed_some(backend_name, tower, picked, chain.smallest_batch(backend_name))
    shuffled = chain.embed_some(backend_name, tower, picked[order], chain.accuracy_batch)
    record(embeddings.invariance(whole, single, shuffled, where, tower, chain.bounds(where)))


@pytest.mark.gate(embeddings.GOLDEN)
def test_golden(chain, record, backend_name, tower_name):
    tower = chain.towers[tower_name]
    where, reference = chain.embeddings(backend_name, tower)
    record(embeddings.golden(chain.golden(tower), reference, where, tower, chain.spec.golden))
