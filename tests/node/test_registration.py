"""Offers, registration with retries, attaching from behind NAT, claims, the journal."""

from __future__ import annotations

import asyncio
import contextlib
import os

import grpc.aio
import pytest

from trueweight.node.backoff import Backoff
from trueweight.node.claims import CLAIM_BEFORE_EXPIRY_MS, claim_due, claim_operation
from trueweight.node.config import NodeConfig, advertised_endpoint, pick_router
from trueweight.node.describe import open_offer
from trueweight.node.journal import JournalEntry, ReceiptJournal
from trueweight.node.registration import Registrar
from trueweight.node.synthetic import Speed
from trueweight.protos.envelope import seal
from trueweight.protos.errors import InvalidRequest, NotFound, Unavailable
from trueweight.protos.sampling import Sampling
from trueweight.protos.v1 import market_pb2 as mp
from trueweight.protos.v1.market_pb2 import Member
from trueweight.protos.v1.router_pb2 import RegisterResponse
from trueweight.protos.v1.router_pb2_grpc import RouterServicer, add_RouterServicer_to_server
from trueweight.runtime import rpc
from trueweight.runtime.clock import ManualClock
from trueweight.runtime.tls import ensure_certificate


async def test_the_offer_says_what_is_served_and_verifies(world):
    async with world.node(capacity=7) as app:
        async with asyncio.timeout(5):
            while not world.registered:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        offer = open_offer(world.registered[0], world.market.market_id)
        assert offer.node_id == app.node_id
        assert offer.endpoint == app.endpoint
        assert offer.tls_certificate_pem == ensure_certificate(world.root / "node", 0)
        assert (offer.capacity, offer.lease_ms) == (7, 15_000)
        (model,) = offer.models
        assert model.ask_input_nano_per_mtok == 100_000_000
        assert model.ask_output_nano_per_mtok == 300_000_000
        assert model.max_context_tokens == 512


async def test_the_same_keys_give_the_same_node_after_a_restart(world):
    async with world.node() as first:
        pass
    async with world.node() as second:
        assert second.node_id == first.node_id


class Flaky:
    """A router that fails a few times, then answers."""

    def __init__(self, *answers):
        self.answers, self.times = list(answers), []

    async def __call__(self, request):
        answer = self.answers.pop(0) if self.answers else RegisterResponse(lease_ms=15_000)
        if isinstance(answer, Exception):
            raise answer
        return answer


async def test_registration_retries_with_bounded_growing_waits_then_renews_before_the_lease_ends():
    down = Unavailable("no router")
    flaky = Flaky(*[down] * 12, RegisterResponse(lease_ms=9_000, eligible=True))
    registrar = Registrar(flaky, lambda: b"offer", ManualClock(), os.urandom)
    waits = [await registrar.register_once() for _ in range(12)]
    assert all(100 <= wait <= 15_000 for wait in waits)
    assert waits[0] <= 200
    assert sum(waits[6:]) > sum(waits[:6])
    assert registrar.last_error is down
    assert await registrar.register_once() == 3_000
    assert registrar.eligible
    assert registrar.last_error is None


async def test_attack_router_with_absurd_leases_gets_neither_a_flood_nor_silence():
    flaky = Flaky(RegisterResponse(lease_ms=0), RegisterResponse(lease_ms=2**63))
    registrar = Registrar(flaky, lambda: b"offer", ManualClock(), os.urandom)
    assert await registrar.register_once() == 500
    assert await registrar.register_once() == 60_000


async def test_an_offer_refused_as_wrong_is_asked_again_rarely():
    flaky = Flaky(InvalidRequest("the price is absurd"))
    registrar = Registrar(flaky, lambda: b"offer", ManualClock(), os.urandom)
    assert await registrar.register_once() >= 5_000


