"""Gates of retrieval: against the published figures, and against PyTorch on the same samples."""

import pytest

from clipval import accuracy

pytestmark = pytest.mark.accuracy


def test_recall(chain, record, backend_name, metric):
    where = chain.embeddings(backend_name, chain.towers["text"]).identity
    record(accuracy.recall(chain.retrieval(backend_name), where, chain.spec, metric))


def test_recall_beside_pytorch(chain, record, candidate_name, paired_metric):
    where = chain.embeddings(candidate_name, chain.towers["text"]).identity
    bounds = next(bounds for bounds in chain.spec.paired if bounds.metric == paired_metric)

    def retrieved(direction, query_id):
        return chain.retrieved(candidate_name, direction, query_id)

    record(accuracy.paired(chain.retrieval("pytorch"), chain.retrieval(candidate_name), where, bounds, retrieved))
