"""Whether a speed can be: operations a second against what the same runtime reaches in a matrix product."""

from __future__ import annotations

import math
from typing import Callable, Dict, Optional

from clipval.backends import Backend, Product
from clipval.throughput.machine import witness

BEYOND = 1.5  # times the best matrix product; a model reaches 0.1 to 0.9 of it
SIDES = (256, 512, 1024, 2048, 4096, 8192)  # of square matrices: small machines are at their best in the small ones
LOOK = 0.15  # seconds of products of one side
LONG_LOOK = 1.0  # before a speed is called impossible
TOO_LONG = 0.5  # seconds of one product beyond which no larger one is tried
# A device whose runtime offers no product: operations a second in fp16 that no chip this suite is for comes near to.
# Of Ascend chips none is documented beyond 4e14 (910B). It bounds what a broken clock or a call that does not wait
# can claim, and no more: ViT-B-32 would have to make 110,000 images or 170,000 captions a second.
CEILING = 1e15


class Peaks:
    """The best matrix product of each runtime on this machine, in operations a second; the best one seen counts."""

    def __init__(self) -> None:
        self._best: Dict[str, float] = {}

    def of(self, backend: Backend, seconds: float = LOOK) -> Optional[float]:
        """The peak; None where the runtime offers no product. Measured when it is first asked for."""
        key = f"{backend.identity} {backend.threads}"
        if key not in self._best or seconds != LOOK:
            found = _best(backend.product, seconds)
            if found is None:
                return None
            self._best[key] = max(found, self._best.get(key, 0.0))
        return self._best[key]

    def impossible(self, backend: Backend, operations: Optional[float], samples_per_second: float) -> str:
        """Why a speed cannot be, empty where it can.

        Args:
            operations: of one sample, None where they cannot be counted.
        """
        if operations is None:
            return ""
        claimed, peak = operations * samples_per_second, self.of(backend)
        if peak is None:
            said = "more than any chip computes; no peak of this one is known"
            return f"{claimed:.2g} operations a second, {said}" if claimed > CEILING else ""
        if claimed <= BEYOND * peak:
            return ""
        peak = self.of(backend, LONG_LOOK) or peak  # others may have slowed it
        if claimed <= BEYOND * peak:
            return ""
        return (
            f"{claimed:.2g} operations a second, {claimed / peak:.3g} times what a matrix product of the same runtime "
            f"reaches here (limit {BEYOND}): the calls did not compute, or returned before they were done"
        )


def _best(product: Callable[[int], Optional[Product]], seconds: float) -> Optional[float]:
    """Operations a second of the fastest product of any side; None where there is none."""
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
