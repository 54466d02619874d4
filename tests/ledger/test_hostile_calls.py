"""Calls that would fill the queue, bring the writer down, or fail their neighbours."""

from __future__ import annotations

import asyncio
import os
import threading
from types import SimpleNamespace

import grpc.aio
import pytest

from trueweight.ledger import audits, evidence, servicer
from trueweight.ledger import service as service_module
from trueweight.ledger import writer as writer_module
from trueweight.ledger.backend import open_backend
from trueweight.ledger.books import Books
from trueweight.ledger.core import MOST_IN_CALL
from trueweight.ledger.court import court_of
from trueweight.ledger.pipeline import Call
from trueweight.ledger.writer import Writer
from trueweight.protos.envelope import seal
from trueweight.protos.errors import (
    InvalidRequest,
    OverCapacity,
    PayloadTooLarge,
    TrueweightError,
    Unauthenticated,
    Unavailable,
)
from trueweight.protos.v1 import audit_pb2
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.runtime import ledger_port, rpc
from trueweight.runtime.ledger_port import MAX_OPERATIONS
from trueweight.simulation.ledger_world import Leg, make_signer

CREDIT = 10**9


@pytest.fixture
def queued(bench, monkeypatch):
    """Every call that enters the writer's queue."""
    seen, real = [], Writer.submit

    def submit(writer, call):
        seen.append(call)
        real(writer, call)

    monkeypatch.setattr(Writer, "submit", submit)
    return seen


@pytest.fixture
def opened(bench, monkeypatch):
    """Connections that the writer opens anew: it does when it starts over."""
    seen = []

    def opening(url):
        seen.append(url)
        return open_backend(url)

    monkeypatch.setattr(service_module, "open_backend", opening)
    return seen


# -- who may fill the queue -------------------------------------------------------------------


async def test_attack_callers_without_a_name_fill_the_queue(bench, remote, queued):
    nobody = remote()
    operations = [bench.world.deposit("acme", 1) for _ in range(200)]
    with pytest.raises(Unauthenticated):
        await nobody.apply(operations)
    with pytest.raises(Unauthenticated):
        await nobody._call(nobody._stub.Apply, pb.ApplyRequest(operations=operations))
    assert not queued
    await nobody.read_log(0)


async def test_attack_strangers_fill_the_queue_with_what_is_not_theirs(bench, queued):
    world = bench.world
    stranger = make_signer("stranger", world.market_id).identity
    operations = [world.deposit("acme", 1) for _ in range(20)]
    operations += [world.publish(b"junk"), pb.Operation(id=world.new_id()), pb.Operation(id=b"x")]
    for operation in operations[5:10]:
        operation.linked = True
    for caller in ("", stranger):
        results = await bench.do(caller, *operations)
        assert {r.status for r in results} == {pb.Result.REFUSED}
        assert {r.code for r in results} == {"PERMISSION_DENIED", "INVALID_REQUEST"}
    assert not queued
    # What may be his is judged by the books.
    payout = pb.PayoutStart(node_id=stranger, amount_nano=1, rail="bank")
    (result,) = await bench.do(stranger, pb.Operation(id=world.new_id(), payout_start=payout))
    assert result.code == "INSUFFICIENT_FUNDS"
    assert [call.payer for call in queued] == [""]
    await bench.must("admin", world.deposit("acme", 1))
    assert queued[-1].payer == world.identity("admin")


async def test_what_would_be_refused_now_and_was_applied_before_is_a_replay(bench):
    world, node = bench.world, bench.world.node[0]
    await bench.publish_nodes()
    await bench.must("admin", world.deposit("acme", CREDIT))
    hold = world.hold("acme", CREDIT)
    await bench.must("router", hold)
    (seen,) = await bench.do("verifier", hold)
    assert seen.status == pb.Result.REPLAYED
    assignment, receipt = world.evidence(hold.id, Leg(node), b"r" * 16)
    body = pb.Claim(hold_id=hold.id, assignment=assignment, receipt=receipt)
    claim = pb.Operation(id=world.new_id(), claim=body)
    bench.advance(50_000)
    await bench.must(node.identity, claim)
    bench.ledger._court = court_of(world.market)  # the node's key counts no more
    (again,) = await bench.do(node.identity, claim)
    assert again.status == pb.Result.REPLAYED
    claim.id = world.new_id()
    (other,) = await bench.do(node.identity, claim)
    assert other.code == "BAD_SIGNATURE"


