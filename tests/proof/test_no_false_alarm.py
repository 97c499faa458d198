"""The clean suite is green, twenty times out of twenty: on 1, 2 and 4 threads, in any order, under xdist."""

import pytest

from tests import small

pytestmark = pytest.mark.proof
WAYS = [("--threads=1",), ("--threads=2",), ("--threads=4",), ("--threads=2", "-n", "2")]


@pytest.mark.parametrize("turn", range(20))
def test_green(turn, small_spec, workdir):
    ended = small.run(small_spec, workdir, "-m", "accuracy", *WAYS[turn % 4], CLIPVAL_ORDER=str(turn))
    assert ended.code == 0, ended.output[-3000:]
    assert not ended.red
