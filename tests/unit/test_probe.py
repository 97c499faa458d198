"""Fresh inputs: laid out as the tokenizer lays out captions, over the whole vocabulary, other ones for another seed."""

import numpy as np
import pytest

from clipval import probe
from clipval.towers import TEXT, VISION

CLIP = probe.TokenLayout((49406,), (49407,), 0, 49408)
SIGLIP = probe.TokenLayout((), (), 1, 32000)


def rows_of(captions, words, prefix, suffix, pad, context=16):
    """A tokenizer of words: each word of a caption is one id, kept in `words`."""
    rows = np.full((len(captions), context), pad)
    for row, caption in zip(rows, captions):
        ids = [*prefix, *(words.setdefault(word, 100 + len(words)) for word in caption.split()), *suffix]
        row[: len(ids)] = ids
    return rows


@pytest.mark.parametrize(
    ("prefix", "suffix", "pad"), [((98,), (99,), 0), ((), (), 1), ((), (1,), 0), ((2, 7), (), 0), ((0,), (2,), 1)]
)
def test_a_layout_is_read_off_the_tokenizer(prefix, suffix, pad):
    words = {}
    found = probe.token_layout(lambda captions: rows_of(captions, words, prefix, suffix, pad), 200)
    assert found == (prefix, suffix, pad, 200)


def test_rows_of_every_length_end_where_the_tower_pools():
    found = probe.captions(TEXT, CLIP, seed=3)
    assert found.rows.shape == (75, 77)
    assert found.rows.dtype == np.int64
    for length, row in zip(range(3, 78), found.rows):
        assert row[0] == 49406
        assert row.argmax() == length - 1
        assert not row[length:].any()
        assert (row[1 : length - 1] > 0).all()
    assert found.ids[0] == "3 tokens"


def test_words_come_from_the_whole_vocabulary():
    drawn = np.concatenate([probe.captions(TEXT, CLIP, seed).rows[:, 1:-1].ravel() for seed in range(40)])
    words = np.unique(drawn[(drawn > 0) & (drawn < 49406)])
    assert words.min() < 100
    assert words.max() > 49300
    assert len(words) > 40_000


def test_a_vocabulary_without_special_tokens():
    found = probe.captions(TEXT, SIGLIP, seed=0)
    assert found.rows.max() < 32000
    assert (found.rows[-1] != 1).all()


@pytest.mark.parametrize("same", [True, False])
def test_another_seed_draws_other_inputs(same):
    def drawn(seed):
        pictures = probe.pictures(VISION, lambda pixels: pixels.transpose(2, 0, 1).astype(np.float32), seed)
        return probe.captions(TEXT, CLIP, seed).rows, pictures.rows

    for first, second in zip(drawn(1), drawn(1 if same else 2)):
        assert np.array_equal(first, second) is same


class Clip:
    """A model whose tokenizer lays out captions as CLIP's does, with a vocabulary of any size."""

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary
        words = {}
        ids = {"prefix": (vocabulary - 2,), "suffix": (vocabulary - 1,), "pad": 0, "context": 77}
        self.tokenize = lambda captions: rows_of(captions, words, **ids)


@pytest.mark.parametrize(("vocabulary", "rows", "shown"), [(49408, 659, 49405), (300, 4, 297), (90_000, 700, 52_500)])
def test_every_id_of_the_vocabulary_is_shown(vocabulary, rows, shown):
    layout = probe.token_layout(Clip(vocabulary).tokenize, vocabulary)
    found = probe.each_id(TEXT, layout, seed=3)
    assert found.rows.shape == (rows, 77)
    assert found.rows.dtype == np.int64
    assert (found.rows[:, 0] == vocabulary - 2).all()
    assert (found.rows.argmax(axis=1) == 76).all()
    assert len(np.unique(found.rows[:, 1:-1])) == shown
    assert len(found.ids) == rows


def test_pictures_reach_the_extremes():
    found = probe.pictures(VISION, lambda pixels: pixels.transpose(2, 0, 1) / np.float32(255), seed=0)
    assert found.rows.shape == (len(found.ids), 3, 224, 224)
    assert found.rows.dtype == np.float32
    by_name = dict(zip(found.ids, found.rows))
    assert by_name["black"].max() == 0
    assert by_name["white"].min() == 1
    assert set(np.unique(by_name["saturated pixels"])) == {0, 1}
    assert by_name["low contrast"].max() - by_name["low contrast"].min() < 0.02
