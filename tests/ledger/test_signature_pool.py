"""The pool says which signatures hold; it never makes a bad one good."""

from __future__ import annotations

import os
import signal

import pytest

from trueweight.ledger.court import court_of, with_key_events
from trueweight.ledger.prepare import prepare
from trueweight.ledger.signature_pool import CheckedRing, SignaturePool
from trueweight.ledger.values import Leaf
from trueweight.protos.envelope import parse_envelope
from trueweight.simulation.ledger_world import Leg, World


@pytest.fixture
def pool():
    made = SignaturePool(1)
    yield made
    made.close()


def forged(operation):
    envelope = parse_envelope(operation.capture.receipts[0])
    signature = bytearray(envelope.signatures[0].signature)
    signature[5] ^= 1
    envelope.signatures[0].signature = bytes(signature)
    operation.capture.receipts[0] = envelope.SerializeToString()
    return operation


async def test_good_captures_pass_and_forged_ones_fail_as_without_the_pool(pool):
    world = World()
    court = with_key_events(
        court_of(world.market), [Leaf("key-event", n.key_event, b"") for n in world.node]
    )
    captures = [world.capture(world.new_id(), Leg(world.node[i % 3])) for i in range(12)]
    captures[4], captures[7] = forged(captures[4]), forged(captures[7])
    captures[9].capture.bill = b"junk"
    ring = await pool.ring_for(captures, court.ring)
    assert (
        isinstance(ring, CheckedRing) and len(ring.checked) == 21
    )  # 12 bills and 12 receipts, less one bill and two receipts
    checked = type(court)(court.terms, ring, court.roles)
    for number, capture in enumerate(captures):
        error = prepare(capture, world.identity("router"), checked).error
        assert (error is None) == (number not in (4, 7, 9)), (number, error)


async def test_a_few_signatures_are_checked_here(pool):
    world = World()
    ring = world.market.ring
    assert await pool.ring_for([world.capture(world.new_id(), Leg(world.node[0]))], ring) is ring


async def test_killed_workers_cost_time_and_nothing_else(pool):
    world = World()
    captures = [world.capture(world.new_id(), Leg(world.node[0])) for _ in range(20)]
    ring = court_of(world.market).ring
    assert len((await pool.ring_for(captures, ring)).checked) == 20  # the bills; nodes are unknown
    for pid in list(pool._executor._processes):
        os.kill(pid, signal.SIGKILL)
    again = await pool.ring_for(captures, ring)
    assert len(again.checked) in (0, 20)
    assert len((await pool.ring_for(captures, ring)).checked) == 20
