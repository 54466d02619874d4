"""Evidence arithmetic: from margins to a node's wealth, the same to the last bit for everybody.

Only +, -, * and / on IEEE doubles, in the order written here, on exact integer inputs. Under
honesty the wealth W is a non-negative supermartingale that starts at 1, so the chance that it
ever reaches 1/alpha is at most alpha (Ville).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from trueweight.protos.errors import InvalidRequest

CLIP_LOGIT = 0.5
NANO = 10**9
SUSPECT = 10**3
CONVICT = 10**6
LAMBDAS = (0.05, 0.1, 0.2, 0.4, 0.8)
# A request counts in full from this many scored tokens.
FULL_WEIGHT_TOKENS = 256
# The mean x of a shorter request is taken over so many, as if its other tokens were exact: else one
# near tie that a client searched for and asked alone would stand for thousands of ordinary tokens.
MEAN_TOKENS = 64
# Smallest null mean that a calibration may state: 5 * 10^-5.
MU0_FLOOR_NANO = 50_000
# What references compute in. Margins grow with the square of the rounding on both sides: one that
# rounds like the nodes doubles an honest node's and hides small cheats behind its own noise.
REFERENCE_DTYPE = "float32"
# Far above every threshold and far below overflow, also after one more factor.
_MAX_SUM = 1e300

State = Literal["clear", "suspect", "convict"]


class Item(NamedTuple):
    """One audited request: sum of clipped margins in 10^-9, scored tokens, null mean in 10^-9."""

    sum_x_nano: int
    n: int
    mu0_nano: int


def clipped_nano(margin: float) -> int:
    """One token's margin as evidence: floor(min(d, D) / D * 10^9). Raises on NaN or negatives."""
    if not margin >= 0.0:
        raise InvalidRequest("a margin is a number and not negative")
    return math.floor(min(margin, CLIP_LOGIT) / CLIP_LOGIT * NANO)


def counted_nano(x_nano: Iterable[int], ignored_below_nano: int) -> int:
    """Sum of what counts of one request's x: a token below ``ignored_below_nano`` counts as 0.

    Up to there rounding alone decides between two tokens, and a client that chooses prompts and
    seeds can make it decide as often as he likes."""
    return sum(x for x in x_nano if x >= ignored_below_nano)


def sum_nano(margins: Iterable[float], ignored_below_nano: int = 0) -> int:
    """``counted_nano`` of one request's margins: ``Verdict.sum_x_nano``."""
    return counted_nano(map(clipped_nano, margins), ignored_below_nano)


def bet(item: Item, fraction: float) -> float:
    """e = 1 + fraction * w * (mean / mu0 - 1), the factor of one request, with
    w = min(n, 256)/256 and mean = sum of x / max(n, 64). Always positive."""
    _check(item)
    weight = min(item.n, FULL_WEIGHT_TOKENS) / FULL_WEIGHT_TOKENS
    # Integer / integer is rounded once, also beyond 2^53.
    ratio = item.sum_x_nano / (max(item.n, MEAN_TOKENS) * item.mu0_nano)
    return 1.0 + fraction * weight * (ratio - 1.0)


@dataclass(frozen=True, slots=True)
class Wealth:
    """A node's accumulated evidence: ``r`` requests, one sum per lambda, ``tokens`` scored.

    S_r = e_r * (S_(r-1) + 1/(r(r+1))) injects a fresh stake at every request, so that a node that
    turns bad late is noticed; W_r is the mean over lambdas of S_r + 1/(r+1).
    """

    r: int = 0
    sums: tuple[float, ...] = (0.0,) * len(LAMBDAS)
    tokens: int = 0

    def add(self, sum_x_nano: int, n: int, mu0_nano: int) -> Wealth:
        """The wealth after one more audited request, in leaf order. Raises InvalidRequest if the
        numbers are impossible (``n`` = 0 is no evidence and must not be added)."""
        item = Item(sum_x_nano, n, mu0_nano)
        r = self.r + 1
        stake = 1.0 / (r * (r + 1))
        sums = tuple(
            min(bet(item, fraction) * (before + stake), _MAX_SUM)
            for fraction, before in zip(LAMBDAS, self.sums, strict=True)
        )
        return Wealth(r, sums, self.tokens + n)

    @property
    def value(self) -> float:
        """W_r; 1 before any evidence."""
        rest = 1.0 / (self.r + 1)
        total = 0.0
        for part in self.sums:
            total += part + rest
        return total / len(self.sums)

    @property
    def state(self) -> State:
        """State by thresholds: "clear" below 10^3, "suspect" below 10^6, then "convict"."""
        value = self.value
        if value >= CONVICT:
            return "convict"
        return "suspect" if value >= SUSPECT else "clear"

    @property
    def log10_milli(self) -> int:
        """floor(1000 * log10(W)), as convictions carry it."""
        return log10_milli(self.value)


def wealth_of(items: Iterable[Item]) -> Wealth:
    """The wealth of a whole sequence, in leaf order."""
    wealth = Wealth()
    for item in items:
        wealth = wealth.add(*item)
    return wealth


def log10_milli(value: float) -> int:
    """floor(1000 * log10(value))."""
    return math.floor(1000 * math.log10(value))


def change_point(items: Sequence[Item]) -> int:
    """Index of the request since which the node has most likely been dishonest.

    The wealth is a mixture over starting points s with weights 1/(s(s+1)) of the product of the
    factors from s on; this is the starting point with the largest share of it, the earliest if
    several tie. Exact rescaling by powers of two keeps it free of overflow and of logarithms.
    Raises InvalidRequest for an empty sequence.
    """
    if not items:
        raise InvalidRequest("no evidence, no change point")
    products = [_Scaled(1.0, 0)] * len(LAMBDAS)
    best, best_share = len(items) - 1, _Scaled(0.0, 0)
    for index in range(len(items) - 1, -1, -1):
        products = [
            _times(product, bet(items[index], fraction))
            for product, fraction in zip(products, LAMBDAS, strict=True)
        ]
        share = _times(_sum(products), 1.0 / ((index + 1) * (index + 2)))
        if _at_least(share, best_share):
            best, best_share = index, share
    return best


class _Scaled(NamedTuple):
    """mantissa * 2^exponent, mantissa in [0.5, 1) or 0."""

    mantissa: float
    exponent: int


def _times(value: _Scaled, factor: float) -> _Scaled:
    mantissa, shift = math.frexp(value.mantissa * factor)
    return _Scaled(mantissa, value.exponent + shift)


def _sum(values: Sequence[_Scaled]) -> _Scaled:
    top = max(value.exponent for value in values)
    total = 0.0
    for value in values:
        total += math.ldexp(value.mantissa, max(value.exponent - top, -2000))
    mantissa, shift = math.frexp(total)
    return _Scaled(mantissa, top + shift)


def _at_least(a: _Scaled, b: _Scaled) -> bool:
    if a.mantissa == 0.0 or b.mantissa == 0.0:
        return a.mantissa >= b.mantissa
    return (a.exponent, a.mantissa) >= (b.exponent, b.mantissa)


def _check(item: Item) -> None:
    if item.n < 1 or item.mu0_nano < 1 or not 0 <= item.sum_x_nano <= item.n * NANO:
        raise InvalidRequest("evidence needs tokens, a null mean and a sum of clipped margins")
