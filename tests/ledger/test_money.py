"""The life of a request's money, on both databases. Every test ends with a clean fsck."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from trueweight.ledger import load, movements
from trueweight.protos.envelope import digest_of, seal
from trueweight.protos.errors import InvalidRequest, NotFound, PermissionDenied
from trueweight.protos.money import split_charge
from trueweight.protos.v1 import audit_pb2, market_pb2
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.simulation.ledger_world import Leg, leg_charge, make_signer

from .conftest import Bench

CREDIT, HOUR_MS = 10**9, 3_600_000


async def funded(bench, amount=10 * CREDIT, client="acme"):
    await bench.publish_nodes()
    await bench.must("admin", bench.world.deposit(client, amount))


async def captured(bench, *legs, client="acme"):
    """A hold and its capture; the receipts' digests."""
    hold = bench.world.hold(client, CREDIT)
    capture = bench.world.capture(hold.id, *legs)
    await bench.must("router", hold)
    await bench.must("router", capture)
    return [digest_of(r) for r in capture.capture.receipts]


async def test_deposit_counts_once_by_reference_and_by_id(bench):
    world = bench.world
    first = world.deposit("acme", 5 * CREDIT, "payment-1")
    await bench.must("admin", first)
    (again,) = await bench.do("admin", first)
    assert again.status == pb.Result.REPLAYED
    (twice,) = await bench.do("admin", world.deposit("acme", 5 * CREDIT, "payment-1"))
    assert (twice.status, twice.code) == (pb.Result.REFUSED, "CONFLICT")
    assert await bench.available("client:acme") == 5 * CREDIT
    assert await bench.available("external:card") == -5 * CREDIT


async def test_hold_capture_moves_exactly_the_bill_and_releases_the_rest(bench):
    world = bench.world
    await funded(bench)
    hold = world.hold("acme", 3 * CREDIT)
    await bench.must("router", hold)
    assert await bench.available("client:acme") == 7 * CREDIT
    legs = [Leg(world.node[0]), Leg(world.node[1], choice=1, billed_output=7)]
    capture = world.capture(hold.id, *legs)
    (result,) = await bench.must("router", capture)
    charge = sum(leg_charge(leg) for leg in legs)
    assert result.amount_nano == charge
    assert await bench.available("client:acme") == 10 * CREDIT - charge
    splits = [split_charge(leg_charge(leg), world.fee_ppm, world.pool_ppm) for leg in legs]
    assert await bench.available("fee:market") == sum(s.fee_nano for s in splits)
    assert await bench.available("pool:market") == sum(s.pool_nano for s in splits)
    for leg, split in zip(legs, splits, strict=True):
        assert await bench.available(f"node-locked:{leg.node.identity}") == split.node_nano
    assert await bench.available("clearing:acme") == 0
    record = await bench.as_("router").hold(hold.id)
    assert (record.state, record.captured_nano) == (pb.HoldRecord.CAPTURED, charge)
    kinds = [e.kind for e in await bench.leaves()]
    assert (kinds.count("receipt"), kinds.count("bill")) == (2, 1)


async def test_replay_returns_the_first_result_and_changes_nothing(bench):
    world = bench.world
    await funded(bench)
    hold = world.hold("acme", CREDIT)
    capture = world.capture(hold.id, Leg(world.node[0]))
    first = [*(await bench.must("router", hold)), *(await bench.must("router", capture))]
    before = (await bench.as_("admin").balances([]), len(await bench.leaves()))
    again = await bench.do("router", hold, capture, hold)
    assert [r.status for r in again] == [pb.Result.REPLAYED] * 3
    assert [r.amount_nano for r in again[:2]] == [r.amount_nano for r in first]
    assert (await bench.as_("admin").balances([]), len(await bench.leaves())) == before


async def test_the_same_id_with_another_body_is_an_error(bench):
    world = bench.world
    await funded(bench)
    hold = world.hold("acme", CREDIT)
    await bench.must("router", hold)
    other = pb.Operation()
    other.CopyFrom(hold)
    other.hold.amount_nano += 1
    (result,) = await bench.do("router", other)
    assert result.code == "ID_CONFLICT"
    (result,) = await bench.do(
        "admin", pb.Operation(id=hold.id, deposit=world.deposit("a", 1).deposit)
    )
    assert result.code == "ID_CONFLICT"
    assert await bench.available("client:acme") == 9 * CREDIT


