"""The ledger takes nobody's word for a conviction: the logged verdicts must add up to it."""

from __future__ import annotations

import pytest

from trueweight.ledger import dockets
from trueweight.protos.envelope import digest_of, parse_envelope, seal
from trueweight.protos.v1 import audit_pb2
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1.audit_pb2 import Conviction
from trueweight.simulation import ledger_guilt
from trueweight.simulation.ledger_guilt import convict_by, conviction_of, guilt_of
from trueweight.simulation.ledger_world import Leg, World

from .conftest import Bench

CREDIT = 10**9


@pytest.fixture
async def market(bench):
    """A market whose node has a bond and has earned something."""
    await bench.publish_nodes()
    world = bench.world
    await bench.must("admin", world.deposit("acme", CREDIT), world.deposit("x", 1000))
    await bench.must("admin", world.bond(world.node[0].identity, CREDIT))
    hold = world.hold("acme", CREDIT)
    await bench.must("router", hold, world.capture(hold.id, Leg(world.node[0])))
    return bench


async def untouched(bench):
    node = bench.world.node[0].identity
    assert await bench.available(f"node-bond:{node}") == CREDIT
    assert await bench.available(f"node-locked:{node}") > 0


def changed(operation, world, **values):
    """The same operation with a conviction that says something else, signed again."""
    said = Conviction.FromString(parse_envelope(operation.convict.conviction).payload)
    for name, value in values.items():
        setattr(said, name, value)
    return convict_by(world, said)


async def test_attack_a_conviction_without_verdicts_takes_nothing(market):
    (result,) = await market.do("verifier", market.world.convict(market.world.node[0].identity, 0))
    assert result.code == "CONFLICT"
    await untouched(market)


async def test_attack_a_conviction_that_says_more_than_its_verdicts(market):
    convict = await market.proven_guilty(market.world.node[0])
    said = Conviction.FromString(parse_envelope(convict.convict.conviction).payload)
    for name, value in (
        ("verdicts", said.verdicts + 1),
        ("audited_tokens", said.audited_tokens + 1),
        ("wealth_log10_milli", said.wealth_log10_milli + 1),
        ("change_point_index", 0),
    ):
        (result,) = await market.do("verifier", changed(convict, market.world, **{name: value}))
        assert result.code == "INVALID_REQUEST", name
    await untouched(market)
    (result,) = await market.must("verifier", convict)
    assert result.amount_nano > CREDIT


@pytest.mark.parametrize("what", ["another node's receipts", "unknown receipts", "a later rule"])
async def test_attack_verdicts_that_do_not_count_carry_no_conviction(market, what):
    world, node = market.world, market.world.node[0]
    guilt = guilt_of(world, world.node[1] if what == "another node's receipts" else node, "x")
    if what != "a later rule":
        await market.must("verifier", guilt.calibration)
    await market.must("router", *guilt.holds)
    if what != "unknown receipts":
        await market.must("router", *guilt.captures)
    if what == "a later rule":
        await market.must("verifier", guilt.calibration)
    await market.must("verifier", *guilt.requests)
    if what == "another node's receipts":
        for published in guilt.verdicts:
            envelope = parse_envelope(published.publish.envelope)
            verdict = audit_pb2.Verdict.FromString(envelope.payload)
            verdict.node_id = node.identity
            await market.must("verifier", world.publish(seal(verdict, world.signers["verifier"])))
    else:
        await market.must("verifier", *guilt.verdicts)
    (result,) = await market.do("verifier", convict_by(world, conviction_of(world, node, [1, 2])))
    assert result.code == "CONFLICT"
    await untouched(market)


async def test_attack_one_receipt_judged_many_times_counts_once(market):
    world, node = market.world, market.world.node[0]
    guilt = guilt_of(world, node, "x")
    await market.must("verifier", guilt.calibration)
    await market.must("router", *guilt.holds)
    await market.must("router", *guilt.captures)
    await market.must("verifier", *guilt.requests)
    envelope = parse_envelope(guilt.verdicts[0].publish.envelope)
    verdict = audit_pb2.Verdict.FromString(envelope.payload)
    for at in range(6):
        verdict.issued_at_unix_ms = at
        await market.must("verifier", world.publish(seal(verdict, world.signers["verifier"])))
    (result,) = await market.do("verifier", convict_by(world, conviction_of(world, node, [1, 2])))
    assert result.code == "CONFLICT"
    await untouched(market)