def idle_writer():
    """A writer that takes calls and does nothing with them."""
    writer = Writer(None, None, None)
    writer._active = True
    return writer


def call_of(payer, size):
    return Call([None] * size, SimpleNamespace(done=lambda: False), payer)


def fill(writer, payer, size=10):
    taken = 0
    while True:
        try:
            writer.submit(call_of(payer, size))
        except OverCapacity:
            return taken
        taken += size


def test_attack_one_caller_takes_the_whole_queue(monkeypatch):
    monkeypatch.setattr(writer_module, "MAX_QUEUED", 1000)
    writer = idle_writer()
    assert fill(writer, "greedy") == 500
    assert fill(writer, "greedy too") == 250
    assert fill(writer, "") == 130
    writer.submit(call_of("modest", 10))
    landed = SimpleNamespace(is_flying=False, has_landed=True)
    taken = 0
    while calls := writer._take(landed, busy=False):
        taken += sum(len(call.operations) for call in calls)
    assert taken == 890
    assert (writer._queued, writer._queued_by) == (0, {})
    assert fill(writer, "greedy") == 500


async def test_a_call_whose_caller_gave_up_in_the_queue_is_not_applied(bench, monkeypatch):
    world = bench.world
    await bench.must("admin", world.deposit("acme", 10 * CREDIT))
    real, entered, go_on = Books.commit, threading.Event(), threading.Event()

    def slow(books, judged):
        entered.set()
        assert go_on.wait(10)
        return real(books, judged)

    monkeypatch.setattr(Books, "commit", slow)
    first, second = world.hold("acme", CREDIT), world.hold("acme", CREDIT)
    flying = asyncio.create_task(bench.do("router", first))
    await asyncio.to_thread(entered.wait, 10)
    waiting = asyncio.create_task(bench.do("router", second))
    await asyncio.sleep(0.05)
    waiting.cancel()
    await asyncio.wait([waiting])
    go_on.set()
    assert (await flying)[0].status == pb.Result.APPLIED
    assert (await bench.do("router", second))[0].status == pb.Result.APPLIED


# -- what no column takes ---------------------------------------------------------------------


def verdict(world, **changes):
    message = audit_pb2.Verdict(
        market_id=world.market_id,
        verifier_id=world.identity("verifier"),
        node_id=world.node[0].identity,
        receipt_digest=b"r" * 32,
    )
    for name, value in changes.items():
        setattr(message, name, value)
    return world.publish(seal(message, world.signers["verifier"]))


def conviction(world, **changes):
    message = audit_pb2.Conviction(
        market_id=world.market_id,
        verifier_id=world.identity("verifier"),
        node_id=world.node[0].identity,
        last_verdict_index=9,
        verdicts=7,
        audited_tokens=700,
        wealth_log10_milli=6001,
        threshold_log10_milli=6000,
    )
    for name, value in changes.items():
        setattr(message, name, value)
    return seal(message, world.signers["verifier"])


def release(world, below):
    body = pb.Release(node_id=world.node[0].identity, amount_nano=1, below_log_index=below)
    return pb.Operation(id=world.new_id(), release=body)


def convict(world, **changes):
    body = pb.Convict(conviction=conviction(world, **changes))
    return pb.Operation(id=world.new_id(), convict=body)


