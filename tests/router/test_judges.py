"""Verifiers do not judge nodes of their own declared owner, as routers see it."""

import pytest

from trueweight.protos.errors import BadSignature
from trueweight.router.judges import Judges
from trueweight.router.keyring import Keys
from trueweight.simulation.ledger_world import World, make_signer


@pytest.mark.parametrize(
    ("verifiers", "needed", "enough"), [(1, 1, False), (2, 1, True), (2, 2, False)]
)
def test_a_node_that_too_few_could_convict_gets_no_work(verifiers, needed, enough):
    world = World(verifiers=verifiers, convictions_needed=needed)
    keys = Keys(world.market_id, world.market.ring)
    judges = Judges(world.market, keys)
    owned = make_signer("owned", world.market_id, owner="verifier")
    assert judges.are_enough_for(owned.identity), "nothing is declared yet"
    keys.learn(owned.key_event)
    assert judges.are_enough_for(owned.identity) is enough
    stranger = make_signer("stranger", world.market_id)
    keys.learn(stranger.key_event)
    assert judges.are_enough_for(stranger.identity)


def test_an_owners_statements_about_its_node_are_not_believed():
    world = World(verifiers=2)
    keys = Keys(world.market_id, world.market.ring)
    owned = make_signer("owned", world.market_id, owner="verifier")
    keys.learn(owned.key_event)
    judges = Judges(world.market, keys)
    with pytest.raises(BadSignature, match="owner in common"):
        judges.check(world.identity("verifier"), owned.identity)
    judges.check(world.identity("verifier1"), owned.identity)
    judges.check(world.market_id, owned.identity)
