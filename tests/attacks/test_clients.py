"""Attacks by clients: free answers, others' receipts, more than the balance, hostile bytes."""

from __future__ import annotations

import asyncio
import os
from collections import Counter

import aiohttp

from trueweight.protos.envelope import parse_envelope, parse_payload
from trueweight.protos.v1.audit_pb2 import Verdict
from trueweight.runtime.rpc import AccessTokens
from trueweight.simulation.audited_market import EngineReference
from trueweight.simulation.inprocess import MODEL_ID, NodeSpec
from trueweight.verifier.app import Connections, VerifierApp
from trueweight.verifier.transcripts import GrpcTranscripts

BODY = {"model": MODEL_ID, "prompt": "def f", "max_tokens": 8, "seed": 3, "ignore_eos": True}


def verifier_of(market):
    """The production verifier, at the router's real transcripts."""
    signer = market.signer("verifier")
    tokens = AccessTokens(signer, market.market.market_id, market.clock, os.urandom)
    member = market.router_member()
    transcripts = GrpcTranscripts(market.market, tokens)
    transcripts._routers = {member.identity: member}
    reference = EngineReference(market.engine(NodeSpec("reference")))
    return VerifierApp(
        market.market,
        signer,
        Connections(market.port("verifier"), transcripts, reference),
        data_directory=market.directory / "verifier-data",
        clock=market.clock,
    )


async def test_attack_erasing_the_transcript_does_not_make_an_answer_free(bazaar, shopper):
    async with bazaar() as market:
        app, stop = verifier_of(market), asyncio.Event()
        client = await shopper(market)
        running = asyncio.create_task(app.run(stop))
        try:
            async with asyncio.timeout(20):
                await app.service.ready.wait()
                paused = app.service._worker.auditor.transcripts
                app.service._worker.auditor.transcripts._routers = {}
                _, answer, _ = await client.post(BODY, "/completions")
                assert await client.delete(f"/receipts/{answer['id']}/transcript") == (
                    200,
                    {"erased": 1},
                )
                member = market.router_member()
                paused._routers = {member.identity: member}
                while not app.service.view.verdicts.values():  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        finally:
            stop.set()
            await running
        leaves = (await market.port("admin").read_log(0, 1000, ["verdict"])).entries
        (verdict,) = [parse_payload(parse_envelope(leaf.body), Verdict) for leaf in leaves]
        assert verdict.outcome == Verdict.UNCALIBRATED and verdict.l0_failure == "erased"
        spent = int((await market.balance("client:acme")).debits_posted_nano)
        returned = int((await market.balance("client:acme")).credits_posted_nano) - 100 * 10**9
        assert spent == answer["usage"]["cost_nano"] > 0 and returned == 0


async def test_attack_another_client_reads_or_erases_a_receipt(bazaar, shopper):
    async with bazaar() as market:
        mine, other = await shopper(market, "mine"), await shopper(market, "other")
        _, answer, _ = await mine.post(BODY, "/completions")
        assert (await other.delete(f"/receipts/{answer['id']}/transcript"))[0] == 404
        assert await mine.delete(f"/receipts/{answer['id']}/transcript") == (200, {"erased": 1})


async def test_attack_many_requests_at_once_do_not_overdraw(bazaar, shopper):
    async with bazaar(
        nodes=(NodeSpec("n", ask_input=9 * 10**11, ask_output=9 * 10**11),)
    ) as market:
        client = await shopper(market, credits=5)
        body = BODY | {"max_tokens": 1500}
        answers = await asyncio.gather(*(client.post(body, "/completions") for _ in range(8)))
        statuses = Counter(status for status, _, _ in answers)
        assert set(statuses) == {200, 402} and 1 <= statuses[200] <= 3
        account = await market.balance("client:acme")
        spent = sum(a["usage"]["cost_nano"] for s, a, _ in answers if s == 200)
        assert 0 <= int(account.available_nano) == 5 * 10**9 - spent


HOSTILE = [
    b"[" * 200_000,
    b'{"model": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
    b'{"model": "tw-demo-3m", "prompt": "\\ud800"}',
    b'{"model": "tw-demo-3m", "prompt": "\xff\xfe"}',
    b'{"model": "tw-demo-3m", "prompt": [4294967295]}',
    b'{"model": "tw-demo-3m", "prompt": [' + b"1," * 500_000 + b"1]}",
    b'{"model": "tw-demo-3m", "prompt": "x", "max_tokens": 1e400}',
    b'{"model": "tw-demo-3m", "prompt": "x", "seed": 99999999999999999999}',
    b'{"model": "tw-demo-3m", "prompt": "x", "provider": {"max_price": {"input": "1e999999999"}}}',
    b'{"model": "tw-demo-3m", "prompt": "x", "stop": ["' + b"a" * 300 + b'"]}',
    b'{"model": "../../etc/passwd", "prompt": "x"}',
    b'{"model": "tw-demo-3m", "prompt": "' + b"a" * 9_000_000 + b'"}',
]


async def test_attack_hostile_bodies_are_client_errors_and_cost_nothing(bazaar, shopper):
    async with bazaar() as market:
        key = await market.client_key("acme")
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        async with aiohttp.ClientSession(headers=headers) as session:
            for data in HOSTILE:
                async with session.post(f"{market.base_url}/completions", data=data) as answer:
                    assert 400 <= answer.status < 500, (data[:60], await answer.text())
        assert int((await market.balance("client:acme")).available_nano) == 100 * 10**9
        assert await market.held_nano("acme") == 0


async def test_attack_a_body_that_never_ends_is_dropped(bazaar, monkeypatch):
    from trueweight.router import http_body

    monkeypatch.setattr(http_body, "BODY_TIMEOUT_S", 0.5)
    async with bazaar() as market:
        key = await market.client_key("acme")
        host, _, port = market.router.http_endpoint.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            "Content-Length: 1000\r\n\r\n{".encode()
        )
        async with asyncio.timeout(5):
            head = await reader.readline()
        assert b" 408 " in head
        writer.close()
