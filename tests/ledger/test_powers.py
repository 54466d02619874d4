"""What one verifier alone can do with money, what holds a release, and how a conviction ends."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from trueweight.ledger.requests import HOLDS_MS
from trueweight.ledger.schema import make_engine, normal_url
from trueweight.protos.envelope import digest_of, parse_envelope, ring_of, seal
from trueweight.protos.errors import PermissionDenied
from trueweight.protos.v1 import audit_pb2, market_pb2
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1.market_pb2 import Member
from trueweight.runtime.market import Market
from trueweight.simulation.ledger_world import Leg, World, leg_charge, make_signer

from .conftest import Bench, fsck

CREDIT = 10**9


async def opened(bench):
    await bench.publish_nodes()
    await bench.must("admin", bench.world.deposit("acme", 10 * CREDIT))
    return bench


async def captured(bench, *legs):
    hold = bench.world.hold("acme", CREDIT)
    capture = bench.world.capture(hold.id, *legs)
    await bench.must("router", hold, capture)
    return [digest_of(receipt) for receipt in capture.capture.receipts]


@pytest.fixture
async def two_of_three(clock, start, database):
    world = World(verifiers=3, convictions_needed=2)
    ledger = await start(world, database)
    yield await opened(Bench(world, clock, ledger, database))
    await ledger.close()


def release(world, node, amount=0, below=10**9):
    return pb.Operation(
        id=world.new_id(),
        release=pb.Release(node_id=node, amount_nano=amount, below_log_index=below),
    )


# Claims.


@pytest.fixture
async def two_routers(world, clock, start, database):
    other = make_signer("other router", world.market_id)
    described = world.market.descriptor
    described.members.append(
        Member(identity=other.identity, role=Member.ROUTER, key_event=other.key_event)
    )
    events = [world.market_signer.key_event, *(m.key_event for m in described.members)]
    world.market = Market(world.market_id, described, ring_of(events, world.market_id))
    world.signers["other router"] = other
    ledger = await start(world, database)
    yield await opened(Bench(world, clock, ledger, database))
    await ledger.close()
    assert fsck(database, world).problems == []


async def test_attack_a_node_claims_from_one_routers_hold_by_anothers_assignment(two_routers):
    """Nodes know the ids of holds. The client would pay for nothing, and the bill be refused."""
    bench, world = two_routers, two_routers.world
    hold, (thief, worker, *_) = world.hold("acme", CREDIT), world.node
    await bench.must("router", hold)
    by = world.signers["other router"]
    signed, receipt = world.evidence(hold.id, Leg(thief, output=3000), b"r" * 16)
    assignment = market_pb2.Assignment.FromString(parse_envelope(signed).payload)
    assignment.router_id = by.identity
    done = market_pb2.Receipt.FromString(parse_envelope(receipt).payload)
    done.assignment_digest = digest_of(seal(assignment, by))
    bench.advance(45_000)
    claim = world.claim(hold.id, (seal(assignment, by), seal(done, thief)))
    (stolen,) = await bench.do(thief.identity, claim)
    assert stolen.code == "PERMISSION_DENIED"
    await bench.must("router", world.capture(hold.id, Leg(worker)))
    assert await bench.available("client:acme") == 10 * CREDIT - leg_charge(Leg(worker))


# Refunds.


async def test_attack_one_verifier_of_several_takes_a_bond_by_refunds(two_of_three):
    bench, world = two_of_three, two_of_three.world
    node = world.node[0].identity
    await bench.must("admin", world.bond(node, CREDIT))
    (digest,) = await captured(bench, Leg(world.node[0]))
    earned = await bench.available(f"node-locked:{node}")
    bench.advance(world.window_ms + 1)
    await bench.must("admin", release(world, node, earned - 10))
    charge = leg_charge(Leg(world.node[0]))
    asked = world.request(digest)
    _, result = await bench.must("verifier", asked, world.refund(digest, node))
    assert await bench.available(f"node-bond:{node}") == CREDIT
    assert await bench.available(f"node-locked:{node}") == 0
    assert result.amount_nano == charge - (earned - 10)
    assert bench.fsck().problems == []


@pytest.mark.parametrize("asked", ["never", "by another", "afterwards"])
async def test_attack_a_refund_for_an_audit_that_nobody_asked_for(two_of_three, asked):
    bench, world = two_of_three, two_of_three.world
    node = world.node[0].identity
    (digest,) = await captured(bench, Leg(world.node[0]))
    refund = world.refund(digest, node)
    if asked == "by another":
        await bench.must("verifier1", world.request(digest, "verifier1"))
    if asked == "afterwards":
        await bench.as_("verifier").publish(refund.refund.verdict)
        await bench.must("verifier", world.request(digest))
    (result,) = await bench.do("verifier", refund)
    assert result.code == "CONFLICT" and "ask" in result.message
    assert await bench.available("client:acme") == 10 * CREDIT - leg_charge(Leg(world.node[0]))


async def test_attack_a_verifier_refunds_its_owners_node_without_naming_it(bench):
    """The market would pay the client, and the node keep what it earned."""
    world = (await opened(bench)).world
    owned = make_signer("owned", world.market_id, owner="verifier")
    await bench.as_("router").publish(owned.key_event)
    await captured(bench, *(Leg(world.node[0], choice=i) for i in range(20)))
    (digest,) = await captured(bench, Leg(owned))
    fees = await bench.available("fee:market")
    await bench.must("verifier", world.request(digest))
    lost = audit_pb2.Verdict.MISSING_TRANSCRIPT
    for named, code in ((owned.identity, "PERMISSION_DENIED"), ("", "INVALID_REQUEST")):
        (result,) = await bench.do("verifier", world.refund(digest, named, lost))
        assert result.code == code
    assert await bench.available("fee:market") == fees


async def test_attack_an_uncalibrated_verdict_refunds_nobody(bench):
    await opened(bench)
    world = bench.world
    (digest,) = await captured(bench, Leg(world.node[0]))
    uncalibrated = world.refund(digest, world.node[0].identity, audit_pb2.Verdict.UNCALIBRATED)
    _, result = await bench.do("verifier", world.request(digest), uncalibrated)
    assert result.code == "INVALID_REQUEST"


# Releases.


async def test_attack_a_release_past_an_audit_that_another_verifier_asked_for(two_of_three):
    bench, world = two_of_three, two_of_three.world
    node = world.node[0]
    digests = [(await captured(bench, Leg(node)))[0] for _ in range(3)]
    await bench.must("verifier1", world.request(digests[1], "verifier1"))
    bench.advance(world.window_ms + 1)
    one = await bench.available(f"node-locked:{node.identity}") // 3
    (greedy,) = await bench.do("verifier", release(world, node.identity, one + 1))
    assert greedy.code == "CONFLICT" and "is asked for" in greedy.message
    (result,) = await bench.must("verifier", release(world, node.identity))
    assert result.amount_nano == one, "only what came before the audit that is owed"
    # Its verdict frees the rest, whatever another verifier says.
    other = world.verdict(digests[1], node.identity, audit_pb2.Verdict.SCORED)
    await bench.as_("verifier").publish(other)
    (still,) = await bench.must("verifier", release(world, node.identity))
    assert still.amount_nano == 0
    verdict = world.verdict(digests[1], node.identity, audit_pb2.Verdict.SCORED, "verifier1")
    await bench.as_("verifier1").publish(verdict)
    (rest,) = await bench.must("verifier", release(world, node.identity))
    assert rest.amount_nano == 2 * one
    assert bench.fsck().problems == []


async def test_attack_a_verifier_that_never_answers_holds_earnings_for_a_day_not_for_ever(bench):
    await opened(bench)
    world, node = bench.world, bench.world.node[0]
    (first,) = await captured(bench, Leg(node))
    (second,) = await captured(bench, Leg(node))
    await bench.must("verifier", world.request(first))
    bench.advance(world.window_ms + HOLDS_MS - 1)
    (held,) = await bench.must("admin", release(world, node.identity))
    assert held.amount_nano == 0
    bench.advance(1)
    # Asking anew, or for another old receipt, holds nothing.
    await bench.must("verifier", world.request(first), world.request(second))
    (result,) = await bench.must("admin", release(world, node.identity))
    assert result.amount_nano > 0 == await bench.available(f"node-locked:{node.identity}")


async def test_a_request_for_a_receipt_that_nobody_settled_holds_nothing(bench):
    await opened(bench)
    world, node = bench.world, bench.world.node[0]
    await captured(bench, Leg(node))
    await bench.must("verifier", world.request(b"?" * 32))
    bench.advance(world.window_ms + 1)
    (result,) = await bench.must("verifier", release(world, node.identity))
    assert result.amount_nano > 0


# Reinstatement.


async def convicted(bench):
    await opened(bench)
    world, node = bench.world, bench.world.node[0]
    await bench.must("admin", world.bond(node.identity, CREDIT))
    await captured(bench, Leg(node))
    convict = await bench.proven_guilty(node)
    (result,) = await bench.must("verifier", convict)
    return node, result.amount_nano


async def test_a_wrongly_convicted_node_earns_again_after_its_reinstatement(bench):
    node, taken = await convicted(bench)
    world = bench.world
    await captured(bench, Leg(node))
    assert await bench.available(f"node-locked:{node.identity}") == 0, "undone while convicted"
    # What it earned before is out of its window; it was forfeited all the same.
    bench.advance(world.window_ms + 1)
    left = await bench.available("treasury:market")
    assert 0 < left < taken
    (too_much,) = await bench.do("admin", world.reinstate(node.identity, left + 1))
    assert too_much.code == "CONFLICT"
    (result,) = await bench.must("admin", world.reinstate(node.identity, left))
    assert result.amount_nano == left and result.log_index_known
    assert [leaf.index for leaf in await bench.leaves("reinstatement")] == [result.log_index]
    assert await bench.available(f"node-bond:{node.identity}") == left
    await captured(bench, Leg(node))
    earned = await bench.available(f"node-locked:{node.identity}")
    assert earned > 0
    # What was forfeited before the window does not let new earnings go before theirs.
    (early,) = await bench.must("verifier", release(world, node.identity))
    assert early.amount_nano == 0
    bench.advance(world.window_ms + 1)
    (done,) = await bench.must("verifier", release(world, node.identity))
    assert done.amount_nano == earned


async def test_attack_the_convictions_that_were_taken_back_convict_again(bench):
    node, _ = await convicted(bench)
    world = bench.world
    old = [leaf.body for leaf in await bench.leaves("conviction")]
    await bench.must("admin", world.reinstate(node.identity), world.bond(node.identity, CREDIT))
    again = pb.Operation(id=world.new_id(), convict=pb.Convict(conviction=old[0]))
    (result,) = await bench.do("verifier", again)
    assert result.code == "CONFLICT"
    assert await bench.available(f"node-bond:{node.identity}") == CREDIT
    # A conviction on audits of later receipts does.
    (result,) = await bench.must("verifier", await bench.proven_guilty(node))
    assert result.amount_nano == CREDIT
    (twice,) = await bench.do("admin", world.reinstate(node.identity, 3 * CREDIT))
    assert twice.code == "CONFLICT", "more than both convictions took"
    # The market's earlier word does not undo the new conviction.
    (word,) = [leaf.body for leaf in await bench.leaves("reinstatement")]
    body = pb.Reinstate(reinstatement=word)
    (used,) = await bench.do("admin", pb.Operation(id=world.new_id(), reinstate=body))
    assert used.code == "CONFLICT"
    await bench.must("admin", world.reinstate(node.identity))


async def test_attack_a_conviction_of_a_name_that_begins_with_another_nodes(bench):
    """It counts for nobody; ``fsck`` (also at the end of this) takes it for what it is."""
    node, _ = await convicted(bench)
    world = bench.world
    await bench.must("admin", world.reinstate(node.identity))
    await bench.as_("verifier").publish(world.conviction(f"{node.identity}:x", 0))
    assert bench.fsck().problems == []


async def test_attack_a_verifier_a_node_or_nobody_reinstates(bench):
    node, _ = await convicted(bench)
    world = bench.world
    for caller, by in (("verifier", "verifier"), (node.identity, "admin"), ("verifier", "admin")):
        (result,) = await bench.do(caller, world.reinstate(node.identity, by=by))
        assert result.code == "PERMISSION_DENIED"
    (signed,) = await bench.do("admin", world.reinstate(node.identity, by="verifier"))
    assert signed.code == "BAD_SIGNATURE"
    (clear,) = await bench.do("admin", world.reinstate(world.node[1].identity))
    assert clear.code == "CONFLICT"
    with pytest.raises(PermissionDenied):
        envelope = world.reinstate(node.identity).reinstate.reinstatement
        await bench.as_("admin").publish(envelope)


async def test_fsck_finds_a_request_or_a_forfeit_that_was_changed(bench):
    await convicted(bench)
    world = bench.world
    (digest,) = await captured(bench, Leg(world.node[1]))
    await bench.must("verifier", world.request(digest))
    assert bench.fsck().problems == []
    engine = make_engine(normal_url(bench.url))
    for change, undo, said in (
        (
            "UPDATE audit_request SET verdict_index = 1 WHERE verdict_index = -1",
            "UPDATE audit_request SET verdict_index = -1 WHERE verdict_index = 1",
            "audit requests",
        ),
        (
            "UPDATE node SET forfeited = forfeited + 1",
            "UPDATE node SET forfeited = forfeited - 1",
            "paid back",
        ),
    ):
        with engine.begin() as connection:
            connection.execute(sa.text(change))
        assert any(said in problem for problem in bench.fsck().problems)
        with engine.begin() as connection:
            connection.execute(sa.text(undo))
    engine.dispose()
