"""Attacks by nodes on routers and clients: stalling, refusing, poisoning, overcharging."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from trueweight.node import session as node_session
from trueweight.node.admission import Refused, admit
from trueweight.node.engine import Step
from trueweight.node.synthetic import Speed, SyntheticEngine
from trueweight.node.synthetic_model import ModelShape, SyntheticModel, shape_from_directory
from trueweight.protos.envelope import seal
from trueweight.protos.errors import EngineError, InvalidRequest, ReceiptRefused
from trueweight.protos.market_terms import epoch_refusal
from trueweight.protos.v1.audit_pb2 import EpochOpen
from trueweight.protos.v1.market_pb2 import Offer, OfferedModel
from trueweight.router import fleet, legs
from trueweight.router import patience as router_patience
from trueweight.router.calls import Call, NewTokens, Outgoing
from trueweight.router.legs import LegEnd, LegRunner, LegTiming
from trueweight.router.lifecycle import Timing
from trueweight.router.node_session import NodeSession
from trueweight.runtime import rpc
from trueweight.runtime.clock import SystemClock
from trueweight.simulation.inprocess import MODEL_DIRECTORY, MODEL_ID, NodeSpec
from trueweight.simulation.ledger_world import make_signer

CHEAP, DEAR = 10_000_000, 400_000_000
ABSURD = 900_000_000_000
BODY = {"model": MODEL_ID, "prompt": "def f", "max_tokens": 40, "seed": 3, "ignore_eos": True}
QUICK = Timing(
    request_ms=20_000,
    queue_ms=5_000,
    leg=LegTiming(first_token_ms=3_000, between_tokens_ms=3_000, receipt_ms=2_000),
)


class Evil(SyntheticEngine):
    """An engine with the right weights and a wrong will."""

    def __init__(self):
        shape = shape_from_directory(MODEL_DIRECTORY, ModelShape(mean_output_tokens=64))
        super().__init__(SyntheticModel(shape), speed=Speed(), max_running=64)


class Stalls(Evil):
    """Takes work and never begins."""

    async def generate(self, job):
        await asyncio.sleep(3600)
        yield Step((), None)


class Poisons(Evil):
    """Sends ids that no other node can take as a prefix, then dies."""

    async def generate(self, job):
        yield Step((2**31, 2**31 + 1), None)
        await asyncio.sleep(0.2)
        raise EngineError("poisoned")


def cheap(name, **more):
    return NodeSpec(name, ask_input=CHEAP, ask_output=CHEAP, **more)


def dear(name, **more):
    return NodeSpec(name, ask_input=DEAR, ask_output=DEAR, **more)


async def settled(market):
    async with asyncio.timeout(10):
        while market.router.front._runs:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_attack_a_node_that_never_begins_is_not_paid_for_prompts(bazaar, shopper):
    """Clients give up, the router cancels, the node signs for nothing."""
    async with bazaar(nodes=(cheap("stalls", engine=Stalls()),), timing=QUICK) as market:
        client = await shopper(market)
        for _ in range(2):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(client.post(BODY, "/completions"), 0.5)
            await settled(market)
        account = await market.balance("client:acme")
        assert int(account.debits_posted_nano or 0) == 0
        assert await market.held_nano("acme") == 0
        (record,) = market.router.fleet.all()
        assert record.measured.completed == 0


async def test_attack_a_cheap_node_that_refuses_everything_does_not_close_the_market(
    bazaar, shopper, monkeypatch
):
    nodes = (cheap("refuses"), dear("works"))
    async with bazaar(nodes=nodes, timing=QUICK, draw=lambda: 0.5) as market:
        refuser = market.nodes["refuses"].node_id

        def full(dispatch, terms, now):
            if terms.node_id == refuser:
                return Refused("OVER_CAPACITY", "all places are taken")
            return admit(dispatch, terms, now)

        monkeypatch.setattr(node_session, "admit", full)
        client = await shopper(market)
        statuses = [(await client.post(BODY, "/completions"))[0] for _ in range(10)]
        assert statuses == [200] * 10


@pytest.fixture
def asked(monkeypatch):
    """When each assignment came to a node; all of them say that they are full."""
    times = []

    def full(*_):
        times.append(time.monotonic())
        return Refused("OVER_CAPACITY", "all places are taken")

    monkeypatch.setattr(node_session, "admit", full)
    return times


async def test_a_full_market_is_429_when_the_queue_time_is_over(bazaar, shopper, asked):
    """Not 503 after a moment: nothing is wrong with a node whose places others have taken."""
    async with bazaar(nodes=(dear("full"),), timing=replace(QUICK, queue_ms=1_500)) as market:
        client = await shopper(market)
        started = time.monotonic()
        status, answer, headers = await client.post(BODY, "/completions")
        assert status == 429 and "busy" in answer["error"]["message"], answer
        assert time.monotonic() - started >= 1.5 and "Retry-After" in headers
        # Asked less and less often.
        assert 3 <= len(asked) <= 8


async def test_full_nodes_are_asked_for_the_whole_queue_time(bazaar, shopper, asked, monkeypatch):
    """However often they refuse meanwhile; and not in a loop where the request ends sooner."""
    monkeypatch.setattr(router_patience, "_FIRST_PAUSE_MS", 4.0)
    monkeypatch.setattr(router_patience, "_LONGEST_PAUSE_MS", 4.0)
    timing = replace(QUICK, queue_ms=60_000, request_ms=1_500)
    async with bazaar(nodes=(dear("full"),), timing=timing) as market:
        client = await shopper(market)
        started = time.monotonic()
        status, answer, _ = await client.post(BODY, "/completions")
        assert status == 429, answer
        assert time.monotonic() - started >= 1.5
        assert len(asked) <= 1_500 / 4 + 2


async def test_attack_out_of_vocabulary_ids_do_not_poison_the_continuation(bazaar, shopper):
    nodes = (cheap("poisons", engine=Poisons()), dear("works"))
    async with bazaar(nodes=nodes, timing=QUICK, draw=lambda: 0.5) as market:
        client = await shopper(market)
        status, body, _ = await client.post(BODY, "/completions")
        assert status == 200, body
        assert body["usage"]["completion_tokens"] == 40


async def test_attack_too_many_tokens_are_another_nodes_chance(bazaar, shopper, monkeypatch):
    """More than were asked for: neither kept, nor the end of the request."""
    nodes = (cheap("floods"), dear("works"))
    async with bazaar(nodes=nodes, timing=QUICK, draw=lambda: 0.5) as market:
        flooder, receive = market.nodes["floods"].node_id, NodeSession._receive
        floods = []

        def flooded(session, frame):
            if session.node_id == flooder:
                for tokens in frame.tokens:
                    tokens.token_ids.extend([300] * 100)
                    floods.append(tokens.call)
            receive(session, frame)

        monkeypatch.setattr(NodeSession, "_receive", flooded)
        client = await shopper(market)
        status, answer, _ = await client.post(BODY, "/completions")
        assert status == 200, answer
        assert floods and answer["usage"]["completion_tokens"] == BODY["max_tokens"]


async def test_attack_tokens_after_a_stop_are_not_kept():
    """Whatever the node goes on sending while its receipt is awaited."""
    window, sent = legs._WINDOW_TOKENS, []

    class Session:
        def start(self, _, tokens):
            call = Call(1, tokens, Outgoing(ignore, ignore, self.send, ignore))
            asyncio.get_running_loop().call_soon(call.deliver, NewTokens((5,) * tokens))
            self.call = call
            return call

        def send(self, _, tokens):
            sent.append(tokens)
            asyncio.get_running_loop().call_soon(self.call.deliver, NewTokens((5,) * tokens))

    leg = leg_at(Session(), max_tokens=1_000_000, receipt_ms=50)

    async def first_only(_):
        return 1

    result = await leg.run(first_only)
    assert result.end is LegEnd.FAILED and len(result.received) <= 2 * window
    assert sum(sent) <= window


async def test_attack_more_tokens_than_were_asked_for_end_the_leg():
    class Session:
        def start(self, _, tokens):
            call = Call(1, tokens, Outgoing(ignore, ignore, ignore, ignore))
            for count in (4, 4, 4):
                call.deliver(NewTokens((5,) * count))
            return call

    taken = []

    async def take(ids):
        taken.extend(ids)

    result = await leg_at(Session(), max_tokens=10).run(take)
    assert (result.end, result.code) == (LegEnd.FAILED, ReceiptRefused.code)
    assert len(taken) == len(result.received) == 8


def leg_at(session, *, max_tokens, receipt_ms=1_000):
    model = SimpleNamespace(manifest=SimpleNamespace(vocabulary_size=100))
    plan = SimpleNamespace(salt=b"s" * 16, prompt=(1,), grammar_source=b"", model=model)
    return LegRunner(
        SimpleNamespace(plan=plan, prefix=(), deadline_ms=60_000),
        SimpleNamespace(session=session),
        SimpleNamespace(envelope=b"", message=SimpleNamespace(max_tokens=max_tokens)),
        clock=SystemClock(),
        timing=LegTiming(receipt_ms=receipt_ms),
        keys=None,
    )


def ignore(*_):
    return None


async def test_attack_registrations_that_cannot_be_dialled_leave_nothing(bazaar, monkeypatch):
    async with bazaar(nodes=(), timing=QUICK) as market:
        service, connections = market.router._service, market.router._connections
        good = (market.directory / "keys/router/tls-cert.pem").read_text()
        for pem in ("x" * 1_000, "x" * 100_000, 2 * good, of_unknown_version(good)):
            with pytest.raises(InvalidRequest, match="TLS certificate"):
                await service._take_offer(fake_offer(market, "careless", pem=pem))
        assert not market.router.fleet.all()

        def broken(*_, **__):
            raise RuntimeError("no such certificate")

        monkeypatch.setattr(rpc, "make_channel", broken)
        connections.ensure(await service._take_offer(fake_offer(market, "sly")))
        await asyncio.sleep(0.1)
        assert not connections._dialled and not connections._tasks


async def test_attack_an_absurd_price_is_not_explored_and_does_not_inflate_holds(bazaar, shopper):
    """A free identity asks 900 credits per million tokens: nobody who named no maximum pays it,
    and nobody needs a balance for it."""
    absurd = NodeSpec("absurd", ask_input=ABSURD, ask_output=ABSURD)
    async with bazaar(nodes=(dear("fair"), absurd), timing=QUICK, draw=lambda: 0.001) as market:
        client = await shopper(market, credits=1)
        body = BODY | {"max_tokens": 1500}
        status, answer, _ = await client.post(body, "/completions")
        assert status == 200, answer
        assert answer["usage"]["cost_nano"] <= 1600 * DEAR // 10**6
        status, answer, _ = await client.post(BODY, "/completions")
        assert status == 200


async def test_attack_a_newcomer_works_without_a_stake_or_ahead_of_the_audits(bazaar, shopper):
    """Once a verifier states the power of its audits, a node without a bond gets nothing, and one
    with a bond no more than it deters while nobody audits."""
    price = 4 * DEAR
    bonded = NodeSpec("bonded", ask_input=price, ask_output=price, bond_credits=1)
    async with bazaar(nodes=(cheap("bare"), bonded), timing=QUICK) as market:
        client = await shopper(market)
        assert (await client.post(BODY, "/completions"))[0] == 200
        verifier, terms = market.signer("verifier"), market.market.descriptor.audit_terms
        epoch = EpochOpen(
            market_id=market.market.market_id,
            verifier_id=verifier.identity,
            epoch=1,
            default_rate_ppm=10**6,
            duplicate_rate_ppm=terms.duplicate_rate_ppm,
            # At these prices all of the bond but 800,000 nanocredits, a dozen answers.
            gain_tokens=(10**9 - 800_000) * 10**6 // (2 * 2 * price),
        )
        assert not epoch_refusal(market.market.descriptor, epoch)
        await market.port("verifier").publish(seal(epoch, verifier))
        digest = market.router.catalog.all()[0].manifest_digest
        served, status, body = [], 200, BODY
        async with asyncio.timeout(60):
            # The router follows the log.
            while any(v.room_nano is None for v in market.router.fleet.views(digest)):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            while status == 200:
                status, _, headers = await client.post(body, "/completions")
                if status == 200:
                    served.append(json.loads(headers["x-trueweight-route"])["node"])
                    body = BODY | {"seed": len(served)}
        assert status == 503 and served
        assert set(served) == {market.nodes["bonded"].node_id}


async def test_attack_free_identities_do_not_fill_the_fleet(bazaar, shopper, monkeypatch):
    """Thousands register at addresses where nobody is; a real node still gets in and works."""
    monkeypatch.setattr(fleet, "MAX_NODES", 8)
    async with bazaar(nodes=(), timing=QUICK) as market:
        service, connections = market.router._service, market.router._connections
        for index in range(30):
            offer = fake_offer(market, f"sybil{index}")
            connections.ensure(await service._take_offer(offer))
        assert len(market.router.fleet.all()) <= 8
        await market.add_node(dear("real"))
        await market.until_connected(1)
        client = await shopper(market)
        status, answer, _ = await client.post(BODY, "/completions")
        assert status == 200, answer
        await asyncio.sleep(0.5)
        assert len(connections._tasks) <= 8 + 1


def of_unknown_version(pem):
    der = x509.load_pem_x509_certificate(pem.encode()).public_bytes(Encoding.DER)
    # The first field of a certificate of version 3.
    body = base64.b64encode(der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x09", 1))
    return f"-----BEGIN CERTIFICATE-----\n{body.decode()}\n-----END CERTIFICATE-----\n"


def fake_offer(market, name, pem=""):
    signer = make_signer(name, market.market.market_id)
    digest = market.router.catalog.all()[0].manifest_digest
    model = OfferedModel(
        manifest_digest=digest,
        ask_input_nano_per_mtok=1,
        ask_output_nano_per_mtok=1,
        max_context_tokens=4096,
    )
    pem = pem or (market.directory / "keys/router/tls-cert.pem").read_text()
    offer = Offer(
        market_id=market.market.market_id,
        node_id=signer.identity,
        key_events=[signer.key_event],
        endpoint="127.0.0.1:9",
        tls_certificate_pem=pem,
        models=[model],
        capacity=64,
        lease_ms=600_000,
        issued_at_unix_ms=market.clock.now_unix_ms(),
    )
    return seal(offer, signer)


async def test_attack_a_nodes_words_reach_neither_logs_nor_clients(
    bazaar, shopper, monkeypatch, caplog
):
    """It knows the prompt; what it says when it refuses is not passed on."""
    caplog.set_level("DEBUG")
    async with bazaar(nodes=(dear("talks"),), timing=QUICK) as market:
        words = "the secret prompt\nERROR forged line"
        monkeypatch.setattr(node_session, "admit", lambda *_: Refused("CONFLICT", words))
        status, answer, _ = await (await shopper(market)).post(BODY, "/completions")
        assert status == 503
        assert "secret" not in str(answer) + caplog.text
