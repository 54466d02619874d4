"""The pool checks exactly as this process would; it never makes a bad capture good."""

from __future__ import annotations

import os
import signal

import pytest

from trueweight.ledger.court import court_of, with_key_events
from trueweight.ledger.prepare import prepare
from trueweight.ledger.prepare_pool import PreparePool
from trueweight.ledger.values import Leaf
from trueweight.protos.envelope import parse_envelope
from trueweight.simulation.ledger_world import Leg, World


@pytest.fixture
def pool():
    made = PreparePool(1)
    yield made
    made.close()


def forged(operation):
    envelope = parse_envelope(operation.capture.receipts[0])
    signature = bytearray(envelope.signatures[0].signature)
    signature[5] ^= 1
    envelope.signatures[0].signature = bytes(signature)
    operation.capture.receipts[0] = envelope.SerializeToString()
    return operation


def said(prepared):
    error = prepared.error
    return (*prepared[:5], prepared.facts, error and (error.code, error.message, error.hint))


async def test_good_captures_pass_and_bad_ones_fail_as_without_the_pool(pool):
    world = World()
    without_keys = court_of(world.market)
    court = with_key_events(without_keys, [Leaf("key-event", n.key_event, b"") for n in world.node])
    operations = [world.capture(world.new_id(), Leg(world.node[i % 3])) for i in range(12)]
    operations[4], operations[7] = forged(operations[4]), forged(operations[7])
    operations[9].capture.bill = b"junk"
    operations.insert(3, world.hold("acme", 5))
    router = world.identity("router")
    # Another court in between: a process must not go on with the one it knew.
    for judges, bad in (
        (court, {5, 8, 10}),
        (without_keys, set(range(13)) - {3}),
        (court, {5, 8, 10}),
    ):
        found = await pool.prepare(operations, router, judges)
        assert {i for i, p in enumerate(found) if p.error} == bad
        assert [said(p) for p in found] == [said(prepare(op, router, judges)) for op in operations]
    assert pool._executor is not None
    strangers = await pool.prepare(operations, world.identity("verifier"), court)
    assert all(p.error is not None for p in strangers)


async def test_a_few_captures_are_checked_here(pool):
    world = World()
    capture = world.capture(world.new_id(), Leg(world.node[0]))
    (found,) = await pool.prepare([capture], world.identity("router"), court_of(world.market))
    assert found.error is not None and pool._executor is None


async def test_killed_workers_cost_time_and_nothing_else(pool):
    world = World()
    court = with_key_events(
        court_of(world.market), [Leaf("key-event", n.key_event, b"") for n in world.node]
    )
    captures = [world.capture(world.new_id(), Leg(world.node[0])) for _ in range(20)]
    router = world.identity("router")
    assert all(p.error is None for p in await pool.prepare(captures, router, court))
    for pid in list(pool._executor._processes):
        os.kill(pid, signal.SIGKILL)
    for _ in range(2):
        assert all(p.error is None for p in await pool.prepare(captures, router, court))