MALFORMED = {
    "a release below 2^63": lambda w: release(w, 2**63),
    "a release below 2^64-1": lambda w: release(w, 2**64 - 1),
    "a conviction since 2^63": lambda w: convict(w, change_point_index=2**63),
    "a conviction of NUL": lambda w: w.publish(conviction(w, node_id="a\0b")),
    "a conviction of a novel": lambda w: w.publish(conviction(w, node_id=os.urandom(9000).hex())),
    "an unheard of outcome": lambda w: verdict(w, outcome=70_000),
    "a negative outcome": lambda w: verdict(w, outcome=-70_000),
    "a verdict on NUL": lambda w: verdict(w, node_id="a\0b"),
    "a verdict in class NUL": lambda w: verdict(w, parameter_class="plain\0"),
    "a verdict on a novel": lambda w: verdict(w, node_id=os.urandom(9000).hex()),
    "a verdict on a long digest": lambda w: verdict(w, receipt_digest=os.urandom(9000)),
    "a request for a long digest": lambda w: w.request(os.urandom(9000)),
}


async def beside(bench, guilty):
    """The result of an operation in the midst of a group of innocent ones."""
    world = bench.world
    first = [bench.do("router", world.hold("acme", 1)) for _ in range(3)]
    then = [bench.do("router", world.hold("acme", 1)) for _ in range(3)]
    answers = await asyncio.gather(*first, bench.do("verifier", guilty), *then)
    found = [answer[0] for answer in answers]
    result = found.pop(3)
    assert [r.status for r in found] == [pb.Result.APPLIED] * 6
    return result


@pytest.fixture
async def funded(bench):
    await bench.publish_nodes()
    await bench.must("admin", bench.world.deposit("acme", CREDIT))
    return bench


@pytest.mark.parametrize("name", MALFORMED)
async def test_attack_a_malformed_operation_is_refused_by_name(funded, queued, opened, name):
    result = await beside(funded, MALFORMED[name](funded.world))
    assert (result.status, result.code) == (pb.Result.REFUSED, "INVALID_REQUEST"), result
    assert not opened


@pytest.mark.parametrize("name", MALFORMED)
async def test_attack_what_no_check_found_fails_nobody_else(  # noqa: PLR0917
    funded, opened, monkeypatch, name, databases, caplog
):
    """The second line: whatever the database or its driver refuses is one operation's fault."""
    for module in (audits, evidence):
        monkeypatch.setattr(module, "check_digest", lambda *_: None)
        monkeypatch.setattr(module, "check_owner", lambda *_: None)
    monkeypatch.setattr(evidence, "check_verdict", lambda *_: None)
    monkeypatch.setattr(evidence, "MAX_INDEX", 2**64)
    result = await beside(funded, MALFORMED[name](funded.world))
    # Each database takes some of it: SQLite any number of any size below 2^63, for example.
    if result.status == pb.Result.REFUSED:
        assert result.code in ("STORAGE", "CONFLICT"), result
    takes_all = databases.kind == "sqlite" and "2^6" not in name
    assert takes_all or result.status == pb.Result.REFUSED
    assert not opened
    await funded.must("router", funded.world.hold("acme", 1))


# -- one call on a stream and its neighbours --------------------------------------------------


async def test_attack_a_call_of_too_many_operations_fails_its_neighbours(bench, remote):
    world = bench.world
    await bench.must("admin", world.deposit("acme", CREDIT))
    router = remote("router")
    holds = [world.hold("acme", 1) for _ in range(20)]
    many = [world.hold("acme", 1) for _ in range(MAX_OPERATIONS + 1)]
    answers = await asyncio.gather(
        *(router.apply([hold]) for hold in holds[:10]),
        router.apply(many),
        *(router.apply([hold]) for hold in holds[10:]),
        return_exceptions=True,
    )
    assert isinstance(answers.pop(10), InvalidRequest)
    assert [answer[0].status for answer in answers] == [pb.Result.APPLIED] * 20
    assert len(await router.apply(many[1:])) == MAX_OPERATIONS


