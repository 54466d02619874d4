"""Who may serve a request and who does. Pure; randomness is injected.

Filters fail closed: a node about which something is not known is not eligible.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from trueweight.router.openai_requests import Preferences
from trueweight.router.quoting import Prices, quote

_HOT_WAITING = 8
_HOT_KV_USE_PPM = 800_000
EXPLORE = 0.015
# The second stage looks at speed alone, so only what costs about the same gets that far: else in a
# small market half of the traffic would go to a node at any price. More if the first is hot.
_COMPARABLE_PRICE = 2.0
_COMPARABLE_PRICE_IF_HOT = 10.0
# Rates are measured under whatever load there was, and nodes alike differ by a third in them. Less
# than that must not overrule the draw, or one lucky measurement attracts all traffic; nor must what
# no client notices.
_NOTABLY_SOONER = 1.5
_NOTICED_S = 1.0
# Below this a price makes no more difference: dumping must not buy all traffic.
_PRICE_FLOOR_NANO_PER_MTOK = 1_000_000
_PRICE_EXPONENT = -2.0
_MIN_SUCCESS = 0.05
# While nobody was measured: a slow machine's rates.
_DEFAULT_PREFILL_TOKENS_PER_S = 2_000.0
_DEFAULT_DECODE_TOKENS_PER_S = 20.0


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as it stands now. Rates are the router's own measurements, 0 if there are none;
    ``waiting`` and ``kv_use_ppm`` are the node's own word."""

    node_id: str
    prices: Prices
    capacity: int
    max_context_tokens: int
    in_flight: int = 0
    tokens_in_flight: int = 0
    waiting: int = 0
    kv_use_ppm: int = 0
    connected: bool = False
    lease_fresh: bool = False
    draining: bool = False
    breaker_closed: bool = False
    suspended: bool = True
    judged: bool = False
    bonded: bool = False
    fingerprint_allowed: bool = False
    success: float = 1.0
    verified: float = 1.0
    capacity_seen: float = 1.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    completed: int = 0
    # Charges that it may have unsettled in addition; None if nothing is capped.
    room_nano: int | None = 0

    @property
    def is_full(self) -> bool:
        """No free place by the router's own count."""
        return self.in_flight >= self.capacity

    @property
    def is_hot(self) -> bool:
        """Another node should be preferred."""
        return self.is_full or self.waiting >= _HOT_WAITING or self.kv_use_ppm >= _HOT_KV_USE_PPM


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be placed. ``tried`` nodes are left out."""

    prompt_tokens: int
    max_tokens: int
    preferences: Preferences = field(default_factory=Preferences)
    tried: frozenset[str] = frozenset()


class Ineligible(Enum):
    """Why a node cannot serve, in the order in which it is asked."""

    SUSPENDED = "suspended"
    NOT_ALLOWED = "engine fingerprint not allowed"
    NOT_JUDGED = "too few independent verifiers"
    NOT_BONDED = "bond too small"
    UNSETTLED = "unsettled work at its cap"
    EXCLUDED = "excluded by the client"
    DISCONNECTED = "not connected"
    LEASE = "lease over"
    DRAINING = "draining"
    BREAKER = "breaker open"
    CONTEXT = "context too short"
    PRICE = "dearer than the client's maximum"
    TRIED = "tried already"


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen node and why, for the client's route header."""

    node: NodeView
    why: str
    drawn: tuple[str, ...]
    eligible: int

    def as_json(self) -> dict[str, object]:
        """The explanation for people and machines."""
        return {
            "node": self.node.node_id,
            "why": self.why,
            "drawn": list(self.drawn),
            "eligible": self.eligible,
            "ask_input_nano_per_mtok": self.node.prices.input_nano_per_mtok,
            "ask_output_nano_per_mtok": self.node.prices.output_nano_per_mtok,
        }


def ineligible(node: NodeView, work: Work) -> Ineligible | None:
    """The first reason against a node, None if it may serve."""
    checks = (
        (node.suspended, Ineligible.SUSPENDED),
        (not node.fingerprint_allowed, Ineligible.NOT_ALLOWED),
        (not node.judged, Ineligible.NOT_JUDGED),
        (not node.bonded, Ineligible.NOT_BONDED),
        (_is_beyond_cap(node, work), Ineligible.UNSETTLED),
        (_is_excluded(node, work.preferences), Ineligible.EXCLUDED),
        (not node.connected, Ineligible.DISCONNECTED),
        (not node.lease_fresh, Ineligible.LEASE),
        (node.draining, Ineligible.DRAINING),
        (not node.breaker_closed, Ineligible.BREAKER),
        (work.prompt_tokens + work.max_tokens > node.max_context_tokens, Ineligible.CONTEXT),
        (_is_too_dear(node, work.preferences), Ineligible.PRICE),
        (node.node_id in work.tried, Ineligible.TRIED),
    )
    return next((reason for applies, reason in checks if applies), None)


def eligible(nodes: Sequence[NodeView], work: Work) -> list[NodeView]:
    """All nodes that may serve, full ones included."""
    return [node for node in nodes if ineligible(node, work) is None]


def highest_prices(nodes: Sequence[NodeView]) -> Prices:
    """The most that any of these nodes charges, part by part."""
    return Prices(
        max(n.prices.input_nano_per_mtok for n in nodes),
        max(n.prices.output_nano_per_mtok for n in nodes),
    )