def test_backoff_is_jittered_bounded_and_resets():
    low, high = Backoff(lambda n: b"\0" * n), Backoff(lambda n: b"\xff" * n)
    lows, highs = [low.next_ms() for _ in range(12)], [high.next_ms() for _ in range(12)]
    assert all(b > 1.9 * a for a, b in zip(lows, highs, strict=True))
    assert highs[-1] == 15_000
    low.reset()
    assert low.next_ms() == pytest.approx(100, rel=0.01)


class AttachRouter(RouterServicer):
    """A router that only takes attached nodes; sessions run through the test's FakeRouter."""

    def __init__(self, world, make):
        self._world, self._make = world, make
        self.sessions = asyncio.Queue()

    async def Attach(self, requests, context):
        router = self._make(self._world, "")
        router.node_id = self._world.node_id

        class Stream:
            async def write(self, frame):
                await context.write(frame)

            async def read(self):
                return await anext(requests, grpc.aio.EOF)

        router.stream = Stream()
        await router.shake_hands()
        await self.sessions.put(router)
        await router._read()


@contextlib.asynccontextmanager
async def attached(world, fake_router, engine=None):
    """A node that dialled a router, and the router's ends of its sessions."""
    from trueweight.node.app import NodeApp

    keys = world.root / "router"
    pem = ensure_certificate(keys, 1_700_000_000_000)
    server = rpc.make_server()
    endpoint = rpc.listen(server, "127.0.0.1:0", keys)
    servicer = AttachRouter(world, fake_router)
    add_RouterServicer_to_server(servicer, server)
    await server.start()
    router = Member(
        identity=world.signers["router"].identity, endpoint=endpoint, tls_certificate_pem=pem
    )
    config = world.config(attach=True, router=router)
    app = NodeApp(config, engine or world.engine(), ledger=world.ledger)
    world.node_id = app.node_id
    await app.start()
    try:
        yield app, servicer
    finally:
        await app.close()
        await server.stop(0)


async def test_a_node_behind_nat_dials_out_and_serves_the_same_session(world, fake_router):
    async with attached(world, fake_router) as (app, servicer):
        router = await asyncio.wait_for(servicer.sessions.get(), 10)
        offer = open_offer(router.offer, world.market.market_id)
        assert (offer.node_id, offer.endpoint) == (app.node_id, "")
        calls = [router.dispatch(seed=i) for i in range(5)]
        await router.run(*calls)
        for call in range(1, 6):
            router.check(call)


async def test_an_attached_node_comes_back_after_a_lost_session(world, fake_router):
    async with attached(world, fake_router) as (_, servicer):
        first = await asyncio.wait_for(servicer.sessions.get(), 10)
        await first.send(first.dispatch(max_tokens=3), first.dispatch(tamper=reuse_call_1))
        second = await asyncio.wait_for(servicer.sessions.get(), 10)
        await second.run(second.dispatch(max_tokens=3))
        second.check(1)


def reuse_call_1(dispatch):
    dispatch.call = 1


async def test_an_attached_node_drains(world, fake_router):
    engine = world.engine(speed=Speed(decode_tokens_per_s=50))
    async with attached(world, fake_router, engine) as (app, servicer):
        router = await asyncio.wait_for(servicer.sessions.get(), 10)
        await router.send(router.dispatch(sampling=Sampling(), max_tokens=20))
        await router.until(lambda: 1 in router.output)
        await asyncio.wait_for(app.drain(), 10)
        await router.until(lambda: router.ended)
        assert router.check(1).output_tokens == 20


def entry(number, expires=1_000):
    return JournalEntry(bytes([number]) * 32, b"h" * 16, expires, b"assignment", receipt(number))


def receipt(number):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from trueweight.protos.identity import Signer

    signer = Signer("node", Ed25519PrivateKey.from_private_bytes(b"k" * 32), b"")
    return seal(mp.Receipt(output_tokens=number), signer)


