"""The log over HTTP: what a stranger needs to check it, and bounds on what a stranger may cost."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
from types import SimpleNamespace

import aiohttp
import pytest

from trueweight.ledger import public_log
from trueweight.ledger.public_log import error_response, make_app
from trueweight.ledger.servicer import LedgerRpc
from trueweight.protos.checkpoint import log_origin, open_note
from trueweight.protos.envelope import digest_of
from trueweight.protos.errors import NotFound, PermissionDenied
from trueweight.protos.identity import public_bytes
from trueweight.protos.merkle import leaf_hash, root, verify_consistency, verify_inclusion
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.runtime import http_server
from trueweight.runtime.http_server import HttpServer, Seats
from trueweight.simulation.ledger_world import Leg

CREDIT = 10**9


class Stranger:
    """Knows the market's descriptor and an address, nothing else."""

    def __init__(self, session, endpoint):
        self._session, self.endpoint = session, endpoint

    async def get(self, path):
        async with self._session.get(f"http://{self.endpoint}{path}") as answer:
            body = await answer.read()
            return answer.status, await answer.json() if body[:1] == b"{" else body

    async def must(self, path):
        status, body = await self.get(path)
        assert status == 200, body
        return body


@pytest.fixture
async def stranger(bench):
    async with serving(bench) as made:
        yield made


@contextlib.asynccontextmanager
async def serving(bench, connections=64):
    """The ledger's log behind an HTTP server."""
    seats = Seats(connections)
    server = HttpServer(make_app(bench.ledger, seats), seats, error_response)
    await server.start("127.0.0.1:0")
    try:
        async with aiohttp.ClientSession() as session:
            yield Stranger(session, server.endpoint)
    finally:
        await server.close()


async def grow(bench, holds=60):
    """Some leaves, one captured receipt, and a checkpoint over all of it; the capture."""
    world = bench.world
    await bench.publish_nodes()
    await bench.must("admin", world.deposit("acme", 1000 * CREDIT))
    first = world.hold("acme", CREDIT)
    await bench.must("router", first, *[world.hold("acme", CREDIT) for _ in range(holds)])
    capture = world.capture(first.id, Leg(world.node[0]))
    await bench.must("router", capture)
    return capture


async def checkpoint_of(stranger, bench, size):
    """The signed checkpoint over at least ``size`` leaves."""
    signer = bench.world.signers["ledger"]
    for _ in range(100):
        status, note = await stranger.get("/checkpoint")
        if status == 200:
            origin = log_origin(bench.world.market_id)
            state = open_note(note.decode(), origin, public_bytes(signer.key))
            if state.size >= size:
                return state
        await asyncio.sleep(0.05)
    raise AssertionError("no checkpoint in 5 s")


async def test_a_stranger_checks_a_receipt_by_checkpoint_and_inclusion(bench, stranger):
    capture = await grow(bench)
    size = (await stranger.must("/v1/leaves?limit=1"))["tree_size"]
    await checkpoint_of(stranger, bench, size)
    receipt = capture.capture.receipts[0]
    found = await stranger.must(f"/v1/inclusion?digest={digest_of(receipt).hex()}")
    assert base64.b64decode(found["leaf"]["body"]) == receipt
    signer = bench.world.signers["ledger"]
    origin = log_origin(bench.world.market_id)
    state = open_note(found["checkpoint"], origin, public_bytes(signer.key))
    path = [base64.b64decode(node) for node in found["path"]]
    verify_inclusion(leaf_hash(receipt), found["index"], state.size, path, state.root)
    by_index = await stranger.must(f"/v1/inclusion?index={found['index']}")
    assert by_index["leaf"] == found["leaf"]


async def test_a_stranger_checks_that_old_checkpoints_are_the_beginning_of_new_ones(
    bench, stranger
):
    await grow(bench, holds=5)
    old = await checkpoint_of(stranger, bench, 10)
    await bench.must("router", *[bench.world.hold("acme", 1) for _ in range(300)])
    new = await checkpoint_of(stranger, bench, old.size + 300)
    found = await stranger.must(f"/v1/consistency?old={old.size}&new={new.size}")
    path = [base64.b64decode(node) for node in found["path"]]
    verify_consistency(old.size, old.root, new.size, new.root, path)


async def test_tiles_are_those_of_c2sp_and_give_the_signed_root(bench, stranger):
    await grow(bench, holds=300)
    size = (await stranger.must("/v1/leaves?limit=1"))["tree_size"]
    state = await checkpoint_of(stranger, bench, size)
    assert size > 256
    full = await stranger.must("/tile/0/000")
    rest = await stranger.must(f"/tile/0/001.p/{size - 256}")
    data = full + rest
    hashes = [data[i : i + 32] for i in range(0, len(data), 32)]
    assert root(hashes) == state.root
    assert await stranger.must("/tile/1/000.p/1") == root(hashes[:256])
    leaves, start = [], 0
    while start < size:
        page = await stranger.must(f"/v1/leaves?from={start}")
        leaves += [base64.b64decode(leaf["body"]) for leaf in page["leaves"]]
        start = page["next"]
    assert [leaf_hash(body) for body in leaves] == hashes


