"""Every architecture that fits the machine exports and agrees with PyTorch: -m sweep, hours."""

import os

import pytest

from clipval import architectures
from tests.sweep.one import run

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
FITS = [row.model for row in architectures.read() if 0 < 3 * (row.vision_gib + row.text_gib) < MEMORY]
DISTANCE = 1e-9  # 1 - cosine: two decades over the worst that was seen of an architecture with seeded weights


@pytest.mark.sweep
@pytest.mark.parametrize("name", FITS)
def test_architecture(name):
    row = run(name)
    assert row.export == architectures.SEEN, row.export
    assert row.vision is not None
    assert row.vision < DISTANCE
    assert row.text is not None
    assert row.text < DISTANCE