async def test_attack_a_stream_that_one_batch_broke_does_not_blame_the_others():
    """A server that refuses one batch ends the stream; the others may have been applied."""

    def failing(status, said):
        async def submit(requests):
            async for _ in requests:
                flying.append(1)
                if len(flying) == 2:
                    break
            trailing = grpc.aio.Metadata(*((f"trueweight-{k}", v) for k, v in said.items()))
            raise grpc.aio.AioRpcError(status, grpc.aio.Metadata(), trailing, "too many")
            yield  # a generator

        return ledger_port._Batcher(submit)

    async def two(batcher, operations):
        batch = [pb.Operation(id=b"i" * 16)] * ledger_port.MAX_BATCH
        calls = [batcher.apply(batch, 5000), batcher.apply(operations, 5000)]
        return await asyncio.gather(*calls, return_exceptions=True)

    batch = [pb.Operation(id=b"o" * 16)] * ledger_port.MAX_BATCH
    invalid, status = "INVALID_REQUEST", grpc.StatusCode
    for code, said in (
        (status.INVALID_ARGUMENT, {"code": invalid}),
        (status.INTERNAL, {}),
        (status.RESOURCE_EXHAUSTED, {"code": "OVER_CAPACITY"}),
    ):
        flying = []
        answers = await two(failing(code, said), batch)
        assert all(type(a) is Unavailable and a.retryable for a in answers), answers
    flying = []
    answers = await two(failing(status.UNAUTHENTICATED, {"code": "UNAUTHENTICATED"}), batch)
    assert all(type(a) is Unauthenticated for a in answers)


