"""Outputs of a backend that was timed, held to PyTorch's."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from clipval.throughput.feed import Feed
from clipval.throughput.outputs import Expected, check_outputs


class Rows:
    """Prepared rows of captions, all different."""

    def __init__(self, count):
        self.ids = tuple(f"{n}_0" for n in range(count))
        self.values = np.arange(count * 77).reshape(count, 77)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return np.ascontiguousarray(self.values[index])


def embed(rows):
    """An embedding of its own for each row, of unit length."""
    turned = np.cos(np.outer(rows[:, 0] / 77 + 1, np.arange(1, 17))).astype(np.float32)
    return turned / np.linalg.norm(turned, axis=1, keepdims=True)


def one_for_all(rows):
    return np.full((len(rows), 16), 0.25, np.float32)


def one_row_off(rows):
    found = embed(rows)
    found[-1] += 0.01
    return found


def cached_result(rows):
    """A backend that has seen these rows before: thousands of times faster."""
    time.sleep(0.0 if rows[0, 0] % (8 * 77) == 0 else 0.02)
    return embed(rows)


@pytest.mark.parametrize(
    ("run", "reference", "said"),
    [
        (embed, embed, ""),
        (one_row_off, embed, "is off pytorch's embedding: cosine"),
        (one_row_off, embed, ", and |difference| 1."),
        (lambda rows: embed(rows)[:-1], embed, "gave (7, 16) for a batch of 8"),
        (one_for_all, one_for_all, "two different inputs give one embedding"),  # nothing to compare pytorch itself with
        (cached_result, embed, "appears to cache results"),
        (lambda rows: np.full((len(rows), 16), np.nan, np.float32), embed, "is off pytorch's embedding: cosine nan"),
    ],
)
def test_outputs_are_checked_after_timing(run, reference, said):
    rows = Rows(96)
    backend = SimpleNamespace(tower=SimpleNamespace(name="text", width=16), run=run)
    found = check_outputs(backend, Feed(rows, 8), Expected(reference, 0.9999999, 2e-5, rows.ids))
    assert found if said else found == ""
    assert said in found
