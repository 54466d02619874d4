"""Many nodes' wealth at once: the arithmetic of ``trueweight.protos.evidence`` on arrays.

Every operation is done in the same order on the same doubles, so each column equals ``Wealth``
to the last bit (a test holds them together); a million audits take a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trueweight.protos.evidence import FULL_WEIGHT_TOKENS, LAMBDAS, MEAN_TOKENS

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Lifetimes:
    """What became of simulated nodes. ``first_crossing`` is the audit (from 1) at which the
    threshold was first reached, 0 if never."""

    largest: F64
    first_crossing: I64

    @property
    def crossed(self) -> int:
        """How many nodes were convicted."""
        return int(np.count_nonzero(self.first_crossing))


def wealth_paths(draws: Iterator[I64], tokens: int, mu0_nano: int) -> Iterator[F64]:
    """W after each audit, one element per node. ``draws`` yields every node's sum of x in 10^-9
    over ``tokens`` tokens."""
    slopes = np.array(LAMBDAS)[:, None]
    weight = min(tokens, FULL_WEIGHT_TOKENS) / FULL_WEIGHT_TOKENS
    sums: F64 | None = None
    for r, drawn in enumerate(draws, start=1):
        if sums is None:
            sums = np.zeros((len(LAMBDAS), drawn.size))
        ratio = drawn / (max(tokens, MEAN_TOKENS) * mu0_nano)
        factor = 1.0 + slopes * weight * (ratio - 1.0)
        sums = np.minimum(factor * (sums + 1.0 / (r * (r + 1))), 1e300)
        rest = 1.0 / (r + 1)
        total = np.zeros(drawn.size)
        for part in sums:
            total = total + (part + rest)
        yield total / len(LAMBDAS)


def simulate(draws: Iterator[I64], tokens: int, mu0_nano: int, threshold: float) -> Lifetimes:
    """Runs all draws; what became of each node."""
    largest: F64 | None = None
    first: I64 | None = None
    for r, wealth in enumerate(wealth_paths(draws, tokens, mu0_nano), start=1):
        if largest is None or first is None:
            largest, first = np.ones_like(wealth), np.zeros(wealth.size, dtype=np.int64)
        largest = np.maximum(largest, wealth)
        first = np.where((first == 0) & (wealth >= threshold), r, first)
    if largest is None or first is None:
        raise ValueError("a lifetime has at least one audit")
    return Lifetimes(largest, first)


def null_draws(
    nodes: int, audits: int, tokens: int, mean_nano: int, *, spread: float, seed: int
) -> Iterator[I64]:
    """Request sums whose mean is exactly ``tokens * mean_nano``: zero, or with chance
    1/spread ``spread`` times the mean. Larger spreads are the worse nulls."""
    rng = np.random.default_rng(seed)
    high = round(tokens * mean_nano * spread)
    for _ in range(audits):
        yield np.where(rng.random(nodes) < 1.0 / spread, high, 0).astype(np.int64)