HOSTILE = {
    "/v1/inclusion": 400,
    "/v1/inclusion?index=-1": 400,
    "/v1/inclusion?index=1&digest=00": 400,
    "/v1/inclusion?digest=zz": 400,
    "/v1/inclusion?index=99999999999999999999999": 400,
    "/v1/inclusion?index=9223372036854775807": 404,
    f"/v1/inclusion?digest={'0' * 64}": 404,
    "/v1/inclusion?index=0&tree_size=1000000": 400,
    "/v1/consistency?old=5": 400,
    "/v1/consistency?old=3&new=1000000": 400,
    "/v1/consistency?old=9&new=3": 400,
    "/v1/leaves?from=x": 400,
    "/tile/0/x000": 400,
    "/tile/0/999": 404,
    "/tile/63/000": 404,
    "/tile/0/000.p/257": 404,
    "/tile/0/../../etc/passwd": 404,
    "/nothing": 404,
}


async def test_attack_hostile_questions_are_refused_by_name(bench, stranger):
    await grow(bench, holds=3)
    await checkpoint_of(stranger, bench, 1)
    for path, status in HOSTILE.items():
        found, body = await stranger.get(path)
        assert (path, found) == (path, status)
        assert body["error"]["code"]


async def test_attack_a_silent_or_slow_peer_does_not_hold_a_connection(bench, monkeypatch):
    monkeypatch.setattr(http_server, "IDLE_S", 0.2)
    async with serving(bench) as stranger:
        host, _, port = stranger.endpoint.partition(":")
        for said in (b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: "):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(said)
            assert await asyncio.wait_for(_rest_of(reader), 10) == b""
            writer.close()
        assert (await stranger.must("/healthz"))["ok"]


async def _rest_of(reader):
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


async def test_attack_idle_connections_lock_nobody_out(bench):
    async with serving(bench, connections=4) as stranger:
        host, _, port = stranger.endpoint.partition(":")
        peers = [await asyncio.open_connection(host, int(port)) for _ in range(8)]
        assert (await stranger.must("/healthz"))["ok"]
        assert await asyncio.wait_for(_rest_of(peers[0][0]), 10) == b""
        for _, writer in peers:
            writer.close()


async def test_attack_what_is_no_http_is_refused(bench):
    async with serving(bench) as stranger:
        host, _, port = stranger.endpoint.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"\x16\x03\x01 not http\r\n\r\n")
        assert b" 400 " in await asyncio.wait_for(_rest_of(reader), 10)
        writer.close()


async def test_attack_questions_beyond_the_bound_are_refused_at_once(bench, monkeypatch):
    monkeypatch.setattr(public_log, "MAX_IN_FLIGHT", 0)
    async with serving(bench) as stranger:
        status, body = await stranger.get("/healthz")
        assert (status, body["error"]["code"]) == (429, "OVER_CAPACITY")


async def test_a_question_that_takes_too_long_is_answered_with_504(bench, monkeypatch):
    monkeypatch.setattr(public_log, "ANSWER_S", 0.05)
    async with serving(bench) as stranger:
        monkeypatch.setattr(bench.ledger, "checkpoint", lambda: asyncio.sleep(60))
        status, _ = await stranger.get("/checkpoint")
        assert status == 504


async def test_attack_a_stranger_cannot_make_the_ledger_scan_for_a_hash(bench, monkeypatch):
    await grow(bench, holds=3)
    leaf = (await bench.leaves("receipt"))[0]
    request = pb.InclusionProofRequest(leaf_hash=leaf_hash(leaf.body))
    looked = []
    monkeypatch.setattr(
        bench.ledger._reader, "_find_leaf", lambda wanted, size: looked.append(size) or leaf.index
    )
    # Nobody, a stranger with an identity, and a certified node, which anybody may have.
    for caller in ("", "stranger", bench.world.node[0].identity):
        with pytest.raises(PermissionDenied, match="members"):
            await bench.ledger.as_caller(caller).inclusion(request)
    assert looked == []
    for role in ("router", "verifier", "admin"):
        with contextlib.suppress(NotFound):  # not under a checkpoint yet
            assert (await bench.as_(role).inclusion(request)).entry == leaf
    assert looked


async def test_attack_over_grpc_a_stranger_cannot_ask_by_hash_either(bench):
    gate = SimpleNamespace(caller=lambda context: SimpleNamespace(identity=context))
    rpc = LedgerRpc(bench.ledger, gate)
    request = pb.InclusionProofRequest(leaf_hash=b"x" * 32)
    found = []
    for caller in (None, bench.world.node[0].identity, bench.world.identity("router")):
        try:
            await inspect.unwrap(LedgerRpc.GetInclusionProof)(rpc, request, caller)
        except (PermissionDenied, NotFound) as error:
            found.append(error.code)
    assert found == ["PERMISSION_DENIED", "PERMISSION_DENIED", "NOT_FOUND"]
