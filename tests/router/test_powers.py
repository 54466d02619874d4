"""Whose word stops a node's work: leaves of the log as a router follows them."""

import pytest

from trueweight.protos.envelope import seal
from trueweight.protos.v1.audit_pb2 import Conviction
from trueweight.protos.v1.log_pb2 import LogEntry
from trueweight.protos.v1.market_pb2 import Reinstatement, Suspension
from trueweight.router.catalog import Catalog
from trueweight.router.exposure import Exposure
from trueweight.router.fleet import Fleet
from trueweight.router.judges import Judges
from trueweight.router.keyring import Keys
from trueweight.router.market_feed import MarketFeed
from trueweight.router.offers import AllowList
from trueweight.runtime.clock import ManualClock
from trueweight.simulation.ledger_world import World, make_signer


class Log:
    """A router's view of a market with three verifiers of which two convict."""

    def __init__(self, needed=2):
        self.world = World(verifiers=3, convictions_needed=needed)
        keys = Keys(self.world.market_id, self.world.market.ring)
        judges = Judges(self.world.market, keys)
        exposure = Exposure(judges)
        self.fleet = Fleet(ManualClock(), AllowList(), judges=judges, exposure=exposure)
        self.feed = MarketFeed(
            self.world.market, keys, Catalog(keys, {}), self.fleet, judges=judges, exposure=exposure
        )
        self.owned = make_signer("owned", self.world.market_id, owner="verifier")
        keys.learn(self.owned.key_event)
        self.node = self.world.node[0].identity

    def signer(self, by):
        return self.world.market_signer if by == "market" else self.world.signers[by]

    async def put(self, kind, message, by):
        entry = LogEntry(index=self.feed.next_index, kind=kind, body=seal(message, self.signer(by)))
        await self.feed.apply(entry)

    async def suspend(self, by, node="", lifted=False):
        message = Suspension(
            market_id=self.world.market_id,
            node_id=node or self.node,
            issuer=self.signer(by).identity,
            lifted=lifted,
        )
        await self.put("suspension", message, by)

    async def convict(self, by):
        message = Conviction(
            market_id=self.world.market_id,
            node_id=self.node,
            verifier_id=self.signer(by).identity,
        )
        await self.put("conviction", message, by)

    async def reinstate(self, by):
        message = Reinstatement(
            market_id=self.world.market_id, node_id=self.node, issuer=self.signer(by).identity
        )
        await self.put("reinstatement", message, by)

    @property
    def stopped(self):
        return self.fleet.is_suspended(self.node)


async def test_attack_one_verifier_of_several_suspends_a_rival():
    log = Log()
    for _ in range(2):
        await log.suspend("verifier")
    assert not log.stopped
    await log.suspend("verifier1")
    assert log.stopped


async def test_attack_one_verifier_lifts_what_two_suspended():
    log = Log()
    await log.suspend("verifier")
    await log.suspend("verifier1")
    for _ in range(2):
        await log.suspend("verifier2", lifted=True)
    assert log.stopped
    await log.suspend("verifier", lifted=True)
    assert not log.stopped


async def test_the_markets_own_word_stops_and_frees():
    log = Log()
    await log.suspend("market")
    assert log.stopped
    await log.suspend("verifier", lifted=True)
    assert log.stopped
    await log.suspend("market", lifted=True)
    assert not log.stopped


async def test_attack_a_verifiers_voice_about_its_owners_node_counts_neither_way():
    log = Log()
    await log.suspend("verifier", log.owned.identity)
    await log.suspend("verifier1", log.owned.identity)
    assert not log.fleet.is_suspended(log.owned.identity)
    await log.suspend("verifier2", log.owned.identity)
    await log.suspend("verifier", log.owned.identity, lifted=True)
    await log.suspend("verifier1", log.owned.identity, lifted=True)
    assert log.fleet.is_suspended(log.owned.identity)


async def test_attack_verifiers_free_a_convicted_node():
    log = Log()
    await log.convict("verifier")
    assert not log.stopped
    await log.convict("verifier1")
    for by in ("verifier", "verifier1", "verifier2", "market"):
        await log.suspend(by, lifted=True)
    assert log.stopped


@pytest.mark.parametrize(("by", "freed"), [("market", True), ("admin", True), ("verifier", False)])
async def test_only_the_market_reinstates_a_convicted_node(by, freed):
    log = Log(needed=1)
    await log.convict("verifier")
    await log.reinstate(by)
    assert log.stopped is not freed
