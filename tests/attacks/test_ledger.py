"""Attacks on the books by nodes, routers and verifiers that sign what suits them."""

from __future__ import annotations

import asyncio
import itertools

from trueweight.ledger import load
from trueweight.ledger.evidence import MAX_EVIDENCE_BYTES, MAX_LEGS
from trueweight.protos.envelope import digest_of, parse_envelope, seal
from trueweight.protos.ids import derived_id
from trueweight.protos.v1 import audit_pb2, market_pb2
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1.audit_pb2 import Conviction
from trueweight.simulation.ledger_world import Leg, leg_charge, make_signer, revocation

CREDIT = 10**9


async def test_attack_a_node_claims_a_lost_leg_before_the_router_can_settle(books):
    """It takes the assignment, does nothing, and signs for the maximum at once: the router's
    bill for the node that did the work, and its void, must still go through."""
    world = books.world
    thief, worker = world.node[0], world.node[1]
    hold = await books.open_hold()
    claim = books.claim(hold, Leg(thief, output=4096))
    (early,) = await books.do(thief.identity, claim)
    assert early.code == "CONFLICT"
    await books.must("router", world.capture(hold, Leg(worker)))
    world.now += 60_000
    await books.expire()
    assert await books.available(f"node-locked:{thief.identity}") == 0
    assert await books.available("client:acme") == 10 * CREDIT - leg_charge(Leg(worker))


async def test_attack_a_claim_for_no_output_is_not_paid(books):
    hold = await books.open_hold()
    node = books.world.node[0]
    idle = books.claim(hold, Leg(node, output=0, billed_output=0, finish=market_pb2.CANCELLED))
    books.world.now += 50_000
    (result,) = await books.do(node.identity, idle)
    assert result.code == "INVALID_REQUEST"


async def test_a_claim_counts_once_the_assignments_time_is_over(books):
    hold = await books.open_hold()
    node = books.world.node[0]
    claim = books.claim(hold, Leg(node))
    books.world.now += 50_000
    await books.must(node.identity, claim)
    books.world.now += 10_000
    await books.expire()
    assert await books.available(f"node-locked:{node.identity}") > 0


async def test_attack_nodes_drain_the_verification_pool_by_continuing_each_other(books):
    """One identity makes a long worthless prefix and dies, the next 're-reads' it at any price."""
    world = books.world
    await books.captured(Leg(world.node[0], output=4000, billed_output=4000))
    pool = await books.available("pool:market")
    hold = await books.open_hold()
    greedy = Leg(world.node[1], leg=1, prefix=1000, billed_input=0, subsidy=100 * 1100)
    (result,) = await books.do("router", world.capture(hold, greedy))
    assert result.code == "INVALID_REQUEST"
    assert await books.available("pool:market") == pool


async def test_attack_a_router_bills_the_prompt_on_every_leg(books):
    world = books.world
    hold = await books.open_hold()
    legs = [Leg(world.node[0]), Leg(world.node[1], leg=1, prefix=50)]
    (result,) = await books.do("router", world.capture(hold, *legs))
    assert result.code == "INVALID_REQUEST"


async def test_attack_router_and_client_drain_a_node_by_losing_its_transcripts(books):
    """The node did its work; the client gets its money back from the market that has the router."""
    node = books.world.node[0].identity
    await books.captured(*[Leg(books.world.node[1], choice=i) for i in range(20)])
    fees = await books.available("fee:market")
    (digest,) = await books.captured(Leg(books.world.node[0]))
    earned = await books.available(f"node-locked:{node}")
    before = await books.available("client:acme")
    lost = books.world.refund(digest, node, audit_pb2.Verdict.MISSING_TRANSCRIPT)
    await books.must("verifier", books.world.request(digest), lost)
    assert await books.available(f"node-locked:{node}") == earned > 0
    charge = leg_charge(Leg(books.world.node[0]))
    assert await books.available("client:acme") == before + charge
    assert await books.available("fee:market") < fees


async def test_attack_a_node_that_claimed_a_lie_is_not_paid_by_the_market(books):
    hold = await books.open_hold()
    node = books.world.node[0]
    claim = books.claim(hold, Leg(node, output=4096))
    books.world.now += 50_000
    await books.must(node.identity, claim)
    books.world.now += 10_000
    await books.expire()
    digest = digest_of(claim.claim.receipt)
    lost = books.world.refund(digest, node.identity, audit_pb2.Verdict.MISSING_TRANSCRIPT)
    await books.must("verifier", books.world.request(digest), lost)
    assert await books.available(f"node-locked:{node.identity}") == 0
    assert await books.available("client:acme") == 10 * CREDIT


