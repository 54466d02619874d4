"""Attacks on the HTTP front below the API: silence, floods, bombs, heads that are no HTTP."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging

import aiohttp
import pytest
import uvloop
from aiohttp import web

from trueweight.node.synthetic import Speed
from trueweight.router import http_body
from trueweight.router.http_errors import error_response
from trueweight.router.openai_responses import Shape
from trueweight.runtime import http_server
from trueweight.runtime.http_server import HttpServer, Seats, seated
from trueweight.simulation.inprocess import MODEL_ID, NodeSpec

BODY = {"model": MODEL_ID, "prompt": "def f", "max_tokens": 4, "seed": 3, "ignore_eos": True}
IDLE_HEAD = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: "


async def dial(port, data=b""):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    if data:
        writer.write(data)
        await writer.drain()
    return reader, writer


async def ended(reader):
    """True once the other side closed the connection."""
    try:
        async with asyncio.timeout(5):
            while await reader.read(65536):
                pass
    except ConnectionError:
        pass
    return True


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.fixture
async def server():
    """``await server(seats=…)``: port, seats, gate."""
    servers = []
    yield lambda seats=100: serve(servers, seats)
    for made in servers:
        await made.close()


async def serve(servers, seats):
    """/now answers, /wait waits for the gate, /long answers with more than any buffer takes."""
    gate = asyncio.Event()

    async def now(_request):
        return web.Response(text="ok")

    async def wait(_request):
        await gate.wait()
        return web.Response(text="ok")

    async def long(_request):
        return web.Response(body=b"x" * (64 * 1024 * 1024))

    made = Seats(seats)
    app = web.Application(middlewares=[seated(made)])
    app.router.add_get("/now", now)
    app.router.add_get("/wait", wait)
    app.router.add_get("/long", long)
    server = HttpServer(app, made, error_response)
    servers.append(server)
    await server.start("127.0.0.1:0")
    return int(server.endpoint.rpartition(":")[2]), made, gate


async def get(port, path="/now"):
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}{path}") as answer,
    ):
        return answer.status


async def test_attack_heads_that_never_end_are_given_up(server, monkeypatch):
    monkeypatch.setattr(http_server, "IDLE_S", 0.2)
    port, seats, _ = await server()
    silent, _w1 = await dial(port)
    slow, trickle = await dial(port, IDLE_HEAD)
    # A second head on a connection that was good once is bounded as well.
    again, _w2 = await dial(port, b"GET /now HTTP/1.1\r\nHost: x\r\n\r\n" + IDLE_HEAD)

    async def drip():
        while not trickle.is_closing():
            trickle.write(b"a")
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    assert await ended(silent) and await ended(slow) and await ended(again)
    dripping.cancel()
    await until(lambda: seats.taken == 0)


async def test_attack_idle_connections_do_not_lock_out_clients(server):
    port, seats, gate = await server(seats=4)
    working, request = await dial(port, b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
    await until(lambda: not seats._waiting and seats.taken == 1)
    idle = [await dial(port, IDLE_HEAD) for _ in range(20)]
    assert await get(port) == 200
    assert seats.taken <= 4
    assert await ended(idle[0][0])
    # Whoever has a request under way is never the one that gives way.
    gate.set()
    assert b"200 OK" in await asyncio.wait_for(working.readline(), 5)
    for _, writer in (*idle, (working, request)):
        writer.close()


def test_the_same_on_the_event_loop_that_production_uses():
    async def flood():
        servers = []
        port, seats, gate = await serve(servers, 2)
        idle = [await dial(port, IDLE_HEAD) for _ in range(5)]
        assert await get(port) == 200 and seats.taken <= 2
        busy = [await dial(port, b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(2)]
        await until(lambda: seats.taken == 2 and not seats._waiting)
        assert await get(port) == 503
        gate.set()
        for _, writer in (*idle, *busy):
            writer.close()
        await until(lambda: seats.taken == 0)
        await servers[0].close()

    uvloop.run(flood())


async def test_when_all_are_busy_a_new_connection_is_told_so(server):
    port, seats, gate = await server(seats=2)
    busy = [await dial(port, b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(2)]
    await until(lambda: seats.taken == 2 and not seats._waiting)
    assert await get(port) == 503
    gate.set()
    for reader, _ in busy:
        assert b"200 OK" in await asyncio.wait_for(reader.readline(), 5)
    await until(lambda: len(seats._waiting) == 2)
    assert await get(port) == 200
    for _, writer in busy:
        writer.close()


async def test_attack_a_client_that_does_not_read_is_given_up(server, monkeypatch):
    monkeypatch.setattr(http_server, "WRITE_TIMEOUT_S", 0.2)
    port, seats, _ = await server()
    _, writer = await dial(port, b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
    await until(lambda: seats.taken == 1)
    await until(lambda: seats.taken == 0)
    writer.close()


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer tw-" + b"s3cret" * 2000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nAuthorization Bearer tw-s3cret\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"a%d: s3cret\r\n" % i for i in range(500)) + b"\r\n",
        b"\x16\x03\x01 tls client hello s3cret\r\n\r\n",
        b"POST /now HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /now s3cret\r\n\r\n",
    ],
    ids=["long", "no-colon", "many", "tls", "smuggled", "no-version"],
)
async def test_attack_malformed_heads_get_a_clear_answer_and_leave_no_secret_in_logs(
    server, caplog, head
):
    caplog.set_level("DEBUG")
    port, _, _ = await server()
    reader, writer = await dial(port, head)
    answer = await asyncio.wait_for(reader.read(), 10)
    assert answer.startswith(b"HTTP/1.1 400 ") or answer.startswith(b"HTTP/1.0 400 ")
    error = json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]
    assert error["type"] == "invalid_request_error"
    assert "s3cret" not in answer.decode() + caplog.text
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
    writer.close()


async def test_attack_compressed_bombs_are_not_unpacked(bazaar, shopper):
    async with bazaar() as market:
        key = await market.client_key("acme")
        bomb = gzip.compress(json.dumps(BODY).encode() + b" " * (30 * 1024 * 1024))
        for encoding in ("gzip", "deflate", "br", "zstd"):
            headers = {"Authorization": f"Bearer {key}", "Content-Encoding": encoding}
            async with (
                aiohttp.ClientSession(headers=headers) as session,
                session.post(f"{market.base_url}/completions", data=bomb) as answer,
            ):
                assert answer.status == 400
                assert "Compressed" in (await answer.json())["error"]["message"]


@pytest.mark.parametrize(
    ("bound", "most"), [("MAX_BODIES_BYTES_PER_ACCOUNT", 4950), ("MAX_BODIES_PER_ACCOUNT", 1)]
)
async def test_attack_one_client_cannot_fill_the_router_with_bodies(
    bazaar, shopper, monkeypatch, bound, most
):
    monkeypatch.setattr(http_body, bound, most)
    async with bazaar() as market:
        client, other = await shopper(market), await shopper(market, "other")
        key = await market.client_key("acme")
        port = int(market.router.http_endpoint.rpartition(":")[2])
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            "Transfer-Encoding: chunked\r\n\r\n"
        )
        _, writer = await dial(port, head.encode() + b"1324\r\n" + b"{" * 0x1324 + b"\r\n")
        status = 200
        async with asyncio.timeout(5):
            while status == 200:
                status, answer, headers = await client.post(BODY, "/completions")
        assert status == 429 and headers["Retry-After"]
        assert answer["error"]["type"] == "rate_limit_error"
        assert (await other.post(BODY, "/completions"))[0] == 200
        writer.close()
        async with asyncio.timeout(5):
            while status == 429:
                status, _, _ = await client.post(BODY, "/completions")
        assert status == 200


async def test_attack_paths_that_climb_lead_nowhere(bazaar, shopper):
    async with bazaar() as market:
        key = await market.client_key("acme")
        port = int(market.router.http_endpoint.rpartition(":")[2])
        for path in (
            "/v1/receipts/../../../etc/passwd",
            "/v1/receipts/..%2f..%2fetc%2fpasswd",
            "/v1/receipts/%00",
            "/v1/models/..%2f..%2f..%2fetc%2fpasswd",
            "/v1/models/%0d%0aSet-Cookie:x",
        ):
            head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            reader, writer = await dial(port, f"{head}Connection: close\r\n\r\n".encode())
            answer = await asyncio.wait_for(reader.read(), 5)
            assert answer.split(b" ", 2)[1] in (b"400", b"404"), (path, answer)
            assert b"root:" not in answer and b"\nSet-Cookie" not in answer
            writer.close()


def test_attack_output_text_cannot_forge_events():
    shape = Shape(is_chat=True, response_id="x", model="m\n\ndata: y", created=0)
    text = 'a"\n\ndata: [DONE]\n\ndata: {"error":1}\r\n\r\u2028\x00'
    for event in (shape.chunk(text, usage=False), shape.chunk(text, first=True, usage=True)):
        assert event.startswith(b"data: ") and event.endswith(b"\n\n")
        assert b"\n" not in event[:-2] and b"\r" not in event
        assert json.loads(event[6:])["choices"][0]["delta"]["content"] == text


async def test_attack_no_prompt_output_or_key_reaches_a_log(bazaar, shopper, caplog):
    """Everything in one process at the most talkative level."""
    caplog.set_level("DEBUG")
    secret = "xyzzy plugh"
    async with bazaar(nodes=(NodeSpec("n", speed=Speed(200.0)),)) as market:
        key = await market.client_key("acme")
        url = f"{market.base_url}/chat/completions"
        chat = {"model": MODEL_ID, "messages": [{"role": "user", "content": secret}]}
        headers = {"Authorization": f"Bearer {key}"}
        texts = []
        async with aiohttp.ClientSession(headers=headers) as session:
            for change in (
                {"max_tokens": 30, "ignore_eos": True},
                {"max_tokens": 30, "stream": True},
                {"max_tokens": -1},
                {"temperature": secret},
                {secret: 1},
                {"model": secret},
                {"provider": {"only": [secret]}},
                {"stop": [secret]},
            ):
                async with session.post(url, json=chat | change) as answer:
                    body = await answer.text()
                    if answer.status == 200 and "stream" not in change:
                        texts.append(json.loads(body)["choices"][0]["message"]["content"])
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await session.post(url, json=chat | {"max_tokens": 900, "ignore_eos": True})
            for auth in ({}, {"Authorization": f"Bearer {key}x"}):
                async with session.post(url, json=chat, headers=auth) as answer:
                    await answer.read()
    logged = "\n".join(f"{r.getMessage()} {r.exc_text or ''}" for r in caplog.records)
    assert texts
    for hidden in (secret, "xyzzy", key, key.split("-", 2)[2], *(t[:40] for t in texts if t)):
        assert hidden not in logged
