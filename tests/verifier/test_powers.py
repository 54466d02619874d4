"""What the fold makes of one verifier's word, and how far a verifier releases."""

from dataclasses import replace
from itertools import permutations

import pytest

from trueweight.protos.envelope import seal
from trueweight.protos.errors import Conflict
from trueweight.protos.evidence import Wealth
from trueweight.protos.ids import derived_id
from trueweight.protos.market_terms import DEFAULT_AUDIT_TERMS, MAX_GAIN_TOKENS
from trueweight.protos.v1.audit_pb2 import Conviction, EpochOpen, Verdict
from trueweight.protos.v1.ledger_pb2 import Result
from trueweight.protos.v1.market_pb2 import AuditTerms, Reinstatement, Suspension
from trueweight.verifier.appeal import Appeal, Retried
from trueweight.verifier.appeal_commands import check_lift, lifted
from trueweight.verifier.deterrence import DETECTABLE_TOKENS
from trueweight.verifier.epochs import RatePolicy
from trueweight.verifier.owed import accounts
from trueweight.verifier.publishing import Publisher
from trueweight.verifier.report import explain, state_of, status_rows
from trueweight.verifier.rewards import payable
from trueweight.verifier.state import LogView

HONEST, WRONG = [0.0] * 40, [0.9] * 50
POLICY = RatePolicy(epoch_ms=60_000, audit_deadline_ms=20_000)


def fold(world):
    view = LogView(world.market)
    for entry in world.ledger.entries:
        view.apply(entry)
    return view


def suspension(world, signer, node, *, lifted=False):
    message = Suspension(
        market_id=world.market_id, node_id=node, issuer=signer.identity, lifted=lifted
    )
    world.ledger.log_envelope(seal(message, signer))


def reinstated(world, node, signer=None):
    signer = signer or world.market_signer
    message = Reinstatement(market_id=world.market_id, node_id=node, issuer=signer.identity)
    world.ledger.log_envelope(seal(message, signer))


def test_attack_one_verifier_of_two_suspends_and_frees(make_world):
    world = make_world(verifier_count=2, convictions_needed=2)
    node = world.add_node("good")
    one, other = world.verifiers
    suspension(world, one, node)
    assert not fold(world).node(node).suspended
    suspension(world, other, node)
    suspension(world, one, node, lifted=True)
    assert fold(world).node(node).suspended
    suspension(world, world.market_signer, node, lifted=True)
    assert not fold(world).node(node).suspended


async def convicted(world, kit, name="bad"):
    node = world.add_node(name)
    await kit.drive(world, (app := world.app()), app.service.ready.is_set)
    for _ in range(8):
        world.serve(name, WRONG)
    app = world.app()
    await kit.settle(world, app)
    assert app.service.view.convicted(node)
    return node


async def test_a_reinstated_node_begins_anew_and_can_be_convicted_anew(world, kit):
    node = await convicted(world, kit)
    suspension(world, world.verifiers[0], node, lifted=True)
    assert state_of(fold(world), node) == "convicted", "lifting frees nobody who is convicted"
    reinstated(world, node, world.verifiers[0])
    assert fold(world).convicted(node), "verifiers do not reinstate"
    for _ in range(8):
        world.serve("bad", WRONG)  # not audited before the market decides
    reinstated(world, node)
    view = fold(world)
    assert state_of(view, node) == "clear" and view.node(node).pooled.wealth.r == 0
    assert "reinstated it" in explain(view, node).words
    app = world.app()
    await kit.settle(world, app)
    assert len(world.ledger.of_kind("verdict", Verdict)) == 16
    assert app.service.view.node(node).pooled.wealth.r == 0
    assert len(world.ledger.of_kind("conviction", Conviction)) == 1, "the past convicts nobody"
    world.ledger.convicted.clear()
    for _ in range(8):
        world.serve("bad", WRONG)
    app = world.app()
    await kit.settle(world, app)
    assert app.service.view.convicted(node) and list(world.ledger.convicted) == [node]
    assert len(world.ledger.of_kind("conviction", Conviction)) == 2


# Releases.


async def until_epoch(world, kit, number):
    app = world.app(policy=POLICY)
    await kit.drive(world, app, lambda: len(app.service.agenda.my_epochs) >= number)
    return app


@pytest.fixture
async def earning(world, kit):
    """A node with a bond and locked earnings, and three receipts that were audited."""
    node = world.add_node("good")
    world.ledger.stakes = {f"node-bond:{node}": 10**12, f"node-locked:{node}": 5_000}
    await kit.drive(world, (app := world.app(policy=POLICY)), app.service.ready.is_set)
    for _ in range(3):
        world.serve("good", HONEST, charge_nano=40)
    await kit.settle(world, world.app(policy=POLICY))
    return world


