"""Throughput of each listed backend, tower and batch size, timed by pytest-benchmark with clipval's protocol."""

import time

import pytest

from clipval import baseline, gates, throughput
from clipval.baseline import REGRESSED
from clipval.throughput import VALID, Feed, HostLoad

pytestmark = pytest.mark.perf


@pytest.fixture(scope="session")
def peak():
    """FLOP/s of this machine's matrix product, measured once."""
    return throughput.matmul_peak()


def test_throughput(request, chain, record, peak, tower_name, backend_name, batch_size):
    tower, settings = chain.towers[tower_name], chain.settings
    started = time.perf_counter()
    backend = chain.backend(backend_name, tower, batch_size)
    load_seconds = time.perf_counter() - started
    feed = Feed(chain.prepared.rows[tower_name], batch_size)
    device = backend.execute_seconds() is not None
    if device:
        backend.refresh()  # a fresh session's clock, so that none is opened inside the timed calls
        # the recipe's figure is the device's execute time, so that is the benchmark's clock
        request.node.add_marker(pytest.mark.benchmark(timer=lambda: sum(backend.execute_seconds())))
    benchmark = request.getfixturevalue("benchmark")
    benchmark.group = f"{tower_name}-{backend_name}"
    busy = chain.busy(backend_name)
    warm = throughput.warm_up(
        lambda: backend.run(feed.next()), seconds=settings.perf_min_time / 4, cap=settings.perf_max_time / 3
    )
    rounds = throughput.rounds_for(warm.estimate, seconds=settings.perf_min_time, cap=settings.perf_max_time)
    host, calls = HostLoad(), []

    def call():
        start = time.perf_counter()
        backend.run(feed.next())
        calls.append(time.perf_counter() - start)

    with throughput.quiet():
        benchmark.pedantic(call, rounds=rounds, iterations=1)
    assert benchmark.stats is not None, "pytest-benchmark is switched off, so nothing was timed"
    timed = {"inference": calls}
    if device:
        timed["execute"] = list(benchmark.stats.stats.data)
    busy = busy or host.busy() or chain.busy(backend_name)
    rows = {scope: throughput.summarise(times, batch_size, scope) for scope, times in timed.items()}
    bad = chain.check_outputs(backend, feed)
    judged = {
        scope: (row, *throughput.verdict(row, busy=busy, bad_output=bad, noise=settings.perf_noise))
        for scope, row in rows.items()
    }
    earlier = chain.against_baseline(backend.identity, tower, batch_size, judged)
    doubtful = settings.strict and any(verdict != VALID for _, verdict, _ in judged.values())
    if not bad and (doubtful or (earlier is not None and earlier.status == REGRESSED)):
        judged = throughput.measure(
            backend,
            feed,
            batch_size,
            seconds=settings.perf_min_time,
            cap=settings.perf_max_time,
            noise=settings.perf_noise,
        )
        earlier = chain.against_baseline(backend.identity, tower, batch_size, judged)
    more = {
        "warm_up": throughput.as_dict(warm),
        "load_seconds": load_seconds,
        "end_to_end": chain.end_to_end(backend, batch_size),
        "threads": settings.threads,
    }
    figures = gates.throughput(
        judged,
        backend.identity,
        tower,
        batch_size,
        spec=chain.spec,
        required=settings.strict,
        config=chain.model_key["config"],
        peak=peak,
        more=more,
        earlier=earlier,
    )
    benchmark.extra_info.update(figures[0].detail)
    benchmark.extra_info.update(figures[0].context)
    record(figures)


def test_every_row_of_the_baseline_is_measured(chain, record, baseline_file):
    backends, sizes = chain.settings.validated, chain.batch_sizes
    rows = [f"{name}/{tower}/{size}" for name in backends for tower in chain.towers for size in sizes]
    wanted = [name.rpartition("/")[0] for name in baseline.load(baseline_file).rows]
    record(gates.baseline_rows(wanted, rows, baseline_file))