async def test_attack_a_bare_conviction_of_another_verifier_does_not_count(clock, start, database):
    world = World(verifiers=3, convictions_needed=2)
    ledger = await start(world, database)
    bench = Bench(world, clock, ledger, database)
    await bench.publish_nodes()
    node = world.node[0]
    await bench.must("admin", world.bond(node.identity, CREDIT))
    convict = await bench.proven_guilty(node)
    bare = world.conviction(node.identity, 0, "verifier1")
    await bench.as_("verifier1").publish(bare)
    (result,) = await bench.do("verifier", convict)
    assert result.code == "CONFLICT"
    assert await bench.available(f"node-bond:{node.identity}") == CREDIT
    await ledger.close()


async def test_honest_audits_convict_nobody(market, monkeypatch):
    monkeypatch.setattr(ledger_guilt, "AUDITS", 20)
    world, node = market.world, market.world.node[0]
    guilt = guilt_of(world, node, "x")
    await market.must("verifier", guilt.calibration)
    await market.must("router", *guilt.holds)
    await market.must("router", *guilt.captures)
    await market.must("verifier", *guilt.requests)
    for published in guilt.verdicts:
        envelope = parse_envelope(published.publish.envelope)
        verdict = audit_pb2.Verdict.FromString(envelope.payload)
        verdict.sum_x_nano = ledger_guilt.MU0_NANO // 2 * verdict.scored_tokens
        await market.must("verifier", world.publish(seal(verdict, world.signers["verifier"])))
    (result,) = await market.do("verifier", convict_by(world, conviction_of(world, node, [1, 2])))
    assert result.code == "CONFLICT"
    assert "wealth" in result.message
    await untouched(market)


async def test_a_node_that_served_for_nothing_is_convicted_too(bench):
    """Its refunds sum to zero, which must not be divided by."""
    await bench.publish_nodes()
    node = bench.world.node[0]
    await bench.must("admin", bench.world.bond(node.identity, CREDIT))
    (result,) = await bench.must("verifier", await bench.proven_guilty(node))
    assert result.amount_nano == CREDIT


async def test_the_same_conviction_again_is_a_replay(market):
    convict = await market.proven_guilty(market.world.node[0])
    (first,) = await market.must("verifier", convict)
    (again,) = await market.must("verifier", convict)
    assert (again.status, again.amount_nano) == (pb.Result.REPLAYED, first.amount_nano)


async def test_attack_calibration_verdicts_and_conviction_in_one_call(market):
    """The calibration comes after the receipts, in the same transaction."""
    world, node = market.world, market.world.node[0]
    guilt = guilt_of(world, node, "x")
    await market.must("router", *guilt.holds)
    await market.must("router", *guilt.captures)
    convict = convict_by(world, conviction_of(world, node, [1, 2]))
    evidence = (*guilt.requests, *guilt.verdicts)
    results = await market.do("verifier", guilt.calibration, *evidence, convict)
    assert [r.code for r in results] == [""] * 7 + ["CONFLICT"]
    await untouched(market)


async def audited(market, *, change=None, ask=True):
    """Everything that convicts the node but the conviction, its verdicts changed before they are
    signed; the conviction that they would carry."""
    world, node = market.world, market.world.node[0]
    guilt = guilt_of(world, node, "x")
    if not getattr(market, "is_calibrated", False):
        await market.must("verifier", guilt.calibration)
    await market.must("router", *guilt.holds)
    first = len(await market.leaves("receipt"))
    await market.must("router", *guilt.captures)
    if ask:
        await market.must("verifier", *guilt.requests)
    for published in guilt.verdicts:
        envelope = parse_envelope(published.publish.envelope)
        verdict = audit_pb2.Verdict.FromString(envelope.payload)
        if change is not None:
            change(verdict)
        await market.must("verifier", world.publish(seal(verdict, world.signers["verifier"])))
    receipts = [leaf.index for leaf in (await market.leaves("receipt"))[first:]]
    return convict_by(world, conviction_of(world, node, receipts))


def calibration(world, *, by="verifier", manifest=b"m" * 32, version=1, mu0_nano=200_000):
    entry = audit_pb2.CalibrationEntry(
        parameter_class="plain",
        mu0_nano=mu0_nano,
        upper_bound_nano=mu0_nano // 2,
        requests=1,
        refund_above_nano=1,
    )
    message = audit_pb2.Calibration(
        market_id=world.market_id,
        verifier_id=world.identity(by),
        manifest_digest=manifest,
        version=version,
        entries=[entry],
    )
    return seal(message, world.signers[by])


async def refused(market, convict):
    (result,) = await market.do("verifier", convict)
    assert result.code == "CONFLICT" and "wealth" in result.message
    await untouched(market)


async def test_attack_verdicts_cite_a_superseded_calibration(market):
    """The newest in force says that these margins are ordinary."""
    world = market.world
    old = calibration(world, mu0_nano=200_000)
    newer = calibration(world, version=2, mu0_nano=990_000_000)
    await market.must("verifier", world.publish(old), world.publish(newer))
    market.is_calibrated = True

    def cite_old(verdict):
        verdict.calibration_digest = digest_of(old)

    await refused(market, await audited(market, change=cite_old))