def choose(
    candidates: Sequence[NodeView], work: Work, random: Callable[[], float]
) -> Choice | None:
    """Draws two by price and honesty, then takes the better placed. ``candidates`` are eligible;
    full ones are never chosen. None if all are full. ``random`` gives floats in [0, 1)."""
    free = sorted((n for n in candidates if not n.is_full), key=lambda n: n.node_id)
    if not free:
        return None
    if len(free) == 1:
        return Choice(free[0], "only free node", (free[0].node_id,), len(candidates))
    newest = min(free, key=lambda n: (n.completed, n.node_id))
    usual = statistics.median_low(_expected_price_nano(n, work) for n in free)
    fair = _expected_price_nano(newest, work) <= _COMPARABLE_PRICE * usual
    if random() < EXPLORE and fair and not newest.is_hot:
        return Choice(newest, "exploring", (newest.node_id,), len(candidates))
    first = _draw(free, work, random())
    times = _COMPARABLE_PRICE_IF_HOT if first.is_hot else _COMPARABLE_PRICE
    limit = times * _expected_price_nano(first, work)
    rivals = [n for n in free if n is not first and _expected_price_nano(n, work) <= limit]
    if not rivals:
        return Choice(first, "others are dearer", (first.node_id,), len(candidates))
    second = _draw(rivals, work, random())
    node, why = _better(first, second, work)
    return Choice(node, why, (first.node_id, second.node_id), len(candidates))


def price_ceilings(nodes: Sequence[NodeView]) -> list[Prices]:
    """What to hold for, dearest first: all of these nodes, the cheaper half, only the cheapest. A
    client without means for the dearest must not be kept from the others by it."""
    ranked = sorted(
        nodes, key=lambda n: (n.prices.input_nano_per_mtok, n.prices.output_nano_per_mtok)
    )
    sizes = (len(ranked), (len(ranked) + 1) // 2, 1)
    return list(dict.fromkeys(highest_prices(ranked[:size]) for size in sizes))


def _expected_price_nano(node: NodeView, work: Work) -> float:
    """Price of the work per million tokens, with a floor; half of ``max_tokens`` is expected."""
    output = max(1, work.max_tokens // 2)
    total = (
        work.prompt_tokens * node.prices.input_nano_per_mtok
        + output * node.prices.output_nano_per_mtok
    )
    return max(float(_PRICE_FLOOR_NANO_PER_MTOK), total / (work.prompt_tokens + output))


def weight(node: NodeView, work: Work) -> float:
    """Weight in the draw: capacity seen × (expected price of a verified success)^-2."""
    honest_success = max(_MIN_SUCCESS, node.success) * max(_MIN_SUCCESS, node.verified)
    cost = _expected_price_nano(node, work) / honest_success
    return float(max(1.0, min(node.capacity_seen, node.capacity)) * cost**_PRICE_EXPONENT)


def expected_completion_s(node: NodeView, work: Work) -> float:
    """Seconds until the work is done there, from measured rates and tokens in flight."""
    prefill = node.prefill_tokens_per_s or _DEFAULT_PREFILL_TOKENS_PER_S
    decode = node.decode_tokens_per_s or _DEFAULT_DECODE_TOKENS_PER_S
    queued = node.tokens_in_flight / (decode * max(1, node.capacity))
    return work.prompt_tokens / prefill + work.max_tokens / decode + queued


def _draw(nodes: Sequence[NodeView], work: Work, point: float) -> NodeView:
    weights = [weight(n, work) for n in nodes]
    mark = point * sum(weights)
    for node, share in zip(nodes, weights, strict=True):
        mark -= share
        if mark < 0:
            return node
    return nodes[-1]


def _better(first: NodeView, second: NodeView, work: Work) -> tuple[NodeView, str]:
    if first.is_hot != second.is_hot:
        return (second if first.is_hot else first), "the other is hot"
    if first.is_hot:
        fewer = min(first, second, key=lambda n: n.in_flight)
        return fewer, "both hot, fewer in flight"
    # An unmeasured node counts as fast as the other: it must get work to be measured at all.
    of_first = expected_completion_s(_as_fast_as(first, second), work)
    of_second = expected_completion_s(_as_fast_as(second, first), work)
    if _is_notably_sooner(of_second, of_first):
        return second, "sooner done"
    if _is_notably_sooner(of_first, of_second):
        return first, "sooner done"
    return first, "drawn first, about as soon"


def _is_notably_sooner(one_s: float, other_s: float) -> bool:
    return other_s >= _NOTABLY_SOONER * one_s and other_s - one_s >= _NOTICED_S


def _as_fast_as(node: NodeView, other: NodeView) -> NodeView:
    """The node with the other's rates where its own were never measured."""
    return replace(
        node,
        prefill_tokens_per_s=node.prefill_tokens_per_s or other.prefill_tokens_per_s,
        decode_tokens_per_s=node.decode_tokens_per_s or other.decode_tokens_per_s,
    )


def _is_beyond_cap(node: NodeView, work: Work) -> bool:
    if node.room_nano is None:
        return False
    return quote(work.prompt_tokens, work.max_tokens, node.prices).hold_nano > node.room_nano


def _is_excluded(node: NodeView, preferences: Preferences) -> bool:
    named = bool(preferences.only) and node.node_id not in preferences.only
    return named or node.node_id in preferences.ignore


def _is_too_dear(node: NodeView, preferences: Preferences) -> bool:
    most_input, most_output = (
        preferences.max_input_nano_per_mtok,
        preferences.max_output_nano_per_mtok,
    )
    return (most_input is not None and node.prices.input_nano_per_mtok > most_input) or (
        most_output is not None and node.prices.output_nano_per_mtok > most_output
    )
