"""The roles and keys of a market as the ledger judges by them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from trueweight.ledger.evidence import Court
from trueweight.ledger.values import Leaf, Terms
from trueweight.protos.envelope import apply_key_event
from trueweight.protos.errors import TrueweightError
from trueweight.protos.v1.market_pb2 import Member
from trueweight.runtime.market import Market


def court_of(market: Market) -> Court:
    """Who may do what, from the signed descriptor."""
    roles: dict[str, frozenset[str]] = {market.market_id: frozenset({"market", "admin"})}
    for member in market.descriptor.members:
        name = Member.Role.Name(member.role).lower()
        roles[member.identity] = roles.get(member.identity, frozenset()) | {name}
    descriptor = market.descriptor
    terms = Terms(
        market.market_id,
        descriptor.fee_ppm,
        descriptor.verification_pool_ppm,
        descriptor.settlement_window_ms,
        tuple(m.identity for m in market.members(Member.VERIFIER)),
        max(1, descriptor.convictions_needed),
    )
    return Court(terms, market.ring, roles)


def with_key_events(court: Court, leaves: Iterable[Leaf]) -> Court:
    """The court after key events that became leaves."""
    ring, revocations = court.ring, court.revocations
    for leaf in leaves:
        if leaf.kind == "key-event":
            before = ring
            try:
                ring = apply_key_event(ring, leaf.body, court.terms.market_id)
            except TrueweightError:
                continue  # two events of one identity in one group: the later one lost
            revocations += bool(ring.lost_since(before))
    return court if ring is court.ring else replace(court, ring=ring, revocations=revocations)