async def test_one_resolution_per_hold(bench):
    world = bench.world
    await funded(bench)
    hold = world.hold("acme", CREDIT)
    await bench.must("router", hold)
    await bench.must("router", world.capture(hold.id, Leg(world.node[0])))
    (second,) = await bench.do("router", world.capture(hold.id, Leg(world.node[0], output=51)))
    (void,) = await bench.do("router", world.void(hold.id))
    assert (second.code, void.code) == ("CONFLICT", "CONFLICT")
    other = world.hold("acme", CREDIT)
    await bench.must("router", other)
    await bench.must("router", world.void(other.id))
    (late,) = await bench.do("router", world.capture(other.id, Leg(world.node[0])))
    assert late.code == "CONFLICT"


async def test_a_short_balance_refuses_and_one_bad_call_does_not_fail_its_neighbours(bench):
    world = bench.world
    await funded(bench, 2 * CREDIT)
    holds = [world.hold("acme", CREDIT) for _ in range(3)]
    stranger = world.hold("nobody", 1)
    results = await asyncio.gather(*(bench.do("router", h) for h in [*holds, stranger]))
    codes = sorted(r[0].code for r in results)
    assert codes == ["", "", "INSUFFICIENT_FUNDS", "INSUFFICIENT_FUNDS"]
    assert await bench.available("client:acme") == 0


async def test_a_refused_operation_leaves_no_trace_and_may_be_tried_again(bench):
    world = bench.world
    hold = world.hold("acme", CREDIT)
    (refused,) = await bench.do("router", hold)
    assert refused.code == "INSUFFICIENT_FUNDS"
    await funded(bench)
    (retried,) = await bench.must("router", hold)
    assert retried.status == pb.Result.APPLIED


