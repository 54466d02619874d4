"""Attacks on identities: certifying, revoking or replaying keys that are somebody else's."""

from __future__ import annotations

import pytest

from trueweight.ledger.court import court_of
from trueweight.ledger.evidence import check_publish
from trueweight.protos.envelope import apply_key_event, open_envelope, seal, seal_key_event
from trueweight.protos.errors import Conflict, TrueweightError
from trueweight.protos.identity import KeyRing, Signer, key_id, public_bytes
from trueweight.protos.v1.envelope_pb2 import KeyEvent
from trueweight.protos.v1.market_pb2 import Bill
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


def test_a_revoked_key_of_ones_own_is_gone_and_does_not_come_back():
    world = World()
    root = Ed25519PrivateKey.generate()
    old = Ed25519PrivateKey.generate()
    identity = key_id(public_bytes(root))

    def event(action, sequence):
        message = KeyEvent(
            market_id=world.market_id,
            identity=identity,
            root_public_key=public_bytes(root),
            operational_public_key=public_bytes(old),
            action=action,
            sequence=sequence,
        )
        return seal_key_event(message, Signer(identity, root, b""))

    ring = apply_key_event(KeyRing(), event(KeyEvent.CERTIFY, 1), world.market_id)
    ring = apply_key_event(ring, event(KeyEvent.REVOKE, 2), world.market_id)
    assert ring.identity_of(key_id(public_bytes(old))) is None
    with pytest.raises(Conflict):
        apply_key_event(ring, event(KeyEvent.CERTIFY, 1), world.market_id)
