"""Gates of retrieval: against the published figures, and against PyTorch on the same samples."""

import pytest

from clipval.backends import REFERENCE
from clipval.gates import retrieval


@pytest.mark.gate(retrieval.RECALL)
def test_recall(chain, record, backend_name, metric):
    where = chain.least_precise(backend_name)
    record(retrieval.recall(chain.retrieval(backend_name), where, chain.spec, metric, chain.precision(where)))


@pytest.mark.gate(retrieval.PAIRED)
def test_recall_beside_pytorch(chain, record, backend_name, metric):
    where = chain.least_precise(backend_name)
    bounds = chain.spec.paired_bounds(metric, chain.precision(where))

    def retrieved(direction, query_id):
        return chain.retrieved(backend_name, direction, query_id)

    record(retrieval.paired(chain.retrieval(REFERENCE), chain.retrieval(backend_name), where, bounds, retrieved))
