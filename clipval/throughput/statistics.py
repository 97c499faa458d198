"""Statistics of timed calls. Seconds everywhere.

Scopes, never compared with each other: `inference` is one call of the backend by the host's clock, transfers included;
`execute` is the device's own execute time, on which ais_bench bases throughput; `end_to_end` is from JPEG or caption to
embedding; `load` and `first_inference` are single times.
"""

from __future__ import annotations

from typing import Optional, Sequence, Tuple

import msgspec
import numpy as np

PROTOCOL = 5  # figures of another protocol are never compared
MIN_ROUNDS = 5  # the range of five is a 94 % interval of the median
DRIFT_BLOCKS = 8  # least number of points of a trend
PERCENTILES = {"p90": (90, 100), "p95": (95, 100), "p99": (99, 300)}  # name: (percentile, least rounds)


class Timing(msgspec.Struct, frozen=True):
    """The calls of one row, by one clock.

    Attributes:
        samples_per_second: batch size / median seconds of a call; interval: of it, 95 %.
        samples_per_second_mean: batch size * rounds / sum of seconds, which is 1000 * batch / mean milliseconds.
        p90, p95, p99: of the seconds of a call; None with too few rounds.
        undisturbed: batch size / fifth percentile of the seconds of a call, which baselines compare. Other processes
        only add time, for seconds on end: on a shared host this figure varies by 1.0 to 1.5 % (standard deviation)
        if calls are timed for 10 s, 1.8 to 8.2 % for 1 s; the median by 1.4 to 5.3 % even for 10 s.
        median_seconds: of a call; cv: standard deviation of single calls (n - 1) / mean.
        effective_rounds: see `effective_rounds`.
        drift: change over the run as a share of the median, positive is slower; 0 if it may be chance.
    """

    scope: str
    batch_size: int
    rounds: int
    samples_per_second: float
    samples_per_second_mean: float
    interval: Tuple[float, float]
    undisturbed: float
    median_seconds: float
    cv: float
    effective_rounds: int
    drift: float
    p90: Optional[float] = None
    p95: Optional[float] = None
    p99: Optional[float] = None


def summarise(times: Sequence[float], batch_size: int, scope: str) -> Timing:
    """Statistics of the seconds of each call.

    Raises:
        ValueError: no calls, or a time that is not a positive number.
    """
    seconds = np.asarray(times, np.float64)
    if not len(seconds) or not np.isfinite(seconds).all() or seconds.min() <= 0:
        raise ValueError(f"{len(seconds)} times; each must be a positive number of seconds")
    median = float(np.median(seconds))
    low, high = median_interval(seconds)
    percentiles = {
        name: float(np.percentile(seconds, rank)) if len(seconds) >= least else None
        for name, (rank, least) in PERCENTILES.items()
    }
    return Timing(
        scope=scope,
        batch_size=batch_size,
        rounds=len(seconds),
        samples_per_second=batch_size / median,
        samples_per_second_mean=batch_size * len(seconds) / float(seconds.sum()),
        interval=(batch_size / high, batch_size / low),
        undisturbed=batch_size / float(np.percentile(seconds, 5)),
        median_seconds=median,
        cv=float(seconds.std(ddof=1) / seconds.mean()) if len(seconds) > 1 else 0.0,
        effective_rounds=effective_rounds(seconds),
        drift=_drift(seconds),
        **percentiles,
    )


def autocorrelation(seconds: np.ndarray) -> float:
    """Correlation of successive calls, on ranks so that one outlier does not decide; 0 if undefined."""
    from scipy.stats import rankdata

    ranks = rankdata(seconds)
    if len(seconds) < 4 or np.ptp(ranks[:-1]) == 0 or np.ptp(ranks[1:]) == 0:
        return 0.0
    return float(np.corrcoef(ranks[:-1], ranks[1:])[0, 1])


def effective_rounds(seconds: np.ndarray) -> int:
    """How many independent calls would determine the median as well as these.

    Calls are not independent (clocks, temperature, other processes). n is divided by the larger of two inflations: that
    of a first-order process, (1 + r) / (1 - r), which sees short memory in few calls, and the initial monotone sequence
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
    Of 5 calls: 0.94 if independent, 0.65 at r = 0.7: five calls are too few to estimate autocorrelation.
    """
    from scipy.stats import binom

    effective = effective_rounds(seconds)
    rank = float(binom.ppf(0.025, effective, 0.5))
    tail = max(0.0, rank - 1) / max(1, effective - 1)
    low, high = np.quantile(seconds, [tail, 1 - tail])
    return float(low), float(high)


def _drift(seconds: np.ndarray) -> float:
    """Theil-Sen slope over medians of as many blocks as effective calls: autocorrelation alone is no trend."""
    from scipy.stats import theilslopes

    if len(seconds) < DRIFT_BLOCKS:
        return 0.0
    count = int(np.clip(effective_rounds(seconds), DRIFT_BLOCKS, 200))
    blocks = np.array([np.median(block) for block in np.array_split(seconds, count)])
    slope, _, low, high = theilslopes(blocks, np.arange(count))
    return float(slope * (count - 1) / np.median(seconds)) if low > 0 or high < 0 else 0.0
