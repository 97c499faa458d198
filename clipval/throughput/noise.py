"""How much a baseline's figures vary between sessions, which a comparison must allow for.

Five sessions of one row are too few for a gate that is evaluated dozens of times a night, so rows of similar scatter
share one estimate of their noise; otherwise each row's variance is shrunk towards the common one (Smyth 2004, Linear
models and empirical Bayes methods). One noise for all would give 3 % false alarms in rows four times as noisy as the
others.
Other processes that slow down a few rows of one session would widen all bounds. That happens on the slow side only, so
a figure counts as at most `OUTLIER` standard deviations below its row's median (Huber), estimated from the pairs of all
rows (Shamos 1976), or `MIRROR` times as far below as the row's fastest is above.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Dict, Mapping, Sequence, Tuple

import numpy as np

OUTLIER = 3.0
MIRROR = 2.0
SHAMOS = 0.9539  # median distance of two normally distributed values, in standard deviations
ALIKE = 1e-3  # with Bartlett's p below this, rows do not share one noise
LEAST_NOISE = 1e-4  # lower limit of a row's standard deviation

Rows = Mapping[str, Sequence[float]]  # name of a row -> samples/s, one figure per session


def pooled(rows: Rows) -> float:
    """Standard deviation of log samples/s between sessions, pooled over all rows."""
    return _together(*_variances(_logs(rows)))


def _together(variances: np.ndarray, degrees: np.ndarray) -> float:
    return float(np.sqrt(np.average(variances, weights=degrees))) if len(degrees) else float("inf")


@lru_cache(maxsize=None)
def _pairs(count: int) -> Tuple[np.ndarray, ...]:
    return np.triu_indices(count, 1)


def _logs(rows: Rows) -> Dict[str, np.ndarray]:
    """Log samples/s of the rows with several sessions, slow outliers clipped."""
    logs = {name: np.log(values) for name, values in rows.items() if len(values) > 1}
    pairs = [np.abs(np.subtract.outer(one, one))[_pairs(len(one))] for one in logs.values()]
    reach = OUTLIER * float(np.median(np.concatenate(pairs))) / SHAMOS if pairs else 0.0
    middles = {name: float(np.median(one)) for name, one in logs.items()}
    lows = {name: middles[name] - max(reach, MIRROR * float(one.max() - middles[name])) for name, one in logs.items()}
    return {name: np.maximum(one, lows[name]) for name, one in logs.items()}


def _variances(logs: Dict[str, np.ndarray]) -> Tuple[np.ndarray, np.ndarray]:
    """Variance between sessions of each row, and its degrees of freedom."""
    return np.array([one.var(ddof=1) for one in logs.values()]), np.array([len(one) - 1 for one in logs.values()])


def of_row(rows: Rows, name: str) -> Tuple[float, float]:
    """Standard deviation of one row's log samples/s between sessions, and its degrees of freedom.

    Args:
        name: a row with at least two sessions.
    """
    every_row = _logs(rows)
    variances, degrees = _variances(every_row)
    everything = float(degrees.sum())
    strength, common = _prior(np.maximum(variances, LEAST_NOISE**2), degrees)
    if np.isinf(strength):
        return _together(variances, degrees), everything
    logs = every_row[name]
    own = len(logs) - 1
    variance = (strength * common + own * float(logs.var(ddof=1))) / (strength + own)
    return float(np.sqrt(variance)), min(strength + own, everything)


def _prior(variances: np.ndarray, degrees: np.ndarray) -> Tuple[float, float]:
    """Degrees of freedom and value of the variance that rows are shrunk towards: Smyth 2004, section 6.2.

    Infinite degrees if rows do not differ by Bartlett's test, which needs only the variances.
    """
    from scipy.optimize import brentq
    from scipy.special import digamma, polygamma
    from scipy.stats import chi2

    count, total = len(variances), float(degrees.sum())
    pooled = float(np.average(variances, weights=degrees))
    if count < 3:
        return float("inf"), pooled
    spread = total * np.log(pooled) - float((degrees * np.log(variances)).sum())
    correction = 1 + (float((1 / degrees).sum()) - 1 / total) / (3 * (count - 1))
    logs = np.log(variances) - digamma(degrees / 2) + np.log(degrees / 2)
    excess = float(logs.var(ddof=1) - polygamma(1, degrees / 2).mean())
    if chi2.sf(spread / correction, count - 1) >= ALIKE or excess <= 1e-3:
        return float("inf"), pooled
    strength = 2 * float(brentq(lambda half: polygamma(1, half) - excess, 1e-3, 1e4))
    return strength, float(np.exp(logs.mean() + digamma(strength / 2) - np.log(strength / 2)))
