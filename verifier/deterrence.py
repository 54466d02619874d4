"""What the best detectable cheat gains, from the power of the calibration and stated savings. Pure.

The inequality itself is ``trueweight.protos.deterrence``. What a cheat saves is an upper bound, not
a guess: making a token means reading the weights once, so serving with fewer bits saves at most
the share of bits that are not read. Who knows better passes a file (``--cheats``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trueweight.protos.deterrence import needed_nano, unsettled_cap_nano
from trueweight.protos.errors import InvalidRequest
from trueweight.protos.evidence import CONVICT, FULL_WEIGHT_TOKENS, LAMBDAS

# The 95th percentile of tokens to conviction is at most this many times the path of a node whose
# margins are always average (docs/verification.md has the measured ones).
_SPREAD = 2.0
# A cheat that takes longer is within twice the honest noise as good as not detected: no stake is
# asked for it, or a null mean just below its mean would ask for any stake (see the limits).
DETECTABLE_TOKENS = 200_000
_WEIGHT_BITS = 16
MAX_CHEATS_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Cheat:
    """A way to save: mean clipped margin it shows, share of the price of a token it saves."""

    name: str
    mean_x: float
    saving_share: float


def _with_bits(name: str, mean_x: float, bits: float) -> Cheat:
    return Cheat(name, mean_x, 1 - bits / _WEIGHT_BITS)


# Margins measured on the demo model (docs/verification.md, ``make bench-verify``). Integers in
# groups of 32 have a 16-bit scale each, half a bit per weight. Another model may be arbitrarily
# small.
KNOWN_CHEATS = (
    Cheat("another model", 0.83, 1.0),
    _with_bits("4-bit weights", 0.025, 4.5),
    _with_bits("5-bit weights", 0.0053, 5.5),
    _with_bits("fp8 weights", 0.0016, 8),
    _with_bits("6-bit weights", 0.0010, 6.5),
)


def read_cheats(path: Path) -> tuple[Cheat, ...]:
    """Cheats from a JSON list of {"name", "mean_x", "saving_share"}. Raises InvalidRequest."""
    try:
        if path.stat().st_size > MAX_CHEATS_BYTES:
            raise InvalidRequest(f"{path} is too large for a list of cheats")
        cheats = tuple(
            Cheat(str(item["name"]), float(item["mean_x"]), float(item["saving_share"]))
            for item in json.loads(path.read_text())
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise InvalidRequest(
            f"{path} is not a list of cheats", hint='[{"name": "", "mean_x": 0, "saving_share": 0}]'
        ) from None
    if not cheats or not all(0 < c.mean_x <= 1 and 0 <= c.saving_share <= 1 for c in cheats):
        raise InvalidRequest("mean_x and saving_share are shares from 0 to 1")
    return cheats


def tokens_to_conviction(mean_x: float, mu0: float) -> float:
    """Audited tokens until the wealth of a node with this mean reaches the threshold, 95th
    percentile; infinity if the mean is not above the null."""
    if mean_x <= mu0:
        return math.inf
    growth = max(math.log1p(slope * (mean_x / mu0 - 1)) for slope in LAMBDAS)
    # The mixture over slopes and starting points costs a constant factor each.
    target = math.log(CONVICT) + math.log(len(LAMBDAS)) + math.log(100)
    return _SPREAD * math.ceil(target / growth) * FULL_WEIGHT_TOKENS


@dataclass(frozen=True, slots=True)
class Power:
    """The cheat that pays best among the detectable, and what it saves until its conviction."""

    cheat: str
    tokens_to_conviction: float
    gain_tokens: int


def power_against(mu0: float, cheats: Sequence[Cheat] = KNOWN_CHEATS) -> Power:
    """The power of audits under a null mean. ``gain_tokens`` 0: no cheat is detected at all."""
    best = Power("", math.inf, 0)
    for cheat in cheats:
        tokens = tokens_to_conviction(cheat.mean_x, mu0)
        if tokens > DETECTABLE_TOKENS:
            continue
        gain = math.ceil(tokens * cheat.saving_share)
        if gain > best.gain_tokens:
            best = Power(cheat.name, tokens, gain)
    return best


@dataclass(frozen=True, slots=True)
class Stake:
    """What a node has to lose, what it is paid, and what nobody has judged yet. Nanocredits."""

    locked_nano: int
    bond_nano: int
    price_nano_per_mtok: int
    unsettled_nano: int = 0

    @property
    def total_nano(self) -> int:
        """What a conviction takes."""
        return self.locked_nano + self.bond_nano


@dataclass(frozen=True, slots=True)
class Deterrence:
    """The inequality for one node at its audit rate."""

    needed_nano: int
    at_stake_nano: int
    unsettled_nano: int
    cap_nano: int

    @property
    def holds(self) -> bool:
        """True if cheating does not pay, unsettled work included."""
        return self.at_stake_nano >= self.needed_nano and self.unsettled_nano <= self.cap_nano

    @property
    def releasable_nano(self) -> int:
        """How much may leave the stake while the rest still deters."""
        return max(0, 2 * (self.cap_nano - self.unsettled_nano))


def deterrence(stake: Stake, rate_ppm: int, gain_tokens: int) -> Deterrence:
    """Needed and present stake at an audit rate above 0."""
    needed = needed_nano(stake.price_nano_per_mtok, gain_tokens, rate_ppm)
    cap = unsettled_cap_nano(stake.total_nano, needed)
    return Deterrence(needed, stake.total_nano, stake.unsettled_nano, cap)


def releasable_nano(stake: Stake, rate_ppm: int, gain_tokens: int) -> int:
    """How much of the locked earnings may go while the rest still deters."""
    return min(stake.locked_nano, deterrence(stake, rate_ppm, gain_tokens).releasable_nano)