async def test_attack_large_calls_break_the_stream_of_their_neighbours(bench, remote):
    """Each fits into a message, all together do not; one that does not fit is refused at once."""
    world = bench.world
    await bench.must("admin", world.deposit("acme", CREDIT))
    router = remote("router")
    publish = pb.Publish(envelope=bytes(evidence.MAX_EVIDENCE_BYTES))
    large = pb.Operation(id=world.new_id(), publish=publish)
    fit = ledger_port.MAX_REQUEST_BYTES // evidence.MAX_EVIDENCE_BYTES
    calls, holds = [[large] * (fit // 4)] * 12, [world.hold("acme", 1) for _ in range(20)]
    answers = await asyncio.gather(
        *(router.apply(call) for call in calls),
        *(router.apply([hold]) for hold in holds),
        router.apply([large] * fit),
        return_exceptions=True,
    )
    assert isinstance(answers.pop(), PayloadTooLarge)
    assert [answer[0].status for answer in answers[len(calls) :]] == [pb.Result.APPLIED] * 20
    refused = {result.code for answer in answers[: len(calls)] for result in answer}
    assert refused == {"BAD_SIGNATURE"}


async def test_attack_strangers_fill_the_memory_with_requests_that_are_too_large(bench, remote):
    stranger = remote("stranger")
    request = pb.BalanceRequest(accounts=["x" * ledger_port.MAX_REQUEST_BYTES])
    with pytest.raises(TrueweightError, match=r"(?i)larger than max"):
        await stranger._call(stranger._stub.GetBalance, request)
    await stranger.read_log(0)


@pytest.mark.parametrize("how", ["refused", "cancelled"])
async def test_attack_a_stream_that_ends_with_full_hands_keeps_what_it_sent(how):
    """Streams of many large batches would fill the memory, though their callers are gone."""
    looked_at, full = [], asyncio.Event()

    async def requests():
        for batch in range(1000):
            yield pb.ApplyRequest(batch=batch)

    async def apply(request):
        looked_at.append(request)
        if len(looked_at) == servicer.MAX_BATCHES_IN_FLIGHT:
            full.set()
        await asyncio.sleep(0.01 if how == "refused" else 3600)
        raise InvalidRequest("not this one")

    async def serve():
        async for _ in servicer._pipelined(requests(), apply):
            pass

    before = asyncio.all_tasks()
    stream = asyncio.ensure_future(serve())
    await full.wait()
    if how == "cancelled":
        stream.cancel()
    with pytest.raises((InvalidRequest, asyncio.CancelledError)):
        await asyncio.wait_for(stream, 5)
    assert len(looked_at) == servicer.MAX_BATCHES_IN_FLIGHT
    assert asyncio.all_tasks() == before


# -- work that takes long ---------------------------------------------------------------------


async def test_attack_a_verifier_asks_for_convictions_without_end(bench, queued):
    """Each reads a history: the writer would do nothing else for minutes."""
    world = bench.world
    results = await bench.do("verifier", *(world.convict(f"n{i}", 0) for i in range(500)))
    codes = [r.code for r in results]
    most = MOST_IN_CALL["convict"]
    assert codes == ["CONFLICT"] * most + ["OVER_CAPACITY"] * (500 - most)
    # They take more of the queue than others, so that a caller cannot line up many of them.
    assert queued[0].size > most * 500


async def test_attack_a_call_that_takes_long_to_check_keeps_nobody_waiting(bench, queued):
    world = bench.world
    hold = world.hold("acme", CREDIT)
    assignment, receipt = world.evidence(hold.id, Leg(world.node[0]), b"r" * 16)
    body = pb.Claim(hold_id=hold.id, assignment=assignment, receipt=receipt)
    claims = [pb.Operation(id=world.new_id(), claim=body) for _ in range(MAX_OPERATIONS)]
    stranger = make_signer("stranger", world.market_id).identity
    slow = asyncio.ensure_future(bench.do(stranger, *claims))
    turns = 0
    while not queued:
        turns += 1
        await asyncio.sleep(0)
    assert turns > 5  # in one go it would be one
    assert {r.code for r in await slow} == {"PERMISSION_DENIED"}


async def test_attack_strangers_follow_the_log_in_great_numbers(bench, remote):
    """Every commit is read anew for each stream: a hundred of them delay everybody tenfold."""
    await bench.must("admin", bench.world.deposit("acme", 1))
    stub = remote()._stub

    async def first_of(stream):
        try:
            await stream.read()
        except grpc.aio.AioRpcError as error:
            return rpc.from_rpc_error(error).code
        return "page"

    most = servicer.MAX_STRANGERS
    for _ in range(2):  # those who are gone leave their place to others
        streams = [stub.FollowLog(pb.ReadLogRequest()) for _ in range(most + 10)]
        seen = await asyncio.gather(*map(first_of, streams))
        assert (seen.count("page"), seen.count("OVER_CAPACITY")) == (most, 10)
        async with asyncio.timeout(5):
            async for _ in remote("router").follow_log(0):
                break
        for stream in streams:
            stream.cancel()
        await asyncio.sleep(0.5)


# -- many holds that fall due -----------------------------------------------------------------


async def test_attack_more_holds_fall_due_than_one_expiry_ends(bench, monkeypatch):
    world = bench.world
    await bench.must("admin", world.deposit("acme", 100))
    monkeypatch.setattr(service_module, "MAX_EXPIRE", 5)
    await bench.must("router", *(world.hold("acme", 1, ttl_ms=1000) for _ in range(60)))
    bench.advance(2000)
    # One a second would take 12 s.
    for _ in range(40):
        if await bench.available("client:acme") == 100:
            break
        await asyncio.sleep(0.1)
    else:
        raise AssertionError(await bench.available("client:acme"))
    with pytest.raises(TrueweightError):
        await bench.as_("router").hold(b"no such hold....")


async def test_expiring_does_not_keep_others_waiting(bench, monkeypatch):
    world = bench.world
    await bench.must("admin", world.deposit("acme", 100))
    monkeypatch.setattr(service_module, "MAX_EXPIRE", 1)
    monkeypatch.setattr(writer_module, "EXPIRE_BUDGET_MS", 0)
    await bench.must("router", *(world.hold("acme", 1, ttl_ms=1000) for _ in range(60)))
    bench.advance(2000)
    await asyncio.sleep(1.2)
    await bench.must("router", world.hold("acme", 1))
    assert await bench.available("client:acme") < 90
