"""Attacks on identities: certifying, revoking or replaying keys that are somebody else's."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from trueweight.ledger.court import court_of
from trueweight.ledger.evidence import check_publish
from trueweight.protos.envelope import apply_key_event, open_envelope, seal, seal_key_event
from trueweight.protos.errors import (
    BadSignature,
    Conflict,
    InvalidRequest,
    TrueweightError,
    Unauthenticated,
)
from trueweight.protos.identity import MAX_OPERATORS, KeyRing, Signer, key_id, public_bytes
from trueweight.protos.v1.envelope_pb2 import Envelope, KeyEvent
from trueweight.protos.v1.market_pb2 import Bill
from trueweight.runtime.clock import ManualClock
from trueweight.runtime.keys import create_keys, load_or_create, load_signer
from trueweight.runtime.rpc import AccessTokens, Authenticator
from trueweight.simulation.ledger_world import World


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
    return seal_key_event(event, root)


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
    with pytest.raises(BadSignature, match="possession"):
        check_publish(event, court_of(world.market))


def test_attack_a_squatter_names_a_public_key_before_its_holder_does():
    """He knows the key and is first, but cannot sign with it; the holder comes later and has it."""
    world, root, key = World(), Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    with pytest.raises(BadSignature, match="possession"):
        apply_key_event(
            KeyRing(), stranger_event(world.market_id, key, KeyEvent.CERTIFY), world.market_id
        )
    event = key_event(world.market_id, root, key, KeyEvent.CERTIFY, 1)
    ring = apply_key_event(KeyRing(), event, world.market_id)
    assert ring.identity_of(key_id(public_bytes(key))) == key_id(public_bytes(root))


def test_attack_an_operator_is_named_against_his_will():
    """A node that claims the verifier's owner as its own would never be judged by that verifier."""
    world, root, key = World(), Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    owner = Ed25519PrivateKey.generate()
    bare = key_event(world.market_id, root, key, KeyEvent.CERTIFY, 1)
    event = KeyEvent.FromString(Envelope.FromString(bare).payload)
    event.operator_public_key = public_bytes(owner)
    with pytest.raises(BadSignature, match="operator"):
        apply_key_event(KeyRing(), seal_key_event(event, root, key), world.market_id)
    ring = apply_key_event(KeyRing(), seal_key_event(event, root, key, owner), world.market_id)
    assert key_id(public_bytes(owner)) in ring.owners_of(event.identity)


def test_attack_an_owner_is_changed_to_escape_the_exclusion():
    """Owners add up: the one who was declared before still counts."""
    world, root, key = World(), Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    owners = [Ed25519PrivateKey.generate() for _ in range(MAX_OPERATORS + 1)]
    event = KeyEvent.FromString(
        Envelope.FromString(key_event(world.market_id, root, key, KeyEvent.CERTIFY, 1)).payload
    )
    ring = KeyRing()
    for number, owner in enumerate(owners[:-1], 1):
        event.sequence, event.operator_public_key = number, public_bytes(owner)
        ring = apply_key_event(ring, seal_key_event(event, root, key, owner), world.market_id)
    assert len(ring.owners_of(event.identity)) == MAX_OPERATORS + 1
    assert all(ring.have_common_owner(event.identity, key_id(public_bytes(o))) for o in owners[:-1])
    event.sequence, event.operator_public_key = 99, public_bytes(owners[-1])
    with pytest.raises(Conflict):
        apply_key_event(ring, seal_key_event(event, root, key, owners[-1]), world.market_id)


def test_a_declared_operator_is_in_the_key_file_and_survives(tmp_path):
    clock = ManualClock(1_790_000_000_000)
    market = create_keys(tmp_path / "market", None, clock).identity
    before = load_or_create(tmp_path / "node", market, clock)
    after = load_or_create(tmp_path / "node", market, clock, tmp_path / "market")
    assert after.key_id == before.key_id and after.key_event != before.key_event
    assert load_signer(tmp_path / "node").key_event == after.key_event
    ring = apply_key_event(KeyRing(), before.key_event, market)
    ring = apply_key_event(ring, after.key_event, market)
    assert ring.have_common_owner(before.identity, market)
    (tmp_path / "node" / "root.pem").unlink()
    same = load_or_create(tmp_path / "node", market, clock, tmp_path / "market")
    assert same.key_event == after.key_event
    create_keys(tmp_path / "other", market, clock)
    with pytest.raises(InvalidRequest, match=r"root\.pem"):
        load_or_create(tmp_path / "node", market, clock, tmp_path / "other")


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
    return seal_key_event(event, root, key)


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
