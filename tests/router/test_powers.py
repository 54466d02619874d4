"""Whose word stops a node's work: leaves of the log as a router follows them."""

import pytest

from trueweight.protos.deterrence import needed_nano
from trueweight.protos.envelope import seal
from trueweight.protos.market_terms import (
    DEFAULT_AUDIT_TERMS,
    DEFAULT_ENGINES,
    MAX_GAIN_TOKENS,
    allow_list_of,
)
from trueweight.protos.v1.audit_pb2 import Conviction, EpochOpen, NodeRate
from trueweight.protos.v1.log_pb2 import LogEntry
from trueweight.protos.v1.market_pb2 import (
    EngineFingerprint,
    MarketDescriptor,
    Offer,
    Reinstatement,
    Suspension,
)
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

    def __init__(self, needed=2, audit_terms=None):
        self.world = World(verifiers=3, convictions_needed=needed, audit_terms=audit_terms)
        keys = Keys(self.world.market_id, self.world.market.ring)
        judges = Judges(self.world.market, keys)
        exposure = self.exposure = Exposure(judges)
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


# What a verifier states when it opens an epoch.


@pytest.mark.parametrize(
    "statement",
    [
        {"default_rate_ppm": 0},
        {"default_rate_ppm": 10**6, "rates": [NodeRate(node_id="n", rate_ppm=9_999)]},
        {"duplicate_rate_ppm": 0},
        {"gain_tokens": MAX_GAIN_TOKENS + 1},
        {"charge_reference_nano": 1},
    ],
    ids=", ".join,
)
async def test_attack_an_epoch_outside_the_markets_terms_does_not_count(statement):
    log = Log(needed=1, audit_terms=DEFAULT_AUDIT_TERMS)
    within = {"default_rate_ppm": 10_000, "duplicate_rate_ppm": 100_000, "gain_tokens": 1_000}
    for number, said in ((2, {**within, **statement}), (1, within)):
        message = EpochOpen(
            market_id=log.world.market_id,
            verifier_id=log.world.identity("verifier"),
            epoch=number,
            **said,
        )
        await log.put("epoch-open", message, "verifier")
        # Had the first counted, the second would go back in time.
        assert (log.exposure.room_nano(log.node, 10**9, 10**6) is None) is (number == 2)


async def test_attack_one_verifier_stops_the_market_by_an_absurd_gain():
    log = Log(needed=2, audit_terms=DEFAULT_AUDIT_TERMS)
    for by, gain in (("verifier", 1_000), ("verifier1", 1_000), ("verifier2", MAX_GAIN_TOKENS)):
        message = EpochOpen(
            market_id=log.world.market_id,
            verifier_id=log.world.identity(by),
            epoch=1,
            default_rate_ppm=10**6,
            duplicate_rate_ppm=100_000,
            gain_tokens=gain,
        )
        await log.put("epoch-open", message, by)
    stake = 10 * needed_nano(10**6, 1_000, 10**6)
    assert log.exposure.room_nano(log.node, stake, 10**6) > 0


# Which engines get paid work.


def offer_of(log, **declared):
    fingerprint = EngineFingerprint(
        engine="vllm", engine_version="vllm 0.32.0", dtype="bfloat16", quantization="none",
        kv_dtype="auto", sampler_id="tw-gumbel-1", sampler_precision="fp32",
    )  # fmt: skip
    for name, value in declared.items():
        setattr(fingerprint, name, value)
    return log.fleet.remember(Offer(node_id=log.node, fingerprint=fingerprint))


def test_attack_a_node_with_an_fp8_kv_cache_registers():
    log = Log()
    assert not log.fleet.refusal(offer_of(log))
    assert "KV-cache dtype 'fp8'" in log.fleet.refusal(offer_of(log, kv_dtype="fp8"))


def test_the_markets_signed_list_decides_not_the_routers_default():
    log = Log()
    signed = MarketDescriptor()
    signed.engines.CopyFrom(DEFAULT_ENGINES)
    signed.engines.kv_dtypes[:] = ["fp8"]
    log.fleet._allow = AllowList(allow_list_of(signed))
    assert not log.fleet.refusal(offer_of(log, kv_dtype="fp8"))
    assert "KV-cache dtype 'auto'" in log.fleet.refusal(offer_of(log))
    assert allow_list_of(MarketDescriptor()) == DEFAULT_ENGINES
