"""Ranks and margins of the blocked float32 product against all of it in float64, where float32 cannot decide too."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipval import environment, ranks
from clipval.errors import BackendUnavailable

DTYPES = (np.float16, np.float32, np.float64)


def oracle(images, captions, owner):
    """(ranks, margins) of captions, then of images: every score in float64, the whole matrix at once."""
    unit = []
    for rows in (images, captions):
        wide = rows.astype(np.float64)
        wide /= np.abs(wide).max(axis=1, keepdims=True)
        unit.append(wide / np.linalg.norm(wide, axis=1, keepdims=True))
    scores = unit[1] @ unit[0].T
    positive = np.asarray(owner)[:, None] == np.arange(len(images))
    found = []
    for mine, own in ((scores, positive), (scores.T, positive.T)):
        best = np.where(own, mine, -np.inf).max(axis=1)
        wrong = np.sort(np.where(own, -np.inf, mine), axis=1)
        fifth = wrong[:, -5] if wrong.shape[1] >= 5 else np.full(len(best), -np.inf)
        with np.errstate(invalid="ignore"):
            margins = np.where(np.isfinite(fifth), best - fifth, np.nan)
        found.append((1 + (wrong >= best[:, None] - 1e-12).sum(axis=1), margins))
    return found


def agree(images, captions, owner):
    owner = np.asarray(owner)
    found = ranks.rank(ranks.unit_rows(images), ranks.unit_rows(captions), owner)
    for (wanted, margins), (got, got_margins) in zip(oracle(images, captions, owner), found):
        assert got.tolist() == wanted.tolist()
        np.testing.assert_allclose(got_margins, margins, rtol=0, atol=5e-14)
    return found


def owners(rng, images, captions):
    return rng.permutation(np.concatenate([np.arange(images), rng.integers(0, images, captions - images)]))


def rows(kind, rng, count, width, owner=None, images=None):
    """Embeddings that are hard for float32 in one way."""
    found = rng.normal(size=(count, width))
    if kind == "close":  # all within float32's rounding of each other
        found = rng.normal(size=width) + 1e-6 * found
    elif kind == "copies":
        found = found[rng.integers(0, max(1, count // 4), count)]
    elif kind == "of the images" and images is not None:  # each caption a float32 rounding away from some image
        found = images[owner if rng.random() < 0.5 else rng.integers(0, len(images), count)] * (1 + 1e-7 * found)
    elif kind == "coarse":
        found = rng.integers(-2, 3, (count, width)) + np.linspace(0.01, 0.02, width)
    return found


KINDS = ("plain", "close", "copies", "of the images", "coarse")


@settings(deadline=None, max_examples=120)
@given(
    images=st.integers(1, 30),
    extra=st.integers(0, 60),
    width=st.integers(2, 20),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 3e-44, 1e-30, 1e30]),
    seed=st.integers(0, 2**32 - 1),
)
def test_as_in_float64(images, extra, width, kinds, dtype, scale, seed):
    rng = np.random.default_rng(seed)
    owner = owners(rng, images, images + extra)
    vision = rows(kinds[0], rng, images, width)
    text = rows(kinds[1], rng, len(owner), width, owner, vision)
    if dtype == np.float16:
        scale = 1.0
    vision, text = (vision * scale).astype(dtype), (text * scale).astype(dtype)
    if not all(one.any(axis=1).all() for one in (vision, text)):  # some denormal rows end as zeros
        return
    agree(vision, text, owner)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(700, 1300), (2100, 2105)], ids=str)  # over the borders of blocks and tiles
def test_in_several_tiles(kind, size):
    rng = np.random.default_rng(3)
    images, captions = size
    owner = owners(rng, images, captions)
    vision = rows(kind, rng, images, 24).astype(np.float32)
    agree(vision, rows(kind, rng, captions, 24, owner, vision).astype(np.float32), owner)


@pytest.mark.parametrize("owner", [[0] * 3000, [0] * 1500 + list(range(12)) + [11] * 1500], ids=["one", "twelve"])
def test_thousands_of_captions_an_image(owner):
    rng = np.random.default_rng(5)
    agree(*(rng.normal(size=(count, 16)).astype(np.float32) for count in (max(owner) + 1, len(owner))), owner)


def test_every_score_is_a_tie():
    rng = np.random.default_rng(6)
    vision = rng.normal(size=(300, 8)).astype(np.float32)
    text = np.repeat(rng.normal(size=(1, 8)), 900, axis=0).astype(np.float32)
    _, images = agree(vision, text, owners(rng, 300, 900))
    assert images.ranks.min() > 800  # a caption of the image itself is no rival


@pytest.mark.parametrize("scale", [1e-310, 1e-160, 1e160, 1e300])
def test_float64_outside_the_range_of_its_squares(scale):
    rng = np.random.default_rng(7)
    agree(rng.normal(size=(40, 8)) * scale, rng.normal(size=(90, 8)), owners(rng, 40, 90))


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_any_number_of_cores(monkeypatch, cores):
    monkeypatch.setattr(environment, "usable_cores", lambda: cores)
    rng = np.random.default_rng(8)
    agree(
        rng.normal(size=(64, 32)).astype(np.float32),
        rng.normal(size=(1111, 32)).astype(np.float32),
        [*range(64)] * 17 + [*range(23)],
    )


def test_float32_stays_within_its_bound():
    rng = np.random.default_rng(9)
    for width in (2, 64, 512, 4096):
        one, other = (ranks.unit_rows(rng.random((60, width)).astype(np.float32)) for _ in range(2))
        wide = [side.given.astype(np.float64) / side.norm[:, None] for side in (one, other)]
        off = np.abs(one.unit[:60] @ other.unit[:60].T - wide[0] @ wide[1].T).max()
        assert off < ranks.rounding(width) < 1e-4 * max(1, width / 1000)


def test_a_product_in_a_reduced_precision_is_refused():
    rng = np.random.default_rng(10)
    vision, text = (ranks.unit_rows(rng.normal(size=(count, 64)).astype(np.float32)) for count in (16, 48))
    bfloat16 = (text.unit.view(np.uint32) & 0xFFFF0000).view(np.float32)
    with pytest.raises(BackendUnavailable, match="reduced precision"):
        ranks.rank(vision, text._replace(unit=bfloat16), np.arange(48) % 16)
