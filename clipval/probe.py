"""Fresh inputs from a seed: token rows and pictures that are in no data set and that no backend has seen.

A data set covers few of the inputs that a backend will get: captions are short and use a small part of the
vocabulary, photographs are neither black nor saturated. A backend that returns stored results passes on the data set,
but not here, since every run draws other inputs.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any, Callable, List, NamedTuple, Sequence, Tuple

import numpy as np

from clipval.model import Model, transformed, vocabulary
from clipval.towers import Tower

SHORTEST = 3  # tokens: start, one word, end
MOST_ROWS = 700  # that show the ids of a vocabulary: all 49408 of CLIP's, 75 a row; of larger ones a part, drawn


class Probe(NamedTuple):
    """Inputs of one tower: names that describe each, and rows [n, *row_shape] in the tower's dtype."""

    ids: Tuple[str, ...]
    rows: np.ndarray

    @property
    def sha256(self) -> str:
        """Hash of the rows: pinned embeddings belong to exactly these inputs."""
        return hashlib.sha256(self.rows.tobytes()).hexdigest()


class TokenLayout(NamedTuple):
    """How a tokenizer lays out a caption: `prefix`, the words, `suffix`, then `pad` up to the context length.

    Attributes:
        prefix: ids before the first word, `(49406,)` in CLIP's; suffix: ids after the last one, `(49407,)` in CLIP's,
            where the tower pools.
        pad: fills the rest of the row.
        vocabulary: number of ids in the text tower's vocabulary.
    """

    prefix: Tuple[int, ...]
    suffix: Tuple[int, ...]
    pad: int
    vocabulary: int

    @property
    def words(self) -> np.ndarray:
        """Ids that may stand for a word: no special ids, and none above the suffix, which is CLIP's highest id."""
        special = [*self.prefix, *self.suffix, self.pad]
        top = min(self.vocabulary, max(self.suffix)) if _is_highest(self) else self.vocabulary
        return np.setdiff1d(np.arange(top), special)


def _is_highest(layout: TokenLayout) -> bool:
    """The tower may pool at the highest id of a row; then no word may be higher than the suffix."""
    return bool(layout.suffix) and max(layout.suffix) >= layout.vocabulary - 16


def token_layout(tokenize: Callable[[List[str]], Any], vocabulary: int) -> TokenLayout:
    """Derive the layout from a tokenizer: what captions of different words and lengths have in common.

    Args:
        tokenize: captions -> int64 [n, context]; vocabulary: size of the text tower's vocabulary.
    """
    rows = [np.asarray(tokenize([text])[0]) for text in ("dog", "two cats on a red chair", "an old bridge")]
    pad = int(rows[0][-1])
    used = [row[: _length(row, pad)] for row in rows]
    prefix = _common(used)
    suffix = _common([row[::-1] for row in used])[::-1]
    return TokenLayout(tuple(map(int, prefix)), tuple(map(int, suffix)), pad, vocabulary)


def _length(row: np.ndarray, pad: int) -> int:
    """Tokens before the padding."""
    other = np.flatnonzero(row != pad)
    return int(other[-1]) + 1 if len(other) else 0


def _common(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The ids that every row begins with."""
    count = min(map(len, rows))
    same = np.all([row[:count] == rows[0][:count] for row in rows], axis=0)
    return rows[0][: count if same.all() else int(np.argmin(same))]


def _generator(seed: int, stream: int) -> np.random.RandomState:
    """numpy's legacy generator, which draws the same in every version, so that embeddings of a seed can be pinned."""
    return np.random.RandomState([seed, stream])


def inputs(loaded: Model, tower: Tower, seed: int, *, every_id: bool = False) -> Probe:
    """Fresh inputs of a tower, laid out by the model's own transform and tokenizer.

    Args:
        every_id: of tokens, rows follow in which each id of the vocabulary occurs.
    """
    if tower.dtype == "float32":
        return pictures(tower, partial(transformed, loaded), seed)
    layout = token_layout(loaded.tokenize, vocabulary(loaded))
    found = captions(tower, layout, seed)
    if not every_id:
        return found
    more = each_id(tower, layout, seed)
    return Probe(found.ids + more.ids, np.concatenate([found.rows, more.rows]))


def each_id(tower: Tower, layout: TokenLayout, seed: int) -> Probe:
    """Full rows of tokens in which each id of the vocabulary stands once, as far as `MOST_ROWS` go, in drawn order.

    A few captions show few ids, and one wrong row of the table of tokens would be met by chance alone.
    """
    words = _generator(seed, 2).permutation(layout.words)
    fixed = len(layout.prefix) + len(layout.suffix)
    each = tower.row_shape[0] - fixed
    count = min(-(-len(words) // each), MOST_ROWS)
    rows = np.empty((count, tower.row_shape[0]), tower.dtype)
    for row, some in zip(rows, np.resize(words, (count, each))):
        row[:] = [*layout.prefix, *some, *layout.suffix]
    return Probe(tuple(f"row {n + 1} of all ids" for n in range(count)), rows)


def captions(tower: Tower, layout: TokenLayout, seed: int) -> Probe:
    """One row of tokens per length, from the shortest to a full context, with words from the whole vocabulary."""
    rng = _generator(seed, 0)
    context, fixed = tower.row_shape[0], len(layout.prefix) + len(layout.suffix)
    lengths = range(max(SHORTEST, fixed + 1), context + 1)
    rows, words = np.full((len(lengths), context), layout.pad, tower.dtype), layout.words
    for row, length in zip(rows, lengths):
        row[:length] = [*layout.prefix, *rng.choice(words, length - fixed), *layout.suffix]
    return Probe(tuple(f"{length} tokens" for length in lengths), rows)


def pictures(tower: Tower, normalise: Callable[[np.ndarray], np.ndarray], seed: int) -> Probe:
    """Noise, black, white, saturated and low-contrast pictures of the input's size.

    Args:
        normalise: uint8 [side, side, 3], RGB -> float32 [3, side, side], the model's own transform.
    """
    rng = _generator(seed, 1)
    side = tower.row_shape[-1]
    shape = (side, side, 3)
    coarse = rng.randint(0, 256, (8, 8, 3))
    drawn = {
        "noise": rng.randint(0, 256, shape),
        "other noise": rng.randint(0, 256, shape),
        "black": np.zeros(shape),
        "white": np.full(shape, 255),
        "one saturated colour": np.broadcast_to(rng.randint(0, 2, 3) * 255, shape),
        "saturated pixels": rng.randint(0, 2, shape) * 255,
        "saturated grey": np.broadcast_to(rng.randint(0, 2, (side, side, 1)) * 255, shape),
        "low contrast": rng.randint(0, 250) + rng.randint(0, 5, shape),
        "blocks": np.kron(coarse, np.ones((-(-side // 8),) * 2 + (1,)))[:side, :side],
        "gradient": np.broadcast_to(np.linspace(0, 255, side)[:, None, None], shape),
    }
    rows = np.stack([normalise(np.ascontiguousarray(picture, np.uint8)) for picture in drawn.values()])
    return Probe(tuple(drawn), rows.astype(tower.dtype))
