"""Upper confidence bound for the mean of honest margins: the statistics behind calibration.

What the wealth needs is that the sum of x over a request, minus mu0 times its tokens, is not
positive on average over requests (``trueweight.protos.evidence`` weighs a request by its tokens).
So requests are the units: tokens of one request may depend on each other in any way.

The bound is a bet (Waudby-Smith and Ramdas 2024). For a supposed mean m and a fixed stake t,

    K(m) = product over requests of (1 + t * (m * n_r - sum_r)),  0 <= t * largest sum <= 1

is non-negative, and if the true mean is at least m its expectation is at most 1. So by Markov's
inequality the smallest m at which K(m) reaches 1/(1 - confidence) exceeds the true mean with that
confidence: no normal approximation, no minimal sample. K is averaged over stakes fixed before the
data is seen. No values at all, or too few, give the bound 1.

One assumption is left, and no method can do without it: that no honest request ever shows more
than ``RANGE_FACTOR`` times the largest sum seen (and at least one whole token). N requests can
never rule out something that happens once in N requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.999
RANGE_FACTOR = 2.0
# Fixed before the data is seen; dropping those that the range forbids only lowers the capital.
_STAKES = 2.0 ** (-np.arange(16) / 2)
_BISECTIONS = 40

Values = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MeanBound:
    """Mean of the sample (sums over tokens), the level that the true mean exceeds with chance
    1 - confidence, tokens, and the largest sum that one request showed."""

    mean: float
    upper: float
    tokens: int
    largest: float


def upper_bound(sums: Values, tokens: Values, confidence: float) -> MeanBound:
    """Bound on the mean of x per token, from each request's sum of x in [0, 1] and its tokens.

    Raises ValueError for impossible values.
    """
    x, n = np.asarray(sums, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if x.shape != n.shape or not bool(np.all((n > 0) & (x >= 0) & (x <= n))):
        raise ValueError("a request has tokens, and a sum between 0 and their number")
    if x.size == 0:
        return MeanBound(0.0, 1.0, 0, 0.0)
    total, largest = float(np.sum(n)), float(np.max(x))
    stakes = _STAKES[_STAKES * max(1.0, RANGE_FACTOR * largest) <= 1.0]
    mean = float(np.sum(x)) / total
    # Most requests are exact; alike ones are counted once.
    (x, n), alike = np.unique(np.stack((x, n)), axis=1, return_counts=True)
    low, high = mean, 1.0
    for _ in range(_BISECTIONS if stakes.size else 0):
        middle = (low + high) / 2
        if _log_capital(middle * n - x, alike, stakes) >= -math.log(1 - confidence):
            high = middle
        else:
            low = middle
    return MeanBound(mean, high, int(total), largest)


def _log_capital(
    gains: NDArray[np.float64], times: NDArray[np.int64], stakes: NDArray[np.float64]
) -> float:
    """ln of the capital, averaged over all stakes (those not played count as lost)."""
    logs = np.array([float(np.sum(times * np.log1p(stake * gains))) for stake in stakes])
    top = float(np.max(logs))
    return top + math.log(float(np.sum(np.exp(logs - top))) / _STAKES.size)
