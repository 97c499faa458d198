"""The measuring protocol of throughput: feed, warm-up, rounds, statistics, verdict. Seconds everywhere.

Scopes, never compared with each other: `inference` is one call of the backend by the host's clock, transfers included;
`execute` is the device's own execute time, which is what ais_bench calls throughput; `end_to_end` goes from JPEG or
caption to embedding; `load` and `first_inference` are single times.
"""

from __future__ import annotations

import gc
import math
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import msgspec
import numpy as np

from clipval.backends import Backend
from clipval.machine import Clock, HostLoad

PROTOCOL = 4  # figures of another protocol are never compared
VALID, NOISY, THROTTLED, BUSY = "VALID", "NOISY", "THROTTLED", "BUSY"
INSUFFICIENT, BAD_OUTPUT = "INSUFFICIENT", "BAD_OUTPUT"

BUFFERS = 4  # distinct inputs in turn: one input again and again would stay in the caches
MIN_ROUNDS = 5  # the range of five is a 94 % interval of the median
GOOD_ROUNDS = 9  # the least whose interval leaves out the slowest call and the fastest
MAX_ROUNDS = 2000
OVERRUN = 2  # times the cap that `GOOD_ROUNDS` may take; what cannot even have `MIN_ROUNDS` in that is INSUFFICIENT
WARM_UP_CALLS = 3
WARM_UP_SECONDS = 1.0  # longer only until the calls are stable
STABLE = 0.02  # warm when the median of the last calls is within 2 % of the calls before
# Half-width of the 95 % interval of the median, as a share of it. Not the coefficient of variation: a few outliers of a
# busy host widen that, and do not move a median.
NOISE = {"inference": 0.05, "execute": 0.025}
DRIFT_BLOCKS = 8  # least points of a trend
DRIFT = 0.05  # rise of the time of a call over the whole run, as a share of the median
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


def warm_up_seconds(seconds: float) -> float:
    """Least warm-up before `seconds` of timed calls."""
    return min(seconds / 4, WARM_UP_SECONDS)


def rounds_for(estimate: float, *, seconds: float, cap: float) -> int:
    """Timed calls for a time budget.

    As many as fill `seconds`, at most what `cap` has time for. `GOOD_ROUNDS` are granted up to `OVERRUN` times the cap;
    slower calls get fewer, at least one, and the verdict says so.
    """
    estimate = max(estimate, 1e-9)
    wanted = max(GOOD_ROUNDS, min(math.ceil(seconds / estimate), MAX_ROUNDS))
    least = min(GOOD_ROUNDS, int(OVERRUN * cap / estimate))
    return max(1, least, min(wanted, int(cap / estimate)))


class Throughput(msgspec.Struct, frozen=True):
    """One row.

    Attributes:
        samples_per_second: batch size / median seconds of a call; interval: of it, 95 %.
        samples_per_second_mean: batch size * rounds / sum of seconds, which is 1000 * batch / mean milliseconds.
        p90, p95, p99: of the seconds of a call; None where there are too few rounds for them.
        undisturbed: batch size / fifth percentile of the seconds of a call, what baselines compare. Others on the
            machine only add time, for seconds on end: on a shared host that is 1.0 to 1.5 % (standard deviation) off
            where calls are timed for 10 s, 1.8 to 8.2 % for 1 s; the median is 1.4 to 5.3 % off even for 10 s.
        median_seconds, mean_seconds, min_seconds, max_seconds: of a call; stdev_seconds and cv: of single calls, n - 1;
        mad_seconds: median distance from the median, not scaled.
        autocorrelation: of successive calls; effective_rounds: see `effective_rounds`.
        drift: change over the run as a share of the median, slower is positive; 0 where it may be chance.
        outliers: calls beyond the quartiles by 1.5 times their distance; none is dropped.
    """

    scope: str
    batch_size: int
    rounds: int
    samples_per_second: float
    samples_per_second_mean: float
    interval: Tuple[float, float]
    undisturbed: float
    median_seconds: float
    mean_seconds: float
    min_seconds: float
    max_seconds: float
    stdev_seconds: float
    mad_seconds: float
    cv: float
    autocorrelation: float
    effective_rounds: int
    drift: float
    outliers: int
    p90: Optional[float] = None
    p95: Optional[float] = None
    p99: Optional[float] = None