async def test_what_the_router_withheld_is_claimed_once_before_the_hold_ends(world):
    journal = ReceiptJournal()
    now = 1_000_000
    journal.record(entry(1, now + CLAIM_BEFORE_EXPIRY_MS - 1))
    journal.record(entry(2, now + CLAIM_BEFORE_EXPIRY_MS + 1))
    assert await claim_due(journal, world.ledger, now) == 1
    (operation,) = world.ledger.claims
    assert operation == claim_operation(entry(1, now))
    assert operation.claim.assignment == b"assignment"
    assert await claim_due(journal, world.ledger, now) == 0
    assert len(world.ledger.claims) == 1
    assert await claim_due(journal, world.ledger, now + 10) == 1


async def test_a_refused_claim_is_settled_and_a_lost_one_is_asked_again(world):
    journal = ReceiptJournal()
    journal.record(entry(1))
    world.ledger.down = True
    with pytest.raises(Unavailable):
        await claim_due(journal, world.ledger, 0)
    world.ledger.down, world.ledger.refuse = False, True
    assert await claim_due(journal, world.ledger, 0) == 0
    assert await claim_due(journal, world.ledger, 0) == 0
    assert len(world.ledger.claims) == 1


async def test_a_leg_that_died_is_not_claimed_but_not_run_again(world):
    from dataclasses import replace

    journal = ReceiptJournal()
    journal.record(replace(entry(1), claimable=False))
    assert await claim_due(journal, world.ledger, 0) == 0
    assert not world.ledger.claims
    assert journal.knows(bytes([1]) * 32)


async def test_keys_of_another_market_are_refused(world):
    from trueweight.node.app import NodeApp
    from trueweight.runtime.keys import create_keys

    create_keys(world.root / "foreign", "othermarket", ManualClock())
    with pytest.raises(InvalidRequest, match="another market"):
        NodeApp(world.config("foreign"), world.engine())


def test_the_journal_survives_a_killed_process_and_forgets_in_time(tmp_path):
    path = tmp_path / "receipts.sqlite"
    first = ReceiptJournal(path)
    first.record(entry(1))
    first.record(entry(1))
    second = ReceiptJournal(path)  # the first was never closed, as after kill -9
    assert second.knows(bytes([1]) * 32)
    assert second.due(2_000) == [entry(1)]
    second.forget_expired(1_001)
    assert not second.knows(bytes([1]) * 32)


def make_member(name, endpoint="r:1"):
    return Member(identity=name, role=Member.ROUTER, endpoint=endpoint, tls_certificate_pem="pem")


class Named:
    def __init__(self, *routers):
        self._routers = routers

    def members(self, role):
        return self._routers


def test_routers_are_picked_by_identity_or_address_and_stay_pinned():
    one, two = make_member("one", "a:1"), make_member("two", "b:2")
    assert pick_router(Named(one, two), "") == one
    assert pick_router(Named(one, two), "two") == two
    assert pick_router(Named(one, two), "b:2") == two
    moved = pick_router(Named(one), "c:3")
    assert (moved.identity, moved.endpoint, moved.tls_certificate_pem) == ("one", "c:3", "pem")
    for market, wanted, error in [
        (Named(), "", NotFound),
        (Named(one), "three", NotFound),
        (Named(one, two), "c:3", InvalidRequest),
        (Named(make_member("one", "")), "", InvalidRequest),
    ]:
        with pytest.raises(error):
            pick_router(market, wanted)


def test_the_advertised_address_can_be_dialled(world):
    config = NodeConfig(world.model_dir, world.market, world.root)

    def advertise(listening, **changes):
        from dataclasses import replace

        return advertised_endpoint(replace(config, **changes), listening)

    assert advertise("127.0.0.1:77") == "127.0.0.1:77"
    assert advertise("0.0.0.0:77", advertise="gpu.example:0") == "gpu.example:77"
    assert advertise("0.0.0.0:77", advertise="gpu.example:443") == "gpu.example:443"
    assert advertise("0.0.0.0:77", attach=True) == ""
    for changes in ({}, {"advertise": "gpu.example"}, {"advertise": ":1"}):
        with pytest.raises(InvalidRequest):
            advertise("0.0.0.0:77", **changes)
