"""Does cheating pay? The design's inequality per node, from measured power and real stakes. Pure.

    locked + bond >= 2 * saving per token * tokens to conviction (95th percentile) / audit rate

The saving is what the dearest cheat that calibration can detect saves per output token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trueweight.protos.evidence import CONVICT, FULL_WEIGHT_TOKENS, LAMBDAS

PPM = 1_000_000
SAFETY = 2
# Measured: the 95th percentile of tokens to conviction is at most this many times the path of a
# node whose margins are always average (shared facts: 45/32, 128/70).
_SPREAD = 2.0
_MAX_REQUESTS = 100_000


@dataclass(frozen=True, slots=True)
class Cheat:
    """A way to save: mean clipped margin it shows, share of the price of a token it saves."""

    name: str
    mean_x: float
    saving_share: float


# Margins measured on the demo model (docs/verification.md); savings are generous to the cheat.
KNOWN_CHEATS = (
    Cheat("another, far smaller model", 0.5, 0.95),
    Cheat("4-bit weights", 0.0089, 0.7),
    Cheat("8-bit float weights", 0.0009, 0.45),
)


def tokens_to_conviction(mean_x: float, mu0: float) -> float:
    """Audited tokens until the wealth of a node with this mean reaches the threshold, 95th
    percentile; infinity if the mean is not above the null."""
    if mean_x <= mu0:
        return math.inf
    growth = max(math.log1p(slope * (mean_x / mu0 - 1)) for slope in LAMBDAS)
    # The mixture over slopes and starting points costs a constant factor each.
    target = math.log(CONVICT) + math.log(len(LAMBDAS)) + math.log(100)
    requests = min(_MAX_REQUESTS, math.ceil(target / growth))
    return _SPREAD * requests * FULL_WEIGHT_TOKENS


@dataclass(frozen=True, slots=True)
class Stake:
    """What a node has to lose and what it is paid. Nanocredits."""

    locked_nano: int
    bond_nano: int
    price_per_token_nano: float

    @property
    def total_nano(self) -> int:
        """What a conviction takes."""
        return self.locked_nano + self.bond_nano


@dataclass(frozen=True, slots=True)
class Deterrence:
    """The inequality for one node. ``cheat`` is the one that pays best among the detectable."""

    needed_nano: int
    at_stake_nano: int
    cheat: str
    tokens_to_conviction: float

    @property
    def holds(self) -> bool:
        """True if cheating does not pay."""
        return self.at_stake_nano >= self.needed_nano


def deterrence(
    stake: Stake, rate: float, mu0: float, cheats: Sequence[Cheat] = KNOWN_CHEATS
) -> Deterrence:
    """Needed and present stake at an audit rate in (0, 1]."""
    gain, cheat = _best_gain(stake.price_per_token_nano, mu0, cheats)
    needed = math.ceil(SAFETY * gain / rate)
    tokens = tokens_to_conviction(cheat.mean_x, mu0) if cheat else math.inf
    return Deterrence(needed, stake.total_nano, cheat.name if cheat else "", tokens)


def needed_rate_ppm(stake: Stake, mu0: float, cheats: Sequence[Cheat] = KNOWN_CHEATS) -> int:
    """The audit rate at which the stake deters; 100 % if it never does."""
    gain, _ = _best_gain(stake.price_per_token_nano, mu0, cheats)
    if stake.total_nano <= 0:
        return PPM if gain > 0 else 0
    # One part per million more than needed: rounding must not leave the stake a nanocredit short.
    return min(PPM, math.floor(SAFETY * gain / stake.total_nano * PPM) + 1)


def releasable_nano(stake: Stake, needed_nano: int) -> int:
    """How much of the locked earnings may go while the rest still deters."""
    return max(0, min(stake.locked_nano, stake.total_nano - needed_nano))


def _best_gain(
    price_nano: float, mu0: float, cheats: Sequence[Cheat]
) -> tuple[float, Cheat | None]:
    """Expected saving until conviction at full audit, over the cheats that get convicted at all."""
    best: tuple[float, Cheat | None] = (0.0, None)
    for cheat in cheats:
        tokens = tokens_to_conviction(cheat.mean_x, mu0)
        gain = price_nano * cheat.saving_share * tokens
        if math.isfinite(tokens) and gain > best[0]:
            best = (gain, cheat)
    return best
