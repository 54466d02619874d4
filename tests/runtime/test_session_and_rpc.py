"""Handshake, access tokens, pinned TLS and the ledger's micro-batching client."""

from __future__ import annotations

import asyncio
import os

import grpc.aio
import pytest

from trueweight.protos.envelope import seal
from trueweight.protos.errors import (
    BadSignature,
    InsufficientFunds,
    InvalidRequest,
    TrueweightError,
    Unauthenticated,
    Unavailable,
)
from trueweight.protos.identity import KeyRing
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1.envelope_pb2 import AccessToken
from trueweight.protos.v1.ledger_pb2_grpc import (
    LedgerServicer,
    LedgerStub,
    add_LedgerServicer_to_server,
)
from trueweight.runtime import rpc
from trueweight.runtime.clock import ManualClock, SystemClock
from trueweight.runtime.handshake import check_proof, make_proof, new_nonce
from trueweight.runtime.keys import create_keys, load_signer
from trueweight.runtime.ledger_port import GrpcLedger, publish_operation
from trueweight.runtime.tls import ensure_certificate

MARKET = "testmarket"


@pytest.fixture
def alice(tmp_path):
    return create_keys(tmp_path / "alice", MARKET, SystemClock())


@pytest.fixture
def bob(tmp_path):
    return create_keys(tmp_path / "bob", MARKET, SystemClock())


def test_keys_reload_and_private_files_are_private(tmp_path, alice):
    again = load_signer(tmp_path / "alice")
    assert (again.identity, again.key_id) == (alice.identity, alice.key_id)
    for name in ("root.pem", "operational.pem"):
        assert (tmp_path / "alice" / name).stat().st_mode & 0o777 == 0o600
    (tmp_path / "alice" / "operational.pem").chmod(0o644)
    with pytest.raises(TrueweightError, match="can be read by others"):
        load_signer(tmp_path / "alice")


def test_signer_does_not_print_its_key(alice):
    assert "key=" not in repr(alice)


def test_handshake_proves_both_sides(alice, bob):
    nonce = new_nonce(os.urandom)
    proof = make_proof(alice, MARKET, bob.identity, nonce)
    who, ring = check_proof(
        proof, market_id=MARKET, my_identity=bob.identity, my_nonce=nonce, ring=KeyRing()
    )
    assert who == alice.identity
    assert ring.identity_of(alice.key_id) == alice.identity


def test_attack_replayed_proof_fails_over_another_nonce(alice, bob):
    proof = make_proof(alice, MARKET, bob.identity, new_nonce(os.urandom))
    with pytest.raises(BadSignature, match="another nonce"):
        check_proof(
            proof,
            market_id=MARKET,
            my_identity=bob.identity,
            my_nonce=new_nonce(os.urandom),
            ring=KeyRing(),
        )


def test_attack_relayed_proof_fails_at_a_third_party(alice, bob, tmp_path):
    carol = create_keys(tmp_path / "carol", MARKET, SystemClock())
    nonce = new_nonce(os.urandom)
    proof = make_proof(alice, MARKET, bob.identity, nonce)
    with pytest.raises(BadSignature, match="somebody else"):
        check_proof(
            proof, market_id=MARKET, my_identity=carol.identity, my_nonce=nonce, ring=KeyRing()
        )


def test_access_tokens_name_the_caller_and_expire(alice, bob):
    clock = ManualClock()
    tokens = rpc.AccessTokens(alice, MARKET, clock, os.urandom)
    gate = rpc.Authenticator(bob.identity, MARKET, KeyRing(), clock)
    ((_, token),) = tokens.metadata(bob.identity)
    assert gate.check(token) == alice.identity
    clock.advance_ms(rpc.TOKEN_LIFETIME_MS + rpc.TOKEN_SKEW_MS + 1)
    with pytest.raises(Unauthenticated, match="not valid now"):
        gate.check(token)
    ((_, fresh),) = tokens.metadata(bob.identity)
    assert fresh != token
    assert gate.check(fresh) == alice.identity