Judged = Dict[str, Tuple[Throughput, str, str]]  # scope -> figures, verdict, reason


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
    stdev = float(seconds.std(ddof=1)) if len(seconds) > 1 else 0.0
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
        undisturbed=batch_size / float(np.percentile(seconds, 5)),
        median_seconds=median,
        mean_seconds=float(seconds.mean()),
        min_seconds=float(seconds.min()),
        max_seconds=float(seconds.max()),
        stdev_seconds=stdev,
        mad_seconds=float(np.median(np.abs(seconds - median))),
        cv=stdev / float(seconds.mean()),
        autocorrelation=autocorrelation(seconds),
        effective_rounds=effective_rounds(seconds),
        drift=_drift(seconds),
        outliers=outliers,
        **percentiles,
    )


def autocorrelation(seconds: np.ndarray) -> float:
    """Correlation of successive calls, on ranks so that one outlier does not decide; 0 where it is undefined."""
    from scipy.stats import rankdata

    ranks = rankdata(seconds)
    if len(seconds) < 4 or np.ptp(ranks[:-1]) == 0 or np.ptp(ranks[1:]) == 0:
        return 0.0
    return float(np.corrcoef(ranks[:-1], ranks[1:])[0, 1])


def effective_rounds(seconds: np.ndarray) -> int:
    """How many independent calls would know the median as well as these.

    Calls are not independent (clocks, temperature, neighbours). n is divided by the larger of two inflations: that of a
    first-order process, (1 + r) / (1 - r), which sees short memory in few calls, and the initial monotone sequence
    (Geyer 1992, Practical Markov Chain Monte Carlo, 3.3) of the signs about the median, which sees a slow wave under
    jitter, where successive calls hardly correlate.
    """
    n = len(seconds)
    r = min(max(autocorrelation(seconds), 0.0), 0.95)
    signs = np.sign(seconds - np.median(seconds))
    signs -= signs.mean()
    if n < 4 or not signs.any():
        return n
    spectrum = np.fft.rfft(signs, 2 * n)
    correlation = np.fft.irfft(spectrum * spectrum.conj(), 2 * n)[:n]
    correlation /= correlation[0]
    pairs = correlation[0 : n - 1 : 2] + correlation[1:n:2]
    ends = np.flatnonzero(pairs <= 0)
    pairs = np.minimum.accumulate(pairs[: ends[0]] if len(ends) else pairs)
    inflation = max(1.0, (1 + r) / (1 - r), float(2 * pairs.sum() - 1))
    return max(min(MIN_ROUNDS, n), int(n / inflation))


def median_interval(seconds: np.ndarray) -> Tuple[float, float]:
    """95 % interval of the median from order statistics, at the binomial ranks of the effective number of calls.

    Simulated coverage of 200 calls: independent 0.97; first-order with r = 0.7, 0.98; a slow wave under jitter, 0.80.
    Of 5 calls: 0.94 where they are independent, 0.65 at r = 0.7: so few do not show how they hang together.
    """
    from scipy.stats import binom

    effective = effective_rounds(seconds)
    rank = float(binom.ppf(0.025, effective, 0.5))
    tail = max(0.0, rank - 1) / max(1, effective - 1)
    low, high = np.quantile(seconds, [tail, 1 - tail])
    return float(low), float(high)


