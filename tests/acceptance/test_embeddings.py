"""Gates of the embeddings: each backend by itself, and PyTorch against what it was pinned to."""

import numpy as np
import pytest

from clipval.backends import REFERENCE
from clipval.embeddings import Embeddings
from clipval.gates import embeddings
from clipval.probe import inputs


@pytest.mark.gate(embeddings.VALUES)
def test_values(chain, record, backend_name, tower_name):
    tower = chain.towers[tower_name]
    where, found = chain.embeddings(backend_name, tower)
    ids = chain.prepared.rows[tower_name].ids
    record(embeddings.values(found, where, tower, chain.bounds(where, tower), ids))


@pytest.mark.gate(embeddings.DISTINCT)
def test_distinct_inputs_give_distinct_embeddings(chain, record, backend_name, tower_name):
    tower = chain.towers[tower_name]
    where, found = chain.embeddings(backend_name, tower)
    untrained = None if chain.subject.trained else chain.embeddings(REFERENCE, tower).embeddings
    record(embeddings.distinct(found, where, tower, chain.prepared.digests(tower), untrained))


@pytest.mark.gate(embeddings.INVARIANCE)
def test_batch_invariance(chain, record, backend_name, tower_name):
    tower = chain.towers[tower_name]
    where, whole = chain.embeddings(backend_name, tower)
    picked = embeddings.invariance_samples(len(whole.ids))
    order = np.random.default_rng(0).permutation(len(picked))
    single = chain.embed_some(backend_name, tower, picked, chain.pool.smallest_batch(backend_name))
    shuffled = chain.embed_some(backend_name, tower, picked[order], chain.accuracy_batch)
    record(embeddings.invariance(whole, single, shuffled, where, tower, chain.bounds(where, tower)))


@pytest.mark.gate(embeddings.BATCHES)
def test_each_batch_size(chain, record, backend_name, tower_name, batch_size):
    tower = chain.towers[tower_name]
    whole = chain.embeddings(REFERENCE, tower).embeddings
    picked = embeddings.batch_samples(len(whole.ids), batch_size)
    found = chain.embed_some(backend_name, tower, picked, batch_size)
    where = chain.backend(backend_name, tower, batch_size).identity
    reference = Embeddings(found.ids, whole.values[picked])
    record(embeddings.batches(reference, found, where, tower, chain.bounds(where, tower), batch_size))


@pytest.mark.gate(embeddings.PROBE)
def test_probe(chain, record, backend_name, tower_name):
    tower = chain.towers[tower_name]
    found = chain.embed_probe(backend_name, tower)
    where = chain.backend(backend_name, tower, chain.accuracy_batch).identity
    reference = chain.embed_probe(REFERENCE, tower)
    record(embeddings.probe(reference, found, where, tower, chain.bounds(where, tower), chain.probe_seed))


@pytest.mark.gate(embeddings.GOLDEN)
def test_golden(chain, record, backend_name, tower_name):
    tower, spec = chain.towers[tower_name], chain.spec.golden
    where, whole = chain.embeddings(backend_name, tower)
    pinned, digest = chain.golden(tower), inputs(chain.model, tower, 0).sha256
    fresh = chain.embed_probe(backend_name, tower, seed=0)
    record(
        [
            *embeddings.golden(pinned, fresh, digest, where, tower, spec),
            *embeddings.golden_of_data(pinned.of_data, whole, where, tower, spec),
        ]
    )
