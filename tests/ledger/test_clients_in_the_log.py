"""What the log tells of who paid is what the ledger knows: a conviction must add up alike for both,
and both cap each client's share of the evidence."""

from __future__ import annotations

import pytest

from trueweight.protos.envelope import seal
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1.audit_pb2 import AuditRequest
from trueweight.protos.v1.log_pb2 import LogEntry
from trueweight.simulation.ledger_world import Leg
from trueweight.verifier import state
from trueweight.verifier.state import LogView

CREDIT = 10**9


async def folded(bench):
    view = LogView(bench.world.market)
    for entry in await bench.leaves():
        view.apply(entry)
    return view


def clients(view):
    return [receipt.client for receipt in view.receipts.values()]


def leg(world, number=0):
    return Leg(world.node[number])


async def test_attack_a_node_claims_so_that_nobody_knows_its_client(bench):
    """Several clients' holds expire in one operation, some with claims of two nodes."""
    world = bench.world
    await bench.publish_nodes()
    paid_by = []
    for client, nodes in (("a", (0,)), ("b", (1, 0)), ("c", ()), ("d", (1,))):
        await bench.must("admin", world.deposit(client, CREDIT))
        hold = world.hold(client, CREDIT)
        await bench.must("router", hold)
        for number in nodes:
            pair = world.evidence(hold.id, leg(world, number), hold.id)
            paid_by.append((world.node[number].identity, world.claim(hold.id, pair), client))
    bench.advance(50_000)
    for node, claim, _ in paid_by:
        await bench.must(node, claim)
    bench.advance(600_000)
    await bench.must("admin", pb.Operation(id=world.new_id(), expire=pb.Expire(limit=100)))
    assert clients(await folded(bench)) == [f"client:{c}" for *_, c in paid_by]


async def test_a_captured_receipts_client_is_its_holds(bench):
    world = bench.world
    await bench.publish_nodes()
    for client in ("a", "b"):
        await bench.must("admin", world.deposit(client, CREDIT))
        hold = world.hold(client, CREDIT)
        await bench.must("router", hold, world.capture(hold.id, leg(world)))
    view = await folded(bench)
    assert clients(view) == ["client:a", "client:b"]
    assert not len(view._clients._holds), "only open holds are remembered"


@pytest.mark.parametrize("voided", [True, False])
async def test_attack_a_flood_of_holds_makes_the_verifier_forget_a_client(
    bench, monkeypatch, voided
):
    """Of a client's own receipts, so that its share of a node's evidence is not capped: while its
    request runs (the holds are given back) or before its audit is asked for."""
    monkeypatch.setattr(state, "MAX_HOLDS", 3)
    world = bench.world
    await bench.publish_nodes()
    await bench.must("admin", world.deposit("a", CREDIT), world.deposit("flood", CREDIT))
    hold = world.hold("a", CREDIT)
    await bench.must("router", hold)
    capture = world.capture(hold.id, leg(world))
    if not voided:
        await bench.must("router", capture)
    for _ in range(6):
        other = world.hold("flood", 1)
        await bench.must("router", other, *([world.void(other.id)] if voided else []))
    if voided:
        await bench.must("router", capture)
    view = await folded(bench)
    (receipt,) = view.receipts.values()
    request = AuditRequest(
        market_id=world.market_id,
        verifier_id=world.identity("verifier"),
        receipt_digest=receipt.receipt_digest,
    )
    envelope = seal(request, world.signers["verifier"])
    view.apply(LogEntry(index=view.next_index, kind="audit-request", body=envelope))
    line = view.node(receipt.node_id).lines[world.identity("verifier")]
    assert line.asked(receipt.receipt_digest).client == "client:a"
