"""What a request may use and the most it can cost. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from trueweight.protos.errors import ContextOverflow, InvalidRequest
from trueweight.protos.money import charge_nano

DEFAULT_MAX_TOKENS = 512
# Each leg of an output rounds its charge up once.
MAX_LEGS = 3


@dataclass(frozen=True, slots=True)
class Prices:
    """Nanocredits per million tokens."""

    input_nano_per_mtok: int
    output_nano_per_mtok: int


@dataclass(frozen=True, slots=True)
class Quote:
    """Output limit of the request and what to hold for it."""

    prompt_tokens: int
    max_tokens: int
    hold_nano: int


def output_limit(prompt_tokens: int, wanted: int | None, max_context_tokens: int) -> int:
    """Most output tokens. An unset wish means a sane default, not the whole context.

    Raises InvalidRequest for an empty prompt, ContextOverflow if prompt and output do not fit.
    """
    if prompt_tokens < 1:
        raise InvalidRequest("The prompt is empty.", hint="Send some text.", param="prompt")
    room = max_context_tokens - prompt_tokens
    if room < 1 or (wanted is not None and wanted > room):
        asked = f" and {wanted} output tokens were asked for" if wanted is not None else ""
        raise ContextOverflow(
            f"This model's context is {max_context_tokens} tokens; the prompt has "
            f"{prompt_tokens}{asked}.",
            hint="Shorten the prompt or lower max_tokens.",
            param="max_tokens" if room >= 1 else "messages",
        )
    return wanted if wanted is not None else min(DEFAULT_MAX_TOKENS, room)


def quote(prompt_tokens: int, max_tokens: int, most: Prices) -> Quote:
    """The hold: everything used, at the highest price that may be charged, over all legs."""
    cost = charge_nano(
        prompt_tokens, max_tokens, most.input_nano_per_mtok, most.output_nano_per_mtok
    )
    # A zero hold would be refused by a ledger that knows no empty transfers.
    return Quote(prompt_tokens, max_tokens, max(1, cost + MAX_LEGS - 1))
