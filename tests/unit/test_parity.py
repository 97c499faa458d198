"""Parity figures, their gate, and the damage that the gate must see."""

import numpy as np
import pytest

from clipval import parity, spec
from clipval.backends import Identity
from clipval.embeddings import Embeddings
from clipval.errors import InputError
from clipval.gates.parity import agreement
from clipval.towers import VISION

WHERE = Identity("onnx", "test", "cpu", "fp32")
IDS = tuple(str(n) for n in range(1000))
SPECS = [spec.load(name) for name in spec.names()]
BOUNDS = SPECS[0].bounds("onnx", "fp32", "vision")


@pytest.fixture(scope="module")
def rows():
    values = np.random.default_rng(0).normal(size=(1000, 512))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def failed(reference, candidate):
    found = agreement(Embeddings(IDS, reference), Embeddings(IDS, candidate), WHERE, VISION, BOUNDS)
    return [figure for figure in found if figure.verdict == "fail"]


def test_equal_embeddings_pass(rows):
    assert not failed(rows, rows.copy())


def only_first(rows, change):
    changed = rows.copy()
    changed[0] = change(rows[0])
    return changed


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda x: np.roll(x, 1, axis=0), id="rows shifted by one"),
        pytest.param(lambda x: -x, id="sign flipped"),
        pytest.param(lambda x: only_first(x, lambda row: np.roll(row, 1)), id="one row destroyed"),
        pytest.param(lambda x: only_first(x, lambda row: row * np.nan), id="one row NaN"),
        pytest.param(lambda x: only_first(x, lambda row: row * 0), id="one row zero"),
        pytest.param(lambda x: only_first(x, lambda row: row + 9e-5 * (-1.0) ** np.arange(512)), id="one row tilted"),
        pytest.param(lambda x: x[::-1], id="reversed"),
        pytest.param(lambda x: np.full_like(x, np.nan), id="all NaN"),
    ],
)
def test_damage_fails(rows, damage):
    found = failed(rows, np.asarray(damage(rows), np.float32))
    assert found
    assert all("parity/onnx/vision" in figure.message for figure in found)


def test_a_destroyed_row_is_named(rows):
    changed = rows.copy()
    changed[417] = -changed[417]
    assert "417 (-1.000000)" in failed(rows, changed)[0].message


@pytest.mark.parametrize("one", SPECS, ids=lambda one: one.name)
def test_every_bound_can_fail_alone(one):
    for bounds in one.parity:
        width = one.model.embed_dim
        assert 1 - bounds.cosine_min < width / 2 * bounds.max_abs**2, "cosine_min is implied by max_abs"
        assert bounds.max_abs**2 < 2 * (1 - bounds.cosine_min), "max_abs is implied by cosine_min"
        assert bounds.cosine_mean > bounds.cosine_min, "cosine_mean is implied by cosine_min"


def test_nothing_to_compare_is_refused():
    with pytest.raises(InputError, match="parity of 0 samples"):
        parity.compare((), np.empty((0, 4)), np.empty((0, 4)))


def test_figures_by_hand():
    found = parity.compare(("a",), np.array([[2.0, 0.0]]), np.array([[3.0, 4.0]]))
    assert found.cosine[0] == pytest.approx(0.6)
    assert found.max_abs[0] == pytest.approx(0.8)
    assert found.relative[0] == pytest.approx(np.sqrt(17) / 2)
    assert found.norm[0] == pytest.approx(5)


def test_detail_counts_every_sample(rows):
    noisy = rows + np.random.default_rng(1).normal(size=rows.shape) * 1e-5
    detail = agreement(Embeddings(IDS, rows), Embeddings(IDS, noisy), WHERE, VISION, BOUNDS)[0].detail
    assert sum(detail.counts) == 1000
    assert len(detail.worst) == 5
    assert detail.worst[0].cosine == pytest.approx(detail.percentiles["0"])