def _drift(seconds: np.ndarray) -> float:
    """Theil-Sen slope over medians of as many blocks as there are effective calls: memory alone is no trend."""
    from scipy.stats import theilslopes

    if len(seconds) < DRIFT_BLOCKS:
        return 0.0
    count = int(np.clip(effective_rounds(seconds), DRIFT_BLOCKS, 200))
    blocks = np.array([np.median(block) for block in np.array_split(seconds, count)])
    slope, _, low, high = theilslopes(blocks, np.arange(count))
    return float(slope * (count - 1) / np.median(seconds)) if low > 0 or high < 0 else 0.0


def verdict(
    found: Throughput, *, busy: str = "", bad_output: str = "", noise: Optional[float] = None
) -> Tuple[str, str]:
    """What a row is worth, and why.

    Args:
        noise: allowed half-width of the median's interval, as a share, and no less of drift; None is `NOISE`.
        busy: what else ran on the device or the host, empty for nothing; bad_output: what was wrong with the results.
    """
    half_width = (found.interval[1] - found.interval[0]) / 2 / found.samples_per_second
    limit = NOISE.get(found.scope, NOISE["inference"]) if noise is None else noise
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
    estimate: Optional[float] = None,
    noise: Optional[float] = None,
    rounds: Optional[int] = None,
    whole: bool = False,
    busy: Callable[[], str] = lambda: "",
    check: Callable[[], str] = lambda: "",
    between: Callable[[], Any] = lambda: None,
    clock: Clock = time.perf_counter,
) -> Judged:
    """Measure one row without a test runner: scope -> (figures, verdict, reason).

    Calls are timed for `seconds` at a time, until all of them together are VALID or `cap` is spent.

    Args:
        estimate: seconds of a call of a backend that is warm already; without it, it is warmed up.
        rounds: a number of calls instead of a time; noise: see `verdict`.
        whole: spend all of `cap`, so that what the machine does undisturbed is seen; between: called between the times.
        busy: what else uses the device, asked before and after; check: what is wrong with outputs, asked after timing.
    """
    last: List[np.ndarray] = []

    def call() -> None:
        last[:] = [backend.run(feed.next())]

    load, used = HostLoad(), busy()
    if estimate is None:
        estimate = warm_up(call, seconds=warm_up_seconds(seconds), cap=cap / 3, clock=clock).estimate
    before, times = len(backend.execute_seconds() or ()), []
    while True:
        times += time_calls(call, rounds or rounds_for(estimate, seconds=seconds, cap=cap), clock=clock)
        rows = {"inference": summarise(times, batch_size, "inference")}
        executed = backend.execute_seconds()
        if executed is not None:
            rows["execute"] = summarise(executed[before:], batch_size, "execute")
        good = all(verdict(row, noise=noise)[0] == VALID for row in rows.values())
        if (good and not whole) or rounds or sum(times) + seconds > cap:
            break
        between()
    used = used or load.busy() or busy()
    bad = check() if np.isfinite(last[0]).all() else "the last timed call gave NaN or infinity"
    return {scope: (row, *verdict(row, busy=used, bad_output=bad, noise=noise)) for scope, row in rows.items()}


def as_dict(row: Any) -> Dict[str, Any]:
    """A `Throughput` or `WarmUp` as plain JSON."""
    found: Dict[str, Any] = msgspec.to_builtins(row)
    return found


def flops_per_sample(config: Dict[str, Any], tower: str) -> Optional[float]:
    """Floating-point operations of one sample, a multiply-add counted as two; None for what is not a plain CLIP ViT.

    Gives 8.82e9 and 5.96e9 for ViT-B-32, as open_clip's docs/model_profile.csv has; within 0.25 % of that table for
    every plain ViT in it. CoCa's attention poolers are not counted, so it has none.

    Args:
        config: open_clip's config of the model; tower: `vision` or `text`.
    """
    part = config["vision_cfg"] if tower == "vision" else config["text_cfg"]
    known = isinstance(part.get("layers"), int) and isinstance(part.get("image_size", 0), int)
    if not known or "multimodal_cfg" in config or "timm_model_name" in part or "hf_model_name" in part:
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