@pytest.mark.parametrize("whose", ["for another model", "another verifier's"])
async def test_attack_verdicts_cite_a_calibration_that_is_not_theirs(clock, start, database, whose):
    world = World(verifiers=2)
    ledger = await start(world, database)
    market = Bench(world, clock, ledger, database)
    await market.publish_nodes()
    await market.must("admin", world.deposit("x", CREDIT))
    theirs = (
        calibration(world, manifest=b"n" * 32)
        if whose == "for another model"
        else calibration(world, by="verifier1")
    )
    await market.must("verifier1" if "verifier" in whose else "verifier", world.publish(theirs))

    def cite(verdict):
        verdict.calibration_digest = digest_of(theirs)

    (result,) = await market.do("verifier", await audited(market, change=cite))
    assert result.code == "CONFLICT"
    await ledger.close()


async def test_attack_verdicts_without_a_logged_request(market):
    await refused(market, await audited(market, ask=False))


async def test_attack_verdicts_that_were_asked_for_only_after_the_margins_were_known(market):
    world, node = market.world, market.world.node[0]
    guilt = guilt_of(world, node, "x")
    await market.must("verifier", guilt.calibration)
    await market.must("router", *guilt.holds)
    await market.must("router", *guilt.captures)
    await market.must("verifier", *guilt.verdicts)
    await market.must("verifier", *guilt.requests)
    await refused(market, convict_by(world, conviction_of(world, node, [1, 2])))


@pytest.mark.parametrize("epochs", [0, 1, 2, 3])
async def test_attack_only_the_worst_of_the_requested_audits_are_published(market, epochs):
    """The first requests stay without verdicts: the others wait, and then they count as zero."""
    world, node = market.world, market.world.node[0]
    withheld = guilt_of(world, node, "x")
    await market.must("router", *withheld.holds)
    await market.must("router", *withheld.captures)
    await market.must("verifier", *withheld.requests)
    convict = await audited(market)
    for number in range(epochs):
        opened = audit_pb2.EpochOpen(
            market_id=world.market_id, verifier_id=world.identity("verifier"), epoch=number + 1
        )
        await market.must("verifier", world.publish(seal(opened, world.signers["verifier"])))
    (result,) = await market.do("verifier", convict)
    # Once the withheld count as zero the wealth is another one than the conviction says.
    assert result.code == ("CONFLICT" if epochs < 2 else "INVALID_REQUEST"), result.message
    await untouched(market)


async def test_a_long_history_is_added_up_in_steps_and_nobodys_word_stands_for_it(
    market, monkeypatch
):
    monkeypatch.setattr(dockets, "STEP_ROWS", 2)
    convict = await audited(market)
    codes = []
    for _ in range(12):
        (result,) = await market.do("verifier", convict)
        codes.append(result.code)
        if not result.code:
            break
    assert codes[0] == "UNAVAILABLE" and codes[-1] == "" and len(codes) > 2
    assert result.amount_nano > CREDIT


async def test_attack_a_long_history_that_carries_no_conviction(market, monkeypatch):
    monkeypatch.setattr(dockets, "STEP_ROWS", 2)

    def honest(verdict):
        verdict.sum_x_nano = 0

    convict = await audited(market, change=honest)
    codes = [(await market.do("verifier", convict))[0].code for _ in range(12)]
    assert set(codes) == {"UNAVAILABLE", "CONFLICT"} and codes[-1] == "CONFLICT"
    await untouched(market)


@pytest.mark.parametrize("guilty", [0, 1], ids=["the first", "the one with the subsidy"])
async def test_an_honest_leg_is_paid_though_the_bills_other_node_is_convicted(market, guilty):
    """The subsidy takes all that the bill brings to an empty pool, out of which the convicted
    node's client gets its share back."""
    world = market.world
    await market.must("verifier", await market.proven_guilty(world.node[0]))
    honest = world.node[1].identity
    nodes = [world.node[0], world.node[1]] if guilty == 0 else [world.node[1], world.node[0]]
    hold = world.hold("acme", CREDIT // 2)
    first = Leg(nodes[0], output=1, billed_output=1)
    second = Leg(nodes[1], leg=1, prefix=1, output=1, billed_input=0, billed_output=1, subsidy=212)
    await market.must("router", hold, world.capture(hold.id, first, second))
    assert await market.available(f"node-locked:{honest}") > 0
    assert await market.available(f"node-locked:{world.node[0].identity}") == 0
    assert market.fsck().problems == []
