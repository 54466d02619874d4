"""What the fold makes of one verifier's word, and how far a verifier releases."""

import pytest

from trueweight.protos.envelope import seal
from trueweight.protos.v1.audit_pb2 import Conviction, Verdict
from trueweight.protos.v1.market_pb2 import Reinstatement, Suspension
from trueweight.verifier.epochs import RatePolicy
from trueweight.verifier.report import explain, state_of
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
    reinstated(world, node)
    view = fold(world)
    assert state_of(view, node) == "clear" and view.node(node).pooled.wealth.r == 0
    assert "reinstated it" in explain(view, node).words
    app = world.app()
    await kit.settle(world, app)
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
    spoken_for = app.service.agenda._spoken_for
    assert max(spoken_for.values()) > first_lost
    judged = {v.receipt_digest for v in world.ledger.of_kind("verdict", Verdict)}
    assert lost not in judged
    assert world.ledger.released, "what came before may go"
    assert max(below for _, _, below in world.ledger.released) <= first_lost
