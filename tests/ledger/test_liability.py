"""Who pays for what was refunded, how often, and that nothing stays where nobody can get it."""

from __future__ import annotations

import asyncio

import pytest

from trueweight.ledger import dockets
from trueweight.protos.envelope import (
    digest_of,
    parse_envelope,
    parse_payload,
    seal,
)
from trueweight.protos.v1 import audit_pb2, market_pb2
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.simulation.ledger_guilt import convict_by, conviction_of, guilt_of
from trueweight.simulation.ledger_world import Leg, World, leg_charge, revocation

from .conftest import Bench, fsck
from .test_money import CREDIT, captured, funded

HOUR_MS = 3_600_000


async def released(bench, leg):
    """A receipt whose earnings are available already; what its node got."""
    world, node = bench.world, leg.node.identity
    (digest,) = await captured(bench, leg)
    earned = await bench.available(f"node-locked:{node}")
    bench.advance(world.window_ms)
    await bench.must("verifier", world.release(node))
    assert await bench.available(f"node-available:{node}") == earned
    return digest, earned


async def refunded(bench, digest, node):
    world = bench.world
    await bench.must("verifier", world.request(digest))
    (result,) = await bench.must("verifier", world.refund(digest, node))
    return result.amount_nano


async def test_a_refund_that_the_bond_paid_is_not_paid_again_by_later_earnings(bench):
    world, node = bench.world, bench.world.node[0].identity
    await funded(bench)
    digest, earned = await released(bench, Leg(world.node[0]))
    await bench.must("admin", world.bond(node, CREDIT))
    assert await refunded(bench, digest, node) == leg_charge(Leg(world.node[0]))
    assert await bench.available(f"node-bond:{node}") == CREDIT - earned
    await captured(bench, Leg(world.node[0]))
    bench.advance(world.window_ms + 24 * HOUR_MS)
    (result,) = await bench.must("verifier", world.release(node))
    assert result.amount_nano == earned
    assert await bench.available(f"node-locked:{node}") == 0


async def test_what_was_released_before_a_conviction_does_not_hold_later_earnings(bench):
    world, node = bench.world, bench.world.node[0]
    await funded(bench)
    await released(bench, Leg(node))
    convict = await bench.proven_guilty(node, reward_ppm=0)
    await bench.must("verifier", convict)
    await bench.must("admin", world.reinstate(node.identity, by="admin"))
    await captured(bench, Leg(node))
    earned = await bench.available(f"node-locked:{node.identity}")
    bench.advance(world.window_ms + 24 * HOUR_MS)
    (result,) = await bench.must("verifier", world.release(node.identity))
    assert result.amount_nano == earned > 0


@pytest.mark.parametrize("together", [False, True])
async def test_attack_a_node_hides_its_bond_behind_withdrawals(bench, together):
    """Only as many end as the refund takes, the last due first."""
    world, node = bench.world, bench.world.node[0].identity
    await funded(bench)
    digest, earned = await released(bench, Leg(world.node[0]))
    await bench.must("admin", world.bond(node, 3 * earned))
    early, late = (
        world.withdraw(node, amount, world.now + days * 24 * HOUR_MS)
        for amount, days in ((2 * earned, 30), (earned, 300))
    )
    request, refund = world.request(digest), world.refund(digest, node)
    if together:  # one group, so that nothing of it is in the database yet
        await bench.must("verifier", request)
        await asyncio.gather(
            bench.must(node, early), bench.must(node, late), bench.must("verifier", refund)
        )
    else:
        await bench.must(node, early, late)
        await bench.must("verifier", request, refund)
    assert await bench.available("client:acme") == 10 * CREDIT
    assert await bench.available(f"node-bond:{node}") == 0
    bench.advance(301 * 24 * HOUR_MS)
    (paid,) = await bench.do("admin", world.settle(late.id, paid=True))
    assert (paid.code, "voided" in paid.message) == ("CONFLICT", True)
    await bench.must("admin", world.settle(early.id, paid=True))


async def test_a_reinstated_node_does_not_pay_again_for_what_was_forfeited(bench):
    world, node = bench.world, bench.world.node[0]
    await funded(bench)
    (old,) = await captured(bench, Leg(node))
    convict = await bench.proven_guilty(node, reward_ppm=0)
    await bench.must("verifier", convict)
    treasury = await bench.available("treasury:market")
    await bench.must("admin", world.reinstate(node.identity, by="admin"))
    await captured(bench, Leg(node))
    earned = await bench.available(f"node-locked:{node.identity}")
    goodwill = pb.Refund(receipt_digest=old, reason="goodwill")
    await bench.must("admin", pb.Operation(id=world.new_id(), refund=goodwill))
    assert await bench.available(f"node-locked:{node.identity}") == earned
    assert await bench.available("treasury:market") == treasury - earned


