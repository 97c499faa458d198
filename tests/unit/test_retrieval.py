"""Ranks, recall and the paired comparison: by hand, against a brute-force oracle, and what must be refused."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clipval import retrieval
from clipval.errors import InputError


def ids(prefix, count):
    return tuple(f"{prefix}{n}" for n in range(count))


def evaluate(images, captions, owner):
    return retrieval.evaluate(ids("i", len(images)), images, ids("c", len(captions)), captions, np.asarray(owner))


def oracle(images, captions, owner):
    """Ranks by one Python loop a query, float64, ties against the model."""
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, captions)]
    scores = unit[1] @ unit[0].T
    image_ranks = [
        1 + sum(scores[c, i] >= scores[c, owner[c]] - 1e-12 for i in range(len(images)) if i != owner[c])
        for c in range(len(captions))
    ]
    text_ranks = []
    for i in range(len(images)):
        best = max(scores[c, i] for c in range(len(captions)) if owner[c] == i)
        wrong = [scores[c, i] for c in range(len(captions)) if owner[c] != i]
        text_ranks.append(1 + sum(score >= best - 1e-12 for score in wrong))
    return image_ranks, text_ranks


@st.composite
def problems(draw):
    images = draw(st.integers(2, 9))
    extra = draw(st.lists(st.integers(0, images - 1), max_size=12))
    owner = draw(st.permutations([*range(images), *extra]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    coarse = draw(st.booleans())  # small integers make exact ties
    shape = (images + len(owner), draw(st.integers(2, 6)))
    rows = rng.integers(-2, 3, shape).astype(float) if coarse else rng.normal(size=shape)
    rows += np.arange(shape[1]) * 1e-3 + 0.01
    return rows[:images].astype(np.float32), rows[images:].astype(np.float32), np.asarray(owner)


@settings(deadline=None, max_examples=150)
@given(problems())
def test_ranks_are_the_oracles(problem):
    images, captions, owner = problem
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, captions)]
    if any(np.ptp(unit, axis=1).min() == 0 or np.ptp(unit, axis=0).max() < 1e-6 for unit in units):
        with pytest.raises(InputError, match="equal"):
            evaluate(images, captions, owner)
        return
    found = evaluate(images, captions, owner)
    wide = images.astype(float), captions.astype(float)
    image_ranks, text_ranks = oracle(*wide, owner)
    assert found.image.ranks.tolist() == image_ranks
    assert found.text.ranks.tolist() == text_ranks


def test_by_hand():
    images = np.array([[1.0, 0.0], [0.0, 1.0]])
    captions = np.array([[1.0, 0.1], [1.0, 0.2], [0.3, 1.0]])  # the second is of image 1, and looks like image 0
    found = evaluate(images, captions, [0, 1, 1])
    assert found.image.ranks.tolist() == [1, 2, 1]
    assert found.text.ranks.tolist() == [1, 1]
    assert found.metrics((1,)) == {"image_retrieval_recall@1": pytest.approx(2 / 3), "text_retrieval_recall@1": 1.0}


def test_ties_count_against_the_model():
    images = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    captions = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = evaluate(images, captions, [0, 1, 2])
    assert found.image.ranks.tolist() == [2, 2, 1]
    assert found.text.ranks.tolist() == [2, 2, 1]


def damaged(kind):
    rows = np.random.default_rng(1).normal(size=(6, 8))
    if kind == "NaN":
        rows[3, 2] = np.nan
    elif kind == "Inf":
        rows[3, 2] = np.inf
    elif kind == "zero":
        rows[3] = 0
    elif kind == "flat":
        rows[3] = 0.25
    elif kind == "equal":
        rows[:] = rows[0]
    return rows


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("NaN", "NaN or Inf in the embedding of sample .3"),
        ("Inf", "NaN or Inf in the embedding of sample .3"),
        ("zero", "length zero of sample .3"),
        ("flat", "every element of the embedding is equal of sample .3"),
        ("equal", "all 6 embeddings are equal"),
    ],
)
def test_degenerate_embeddings_are_refused(side, kind, words):
    good, bad = damaged("none"), damaged(kind)
    pair = (bad, good) if side == "image" else (good, bad)
    with pytest.raises(InputError, match=f"{side} embeddings: .*{words}"):
        evaluate(*pair, range(6))


@pytest.mark.parametrize(
    ("images", "captions", "owner", "words"),
    [
        (np.ones((2, 3), np.int64), np.eye(2, 3), [0, 1], "expected floats"),
        (np.eye(2, 3), np.eye(2, 4), [0, 1], "wide"),
        (np.eye(2, 3), np.eye(3, 3), [0, 1], "map is"),
        (np.eye(2, 3), np.eye(2, 3), [0, 2], "map is"),
        (np.eye(2, 3), np.eye(2, 3), [0, 0], "image i1 has no caption"),
        (np.empty((0, 3)), np.eye(2, 3), [0, 0], "expected floats"),
    ],
)
def test_what_does_not_fit_is_refused(images, captions, owner, words):
    with pytest.raises(InputError, match=words):
        evaluate(images, captions, owner)


def test_ids_twice_are_refused():
    rows = np.random.default_rng(0).normal(size=(2, 4))
    with pytest.raises(InputError, match="2 ids \\(1 different\\)"):
        retrieval.evaluate(("a", "a"), rows, ("x", "y"), rows, np.arange(2))


def direction(ranks, margins=None):
    margins = np.zeros(len(ranks)) if margins is None else np.asarray(margins)
    return retrieval.Direction("image_retrieval", ids("c", len(ranks)), np.asarray(ranks), margins, 10)


def test_pair_lists_flips_widest_margin_first():
    found = retrieval.pair(direction([1, 9, 2, 7]), direction([6, 1, 2, 8], [-0.3, 0.001, 0.2, -0.1]))
    assert (found.gains, found.losses, found.difference) == (1, 1, 0.0)
    assert [flip["id"] for flip in found.flips] == ["c0", "c1"]
    assert found.flips[0]["was"] == 1
    assert found.flips[0]["now"] == 6


def test_mcnemar_is_the_exact_one():
    # 1 gained, 9 lost: two-sided binomial tail 2 * (1 + 10) / 1024
    found = retrieval.pair(direction([1] * 9 + [9]), direction([9] * 9 + [1]))
    assert found.p_value == pytest.approx(22 / 1024)
    assert retrieval.pair(direction([1, 2]), direction([2, 1])).p_value == 1.0


def test_intervals_and_p_values_are_scipys():
    for hits, count in ((0, 7), (7, 7), (3, 7), (963, 1000), (4415, 5000)):
        wanted = stats.binomtest(hits, count).proportion_ci(0.95, "wilson")
        assert retrieval.interval(hits, count) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    for gains, losses in ((0, 1), (4, 4), (3, 11), (130, 90)):
        found = retrieval.pair(direction([9] * gains + [1] * losses), direction([1] * gains + [9] * losses))
        assert found.p_value == pytest.approx(stats.binomtest(gains, gains + losses).pvalue, abs=1e-12)


def test_pair_needs_the_same_queries():
    with pytest.raises(InputError, match="different queries"):
        retrieval.pair(direction([1, 2]), direction([1, 2, 3]))


def test_pair_needs_as_many_candidates():
    with pytest.raises(InputError, match="9 candidates on one side, 10 on the other"):
        retrieval.pair(direction([1, 2]), dataclasses.replace(direction([1, 2]), candidates=9))


def test_wilson_interval_is_the_published_one():
    ranks = np.where(np.arange(1000) < 962, 1, 9)
    assert retrieval.interval(direction(ranks).hits(5), len(ranks)) == pytest.approx((0.9483, 0.9722), abs=5e-5)


def test_margin_is_the_gap_to_the_fifth_wrong_candidate():
    images = np.vstack([np.eye(8)[0], np.linspace(0.9, 0.2, 7)[:, None] * np.eye(8)[0] + np.eye(8)[1:]])
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    captions = np.vstack([np.eye(8)[:1], images[1:]])
    found = evaluate(images, captions, range(8))
    scores = np.sort(images[1:] @ captions[0])[::-1]
    assert found.image.margins[0] == pytest.approx(1 - scores[4])


def test_retrieved_are_the_best():
    candidates = np.array([[1.0, 0], [0, 5.0], [3.0, 3.0]])
    assert retrieval.retrieved(np.array([0.0, 1.0]), candidates, ("a", "b", "c"), 2) == ["b", "c"]
