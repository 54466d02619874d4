"""Targets of the attacks: a ledger on SQLite with real evidence, and whole markets in process."""

from __future__ import annotations

import aiohttp
import pytest

from trueweight.ledger.fsck import check
from trueweight.ledger.schema import make_engine, normal_url
from trueweight.ledger.service import Ledger
from trueweight.protos.envelope import digest_of
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.runtime.clock import SystemClock
from trueweight.simulation.inprocess import InProcessMarket, MarketSpec
from trueweight.simulation.ledger_world import World

CREDIT = 10**9


class _HandClock(SystemClock):
    """Wall time by hand, waiting in real time."""

    def __init__(self, world):
        self._world = world

    def now_unix_ms(self):
        return self._world.now


class Books:
    """A running ledger and handles for every role; strangers go by their identity."""

    def __init__(self, world, ledger, url):
        self.world, self.ledger, self.url = world, ledger, url

    def as_(self, who):
        signer = self.world.signers.get(who)
        return self.ledger.as_caller(signer.identity if signer else who)

    async def do(self, who, *operations):
        return await self.as_(who).apply(operations)

    async def must(self, who, *operations):
        results = await self.do(who, *operations)
        refused = [(r.code, r.message) for r in results if r.status == r.REFUSED]
        assert not refused
        return results

    async def available(self, account):
        records = await self.as_("admin").balances([account])
        return int(records[0].available_nano) if records else 0

    async def open_hold(self, amount=CREDIT, client="acme", ttl_ms=60_000):
        hold = self.world.hold(client, amount, ttl_ms=ttl_ms)
        await self.must("router", hold)
        return hold.id

    async def captured(self, *legs, client="acme"):
        """A hold and its capture; the receipts' digests."""
        capture = self.world.capture(await self.open_hold(client=client), *legs)
        await self.must("router", capture)
        return [digest_of(r) for r in capture.capture.receipts]

    def claim(self, hold_id, leg):
        assignment, receipt = self.world.evidence(hold_id, leg, b"r" * 16)
        body = pb.Claim(hold_id=hold_id, assignment=assignment, receipt=receipt)
        return pb.Operation(id=self.world.new_id(), claim=body)

    async def expire(self):
        await self.must("router", pb.Operation(id=self.world.new_id(), expire=pb.Expire(limit=10)))


@pytest.fixture
async def books(tmp_path):
    world = World()
    url = f"sqlite:///{tmp_path / 'books.sqlite'}"
    ledger = Ledger(world.market, world.signers["ledger"], url, _HandClock(world))
    await ledger.start()
    made = Books(world, ledger, url)
    for node in world.node:
        await made.as_("router").publish(node.key_event)
    await made.must("admin", world.deposit("acme", 10 * CREDIT))
    yield made
    await ledger.close()
    engine = make_engine(normal_url(url))
    signer = world.signers["ledger"]
    keys = world.market.ring.keys_of(signer.identity)
    found = check(engine, world.market_id, keys)
    engine.dispose()
    assert found.problems == []


@pytest.fixture
def bazaar(tmp_path):
    """Starts markets in process: ``async with bazaar(nodes=…) as market``."""

    def make(**spec):
        return InProcessMarket(tmp_path / "market", MarketSpec(**spec))

    return make


class Shopper:
    """A client of one market's HTTP API."""

    def __init__(self, market, key):
        self._url, self._headers = market.base_url, {"Authorization": f"Bearer {key}"}

    async def post(self, body, path="/chat/completions"):
        """Status and JSON of a request without streaming."""
        async with (
            aiohttp.ClientSession(headers=self._headers) as session,
            session.post(self._url + path, json=body) as answer,
        ):
            return answer.status, await answer.json(), dict(answer.headers)

    async def delete(self, path):
        async with (
            aiohttp.ClientSession(headers=self._headers) as session,
            session.delete(self._url + path) as answer,
        ):
            return answer.status, await answer.json()


@pytest.fixture
def shopper():
    async def make(market, name="acme", credits=100):
        return Shopper(market, await market.client_key(name, credits))

    return make