def receipts_of(world):
    return [e.index for e in world.ledger.entries if e.kind == "receipt"]


async def test_attack_earnings_that_no_audit_speaks_for_are_not_released(earning, kit):
    """Nothing is owed of what came last, but nobody has looked at it either."""
    world = earning
    audited = receipts_of(world)[-1]
    (secret,) = (world.directory / "verifier-0").glob("1.secret")
    assert secret.exists()
    app = world.app(policy=POLICY)
    agenda = app.service.agenda
    agenda._owes = lambda epoch, receipt: False
    for _ in range(4):
        world.serve("good", HONEST, charge_nano=40)
    await kit.drive(world, app, lambda: len(world.ledger.released) >= 1)
    assert world.ledger.released[-1][2] == audited + 1 < receipts_of(world)[-1]


async def test_attack_a_release_across_an_epoch_whose_secret_is_lost(earning, kit):
    world = earning
    await until_epoch(world, kit, 2)
    lost = world.serve("good", HONEST, charge_nano=40)
    first_lost = receipts_of(world)[-1]
    (world.directory / "verifier-0" / "2.secret").unlink()
    app = await until_epoch(world, kit, 3)
    world.serve("good", HONEST, charge_nano=40)
    app = await until_epoch(world, kit, 4)
    assert app.service.agenda._spoken_for(world.nodes["good"].identity) > first_lost
    judged = {v.receipt_digest for v in world.ledger.of_kind("verdict", Verdict)}
    assert lost not in judged
    assert world.ledger.released, "what came before may go"
    assert max(below for _, _, below in world.ledger.released) <= first_lost


# Appeals.


def appeal_of(node, *, upheld, error=""):
    wealth = Wealth()
    for _ in range(20 if upheld else 1):
        wealth = wealth.add(256 * 10**9, 256, 400_000)
    assert (wealth.state == "convict") is upheld
    return Appeal(node, 1e7, wealth, (Retried(1, 256, 0.9, 0.9, error),))


async def test_attack_lift_pretends_that_a_convicted_node_may_work_again(world, kit):
    """Its captures would go on being undone: only the market takes a conviction back."""
    node = await convicted(world, kit)
    with pytest.raises(Conflict, match="convicted") as caught:
        check_lift(fold(world), appeal_of(node, upheld=False))
    assert "ledger reinstate" in caught.value.hint


def test_lift_frees_a_suspended_node_if_the_appeal_speaks_for_it(world):
    node, (me,) = world.add_node("good"), world.verifiers
    suspension(world, me, node)
    view = fold(world)
    for not_for_it in (appeal_of(node, upheld=True), appeal_of(node, upheld=False, error="erased")):
        with pytest.raises(Conflict, match="stays"):
            check_lift(view, not_for_it)
    check_lift(view, appeal_of(node, upheld=False))
    assert view.node(node).suspended
    world.ledger.log_envelope(seal(lifted(world.market, me, node), me))
    assert not fold(world).node(node).suspended


# The market's terms.


def test_attack_a_sole_verifier_opens_an_epoch_that_owes_nothing(make_world):
    world = make_world(audit_terms=DEFAULT_AUDIT_TERMS)
    (me,) = world.verifiers
    message = EpochOpen(market_id=world.market_id, verifier_id=me.identity, epoch=1)
    world.ledger.log_envelope(seal(message, me))
    view = fold(world)
    assert not view.epochs.get(me.identity)
    (found,) = accounts(view, 1, 0)
    assert not found.kept and "below the market's floor" in found.refused
    assert not payable(view, found).verdict_digests and payable(view, found).why_not


async def test_an_honest_verifiers_epochs_keep_to_the_terms_whatever_its_policy(make_world, kit):
    terms = AuditTerms(floor_ppm=300_000, duplicate_rate_ppm=400_000, max_gain_tokens=5)
    world = make_world(audit_terms=terms)
    world.ledger.stakes = {f"node-bond:{world.add_node('good')}": 10**18}
    policy = RatePolicy(newcomer_tokens=1, floor_ppm=1, duplicate_ppm=1, epoch_ms=60_000)
    policy = replace(policy, charge_reference_nano=10**9)
    await kit.drive(world, (app := world.app(policy=policy)), app.service.ready.is_set)
    for _ in range(4):
        world.serve("good", HONEST)
    app = world.app(policy=policy)
    await kit.drive(world, app, lambda: len(app.service.agenda.my_epochs) >= 2)
    opened = world.ledger.of_kind("epoch-open", EpochOpen)[-1]
    assert [r.rate_ppm for r in opened.rates] == [300_000]
    assert (opened.duplicate_rate_ppm, opened.charge_reference_nano) == (400_000, 0)
    assert opened.gain_tokens == 5