async def test_linked_operations_all_or_none(bench):
    world = bench.world
    await funded(bench, 2 * CREDIT)
    chain = [world.hold("acme", CREDIT), world.hold("acme", 5 * CREDIT), world.hold("acme", 1)]
    chain[0].linked = chain[1].linked = True
    alone = world.hold("acme", CREDIT)
    results = await bench.do("router", *chain, alone)
    assert [r.code for r in results] == ["CONFLICT", "INSUFFICIENT_FUNDS", "CONFLICT", ""]
    assert await bench.available("client:acme") == CREDIT
    fits = [world.hold("acme", CREDIT // 2), world.hold("acme", CREDIT // 2)]
    fits[0].linked = True
    await bench.must("router", *fits)
    assert await bench.available("client:acme") == 0


async def test_attack_a_chain_without_end_does_not_reach_into_another_call(bench):
    world = bench.world
    await funded(bench)
    loose = world.hold("acme", CREDIT)
    loose.linked = True
    results = await asyncio.gather(
        bench.do("router", loose), bench.do("router", world.hold("acme", CREDIT))
    )
    assert [r[0].code for r in results] == ["INVALID_REQUEST", ""]


async def test_expired_holds_go_back_and_cannot_be_captured(bench):
    world = bench.world
    await funded(bench)
    hold = world.hold("acme", CREDIT, ttl_ms=5_000)
    capture = world.capture(hold.id, Leg(world.node[0]))
    await bench.must("router", hold)
    bench.advance(5_000)
    (late,) = await bench.do("router", capture)
    assert late.code == "CONFLICT"
    (result,) = await bench.must(
        "router", pb.Operation(id=world.new_id(), expire=pb.Expire(limit=10))
    )
    # The ledger's own housekeeping may have been faster.
    assert result.amount_nano in (0, CREDIT)
    assert await bench.available("client:acme") == 10 * CREDIT
    assert (await bench.as_("router").hold(hold.id)).state == pb.HoldRecord.EXPIRED


async def test_due_holds_expire_by_themselves(bench):
    await funded(bench)
    await bench.must("router", bench.world.hold("acme", CREDIT, ttl_ms=1_000))
    bench.advance(2_000)
    for _ in range(100):
        if await bench.available("client:acme") == 10 * CREDIT:
            return
        await asyncio.sleep(0.05)
    pytest.fail("the hold was not expired within 5 s")


async def test_spending_limit_of_a_key_holds_with_the_hold(bench):
    world = bench.world
    await funded(bench)
    limit = pb.SetSpendingLimit(api_key_id="key-1", limit_nano=2 * CREDIT)
    await bench.must("admin", pb.Operation(id=world.new_id(), set_spending_limit=limit))
    holds = [world.hold("acme", CREDIT, api_key="key-1") for _ in range(3)]
    results = await bench.do("router", *holds)
    assert [r.code for r in results] == ["", "", "LIMIT_EXCEEDED"]
    await bench.must("router", world.void(holds[0].id))
    await bench.must("router", world.capture(holds[1].id, Leg(world.node[0])))
    big = world.hold("acme", 2 * CREDIT - leg_charge(Leg(world.node[0])), api_key="key-1")
    await bench.must("router", big)
    (over,) = await bench.do("router", world.hold("acme", 1, api_key="key-1"))
    assert over.code == "LIMIT_EXCEEDED"


async def set_limit(bench, amount, period_ms=0):
    body = pb.SetSpendingLimit(api_key_id="key-1", limit_nano=amount, period_ms=period_ms)
    await bench.must("admin", pb.Operation(id=bench.world.new_id(), set_spending_limit=body))


async def try_hold(bench, amount):
    hold = bench.world.hold("acme", amount, api_key="key-1", ttl_ms=10 * HOUR_MS)
    (result,) = await bench.do("router", hold)
    return hold.id if result.status == pb.Result.APPLIED else result.code


async def test_a_budget_counts_holds_in_the_period_in_which_they_were_taken(bench):
    world = bench.world
    await funded(bench)
    bench.advance(HOUR_MS - world.now % HOUR_MS)
    await set_limit(bench, 2 * CREDIT, HOUR_MS)
    captured_now, voided_later = [await try_hold(bench, CREDIT) for _ in range(2)]
    assert await try_hold(bench, 1) == "LIMIT_EXCEEDED"
    # What a capture gives back may be spent in the same hour.
    await bench.must("router", world.capture(captured_now, Leg(world.node[0])))
    rest = CREDIT - leg_charge(Leg(world.node[0]))
    assert await try_hold(bench, rest + 1) == "LIMIT_EXCEEDED"
    assert await try_hold(bench, rest) != "LIMIT_EXCEEDED"
    bench.advance(HOUR_MS - 1)
    assert await try_hold(bench, 1) == "LIMIT_EXCEEDED"
    bench.advance(1)
    full = await try_hold(bench, 2 * CREDIT)
    # It belongs to the hour before, so it makes no room in this one.
    await bench.must("router", world.void(voided_later))
    assert await try_hold(bench, 1) == "LIMIT_EXCEEDED"
    await bench.must("router", world.void(full))
    assert await try_hold(bench, 2 * CREDIT) != "LIMIT_EXCEEDED"


async def test_a_budget_stands_beside_the_limit_in_total_and_can_be_changed(bench):
    world = bench.world
    await funded(bench)
    await set_limit(bench, 3 * CREDIT)
    await set_limit(bench, 2 * CREDIT, HOUR_MS)
    first = await try_hold(bench, 2 * CREDIT)
    bench.advance(HOUR_MS)
    assert await try_hold(bench, CREDIT + 1) == "LIMIT_EXCEEDED"
    await set_limit(bench, CREDIT // 2, HOUR_MS)
    assert await try_hold(bench, CREDIT // 2 + 1) == "LIMIT_EXCEEDED"
    assert await try_hold(bench, CREDIT // 2) != "LIMIT_EXCEEDED"
    # Another length counts anew, and what was counted before does not come back into it.
    await set_limit(bench, CREDIT // 4, 24 * HOUR_MS)
    await bench.must("router", world.void(first))
    assert await try_hold(bench, CREDIT // 4 + 1) == "LIMIT_EXCEEDED"
    assert await try_hold(bench, CREDIT // 4) != "LIMIT_EXCEEDED"
    assert await try_hold(bench, 1) == "LIMIT_EXCEEDED"
    await set_limit(bench, 0, HOUR_MS)
    assert await try_hold(bench, 2 * CREDIT) != "LIMIT_EXCEEDED"
    assert await try_hold(bench, CREDIT) == "LIMIT_EXCEEDED"  # in total


async def test_a_clock_that_is_set_back_opens_no_budget_twice(bench):
    await funded(bench)
    await set_limit(bench, CREDIT, HOUR_MS)
    bench.advance(HOUR_MS)
    held = await try_hold(bench, CREDIT)
    bench.advance(-HOUR_MS)
    assert await try_hold(bench, 1) == "LIMIT_EXCEEDED"
    await set_limit(bench, CREDIT, 2 * HOUR_MS)
    await bench.must("router", bench.world.void(held))
    assert await try_hold(bench, CREDIT + 1) == "LIMIT_EXCEEDED"


async def test_refund_gives_everything_back_once(bench):
    world = bench.world
    await funded(bench)
    (digest,) = await captured(bench, Leg(world.node[0]))
    asked, refund = world.request(digest), world.refund(digest, world.node[0].identity)
    _, result = await bench.must("verifier", asked, refund)
    assert result.amount_nano == leg_charge(Leg(world.node[0]))
    assert await bench.available("client:acme") == 10 * CREDIT
    for account in ("fee:market", "pool:market", f"node-locked:{world.node[0].identity}"):
        assert await bench.available(account) == 0
    (twice,) = await bench.do("verifier", world.refund(digest, world.node[0].identity))
    assert twice.code == "CONFLICT"
    assert len(await bench.leaves("verdict")) == 1


async def test_refund_falls_back_to_bond_and_treasury(bench):
    world = bench.world
    node = world.node[0].identity
    await funded(bench)
    (digest,) = await captured(bench, Leg(world.node[0]))
    earned = await bench.available(f"node-locked:{node}")
    bench.advance(world.window_ms + 1)
    await bench.must("admin", release(world, node, earned))
    await bench.must("admin", world.bond(node, earned - 10))
    _, result = await bench.must("verifier", world.request(digest), world.refund(digest, node))
    assert result.amount_nano == leg_charge(Leg(world.node[0])) - 10
    assert await bench.available(f"node-bond:{node}") == 0


def release(world, node, amount=0, below=10**9):
    return pb.Operation(
        id=world.new_id(),
        release=pb.Release(node_id=node, amount_nano=amount, below_log_index=below),
    )


async def test_release_waits_for_window_and_log_index_then_payout_in_two_phases(bench):
    world = bench.world
    node = world.node[0].identity
    await funded(bench)
    (digest,) = await captured(bench, Leg(world.node[0]))
    earned = await bench.available(f"node-locked:{node}")
    (early,) = await bench.do("verifier", release(world, node, 1))
    assert early.code == "CONFLICT"
    bench.advance(world.window_ms)
    index = next(e.index for e in await bench.leaves("receipt"))
    (below,) = await bench.do("verifier", release(world, node, 1, below=index))
    assert below.code == "CONFLICT"
    (done,) = await bench.must("verifier", release(world, node, 0, below=index + 1))
    assert done.amount_nano == earned
    (again,) = await bench.must("verifier", release(world, node))
    assert again.amount_nano == 0
    start = pb.Operation(
        id=world.new_id(),
        payout_start=pb.PayoutStart(node_id=node, amount_nano=earned, rail="bank"),
    )
    await bench.must(node, start)
    assert await bench.available(f"node-available:{node}") == 0
    settle = pb.PayoutSettle(payout_id=start.id, paid=False)
    await bench.must("admin", pb.Operation(id=world.new_id(), payout_settle=settle))
    assert await bench.available(f"node-available:{node}") == earned
    assert digest


async def test_conviction_forfeits_refunds_pro_rata_rewards_and_records_the_rest(bench):
    world = bench.world
    cheat = world.node[0]
    await funded(bench)
    await funded(bench, client="other")
    before = await captured(bench, Leg(cheat))
    convict = await bench.proven_guilty(cheat)
    await captured(bench, Leg(cheat), client="acme")
    await captured(bench, Leg(cheat, billed_output=20), client="other")
    bond = 20_001
    await bench.must("admin", world.bond(cheat.identity, bond))
    forfeited = await bench.available(f"node-locked:{cheat.identity}") + bond
    owed = {"acme": leg_charge(Leg(cheat)), "other": leg_charge(Leg(cheat, billed_output=20))}
    had = {c: await bench.available(f"client:{c}") for c in owed}
    (result,) = await bench.must("verifier", convict)
    assert result.amount_nano == forfeited
    reward = forfeited // 10
    assert await bench.available(f"verifier:{world.identity('verifier')}") == reward
    pay = min(forfeited - reward, sum(owed.values()))
    got = {c: await bench.available(f"client:{c}") - had[c] for c in owed}
    assert sum(got.values()) == pay
    for client, charge in owed.items():
        assert abs(got[client] - pay * charge / sum(owed.values())) <= 1
    assert await bench.available("treasury:market") == forfeited - reward - pay
    (twice,) = await bench.do("verifier", world.convict(cheat.identity, 0))
    assert twice.code == "CONFLICT"
    (released,) = await bench.do("admin", release(world, cheat.identity))
    assert released.code == "CONFLICT"
    assert before


async def test_work_under_way_at_the_conviction_is_refunded_when_it_is_captured(bench):
    world = bench.world
    cheat = world.node[0]
    await funded(bench)
    await captured(bench, Leg(cheat))
    await bench.must("admin", world.bond(cheat.identity, 10_000))
    await bench.must("verifier", await bench.proven_guilty(cheat))
    accounts = ("client:acme", f"node-locked:{cheat.identity}", "fee:market", "pool:market")
    before = [await bench.available(account) for account in accounts]
    await captured(bench, Leg(cheat), client="acme")
    assert [await bench.available(account) for account in accounts] == before


async def test_attack_a_node_with_endless_bond_withdrawals_delays_no_conviction(bench, monkeypatch):
    """They would all be voided while everybody waits."""
    monkeypatch.setattr(movements, "MAX_WITHDRAWALS", 3)
    world, node = bench.world, bench.world.node[0].identity
    await bench.must("admin", world.bond(node, CREDIT), world.bond(world.node[1].identity, CREDIT))

    def withdrawals(count):
        return [world.withdraw(node, 1, world.now + world.window_ms) for _ in range(count)]

    first = withdrawals(2)
    await bench.must(node, *first)
    # In one group with others, and in groups judged on top of each other.
    results = await asyncio.gather(*(bench.do(node, op) for op in withdrawals(8)))
    assert Counter(r.code for (r,) in results) == {"": 1, "CONFLICT": 7}
    assert [r.code for r in await bench.do(node, *withdrawals(2))] == ["CONFLICT"] * 2
    await bench.must(
        world.node[1].identity,
        world.withdraw(world.node[1].identity, 1, world.now + world.window_ms),
    )
    # One that ends makes room for one, also in the same group.
    ended = world.settle(first[0].id, paid=False)
    codes = [r.code for r in await bench.do("admin", ended, *withdrawals(2))]
    assert codes == ["", "", "CONFLICT"]
    assert await bench.available(f"node-bond:{node}") == CREDIT - 3


async def test_withdrawals_are_found_without_looking_through_holds(bench):
    engine = bench.ledger._engine
    explain = "EXPLAIN QUERY PLAN" if engine.dialect.name == "sqlite" else "EXPLAIN"
    with engine.connect() as connection:
        if engine.dialect.name != "sqlite":
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        for sql in (
            f"{load._WITHDRAWN} WHERE debit = 'node-bond:n'",
            "SELECT * FROM pending WHERE debit = 'node-bond:n' AND state = 1 AND kind = 3",
        ):
            plan = str(connection.exec_driver_sql(f"{explain} {sql}").fetchall())
            assert "pending_withdrawal" in plan, plan


async def test_conviction_takes_a_bond_whose_withdrawal_is_pending(bench):
    world = bench.world
    node = world.node[0].identity
    await funded(bench)
    await bench.must("admin", world.bond(node, CREDIT))
    withdraw = pb.Operation(
        id=world.new_id(),
        bond_withdraw=pb.BondWithdraw(
            node_id=node, amount_nano=CREDIT, not_before_unix_ms=world.now + world.window_ms
        ),
    )
    await bench.must(node, withdraw)
    settle = pb.PayoutSettle(payout_id=withdraw.id, paid=True)
    (early,) = await bench.do("admin", pb.Operation(id=world.new_id(), payout_settle=settle))
    assert early.code == "CONFLICT"
    (result,) = await bench.must("verifier", await bench.proven_guilty(world.node[0]))
    assert result.amount_nano == CREDIT
    bench.advance(world.window_ms)
    (late,) = await bench.do("admin", pb.Operation(id=world.new_id(), payout_settle=settle))
    assert late.code == "CONFLICT"


async def test_a_claim_is_paid_at_expiry_when_the_router_withholds_the_capture(bench):
    world = bench.world
    node = world.node[0]
    await funded(bench)
    hold = world.hold("acme", CREDIT)
    await bench.must("router", hold)
    claim = claim_of(world, hold.id, Leg(node))
    bench.advance(50_000)
    (result,) = await bench.must(node.identity, claim)
    assert result.amount_nano == leg_charge(Leg(node))
    (void,) = await bench.do("router", world.void(hold.id))
    assert void.code == "CONFLICT"
    bench.advance(10_000)
    await bench.must("router", pb.Operation(id=world.new_id(), expire=pb.Expire(limit=10)))
    charge = leg_charge(Leg(node))
    assert await bench.available("client:acme") == 10 * CREDIT - charge
    split = split_charge(charge, world.fee_ppm, world.pool_ppm)
    assert await bench.available(f"node-locked:{node.identity}") == split.node_nano
    assert len(await bench.leaves("receipt")) == 1


def claim_of(world, hold_id, leg):
    assignment, receipt = world.evidence(hold_id, leg, b"r" * 16)
    return pb.Operation(
        id=world.new_id(),
        claim=pb.Claim(hold_id=hold_id, assignment=assignment, receipt=receipt),
    )


async def test_attack_a_bill_that_leaves_out_a_claimed_leg_is_refused(bench):
    world = bench.world
    await funded(bench)
    hold = world.hold("acme", CREDIT)
    await bench.must("router", hold)
    claim = claim_of(world, hold.id, Leg(world.node[0]))
    bench.advance(50_000)
    await bench.must(world.node[0].identity, claim)
    (result,) = await bench.do("router", world.capture(hold.id, Leg(world.node[1])))
    assert result.code == "CONFLICT"


async def test_attack_a_dead_leg_cannot_be_claimed(bench):
    world = bench.world
    await funded(bench)
    hold = world.hold("acme", CREDIT)
    await bench.must("router", hold)
    dead = Leg(world.node[0], finish=market_pb2.ENGINE_ERROR)
    (result,) = await bench.do(world.node[0].identity, claim_of(world, hold.id, dead))
    assert result.code == "INVALID_REQUEST"


async def test_a_later_leg_earns_a_subsidy_from_the_pool_as_far_as_it_reaches(bench):
    world = bench.world
    await funded(bench)
    await captured(bench, Leg(world.node[0], output=4000, billed_output=4000))
    pool = await bench.available("pool:market")
    # At most what the bill itself brings to the pool.
    second = Leg(
        world.node[1],
        leg=1,
        prefix=20,
        output=2000,
        billed_input=0,
        billed_output=2000,
        subsidy=12_000,
    )
    await captured(bench, second)
    charge = leg_charge(second)
    split = split_charge(charge, world.fee_ppm, world.pool_ppm)
    assert (
        await bench.available(f"node-locked:{world.node[1].identity}") == split.node_nano + 12_000
    )
    assert await bench.available("pool:market") == pool + split.pool_nano - 12_000


async def test_reward_pays_a_verifier_once_per_verdict(bench):
    world = bench.world
    await funded(bench)
    (digest,) = await captured(bench, Leg(world.node[0], output=4000, billed_output=4000))
    await bench.must("verifier", world.request(digest))
    verdict = world.verdict(digest, world.node[0].identity, audit_pb2.Verdict.SCORED)
    body = pb.Reward(
        verifier_id=world.identity("verifier"), amount_nano=100, verdict_digest=digest_of(verdict)
    )
    (unknown,) = await bench.do("admin", pb.Operation(id=world.new_id(), reward=body))
    assert unknown.code == "NOT_FOUND"
    await bench.as_("verifier").publish(verdict)
    (himself,) = await bench.do("verifier", pb.Operation(id=world.new_id(), reward=body))
    assert himself.code == "PERMISSION_DENIED"
    other = pb.Reward(verifier_id="somebody", amount_nano=100, verdict_digest=digest_of(verdict))
    (anothers,) = await bench.do("admin", pb.Operation(id=world.new_id(), reward=other))
    assert anothers.code == "INVALID_REQUEST"
    key_event = pb.Reward(
        verifier_id=world.identity("verifier"),
        amount_nano=100,
        verdict_digest=digest_of(world.node[0].key_event),
    )
    (no_verdict,) = await bench.do("admin", pb.Operation(id=world.new_id(), reward=key_event))
    assert no_verdict.code == "INVALID_REQUEST"
    await bench.must("admin", pb.Operation(id=world.new_id(), reward=body))
    (twice,) = await bench.do("admin", pb.Operation(id=world.new_id(), reward=body))
    assert twice.code == "CONFLICT"


async def test_k_of_n_verifiers_must_convict(clock, start, database):
    from trueweight.simulation.ledger_world import World

    world = World(verifiers=3, convictions_needed=2)
    ledger = await start(world, database)
    node = world.node[0].identity
    admin, first = (
        ledger.as_caller(world.identity("admin")),
        ledger.as_caller(world.identity("verifier")),
    )
    await admin.apply([world.bond(node, CREDIT)])
    bench = Bench(world, clock, ledger, database)
    await bench.publish_nodes()
    convict = await bench.proven_guilty(world.node[0])
    (alone,) = await first.apply([convict])
    assert alone.code == "CONFLICT"
    second = await bench.proven_guilty(world.node[0], "verifier1")
    await ledger.as_caller(world.identity("verifier1")).publish(second.convict.conviction)
    (both,) = await first.apply([convict])
    assert both.amount_nano == CREDIT
    await ledger.close()


async def test_attack_a_verifier_judges_releases_or_frees_its_owners_node(bench):
    """Convicting one's own node late brings a tenth back and refunds few; releasing it, all."""
    world = bench.world
    owned = make_signer("owned", world.market_id, owner="verifier")
    await bench.as_("router").publish(owned.key_event)
    await bench.must("admin", world.bond(owned.identity, CREDIT))
    (convicted,) = await bench.do("verifier", world.convict(owned.identity, 0))
    (released,) = await bench.do("verifier", release(world, owned.identity, 0))
    assert {convicted.code, released.code} == {"PERMISSION_DENIED"}
    verdict = world.verdict(b"r" * 32, owned.identity, audit_pb2.Verdict.REFUND)
    lifted = market_pb2.Suspension(
        market_id=world.market_id,
        node_id=owned.identity,
        issuer=world.identity("verifier"),
        lifted=True,
    )
    for envelope in (verdict, seal(lifted, world.signers["verifier"])):
        with pytest.raises(PermissionDenied):
            await bench.as_("verifier").publish(envelope)
    assert await bench.available(f"node-bond:{owned.identity}") == CREDIT


async def test_limits_of_one_call_and_reading_rights(bench):
    world = bench.world
    await funded(bench)
    with pytest.raises(InvalidRequest):
        await bench.do("router", *[world.hold("acme", 1) for _ in range(1025)])
    with pytest.raises(PermissionDenied):
        await bench.as_("stranger").balances(["client:acme"])
    with pytest.raises(PermissionDenied):
        await bench.as_("stranger").transfers("client:acme")
    assert await bench.as_("acme").balances(["client:acme"])
    with pytest.raises(NotFound):
        await bench.as_("router").hold(b"x" * 16)


async def test_attack_a_counter_never_wraps_around(bench):
    """Beyond 2^63-1 nanocredits a counter refuses, whoever's it is."""
    world = bench.world
    most = 2**63 - 1
    await bench.must("admin", world.deposit("acme", most))
    for name in ("acme", "other"):  # the outside world's counter is full as well
        (result,) = await bench.do("admin", world.deposit(name, 1))
        assert result.code == "INVALID_REQUEST"
    assert await bench.available("client:acme") == most
