"""The measuring protocol of throughput: feed, warm-up, rounds, statistics, verdict. Seconds everywhere.

Scopes, never compared with each other: `inference` is one call of the backend by the host's clock, transfers included;
`execute` is the device's own execute time, which is what ais_bench calls throughput; `end_to_end` goes from JPEG or
caption to embedding; `load` and `first_inference` are single times.
"""

from __future__ import annotations

import gc
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import msgspec
import numpy as np

from clipval.backends import Backend

PROTOCOL = 1  # figures of another protocol are never compared
VALID, NOISY, THROTTLED, BUSY = "VALID", "NOISY", "THROTTLED", "BUSY"
INSUFFICIENT, BAD_OUTPUT = "INSUFFICIENT", "BAD_OUTPUT"

BUFFERS = 4  # distinct inputs in turn: one input again and again would stay in the caches
MIN_ROUNDS = 5  # the range of five is a 94 % interval of the median
MAX_ROUNDS = 2000
WARM_UP_CALLS = 3
STABLE = 0.02  # warm when the median of the last calls is within 2 % of the calls before
# Half-width of the 95 % interval of the median, as a share of it. Not the coefficient of variation: a few outliers of a
# busy host widen that, and do not move a median.
NOISE = {"inference": 0.05, "execute": 0.025}
DRIFT = 0.05  # rise of the time of a call over the whole run, as a share of the median
OTHERS = 0.5  # processor cores kept busy by others
PERCENTILES = {"p90": (90, 100), "p95": (95, 100), "p99": (99, 300)}  # name: (percentile, least rounds)


