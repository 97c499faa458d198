"""Fixtures of the acceptance tests. What keeps a run honest is `clipval.plugin`."""

import pytest

from clipval.plugin import CHAIN, Recorder

pytest_plugins = ["clipval.plugin"]


@pytest.fixture(scope="session")
def chain(pytestconfig):
    """The chain of this session: every artifact and backend, each built or opened once."""
    yield pytestconfig.stash[CHAIN]
    pytestconfig.stash[CHAIN].close()


@pytest.fixture
def record(request):
    """Take the figures of a gate: into the results, the JUnit file and the report; fail when one of them failed."""
    return Recorder(request.node)
