"""Upper confidence bounds for the mean of honest margins: the statistics behind calibration.

Two bounds; calibration takes the larger.

1. Over tokens, without any assumption on their distribution: the empirical Bernstein bound for
   martingale differences (Fan, Grama and Liu 2015; Howard, Ramdas, McAuliffe and Sekhon 2021,
   theorem 4). For x_i in [0, 1] with conditional means m_i given the past, and any prediction p_i
   made from the past,

       exp(t * sum(m_i - x_i) - psi(t) * sum((x_i - p_i)^2)),  psi(t) = -ln(1 - t) - t,  0 <= t < 1

   is a supermartingale. So with confidence 1 - delta the average conditional mean is at most
   ``mean(x) + (ln(1/delta) + psi(t) * V) / (n * t)``, however tokens depend on each other. Used on
   tokens because a distribution-free bound on N values cannot go below about ln(1/delta) / N: a
   few hundred request means could never certify 2e-4.
2. Over requests, because the first bounds the mean of *these* requests, and requests differ: the
   ratio estimator's normal bound with requests as clusters. It is an approximation (that is what
   the factor two of the null mean is for), but it sees noise that comes in whole requests.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Fixed before the data is seen; the error is shared between them (union bound).
_SLOPES = (0.1, 0.3, 0.6, 0.9, 0.97)
CONFIDENCE = 0.999


@dataclass(frozen=True, slots=True)
class MeanBound:
    """Mean of the sample and the level that its true mean exceeds with chance 1 - confidence."""

    mean: float
    upper: float
    count: int


def upper_bound(values: Sequence[float] | NDArray[np.float64], confidence: float) -> MeanBound:
    """Upper bound on the average conditional mean of values in [0, 1]. No values: 1."""
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        return MeanBound(0.0, 1.0, 0)
    if not bool(np.all((x >= 0) & (x <= 1))):
        raise ValueError("the bound holds for values in [0, 1] only")
    # Predictions from the past only; the half pseudo-observation of 0 keeps the first one defined.
    before = np.concatenate(([0.0], np.cumsum(x)[:-1]))
    predicted = before / (np.arange(x.size) + 0.5)
    variance = float(np.sum((x - np.minimum(predicted, 1.0)) ** 2))
    slack = math.log(len(_SLOPES) / (1 - confidence))
    excess = min((slack + _psi(t) * variance) / (x.size * t) for t in _SLOPES)
    mean = float(np.mean(x))
    return MeanBound(mean, min(1.0, mean + excess), int(x.size))


def _psi(slope: float) -> float:
    return -math.log1p(-slope) - slope


def cluster_upper_bound(
    sums: Sequence[float] | NDArray[np.float64],
    counts: Sequence[float] | NDArray[np.float64],
    confidence: float,
) -> float:
    """Upper bound on sum / count over requests, each request a cluster. Fewer than two: 1."""
    x, n = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if x.size < 2 or float(np.sum(n)) <= 0:
        return 1.0
    mean = float(np.sum(x) / np.sum(n))
    residual = x - mean * n
    variance = x.size / (x.size - 1) * float(np.sum(residual**2))
    z = statistics.NormalDist().inv_cdf(confidence)
    return min(1.0, mean + z * math.sqrt(variance) / float(np.sum(n)))