@pytest.mark.parametrize("stricter", [{"floor_ppm": 999_999}, {"duplicate_rate_ppm": 400_000}])
async def test_stricter_terms_do_not_leave_a_verifier_in_an_epoch_that_is_revealed(
    make_world, kit, stricter
):
    """Epochs from before the market's file was issued anew are outside its terms by now, all of
    them or all since nodes have rates, but their numbers are taken: the verifier must go beyond
    them, at once."""
    world = make_world()
    world.ledger.stakes = {f"node-bond:{world.add_node('good')}": 10**18}
    policy = RatePolicy(newcomer_tokens=1, epoch_ms=60_000)

    def opened():
        return world.ledger.of_kind("epoch-open", EpochOpen)

    for number in range(5):
        app = world.app(policy=policy)
        await kit.drive(world, app, lambda number=number: len(opened()) > number)
        world.serve("good", [0.0] * 256)
    before = len(opened())
    world.audit_terms = AuditTerms(max_gain_tokens=10**9, **stricter)
    world.market = world._write_market()
    app = world.app(policy=policy)
    await kit.drive(world, app, lambda: len(opened()) > before, rounds=100)
    await kit.settle(world, app := world.app(policy=policy))
    newest = app.service.agenda.my_epochs[-1].message
    assert (newest.epoch, len(opened())) == (before + 1, before + 1)


def test_the_largest_gain_that_is_believed_is_the_largest_that_verifiers_state():
    assert MAX_GAIN_TOKENS == DETECTABLE_TOKENS


@pytest.mark.parametrize(("kv_dtype", "outcome"), [("fp8", Verdict.INVALID_RECEIPT), ("auto", 0)])
async def test_attack_a_node_with_an_fp8_kv_cache_is_paid(make_world, kit, kv_dtype, outcome):
    """Should a router let it through, the verifier refunds its clients."""
    world = make_world()
    world.add_node("good")
    await kit.drive(world, (app := world.app()), app.service.ready.is_set)

    def declares(receipt):
        receipt.fingerprint.engine = "vllm"
        receipt.fingerprint.engine_version = "vllm 0.32.0"
        receipt.fingerprint.dtype = "bfloat16"
        receipt.fingerprint.kv_dtype = kv_dtype

    world.serve("good", HONEST, lie=declares)
    await kit.settle(world, world.app())
    (verdict,) = world.ledger.of_kind("verdict", Verdict)
    assert verdict.outcome == (outcome or Verdict.SCORED)
    assert verdict.l0_failure == ("allowed" if outcome else "")
    assert bool(world.ledger.refunds) is bool(outcome)


async def test_who_may_not_see_balances_is_told_that_the_stake_is_unknown(world, kit):
    world.ledger.stakes = {f"node-bond:{world.add_node('good')}": 10**12}
    await kit.drive(world, (app := world.app()), app.service.ready.is_set)
    world.serve("good", HONEST)
    app = world.app()
    await kit.settle(world, app)
    (row,) = status_rows(app.service.view, None)
    assert (row.at_stake_nano, row.cap_nano, row.deterred) == (None, None, None)


async def test_attack_a_rival_takes_the_ids_of_a_verifiers_statements_before_it(make_world):
    """Ids are the same after a crash, and a secret: in the ledger whoever comes first has one."""
    world = make_world(verifier_count=2)

    class Recorder:
        def __init__(self):
            self.ids = []

        async def apply(self, operations):
            self.ids += [operation.id for operation in operations]
            return [Result(status=Result.APPLIED) for _ in operations]

    async def ids_of(signer):
        publisher = Publisher(ledger := Recorder(), signer)
        await publisher.publish(EpochOpen(epoch=1), "epoch-open", b"1")
        await publisher.refund(b"r" * 32, "", b"")
        await publisher.convict(b"", (b"node",), 0)
        return ledger.ids

    me, rival = world.verifiers
    mine = await ids_of(me)
    assert mine == await ids_of(me)
    assert not set(mine) & set(await ids_of(rival))
    public = (b"1", b"node", b"r" * 32, me.identity.encode())
    foreseen = {
        derived_id(about, *parts)
        for about in ("epoch-open", "refund", "convict")
        for length in (1, 2)
        for parts in permutations(public, length)
    }
    assert not set(mine) & foreseen
