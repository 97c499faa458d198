"""Shared by the unit tests: the small architecture with seeded weights, loaded once."""

import pytest

from clipval import model, weights
from clipval.spec import FOLDER
from clipval.towers import towers

CONFIG = str(FOLDER / "shapes-vit.json")


@pytest.fixture(scope="session")
def seeded():
    """The embedded default's architecture with random weights."""
    return model.load(CONFIG, weights.find_weights(CONFIG, weights.RANDOM), towers())
