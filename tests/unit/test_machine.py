"""The machine that something is measured on: who else uses it, and how fast it is."""

import pytest

from clipval.throughput import machine


@pytest.mark.parametrize(
    ("all_cores", "own", "cores", "busy"),
    [(4.2, 4.0, 4, False), (4.0, 3.0, 4, True), (10.0, 8.0, 192, False), (20.0, 8.0, 192, True)],
)
def test_others_on_the_host_are_seen(monkeypatch, all_cores, own, cores, busy):
    reads = iter([(100.0, 50.0, 0.0), (100.0 + 2 * all_cores, 50.0 + 2 * own, 2.0)])
    monkeypatch.setattr(machine.HostLoad, "_read", staticmethod(lambda: next(reads)))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: cores)
    said = machine.HostLoad().busy()
    assert bool(said) is busy
    assert not busy or f"kept {all_cores - own:.1f} cores busy" in said


def test_a_system_that_does_not_tell_its_load_is_not_called_busy(monkeypatch):
    monkeypatch.setattr(machine.HostLoad, "_read", staticmethod(lambda: None))
    assert machine.HostLoad().busy() == ""
    assert machine.HostLoad().cores() is None


def test_cores_that_this_process_kept_busy(monkeypatch):
    reads = iter([(100.0, 50.0, 3.0), (108.0, 53.0, 5.0)])
    monkeypatch.setattr(machine.HostLoad, "_read", staticmethod(lambda: next(reads)))
    assert machine.HostLoad().cores() == pytest.approx(1.5)


def test_small_products_are_those_of_the_best_row_of_them():
    ticks = iter([0.0, 0.4, 1.0, 1.2, 2.0, 2.5])
    found = machine.small_products(1.0, clock=lambda: next(ticks))
    assert found == pytest.approx(machine.MEETINGS / 0.2)


def test_small_products_take_the_threads_of_the_backends():
    from threadpoolctl import threadpool_info

    def threads():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    def clock():
        seen.append(threads())
        return float(len(seen))

    before, seen = threads(), []
    machine.small_products(1.0, 1, clock=clock)
    assert before
    assert seen == [[1] * len(before)] * 2
    assert threads() == before


def test_the_pace_is_a_share_of_the_best(monkeypatch):
    asked, speeds = [], iter([600.0, 300.0])
    monkeypatch.setattr(machine, "small_products", lambda seconds, threads: asked.append(threads) or next(speeds))
    pace = machine.Pace(500.0, threads=3)
    assert (pace.now(), pace.best) == (1.0, 600.0)  # faster than was known
    assert (pace.now(), pace.best) == (0.5, 600.0)
    assert asked == [3, 3]
