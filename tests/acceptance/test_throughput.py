"""Throughput of each listed backend, tower and batch size: clipval's protocol, with pytest-benchmark as its loop."""

import msgspec
import pytest

from clipval.gates import throughput
from clipval.throughput import baseline, rows
from clipval.throughput.feed import Feed
from clipval.throughput.machine import Pace
from clipval.throughput.protocol import Plan, measure


@pytest.fixture(scope="session")
def known(chain):
    """The baseline that was given, or None."""
    return chain.settings.baseline and baseline.load(chain.settings.baseline)


@pytest.fixture(scope="session")
def pace(chain, known):
    """How fast this machine is, against its best: of this session, or of the baseline's where that is its own."""
    own = known is not None and not baseline.differences(known, rows.baseline_key(chain, {}))
    found = Pace(known.machine if own else 0.0, chain.settings.threads)
    found.now()
    return found


@pytest.mark.gate(throughput.THROUGHPUT)
def test_throughput(chain, record, pace, known, benchmark, tower_name, backend_name, batch_size):
    tower, settings = chain.towers[tower_name], chain.settings
    cold = chain.cold_start(backend_name, tower, batch_size)
    backend = chain.backend(backend_name, tower, batch_size)
    benchmark.group = f"{tower_name}-{backend_name}"

    def loop(call, rounds):
        benchmark.pedantic(call, rounds=rounds, iterations=1)
        assert benchmark.stats is not None, "pytest-benchmark is switched off, so nothing was timed"

    subject = rows.subject(chain, backend, Feed(chain.prepared.rows[tower_name], batch_size), pace=pace, known=known)
    plan = Plan(settings.perf_min_time, settings.perf_max_time, noise=settings.perf_noise, insist=settings.strict)
    row, seconds = measure(subject, plan, loop)
    # pytest-benchmark's statistics are of the row's own calls: of the last attempt, and of the device's clock if any
    benchmark.stats.stats.data[:] = seconds
    row = msgspec.structs.replace(row, cold_start=cold, end_to_end=rows.end_to_end(chain, backend, batch_size))
    figures = throughput.row(row, spec=chain.spec, required=settings.strict)
    judged = {"scope": row.scope, "verdict": row.decided.verdict, "made_by": str(row.made_by)}
    benchmark.extra_info.update({**msgspec.to_builtins(row), **judged})
    record(figures)


@pytest.mark.gate(throughput.BASELINE)
def test_every_row_of_the_baseline_is_measured(chain, record, known):
    backends, sizes = chain.settings.validated, chain.batch_sizes
    measured = [f"{name}/{tower}/{size}" for name in backends for tower in chain.towers for size in sizes]
    wanted = [name.rpartition("/")[0] for name in known.rows]
    record(throughput.baseline_rows(wanted, measured, chain.settings.baseline))
