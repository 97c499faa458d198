"""Throughput of each listed backend, tower and batch size, timed by pytest-benchmark with clipval's protocol."""

import time

import pytest

from clipval import baseline, bench, perf, throughput
from clipval.baseline import REGRESSED
from clipval.machine import HostLoad, Pace
from clipval.throughput import BAD_OUTPUT, VALID, Feed

pytestmark = pytest.mark.perf


@pytest.fixture(scope="session")
def pace(chain):
    """How fast this machine is, against its best: of this session, or of the baseline's where that is its own."""
    file = chain.settings.baseline
    known = baseline.load(file) if file else None
    own = known is not None and not baseline.differences(known, bench.baseline_key(chain, {}))
    found = Pace(known.machine if own else 0.0, chain.settings.threads)
    found.now()
    return found


@pytest.fixture
def opened(request, chain, tower_name, backend_name, batch_size):
    """The backend, how it started from cold, and the benchmark: on the device's clock where it has one."""
    tower = chain.towers[tower_name]
    cold = chain.cold_start(backend_name, tower, batch_size)
    backend = chain.backend(backend_name, tower, batch_size)
    if backend.execute_seconds() is not None:
        backend.refresh()  # a fresh session's clock, so that none is opened inside the timed calls
        # the recipe's figure is the device's execute time, so that is the benchmark's clock
        request.node.add_marker(pytest.mark.benchmark(timer=lambda: sum(backend.execute_seconds())))
    benchmark = request.getfixturevalue("benchmark")
    benchmark.group = f"{tower_name}-{backend_name}"
    return backend, cold, benchmark


def timed(benchmark, backend, feed, budget):
    """Warm up, then let pytest-benchmark time the calls: the warm-up, and scope -> seconds of each call."""
    calls = []

    def call():
        start = time.perf_counter()
        backend.run(feed.next())
        calls.append(time.perf_counter() - start)

    seconds = throughput.warm_up_seconds(budget["seconds"])
    warm = throughput.warm_up(lambda: backend.run(feed.next()), seconds=seconds, cap=budget["cap"] / 3)
    with throughput.quiet():
        benchmark.pedantic(call, rounds=throughput.rounds_for(warm.estimate, **budget), iterations=1)
    assert benchmark.stats is not None, "pytest-benchmark is switched off, so nothing was timed"
    device = backend.execute_seconds() is not None
    return warm, {"inference": calls, **({"execute": list(benchmark.stats.stats.data)} if device else {})}


def test_throughput(chain, record, pace, opened, tower_name, backend_name, batch_size):
    tower, settings, (backend, cold, benchmark) = chain.towers[tower_name], chain.settings, opened
    feed = Feed(chain.prepared.rows[tower_name], batch_size)
    budget = {"seconds": settings.perf_min_time, "cap": settings.perf_max_time}
    here = pace if backend.identity.on_host else None
    host, busy = HostLoad(), chain.busy(backend_name)

    warm, times = timed(benchmark, backend, feed, budget)
    cores, busy, share = host.cores(), busy or host.busy() or chain.busy(backend_name), here and here.now()
    rows = {scope: throughput.summarise(seconds, batch_size, scope) for scope, seconds in times.items()}
    judged = {
        scope: (row, *throughput.verdict(row, busy=busy, noise=settings.perf_noise)) for scope, row in rows.items()
    }
    earlier = bench.against_baseline(chain, backend.identity, tower, batch_size, judged)
    doubtful = settings.strict and any(verdict != VALID for _, verdict, _ in judged.values())
    again = doubtful or (earlier is not None and earlier.status == REGRESSED)
    if again:
        judged, earlier, share = bench.second_try(chain, backend, feed, batch_size, estimate=warm.estimate, pace=here)
    bad = bench.check_outputs(chain, backend, feed)
    if bad:
        judged = {scope: (row, BAD_OUTPUT, bad) for scope, (row, _, _) in judged.items()}

    speed = judged["execute" if "execute" in judged else "inference"][0].samples_per_second
    more = {
        "warm_up": throughput.as_dict(warm),
        "measured_again": again,  # then pytest-benchmark's own statistics are of the first time
        "cold_start": cold._asdict(),
        "end_to_end": bench.end_to_end(chain, backend, batch_size),
        "threads": backend.threads,
        "cores": cores,
        "machine_share": share,
        **perf.operations(chain.model_key["config"], tower, speed, here and here.peak),
    }
    wanted = {"spec": chain.spec, "required": settings.strict}
    figures = perf.row(judged, backend.identity, tower, batch_size, more=more, earlier=earlier, **wanted)
    benchmark.extra_info.update({**figures[0].detail, **figures[0].context})
    record(figures)


def test_every_row_of_the_baseline_is_measured(chain, record, baseline_file):
    backends, sizes = chain.settings.validated, chain.batch_sizes
    rows = [f"{name}/{tower}/{size}" for name in backends for tower in chain.towers for size in sizes]
    wanted = [name.rpartition("/")[0] for name in baseline.load(baseline_file).rows]
    record(perf.baseline_rows(wanted, rows, baseline_file))
