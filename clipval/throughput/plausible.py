"""Whether a speed is possible: its FLOP/s compared with those of a matrix product in the same runtime."""

from __future__ import annotations

import math
from typing import Callable, Dict, Optional

from clipval.backends import Backend, Product
from clipval.throughput.machine import witness

BEYOND = 1.5  # times the best matrix product; a model reaches 0.1 to 0.9 of it
SIDES = (256, 512, 1024, 2048, 4096, 8192)  # of square matrices: small machines are fastest on small ones
LOOK = 0.15  # seconds of products per side
LONG_LOOK = 1.0  # before a speed is judged impossible
TOO_LONG = 0.5  # seconds of one product above which no larger one is tried
# For a device whose runtime offers no product: fp16 FLOP/s well above any supported chip. No Ascend chip is documented
# above 4e14 (910B). It only limits what a broken clock or a call that does not wait can claim: ViT-B-32 would have to
# process 110,000 images or 170,000 captions per second.
CEILING = 1e15


class Peaks:
    """The fastest matrix product of each runtime on this machine, in FLOP/s."""

    def __init__(self) -> None:
        self._best: Dict[str, float] = {}

    def of(self, backend: Backend, seconds: float = LOOK) -> Optional[float]:
        """The peak; None if the runtime offers no product. Measured on first use."""
        key = f"{backend.identity} {backend.threads}"
        if key not in self._best or seconds != LOOK:
            found = _best(backend.product, seconds)
            if found is None:
                return None
            self._best[key] = max(found, self._best.get(key, 0.0))
        return self._best[key]

    def impossible(self, backend: Backend, operations: Optional[float], samples_per_second: float) -> str:
        """Why a speed is impossible; empty if it is possible.

        Args:
            operations: per sample; None if they cannot be counted.
        """
        if operations is None:
            return ""
        claimed, peak = operations * samples_per_second, self.of(backend)
        if peak is None:
            said = "more than any chip reaches; the peak of this one is not known"
            return f"{claimed:.2g} operations a second, {said}" if claimed > CEILING else ""
        if claimed <= BEYOND * peak:
            return ""
        peak = self.of(backend, LONG_LOOK) or peak  # other load may have slowed it down
        if claimed <= BEYOND * peak:
            return ""
        return (
            f"{claimed:.2g} operations a second, {claimed / peak:.3g} times what a matrix product of the same runtime "
            f"reaches here (limit {BEYOND}): the calls did not compute, or returned before they were done"
        )


def _best(product: Callable[[int], Optional[Product]], seconds: float) -> Optional[float]:
    """FLOP/s of the fastest product of any side; None if there is none."""
    best = 0.0
    for side in SIDES:
        made = product(side)
        if made is None:
            return None
        operations, call = made
        call()
        fastest, spent = math.inf, 0.0
        while spent < seconds:
            start = witness()
            call()
            elapsed = witness() - start
            fastest, spent = min(fastest, elapsed), spent + elapsed
        rate = operations / fastest
        if rate < 1.05 * best or fastest > TOO_LONG:
            return max(best, rate)
        best = rate
    return best