class Feed:
    """Batches of one size from prepared rows, in turn.

    Args:
        rows: [n, *row_shape], or what slices to it; batch_size: rows of a batch. Short data is repeated.
    """

    def __init__(self, rows: Any, batch_size: int) -> None:
        count = min(BUFFERS, max(1, len(rows) // batch_size))
        picked = [np.arange(n * batch_size, (n + 1) * batch_size) % len(rows) for n in range(max(count, 2))]
        self.indices: List[np.ndarray] = picked
        self.batches = [np.ascontiguousarray(rows[index]) for index in picked]
        self._turn = 0

    def next(self) -> np.ndarray:
        """The next batch, C-contiguous."""
        self._turn = (self._turn + 1) % len(self.batches)
        return self.batches[self._turn]


class WarmUp(msgspec.Struct, frozen=True):
    """Untimed calls: how many, seconds in all, of the first, the estimate for planning, and whether they settled."""

    calls: int
    seconds: float
    first_call: float
    estimate: float
    stable: bool


Clock = Callable[[], float]


def warm_up(call: Callable[[], Any], *, seconds: float, cap: float, clock: Clock = time.perf_counter) -> WarmUp:
    """Call until it is warm: by count, by time, and until the time of a call is stable.

    Args:
        seconds: least time in all; cap: most, after which it stops though it is not stable.
    """
    times: List[float] = []
    while True:
        start = clock()
        call()
        times.append(clock() - start)
        spent, half = sum(times), max(1, min(10, len(times) // 2))
        late, early = np.median(times[-half:]), np.median(times[-2 * half : -half] or times)
        stable = len(times) >= WARM_UP_CALLS and abs(late - early) <= STABLE * early
        if spent >= cap or (len(times) >= WARM_UP_CALLS and spent >= seconds and stable):
            return WarmUp(len(times), spent, times[0], float(late), bool(stable))


def rounds_for(estimate: float, *, seconds: float, cap: float) -> int:
    """Timed calls for a time budget: `seconds` of them, not more than `cap`, at least `MIN_ROUNDS`."""
    wanted = math.ceil(min(seconds, cap) / max(estimate, 1e-9))
    return max(MIN_ROUNDS, min(wanted, MAX_ROUNDS))


class Throughput(msgspec.Struct, frozen=True):
    """One row.

    Attributes:
        samples_per_second: batch size / median seconds of a call; interval: of it, 95 %.
        samples_per_second_mean: batch size * rounds / sum of seconds, which is 1000 * batch / mean milliseconds.
        p90, p95, p99: of the seconds of a call; None where there are too few rounds for them.
        autocorrelation: of successive calls; drift: rise over the run as a share of the median.
        outliers: calls beyond the quartiles by 1.5 times their distance; none is dropped.
    """

    scope: str
    batch_size: int
    rounds: int
    samples_per_second: float
    samples_per_second_mean: float
    interval: Tuple[float, float]
    median_seconds: float
    mean_seconds: float
    min_seconds: float
    max_seconds: float
    cv: float
    autocorrelation: float
    drift: float
    outliers: int
    p90: Optional[float] = None
    p95: Optional[float] = None
    p99: Optional[float] = None


def summarise(times: Sequence[float], batch_size: int, scope: str) -> Throughput:
    """Statistics of the seconds of each call.

    Raises:
        ValueError: no calls, or a time that is not a positive number.
    """
    seconds = np.asarray(times, np.float64)
    if not len(seconds) or not np.isfinite(seconds).all() or seconds.min() <= 0:
        raise ValueError(f"{len(seconds)} times; each must be a positive number of seconds")
    median = float(np.median(seconds))
    low, high = median_interval(seconds)
    first, third = np.percentile(seconds, [25, 75])
    outliers = int(((seconds < first - 1.5 * (third - first)) | (seconds > third + 1.5 * (third - first))).sum())
    percentiles = {
        name: float(np.percentile(seconds, rank)) if len(seconds) >= least else None
        for name, (rank, least) in PERCENTILES.items()
    }
    return Throughput(
        scope=scope,
        batch_size=batch_size,
        rounds=len(seconds),
        samples_per_second=batch_size / median,
        samples_per_second_mean=batch_size * len(seconds) / float(seconds.sum()),
        interval=(batch_size / high, batch_size / low),
        median_seconds=median,
        mean_seconds=float(seconds.mean()),
        min_seconds=float(seconds.min()),
        max_seconds=float(seconds.max()),
        cv=float(seconds.std() / seconds.mean()),
        autocorrelation=autocorrelation(seconds),
        drift=_drift(seconds),
        outliers=outliers,
        **percentiles,
    )


def autocorrelation(seconds: np.ndarray) -> float:
    """Correlation of successive calls, on ranks so that one outlier does not decide; 0 where it is undefined."""
    from scipy.stats import rankdata

    if len(seconds) < 4:
        return 0.0
    ranks = rankdata(seconds)
    if np.ptp(ranks[:-1]) == 0 or np.ptp(ranks[1:]) == 0:
        return 0.0
    return float(np.corrcoef(ranks[:-1], ranks[1:])[0, 1])


def median_interval(seconds: np.ndarray) -> Tuple[float, float]:
    """95 % interval of the median from order statistics.

    Calls are not independent (clocks, temperature), so the number of calls is reduced to the effective one of a
    first-order process, n (1 - r) / (1 + r); the binomial ranks are taken for that number.
    """
    from scipy.stats import binom

    r = min(max(autocorrelation(seconds), 0.0), 0.95)
    effective = max(MIN_ROUNDS, int(len(seconds) * (1 - r) / (1 + r)))
    rank = float(binom.ppf(0.025, effective, 0.5))
    low, high = np.quantile(seconds, [max(0.0, (rank - 1) / effective), min(1.0, 1 - (rank - 1) / effective)])
    return float(low), float(high)


def _drift(seconds: np.ndarray) -> float:
    from scipy.stats import theilslopes

    if len(seconds) < 2 * MIN_ROUNDS:
        return 0.0
    thinned = seconds[:: max(1, len(seconds) // 200)]
    slope, _, low, _ = theilslopes(thinned, np.arange(len(thinned)))
    return float(slope * len(thinned) / np.median(thinned)) if low > 0 else 0.0


def verdict(
    found: Throughput, *, busy: str = "", bad_output: str = "", noise: Optional[float] = None
) -> Tuple[str, str]:
    """What a row is worth, and why.

    Args:
        noise: allowed half-width of the median's interval, as a share, and no less of drift; None is `NOISE`.
        busy: what else ran on the device or the host, empty for nothing; bad_output: what was wrong with the results.
    """
    half_width = (found.interval[1] - found.interval[0]) / 2 / found.samples_per_second
    limit = NOISE[found.scope] if noise is None else noise
    drift = max(DRIFT, limit)
    if bad_output:
        return BAD_OUTPUT, bad_output
    if found.rounds < MIN_ROUNDS:
        return INSUFFICIENT, f"{found.rounds} rounds, at least {MIN_ROUNDS} are needed; raise --perf-max-time"
    if busy:
        return BUSY, busy
    if found.drift > drift:
        return THROTTLED, f"calls became {found.drift:.1%} slower over the run, allowed {drift:.1%}"
    if half_width > limit:
        return NOISY, f"median is known to +-{half_width:.1%} only, allowed {limit:.1%}; quieten the machine"
    return VALID, ""


@contextmanager
def quiet() -> Iterator[None]:
    """Collect garbage now and not while calls are timed."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class HostLoad:
    """Processor time that others use while something is measured, from Linux's /proc/stat."""

    def __init__(self) -> None:
        self._start = self._read()

    def busy(self) -> str:
        """Why the host is not idle, empty where it is or where this system does not tell."""
        now, start = self._read(), self._start
        if now is None or start is None or now[2] - start[2] < 0.2:
            return ""
        others = ((now[0] - start[0]) - (now[1] - start[1])) / (now[2] - start[2])
        return f"other processes kept {others:.1f} cores busy, allowed {OTHERS}" if others > OTHERS else ""

    @staticmethod
    def _read() -> Optional[Tuple[float, float, float]]:
        """Seconds of processor time used by all, by this process and its children, and of the wall clock."""
        try:
            fields = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:]]
        except (OSError, ValueError):
            return None
        idle = fields[3] + fields[4]
        ticks = os.sysconf("SC_CLK_TCK")
        own = os.times()
        return (sum(fields[:8]) - idle) / ticks, sum(own[:4]), time.monotonic()


def time_calls(call: Callable[[], Any], rounds: int, *, clock: Clock = time.perf_counter) -> List[float]:
    """Seconds of each of `rounds` calls, garbage collection off."""
    times = []
    with quiet():
        for _ in range(rounds):
            start = clock()
            call()
            times.append(clock() - start)
    return times


def measure(
    backend: Backend,
    feed: Feed,
    batch_size: int,
    *,
    seconds: float,
    cap: float,
    noise: Optional[float] = None,
    rounds: Optional[int] = None,
) -> Dict[str, Tuple[Throughput, str, str]]:
    """Measure one row without a test runner: scope -> (figures, verdict, reason).

    Args:
        seconds: of timed calls; cap: seconds of the row at most; rounds: a number of calls instead.
        noise: see `verdict`.
    """
    load = HostLoad()
    warm = warm_up(lambda: backend.run(feed.next()), seconds=seconds / 4, cap=cap / 3)
    before = len(backend.execute_seconds() or ())
    count = rounds or rounds_for(warm.estimate, seconds=seconds, cap=cap)
    times = time_calls(lambda: backend.run(feed.next()), count)
    busy = load.busy()
    rows = {"inference": summarise(times, batch_size, "inference")}
    executed = backend.execute_seconds()
    if executed is not None:
        rows["execute"] = summarise(executed[before:], batch_size, "execute")
    return {scope: (row, *verdict(row, busy=busy, noise=noise)) for scope, row in rows.items()}


def as_dict(row: Any) -> Dict[str, Any]:
    """A `Throughput` or `WarmUp` as plain JSON."""
    found: Dict[str, Any] = msgspec.to_builtins(row)
    return found


def flops_per_sample(config: Dict[str, Any], tower: str) -> Optional[float]:
    """Floating-point operations of one sample, a multiply-add counted as two; None for what is not a plain ViT.

    Gives 8.82e9 and 5.96e9 for ViT-B-32, as open_clip's docs/model_profile.csv has.
    """
    part = config["vision_cfg"] if tower == "vision" else config["text_cfg"]
    if "timm_model_name" in part or "hf_model_name" in part or not isinstance(part.get("layers"), int):
        return None
    width, ratio = part["width"], part.get("mlp_ratio", 4.0)
    stem = 0.0
    if tower == "vision":
        patches = (part["image_size"] // part["patch_size"]) ** 2
        tokens, stem = patches + 1, patches * width * 3 * part["patch_size"] ** 2
    else:
        tokens = part.get("context_length", 77)
    layer = (4 + 2 * ratio) * width**2 * tokens + 2 * tokens**2 * width
    return float(2 * (stem + part["layers"] * layer + width * config["embed_dim"]))


def matmul_peak(seconds: float = 0.3) -> float:
    """FLOP/s of this machine's float32 matrix product as numpy has it: the best of what fits in `seconds`."""
    square = np.ones((1536, 1536), np.float32)
    best, spent = math.inf, 0.0
    while spent < seconds:
        start = time.perf_counter()
        square @ square
        elapsed = time.perf_counter() - start
        best, spent = min(best, elapsed), spent + elapsed
    return 2 * 1536**3 / best
