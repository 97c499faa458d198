"""Fixtures of the acceptance tests; `clipval.plugin` does the rest."""

import pytest

pytest_plugins = ["clipval.plugin"]  # imported by pytest, and here only when used: it rewrites the plugin's asserts


@pytest.fixture(scope="session")
def chain(pytestconfig):
    """The chain of this session: every artifact and backend, each built or opened once."""
    from clipval.plugin import CHAIN

    yield pytestconfig.stash[CHAIN]
    pytestconfig.stash[CHAIN].close()


@pytest.fixture
def record(request):
    """Record the figures of a gate in the results, the JUnit file and the report; fail if one of them failed."""
    from clipval.plugin import Recorder

    return Recorder(request.node)
