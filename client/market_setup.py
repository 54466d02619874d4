"""Makes a market's directory: keys of every role and the signed descriptor.

DIR/market.json          public; every role loads it
DIR/keys/<role>/         private; one identity per role
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trueweight.protos.envelope import ring_of, seal
from trueweight.protos.errors import InvalidRequest
from trueweight.protos.identity import Signer
from trueweight.protos.market_terms import DEFAULT_AUDIT_TERMS, DEFAULT_ENGINES
from trueweight.protos.money import PPM
from trueweight.protos.v1.market_pb2 import AuditTerms, EngineAllowList, MarketDescriptor, Member
from trueweight.runtime.clock import Clock
from trueweight.runtime.keys import create_keys, load_signer
from trueweight.runtime.market import Market, load_market, write_market
from trueweight.runtime.rpc import host_and_port
from trueweight.runtime.tls import ensure_certificate

MARKET_FILE, KEYS, _MARKET_KEYS = "market.json", "keys", "market"
# Directory name of each member's keys and its role.
ROLES: Mapping[str, Member.Role] = {
    "ledger": Member.LEDGER,
    "router": Member.ROUTER,
    "verifier": Member.VERIFIER,
    "publisher": Member.PUBLISHER,
    "admin": Member.ADMIN,
}
# Roles that others dial, or may dial, and which therefore have a certificate to pin.
SERVERS = ("ledger", "router", "verifier")
_MAX_NAME = 128


@dataclass(frozen=True, slots=True)
class MarketPlan:
    """What the market's owner decides. ``endpoints``: host:port by key directory name."""

    name: str
    endpoints: Mapping[str, str] = field(default_factory=dict)
    fee_ppm: int = 50_000
    verification_pool_ppm: int = 50_000
    settlement_window_ms: int = 3_600_000
    convictions_needed: int = 1
    # Members whose keys others hold, as they are in the descriptor.
    guests: Sequence[Member] = ()
    # None: as in descriptors from before there were any.
    engines: EngineAllowList | None = field(default_factory=lambda: DEFAULT_ENGINES)
    audit_terms: AuditTerms | None = field(default_factory=lambda: DEFAULT_AUDIT_TERMS)


def create_market(directory: Path, plan: MarketPlan, clock: Clock) -> Market:
    """Makes all keys and the descriptor. Raises InvalidRequest if the directory has any."""
    _check(plan)
    if (directory / MARKET_FILE).exists():
        raise InvalidRequest(f"{directory} already holds a market", hint="Name another directory.")
    directory.mkdir(parents=True, exist_ok=True)
    owner = directory / KEYS / _MARKET_KEYS
    market = create_keys(owner, None, clock)
    # Whoever makes all these keys owns all these roles, and it is said so.
    signers = {
        role: create_keys(directory / KEYS / role, market.identity, clock, owner) for role in ROLES
    }
    return _issue(directory, plan, market, signers, sequence=1, clock=clock)


@dataclass(frozen=True, slots=True)
class Changes:
    """What a re-issue changes. ``verifiers`` are key events of identities that others run."""

    endpoints: Mapping[str, str] = field(default_factory=dict)
    verifiers: Sequence[bytes] = ()
    convictions_needed: int = 0
    engines: EngineAllowList | None = None
    audit_terms: AuditTerms | None = None


def reissue_market(directory: Path, changes: Changes, clock: Clock) -> Market:
    """Signs the descriptor again with these changes; everything else stays."""
    known_market = load_market(directory / MARKET_FILE)
    old = known_market.descriptor
    market = load_signer(directory / KEYS / _MARKET_KEYS)
    signers = {role: load_signer(directory / KEYS / role) for role in ROLES}
    own = {signer.identity for signer in signers.values()}
    guests = {m.identity: m for m in old.members if m.identity not in own}
    for event in changes.verifiers:
        guest = _verifier(event, known_market.market_id)
        if guest.identity in own:
            raise InvalidRequest("this verifier is a member already")
        guests[guest.identity] = guest
    known = {name: _member(old, role).endpoint for name, role in ROLES.items()}
    plan = MarketPlan(
        name=old.name,
        endpoints={**known, **changes.endpoints},
        fee_ppm=old.fee_ppm,
        verification_pool_ppm=old.verification_pool_ppm,
        settlement_window_ms=old.settlement_window_ms,
        convictions_needed=changes.convictions_needed or old.convictions_needed,
        guests=tuple(guests.values()),
        engines=changes.engines or (old.engines if old.HasField("engines") else None),
        audit_terms=changes.audit_terms
        or (old.audit_terms if old.HasField("audit_terms") else None),
    )
    _check(plan)
    return _issue(directory, plan, market, signers, sequence=old.sequence + 1, clock=clock)


