"""Attacks on identities: certifying, revoking or replaying keys that are somebody else's."""

from __future__ import annotations

import os

import pytest

from trueweight.ledger.court import court_of
from trueweight.ledger.evidence import check_publish
from trueweight.protos.envelope import apply_key_event, open_envelope, seal, seal_key_event
from trueweight.protos.errors import Conflict, TrueweightError, Unauthenticated
from trueweight.protos.identity import Signer, key_id, public_bytes
from trueweight.protos.v1.envelope_pb2 import KeyEvent
from trueweight.protos.v1.market_pb2 import Bill
from trueweight.runtime.clock import ManualClock
from trueweight.runtime.rpc import AccessTokens, Authenticator
from trueweight.simulation.ledger_world import Ed25519PrivateKey, World


def stranger_event(market_id, victim_key, action, sequence=1):
    """A stranger's own root says something about the victim's operational key."""
    root = Ed25519PrivateKey.generate()
    identity = key_id(public_bytes(root))
    event = KeyEvent(
        market_id=market_id,
        identity=identity,
        root_public_key=public_bytes(root),
        operational_public_key=public_bytes(victim_key),
        action=action,
        sequence=sequence,
    )
    return seal_key_event(event, Signer(identity, root, b""))


@pytest.mark.parametrize("action", [KeyEvent.CERTIFY, KeyEvent.REVOKE])
def test_attack_a_stranger_takes_over_or_revokes_the_routers_key(action):
    world = World()
    router = world.signers["router"]
    event = stranger_event(world.market_id, router.key, action)
    bill = seal(Bill(market_id=world.market_id), router)
    try:
        ring = apply_key_event(world.market.ring, event, world.market_id)
    except TrueweightError:
        ring = world.market.ring
    opened = open_envelope(bill, Bill, ring, world.market_id, signer=router.identity)
    assert opened.signer == router.identity


def test_attack_a_hijacking_key_event_does_not_enter_the_log():
    world = World()
    event = stranger_event(world.market_id, world.signers["ledger"].key, KeyEvent.CERTIFY)
    with pytest.raises(Conflict):
        check_publish(event, court_of(world.market))


def key_event(market_id, root, key, action, sequence):
    identity = key_id(public_bytes(root))
    event = KeyEvent(
        market_id=market_id,
        identity=identity,
        root_public_key=public_bytes(root),
        operational_public_key=public_bytes(key),
        action=action,
        sequence=sequence,
    )
    return seal_key_event(event, Signer(identity, root, b""))


def test_attack_a_stolen_key_still_opens_doors_after_its_revocation():
    """The thief brings the old certificate of the key with each token."""
    world, clock = World(), ManualClock(1_790_000_000_000)
    root, stolen = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    certified = key_event(world.market_id, root, stolen, KeyEvent.CERTIFY, 1)
    revoked = key_event(world.market_id, root, stolen, KeyEvent.REVOKE, 2)
    member = Signer(key_id(public_bytes(root)), stolen, certified)
    rings = [apply_key_event(world.market.ring, certified, world.market_id)]
    gate = Authenticator("door", world.market_id, lambda: rings[-1], clock)
    ((_, token),) = AccessTokens(member, world.market_id, clock, os.urandom).metadata("door")
    assert gate.check(token) == member.identity
    rings.append(apply_key_event(rings[0], revoked, world.market_id))
    with pytest.raises(Unauthenticated):
        gate.check(token)
    with pytest.raises(Conflict):
        apply_key_event(rings[-1], certified, world.market_id)
