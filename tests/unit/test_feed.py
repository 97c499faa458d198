"""The batches that a backend is timed with: half of them are new to it."""

import numpy as np
import pytest

from clipval.throughput.feed import FRESH, SEEN, Feed
from clipval.towers import TEXT, VISION

END = 1000


def captions(count, seed=0):
    """Token rows of CLIP's kind: start, words, the highest id at the end, zeros."""
    rng, rows = np.random.default_rng(seed), np.zeros((count, 77), np.int64)
    for row in rows:
        length = rng.integers(4, 20)
        row[: length + 2] = [900, *rng.integers(1, 60, length), END]
    return rows


def pictures(count):
    return np.random.default_rng(1).normal(size=(count, *VISION.row_shape)).astype(np.float32)


def taken(feed, count):
    """Slots and bytes of the next batches."""
    return [(slot, batch.tobytes()) for slot, batch in (feed.next() for _ in range(count))]


@pytest.mark.parametrize("rows", [captions(20), pictures(12)], ids=["captions", "pictures"])
def test_every_second_batch_is_a_fresh_one_and_the_others_come_again(rows):
    found = taken(Feed(rows, 3), 40)
    fresh = [given for slot, given in found if slot == FRESH]
    assert len(set(fresh)) == len(fresh) == 20
    assert len({given for slot, given in found if slot != FRESH}) == SEEN
    assert all({found[n][0] == FRESH, found[n + 1][0] == FRESH} == {True, False} for n in range(0, 40, 2))
    assert len({found[n][0] == FRESH for n in range(0, 40, 2)}) == 2  # in either order


@pytest.mark.parametrize("rows", [captions(20), pictures(12)], ids=["captions", "pictures"])
def test_fresh_batches_can_be_given_again_from_the_last_one_back(rows):
    feed = Feed(rows, 3)
    fresh = [given for slot, given in taken(feed, 40) if slot == FRESH]
    assert [batch.tobytes() for batch in feed.again(15)] == fresh[:4:-1]
    later = [given for slot, given in taken(feed, 40) if slot == FRESH]
    assert not set(later) & set(fresh)


def test_a_single_caption_gives_many_fresh_ones():
    fresh = [given for slot, given in taken(Feed(captions(200), 1), 1000) if slot == FRESH]
    assert len(set(fresh)) > 490


def test_fresh_captions_keep_their_layout():
    rows = captions(40)
    feed = Feed(rows, 8)
    before = feed.fresh.copy()
    taken(feed, 10)
    assert (feed.fresh != before).any()
    assert (feed.fresh.argmax(axis=1) == before.argmax(axis=1)).all()
    assert (feed.fresh[:, 0] == 900).all()
    assert ((feed.fresh == END).sum(axis=1) == 1).all()
    assert feed.fresh.dtype == TEXT.dtype


def test_fresh_pictures_keep_their_values_but_for_the_sign_and_differ_from_each_other():
    feed = Feed(pictures(9), 3)
    before = feed.fresh.copy()
    taken(feed, 10)
    np.testing.assert_array_equal(np.abs(feed.fresh), np.abs(before))
    assert len({row.tobytes() for row in feed.fresh}) == 3


def test_no_two_feeds_give_the_same_fresh_batches():
    rows = captions(20)
    assert taken(Feed(rows, 3), 20) != taken(Feed(rows, 3), 20)


def test_short_data_is_repeated_but_two_batches_differ():
    feed = Feed(captions(3), 2)
    assert [list(index) for index in feed.indices] == [[0, 1], [2, 0]]
    assert all(batch.flags.c_contiguous for batch in (*feed.batches, feed.fresh))


def test_a_batch_that_was_written_to_is_named():
    feed = Feed(pictures(9), 2)
    taken(feed, 10)
    assert feed.changed() == []
    feed.batches[1][0, 0, 0, 0] += 1e-6
    assert feed.changed() == ["batch 2"]


def test_the_rows_themselves_are_never_written_to():
    rows = captions(20)
    before = rows.copy()
    taken(Feed(rows, 3), 10)
    np.testing.assert_array_equal(rows, before)