async def test_attack_a_verifier_prints_verdicts_to_be_rewarded_for(bench):
    """Only the answer to its own logged request, about a settled receipt, and not for an appeal."""
    world, node = bench.world, bench.world.node[0]
    await funded(bench)
    leg = Leg(node, output=4000, billed_output=4000)
    (asked,) = await captured(bench, leg)
    (unasked,) = await captured(bench, leg)
    (appealed,) = await captured(bench, leg)
    scored = audit_pb2.Verdict.SCORED
    await bench.must("verifier", world.request(asked), world.request(b"?" * 32))
    appeal = audit_pb2.AuditRequest(
        market_id=world.market_id,
        verifier_id=world.identity("verifier"),
        receipt_digest=appealed,
        for_appeal=True,
    )
    await bench.must("verifier", world.publish(seal(appeal, world.signers["verifier"])))
    verdicts = [
        world.verdict(digest, node.identity, outcome)
        for digest, outcome in (
            (asked, scored),
            (asked, audit_pb2.Verdict.UNCALIBRATED),
            (unasked, scored),
            (appealed, scored),
            (b"?" * 32, scored),
        )
    ]
    for verdict in verdicts:
        await bench.as_("verifier").publish(verdict)
    rewards = [world.reward(digest_of(verdict), 10) for verdict in verdicts]
    results = await bench.do("admin", *rewards)
    assert [r.code for r in results] == [""] + ["CONFLICT"] * 4


async def test_a_conviction_waits_until_the_other_verifiers_audits_are_added_up(
    clock, start, database, monkeypatch
):
    """A conflict would be taken for "convicted before", and never asked for again."""
    monkeypatch.setattr(dockets, "STEP_ROWS", 5)
    world = World(now=clock.now_unix_ms(), verifiers=2, convictions_needed=2)
    bench = Bench(world, clock, await start(world, database), database)
    node = world.node[0]
    await funded(bench)
    await bench.must("admin", world.deposit("audited", 100), world.bond(node.identity, CREDIT))
    for _ in range(7):
        (digest,) = await captured(bench, Leg(node))
        verdict = world.verdict(digest, node.identity, audit_pb2.Verdict.SCORED, "verifier1")
        await bench.must("verifier1", world.request(digest, "verifier1"), world.publish(verdict))
    zeros = {"verifier": [], "verifier1": [(index, 50) for index in await receipts_of(bench)]}
    convictions = {}
    for by, audited in zeros.items():
        guilt = guilt_of(world, node, "audited", by)
        await bench.must(by, guilt.calibration)
        before = len(await receipts_of(bench))
        await bench.must("router", *guilt.holds)
        await bench.must("router", *guilt.captures)
        await bench.must(by, *guilt.requests)
        await bench.must(by, *guilt.commitments)
        await bench.must(by, *guilt.verdicts)
        indices = (await receipts_of(bench))[before:]
        said = conviction_of(world, node, indices, by, audited)
        convictions[by] = convict_by(world, said, by=by)
        await bench.must(by, world.publish(seal(said, world.signers[by])))
    codes = []
    while "" not in codes and len(codes) < 20:
        (result,) = await bench.do("verifier", convictions["verifier"])
        codes.append(result.code)
    assert set(codes[:-1]) == {"UNAVAILABLE"}
    assert codes[-1] == ""
    assert fsck(database, world).problems == []


async def receipts_of(bench):
    return [entry.index for entry in await bench.leaves("receipt")]


async def test_attack_a_router_bills_more_input_than_the_node_signed_for(bench):
    world, leg = bench.world, Leg(bench.world.node[0], prompt=100, billed_input=100)
    await funded(bench)
    hold, request_id = world.hold("acme", CREDIT), world.new_id()
    await bench.must("router", hold)
    assignment, receipt = world.evidence(hold.id, leg, request_id)
    signed = parse_payload(parse_envelope(receipt), market_pb2.Receipt)
    signed.prompt_tokens = 99
    pair = assignment, seal(signed, leg.node)
    (result,) = await bench.do("router", world.capture_served(hold.id, request_id, [leg], [pair]))
    assert result.code == "INVALID_REQUEST"
    assert "signed for" in result.message


async def test_attack_a_revoked_key_still_opens_a_standby(bench, start):
    world, admin = bench.world, bench.world.signers["admin"]
    standby = await start(world, bench.url, wait_ms=300)
    assert not standby.is_writer
    event = revocation("admin", admin, world.market_id)
    await bench.as_("router").publish(event)
    await bench.publish_nodes()
    async with asyncio.timeout(10):
        while world.node[0].key_id not in standby.court.ring.keys:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert admin.key_id not in standby.court.ring.keys