def _verifier(key_event: bytes, market_id: str) -> Member:
    ring = ring_of([key_event], market_id)
    (identity,) = ring.sequences
    return Member(identity=identity, role=Member.VERIFIER, key_event=key_event)


def _issue(
    directory: Path,
    plan: MarketPlan,
    market: Signer,
    signers: Mapping[str, Signer],
    *,
    sequence: int,
    clock: Clock,
) -> Market:
    now = clock.now_unix_ms()
    members = [
        Member(
            identity=signers[name].identity,
            role=role,
            key_event=signers[name].key_event,
            endpoint=plan.endpoints.get(name, ""),
            tls_certificate_pem=(
                ensure_certificate(directory / KEYS / name, now) if name in SERVERS else ""
            ),
        )
        for name, role in ROLES.items()
    ]
    descriptor = MarketDescriptor(
        market_id=market.identity,
        name=plan.name,
        members=[*members, *plan.guests],
        fee_ppm=plan.fee_ppm,
        verification_pool_ppm=plan.verification_pool_ppm,
        settlement_window_ms=plan.settlement_window_ms,
        convictions_needed=plan.convictions_needed,
        issued_at_unix_ms=now,
        sequence=sequence,
        engines=plan.engines,
        audit_terms=plan.audit_terms,
    )
    path = directory / MARKET_FILE
    write_market(path, seal(descriptor, market), market.key_event)
    return load_market(path)


def _member(descriptor: MarketDescriptor, role: Member.Role) -> Member:
    return next((m for m in descriptor.members if m.role == role), Member())


def _check(plan: MarketPlan) -> None:
    if not 1 <= len(plan.name) <= _MAX_NAME or not plan.name.isprintable():
        raise InvalidRequest(f"a market's name has 1 to {_MAX_NAME} printable characters")
    if min(plan.fee_ppm, plan.verification_pool_ppm) < 0 or (
        plan.fee_ppm + plan.verification_pool_ppm > PPM
    ):
        raise InvalidRequest(
            "fee and verification pool are shares of the charge, at most all of it"
        )
    terms = plan.audit_terms
    if terms and max(terms.floor_ppm, terms.duplicate_rate_ppm) > PPM:
        raise InvalidRequest("audit rates are shares of the requests, at most all of them")
    if plan.engines is not None and not (plan.engines.engines and plan.engines.sampler_id):
        raise InvalidRequest("the list of engines allows nothing")
    if plan.settlement_window_ms < 0 or plan.convictions_needed < 1:
        raise InvalidRequest("the settlement window and the convictions needed are positive")
    verifiers = 1 + sum(member.role == Member.VERIFIER for member in plan.guests)
    if plan.convictions_needed > verifiers:
        raise InvalidRequest(
            f"{verifiers} verifier(s) cannot make {plan.convictions_needed} convictions"
        )
    for name, endpoint in plan.endpoints.items():
        _check_endpoint(name, endpoint)


def _check_endpoint(name: str, endpoint: str) -> None:
    if name not in ROLES:
        raise InvalidRequest(f"{name!r} is not a role", hint=f"Roles: {', '.join(ROLES)}.")
    # Both must be named: others dial it.
    if endpoint and not all(host_and_port(endpoint) or ("",)):
        raise InvalidRequest(f"{endpoint!r} is not an endpoint", hint="Write host:port.")