def test_attack_token_for_another_server_or_subject_is_refused(alice, bob):
    clock = ManualClock()
    tokens = rpc.AccessTokens(alice, MARKET, clock, os.urandom)
    gate = rpc.Authenticator(bob.identity, MARKET, KeyRing(), clock)
    ((_, token),) = tokens.metadata("somebody-else")
    with pytest.raises(Unauthenticated, match="another server"):
        gate.check(token)
    now = clock.now_unix_ms()
    forged = AccessToken(
        market_id=MARKET,
        subject=bob.identity,
        audience=bob.identity,
        issued_at_unix_ms=now,
        expires_at_unix_ms=now + 1000,
        nonce=b"n" * 16,
        key_event=alice.key_event,
    )
    with pytest.raises(Unauthenticated):
        gate.check(seal(forged, alice))
    for junk in (b"", b"\xff" * 50, b"x" * 9000):
        with pytest.raises(Unauthenticated):
            gate.check(junk)


class FakeLedger(LedgerServicer):
    def __init__(self):
        self.batches = []
        self.fail_after = None

    async def Submit(self, request_iterator, context):
        async for request in request_iterator:
            self.batches.append(len(request.operations))
            if self.fail_after is not None and len(self.batches) > self.fail_after:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            await asyncio.sleep(0.01)
            yield pb.ApplyResponse(
                batch=request.batch,
                results=[
                    pb.Result(status=pb.Result.APPLIED, amount_nano=op.hold.amount_nano)
                    for op in request.operations
                ],
            )

    @rpc.unary
    async def GetHold(self, request, context):
        raise InsufficientFunds("nothing there", hint="Deposit.")


@pytest.fixture
async def served(tmp_path, alice, bob):
    ledger = FakeLedger()
    server = rpc.make_server()
    pem = ensure_certificate(tmp_path / "bob", SystemClock().now_unix_ms())
    endpoint = rpc.listen(server, "127.0.0.1:0", tmp_path / "bob")
    add_LedgerServicer_to_server(ledger, server)
    await server.start()
    tokens = rpc.AccessTokens(alice, MARKET, SystemClock(), os.urandom)
    client = GrpcLedger(endpoint, pem, bob.identity, tokens)
    yield ledger, client, endpoint
    await client.close()
    await server.stop(0)


def hold(amount):
    return pb.Operation(id=os.urandom(16), hold=pb.Hold(amount_nano=amount))


async def test_concurrent_calls_share_batches_and_get_their_own_results(served):
    ledger, client, _ = served
    answers = await asyncio.gather(*(client.apply([hold(i)]) for i in range(200)))
    assert [a[0].amount_nano for a in answers] == list(range(200))
    assert len(ledger.batches) < 20


async def test_a_lost_stream_fails_what_flies_and_recovers(served):
    ledger, client, _ = served
    ledger.fail_after = 0
    with pytest.raises(Unavailable):
        await client.apply([hold(1)])
    ledger.fail_after = None
    assert (await client.apply([hold(2)]))[0].amount_nano == 2


async def test_errors_keep_code_and_hint_across_grpc(served):
    _, client, _ = served
    with pytest.raises(InsufficientFunds) as caught:
        await client.hold(b"x" * 16)
    assert caught.value.hint == "Deposit."


async def test_attack_server_with_another_certificate_is_not_talked_to(served, tmp_path, alice):
    _, _, endpoint = served
    other = ensure_certificate(tmp_path / "mallory", SystemClock().now_unix_ms())
    tokens = rpc.AccessTokens(alice, MARKET, SystemClock(), os.urandom)
    client = GrpcLedger(endpoint, other, "x", tokens)
    with pytest.raises(TrueweightError):
        await client.apply([hold(1)])
    await client.close()


async def test_attack_nobody_is_served_without_tls(served):
    _, _, endpoint = served
    async with grpc.aio.insecure_channel(endpoint) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await LedgerStub(channel).GetHold(pb.GetHoldRequest(hold_id=b"x" * 16), timeout=5)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_attack_silent_connections_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(rpc, "TLS_HANDSHAKE_MS", 200)
    ensure_certificate(tmp_path / "bob", SystemClock().now_unix_ms())
    server = rpc.make_server()
    endpoint = rpc.listen(server, "127.0.0.1:0", tmp_path / "bob")
    await server.start()
    host, _, port = endpoint.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()
    await server.stop(0)


@pytest.mark.parametrize("address", ["", "here", "here:", "here:port", "h:70000", "h:-1", "h:٣"])
def test_addresses_that_are_none_are_refused(address):
    with pytest.raises(InvalidRequest):
        rpc.split_address(address)
    assert rpc.split_address(":80") == ("127.0.0.1", 80)
    assert rpc.split_address("[::1]:80") == ("[::1]", 80)


def test_publishing_twice_is_one_operation(alice):
    token = seal(AccessToken(market_id=MARKET), alice)
    assert publish_operation(token).id == publish_operation(token).id