async def test_attack_a_conviction_that_states_too_little_evidence_takes_nothing(books):
    node = books.world.node[0].identity
    await books.captured(Leg(books.world.node[0]))
    earned = await books.available(f"node-locked:{node}")
    honest = Conviction.FromString(parse_envelope(books.world.conviction(node, 0)).payload)
    for name, value in (
        ("wealth_log10_milli", 5999),
        ("threshold_log10_milli", 1),
        ("threshold_log10_milli", 7000),
        ("verdicts", 0),
        ("audited_tokens", 0),
        ("first_verdict_index", 10),
    ):
        bent = Conviction()
        bent.CopyFrom(honest)
        setattr(bent, name, value)
        envelope = seal(bent, books.world.signers["verifier"])
        body = pb.Convict(conviction=envelope, reward_ppm=100_000)
        operation = pb.Operation(id=books.world.new_id(), convict=body)
        (result,) = await books.do("verifier", operation)
        assert result.code == "INVALID_REQUEST", name
    assert await books.available(f"node-locked:{node}") == earned > 0


async def test_attack_a_node_takes_its_bond_away_before_its_audits_are_done(books):
    node = books.world.node[0].identity
    await books.must("admin", books.world.bond(node, CREDIT))
    body = pb.BondWithdraw(
        node_id=node, amount_nano=CREDIT, not_before_unix_ms=books.world.now + 1000
    )
    (result,) = await books.do(node, pb.Operation(id=books.world.new_id(), bond_withdraw=body))
    assert result.code == "INVALID_REQUEST"


async def test_attack_strangers_fill_the_log_with_free_identities(books):
    stranger = make_signer("stranger", books.world.market_id)
    for caller in ("", stranger.identity):
        (result,) = await books.do(caller, books.world.publish(stranger.key_event))
        assert result.code == "PERMISSION_DENIED"


async def test_attack_router_and_node_claim_more_from_a_hold_than_anybody_can_read(books):
    """Every look at the hold reads all of its claims in the writer, and its end pays them all."""
    world, node = books.world, books.world.node[0]
    many, big = await books.open_hold(), await books.open_hold()
    claims = [books.claim(many, Leg(node, output=1, choice=i)) for i in range(MAX_LEGS + 1)]
    large = [books.claim(big, Leg(node, output=1, choice=i)) for i in range(2)]
    for claim in large:
        receipt = market_pb2.Receipt.FromString(parse_envelope(claim.claim.receipt).payload)
        receipt.output_digest = b"o" * (MAX_EVIDENCE_BYTES // 2)
        claim.claim.receipt = seal(receipt, node)
    world.now += 50_000
    *_, beyond = await books.do(node.identity, *claims)
    assert beyond.code == "CONFLICT"
    first, beyond = await books.do(node.identity, *large)
    assert (first.code, beyond.code) == ("", "CONFLICT")
    world.now += 20_000
    await books.expire()
    receipts = (await books.as_("").read_log(0, 1000, ("receipt",))).entries
    assert len(receipts) == MAX_LEGS + 1


async def test_attack_many_holds_with_claims_fall_due_together(books, monkeypatch):
    """One expiry pays a bounded number of claims, or everybody would wait until all are paid."""
    monkeypatch.setattr(load, "MAX_CLAIMS_PAID", 5)
    world, node = books.world, books.world.node[0]
    holds = [await books.open_hold(CREDIT) for _ in range(6)]
    claims = [books.claim(h, Leg(node, choice=i)) for h in holds for i in range(2)]
    world.now += 50_000
    await books.must(node.identity, *claims)
    world.now += 10_000
    for _ in holds:
        await books.expire()
    kinds = [leaf.kind for leaf in (await books.as_("").read_log(0, 1000, ())).entries]
    runs = [len(list(run)) for kind, run in itertools.groupby(kinds) if kind == "receipt"]
    assert runs == [4, 4, 4]


async def test_attack_a_receipt_by_a_key_that_is_revoked_while_its_bill_waits(books):
    """A signature counts by the keys of its own place in the log, not by those of its arrival."""
    world, node = books.world, books.world.node[0]
    capture = world.capture(await books.open_hold(), Leg(node))
    revoked, captured = await asyncio.gather(
        books.do("router", world.publish(revocation("node0", node, world.market_id))),
        books.do("router", capture),
    )
    assert (revoked[0].code, captured[0].code) == ("", "BAD_SIGNATURE")
    assert await books.available(f"node-locked:{node.identity}") == 0


async def test_attack_a_node_takes_the_ids_under_which_others_would_act_on_it(books):
    """Verifiers and routers derive ids from public facts, so that a repeat is a replay."""
    world, node = books.world, books.world.node[0].identity
    (digest,) = await books.captured(Leg(books.world.node[0]))
    hold = await books.open_hold()
    await books.must("admin", world.bond(node, CREDIT))
    refund, void = world.refund(digest, node), world.void(hold)
    refund.id, void.id = derived_id("refund", digest), derived_id("void", hold)
    taken = [world.withdraw(node, 1, world.now + 10 * world.window_ms) for _ in range(2)]
    taken[0].id, taken[1].id = refund.id, void.id
    results = await books.do(node, *taken)
    assert [r.code for r in results] == ["INVALID_REQUEST"] * 2
    (by_router,) = await books.do(
        "router", pb.Operation(id=refund.id, hold=world.hold("a", 1).hold)
    )
    assert by_router.code == "INVALID_REQUEST"
    await books.must("router", void)
    await books.must("verifier", world.request(digest), refund)
