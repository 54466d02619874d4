"""Money: integer nanocredits (1 credit = 10^9), prices in nanocredits per million tokens.

Charge rounds up once, fee and pool shares round down, the rest is the node's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trueweight.protos.errors import InvalidRequest

NANO_PER_CREDIT = 10**9
TOKENS_PER_MTOK = 10**6
PPM = 10**6
MAX_NANO = 2**63 - 1
_CREDITS = re.compile(r"([0-9]{1,20})(?:\.([0-9]{1,20}))?(?:[eE]([+-]?[0-9]{1,2}))?")


@dataclass(frozen=True, slots=True)
class Split:
    """How a charge is divided; the three parts sum to the charge exactly."""

    fee_nano: int
    pool_nano: int
    node_nano: int


def charge_nano(
    input_tokens: int,
    output_tokens: int,
    ask_input_nano_per_mtok: int,
    ask_output_nano_per_mtok: int,
) -> int:
    """ceil((input * ask_input + output * ask_output) / 10^6). Raises on overflow or negatives."""
    values = (input_tokens, output_tokens, ask_input_nano_per_mtok, ask_output_nano_per_mtok)
    if min(values) < 0:
        raise InvalidRequest("tokens and prices must not be negative")
    total = input_tokens * ask_input_nano_per_mtok + output_tokens * ask_output_nano_per_mtok
    charge = -(-total // TOKENS_PER_MTOK)
    if charge > MAX_NANO:
        raise InvalidRequest("the charge exceeds what the ledger can hold")
    return charge


def split_charge(charge: int, fee_ppm: int, pool_ppm: int) -> Split:
    """Fee and pool are floors of their shares, the node gets the rest."""
    if charge < 0 or fee_ppm < 0 or pool_ppm < 0 or fee_ppm + pool_ppm > PPM:
        raise InvalidRequest("shares must be between 0 and 1,000,000 ppm together")
    fee = charge * fee_ppm // PPM
    pool = charge * pool_ppm // PPM
    return Split(fee, pool, charge - fee - pool)


def parse_credits(text: str) -> int:
    """Decimal credits, for example "0.10" or "1e-05", as nanocredits. Exact or refused."""
    match = _CREDITS.fullmatch(text)
    nano, rest = 0, 1
    if match:
        decimals = match[2] or ""
        digits = int(match[1] + decimals)
        # In integers: floats and decimal contexts would round.
        shift = 9 + int(match[3] or 0) - len(decimals)
        nano, rest = divmod(digits * 10 ** max(shift, 0), 10 ** max(-shift, 0))
    if not match or rest or nano > MAX_NANO:
        raise InvalidRequest(
            f"{text[:40]!r} is not an amount of credits",
            hint="Write it like 0.10: at most 9 decimals, not negative.",
        )
    return nano


def format_credits(nano: int) -> str:
    """Nanocredits as decimal credits without trailing zeros: 1500000000 -> "1.5"."""
    sign = "-" if nano < 0 else ""
    whole, part = divmod(abs(nano), NANO_PER_CREDIT)
    return f"{sign}{whole}.{part:09d}".rstrip("0").rstrip(".")
