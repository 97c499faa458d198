"""Backends that are open at the same time."""

from types import SimpleNamespace

import pytest

from clipval.backends import Identity
from clipval.backends.pool import Pool
from clipval.options import Settings
from clipval.towers import TEXT, VISION


@pytest.fixture
def pool():
    """A pool of backends that only remember whether they were closed."""

    def opened(name, tower, batch_size):
        backend = SimpleNamespace(identity=Identity(name, "1", "cpu", "fp32"), closed=False, load_seconds=0.0)
        backend.notes = ()
        backend.close = lambda: setattr(backend, "closed", True)
        return backend

    pool = Pool(SimpleNamespace(settings=Settings()))
    pool.file = lambda name, tower, batch_size: None
    pool.open_file = lambda name, tower, file, batch_size: opened(name, tower, batch_size)
    return pool


def test_the_reference_and_one_other_are_open(pool):
    reference, onnx = pool.get("pytorch", TEXT, 8), pool.get("onnx", TEXT, 8)
    om = pool.get("om", TEXT, 8)
    assert (reference.closed, onnx.closed, om.closed) == (False, True, False)


def test_the_reference_is_opened_beside_what_is_held_to_it(pool):
    onnx = pool.get("onnx", TEXT, 8)
    assert pool.get("pytorch", TEXT, 1) is pool.get("pytorch", TEXT, 8)
    assert not onnx.closed
    assert pool.get("onnx", TEXT, 64) is onnx


def test_a_device_holds_one_session(pool):
    first, second = pool.get("om", TEXT, 8), pool.get("om", VISION, 8)
    assert (first.closed, second.closed) == (True, False)
