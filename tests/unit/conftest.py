"""Shared by the unit tests: the small architecture with seeded weights, loaded once."""

import pytest

from clipval import model
from clipval.spec import FOLDER
from clipval.towers import towers

CONFIG = str(FOLDER / "shapes-vit.json")


@pytest.fixture(scope="session")
def seeded():
    """The embedded default's architecture with random weights."""
    return model.load(CONFIG, model.find_weights(CONFIG, model.RANDOM), towers())
