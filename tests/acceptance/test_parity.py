"""The gate of parity: each backend against PyTorch, sample by sample."""

import pytest

from clipval.backends import REFERENCE
from clipval.diagnose import candidate
from clipval.gates import parity


@pytest.mark.gate(parity.PARITY)
def test_parity(chain, record, backend_name, tower_name):
    tower = chain.towers[tower_name]
    where, found = chain.embeddings(backend_name, tower)
    reference = chain.embeddings(REFERENCE, tower).embeddings
    figures = parity.agreement(reference, found, where, tower, chain.bounds(where, tower))
    record(candidate.annotated(chain, backend_name, tower, figures))
