"""Several ways of doing one thing, timed in turns, so that what the machine does meanwhile meets them all."""

import os
import statistics
import time
from typing import Any, Callable, Dict

SETTLE = 0.1  # seconds; the threads of BLAS and OpenMP spin for some milliseconds after their work


def measure(
    ways: Dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> Dict[str, Dict[str, float]]:
    """Seconds of each way, best and median, best of the processors', and the first way's median share of each round.

    Args:
        clock: `time.process_time` leaves out what other processes take of a busy machine; for ways of one thread.
    """
    times: Dict[str, Any] = {name: [] for name in ways}
    busy: Dict[str, Any] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            time.sleep(SETTLE)
            started, worked = clock(), _worked()
            way()
            if turn or rounds == 1:  # the first one warms up
                times[name].append(clock() - started)
                busy[name].append(_worked() - worked)
        if rounds == 1:
            break
    first = next(iter(times.values()))
    rows = {}
    for name, seconds in times.items():
        share = statistics.median(ours / theirs for ours, theirs in zip(first, seconds))
        median = statistics.median(seconds)
        rows[name] = {"best": min(seconds), "median": median, "processor": min(busy[name]), "share": share}
    return rows


def _worked() -> float:
    """Seconds of the processors for this process and for those that it started and that have ended."""
    found = os.times()
    return time.process_time() + found.children_user + found.children_system


def show(rows: Dict[str, Dict[str, float]]) -> None:
    width = max(len(name) for name in rows)
    print(f"{'':{width}}  best seconds    median  processors  clipval takes")
    for name, row in rows.items():
        print(
            f"{name:{width}}  {row['best']:12.4f}  {row['median']:8.4f}  {row['processor']:10.4f}  "
            f"{row['share']:.2f} of it"
        )
