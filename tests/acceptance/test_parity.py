"""Gates of the embeddings: each backend by itself, then against PyTorch sample by sample."""

import numpy as np
import pytest

from clipval import accuracy

pytestmark = pytest.mark.accuracy


def test_values(chain, record, backend_name, tower_name):
    tower = chain.towers[tower_name]
    where, found = chain.embeddings(backend_name, tower)
    ids = chain.prepared.rows[tower_name].ids
    record(accuracy.values(found, where, tower, chain.bounds(where), ids))


def test_distinct_inputs_give_distinct_embeddings(chain, record, backend_name, tower_name):
    tower = chain.towers[tower_name]
    where, found = chain.embeddings(backend_name, tower)
    record(accuracy.distinct(found, where, tower, chain.input_digests(tower)))


def test_batch_invariance(chain, record, backend_name, tower_name):
    tower = chain.towers[tower_name]
    where, whole = chain.embeddings(backend_name, tower)
    picked = accuracy.invariance_samples(len(whole.ids))
    order = np.random.default_rng(0).permutation(len(picked))
    single = chain.embed_some(backend_name, tower, picked, 1)
    shuffled = chain.embed_some(backend_name, tower, picked[order], chain.accuracy_batch)
    record(accuracy.invariance(whole, single, shuffled, where, tower, chain.bounds(where)))


def test_golden(chain, record, golden_tower):
    tower = chain.towers[golden_tower]
    where, reference = chain.embeddings("pytorch", tower)
    record(accuracy.golden(chain.golden(tower), reference, where, tower, chain.spec.golden))


def test_parity(chain, record, candidate_name, tower_name):
    tower = chain.towers[tower_name]
    where, found = chain.embeddings(candidate_name, tower)
    reference = chain.embeddings("pytorch", tower).embeddings
    record(accuracy.agreement(reference, found, where, tower, chain.bounds(where)))
