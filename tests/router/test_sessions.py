"""The router's end of a session against nodes that break the protocol."""

from __future__ import annotations

import asyncio
import os

import pytest

from trueweight.protos.errors import (
    BadSignature,
    DeadlineExceeded,
    InvalidRequest,
    OverCapacity,
    PermissionDenied,
    TrueweightError,
    Unavailable,
)
from trueweight.protos.identity import KeyRing
from trueweight.protos.v1.node_pb2 import (
    Captured,
    Dispatch,
    Finished,
    Load,
    NodeFrame,
    Rejected,
    SessionNonce,
    Tokens,
)
from trueweight.router import calls, node_session
from trueweight.router.channel import CAPACITY, Channel, ClientGone
from trueweight.router.node_session import NodeSession, SessionIdentity
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.handshake import check_proof, make_proof
from trueweight.runtime.keys import create_keys

MARKET = "m"


@pytest.fixture
def router(tmp_path):
    return create_keys(tmp_path / "router", MARKET, SystemClock())


@pytest.fixture
def node(tmp_path):
    return create_keys(tmp_path / "node", MARKET, SystemClock())


class Wire:
    """Both directions of a session, with a scripted node at the other end."""

    def __init__(self, router, expected="", lease_ms=5_000.0):
        self.frames: asyncio.Queue[NodeFrame | None] = asyncio.Queue()
        me = SessionIdentity(router, MARKET, KeyRing(), os.urandom, SystemClock())
        self.session = NodeSession(me, expected)
        self.sent = self.session.outgoing()
        self.opened = asyncio.Event()
        self.task = asyncio.create_task(self._run(lease_ms))

    async def _run(self, lease_ms):
        async def opened(_):
            self.opened.set()

        async def incoming():
            while (frame := await self.frames.get()) is not None:
                yield frame

        await self.session.run(incoming(), opened, lambda: lease_ms)

    async def shake(self, node, router_id, nonce=b"n" * 32):
        await self.frames.put(NodeFrame(nonce=SessionNonce(nonce=nonce)))
        theirs = (await anext(self.sent)).nonce.nonce
        proof = (await anext(self.sent)).proof
        who, _ = check_proof(
            proof, market_id=MARKET, my_identity=node.identity, my_nonce=nonce, ring=KeyRing()
        )
        assert who == router_id
        await self.frames.put(NodeFrame(proof=make_proof(node, MARKET, router_id, theirs)))
        await asyncio.wait_for(self.opened.wait(), 5)


@pytest.fixture
async def wire(router, node):
    made = Wire(router, node.identity)
    await made.shake(node, router.identity)
    yield made
    made.session.close("test over")
    made.task.cancel()
    await asyncio.gather(made.task, return_exceptions=True)


async def test_tokens_and_receipt_arrive_in_order(wire):
    call = wire.session.start(Dispatch(salt=b"s"), 8)
    frame = await anext(wire.sent)
    assert (frame.dispatches[0].call, frame.dispatches[0].window_tokens) == (call.number, 8)
    await wire.frames.put(
        NodeFrame(
            tokens=[Tokens(call=call.number, token_ids=[1, 2])],
            finished=[Finished(call=call.number, receipt=b"r")],
        )
    )
    assert await call.next(1000) == calls.NewTokens((1, 2))
    assert await call.next(1000) == calls.Finished(b"r")


async def test_one_frame_carries_what_all_calls_say(wire):
    made = [wire.session.start(Dispatch(), 8) for _ in range(5)]
    made[0].stop(3)
    made[1].cancel()
    frame = await anext(wire.sent)
    assert len(frame.dispatches) == 5
    assert (frame.stops[0].at, frame.cancels[0].call) == (3, made[1].number)


async def test_the_window_grows_as_tokens_are_taken(wire):
    call = wire.session.start(Dispatch(), 4)
    await anext(wire.sent)
    await wire.frames.put(NodeFrame(tokens=[Tokens(call=call.number, token_ids=[1, 2])]))
    await call.next(1000)
    assert (await anext(wire.sent)).windows[0].tokens == 2


async def test_attack_a_node_that_ignores_its_window_loses_the_call(wire):
    call = wire.session.start(Dispatch(), 4)
    await wire.frames.put(NodeFrame(tokens=[Tokens(call=call.number, token_ids=[1] * 5)]))
    assert isinstance(await call.next(1000), calls.Lost)


async def test_attack_empty_token_messages_and_unknown_calls_do_not_pile_up(wire):
    call = wire.session.start(Dispatch(), 4)
    await wire.frames.put(NodeFrame(tokens=[Tokens(call=77, token_ids=[1] * 1000)]))
    await wire.frames.put(NodeFrame(tokens=[Tokens(call=call.number)] * 100))
    assert isinstance(await call.next(1000), calls.Lost)
    assert len(call._inbox) == 0


@pytest.mark.parametrize("end", [lambda call: call.stop(1), lambda call: call.cancel()])
async def test_attack_tokens_after_the_end_was_asked_for_get_no_window(wire, end):
    call = wire.session.start(Dispatch(), 4)
    end(call)
    await wire.frames.put(NodeFrame(tokens=[Tokens(call=call.number, token_ids=[1] * 4)]))
    await call.next(1000)
    assert not (await anext(wire.sent)).windows and not wire.session._outbox
    # So whoever goes on sending loses the call.
    await wire.frames.put(NodeFrame(tokens=[Tokens(call=call.number, token_ids=[1])]))
    assert isinstance(await call.next(1000), calls.Lost)


async def test_a_session_that_takes_no_more_work_says_so_at_once(wire):
    ends = []
    wire.session.on_end = lambda: ends.append(wire.session.is_open)
    for _ in range(2):
        await wire.frames.put(NodeFrame(draining=True))
    await wire.frames.put(None)
    await asyncio.wait({wire.task}, timeout=5)
    wire.session.close("again")
    assert ends == [True, False]


async def test_attack_what_is_kept_of_a_frame_does_not_keep_the_frame(wire):
    frame = NodeFrame(load=Load(running=2), tokens=[Tokens()] * 1000)
    await wire.frames.put(frame)
    async with asyncio.timeout(5):
        while wire.session.load.running != 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    frame.load.running = 3
    assert wire.session.load.running == 2


async def test_rejections_and_silence(wire):
    call = wire.session.start(Dispatch(), 4)
    with pytest.raises(DeadlineExceeded):
        await call.next(10)
    await wire.frames.put(
        NodeFrame(rejected=[Rejected(call=call.number, code="X" * 1000, message="m" * 10_000)])
    )
    event = await call.next(1000)
    assert isinstance(event, calls.Rejected)
    assert len(event.code) + len(event.message) < 500


async def test_a_lost_session_fails_every_call_at_once(wire):
    made = [wire.session.start(Dispatch(), 4) for _ in range(10)]
    await wire.frames.put(None)
    for call in made:
        assert isinstance(await call.next(1000), calls.Lost)
    with pytest.raises(Unavailable):
        wire.session.start(Dispatch(), 4)


async def test_a_draining_node_gets_no_new_calls(wire):
    await wire.frames.put(NodeFrame(draining=True))
    await asyncio.sleep(0.05)
    with pytest.raises(Unavailable):
        wire.session.start(Dispatch(), 4)


async def test_a_silent_node_is_lost_when_its_lease_is_over(router, node):
    wire = Wire(router, node.identity, lease_ms=100.0)
    await wire.shake(node, router.identity)
    call = wire.session.start(Dispatch(), 4)
    assert isinstance(await call.next(3000), calls.Lost)
    with pytest.raises(DeadlineExceeded, match="lease"):
        await wire.task


async def test_too_many_calls_are_refused(wire, monkeypatch):
    monkeypatch.setattr(node_session, "MAX_CALLS", 2)
    wire.session.start(Dispatch(), 4)
    wire.session.start(Dispatch(), 4)
    with pytest.raises(OverCapacity):
        wire.session.start(Dispatch(), 4)


async def test_attack_a_node_that_never_reads_is_cut_off(wire, monkeypatch):
    monkeypatch.setattr(node_session, "MAX_OUTBOX", 10)
    call = wire.session.start(Dispatch(), 4)
    for _ in range(20):
        call.cancel()
    assert not wire.session.is_open
    assert isinstance(await call.next(1000), calls.Lost)


@pytest.mark.parametrize(
    "first",
    [
        NodeFrame(),
        NodeFrame(nonce=SessionNonce(nonce=b"short")),
        NodeFrame(tokens=[Tokens(call=1, token_ids=[1])]),
        NodeFrame(nonce=SessionNonce(nonce=b"n" * 32), proof=b"early"),
    ],
)
async def test_attack_a_session_begins_with_a_nonce_or_ends(router, first):
    wire = Wire(router)
    await wire.frames.put(first)
    with pytest.raises(BadSignature):
        await asyncio.wait_for(wire.task, 5)


async def test_attack_another_node_than_the_dialled_one_is_refused(router, node, tmp_path):
    mallory = create_keys(tmp_path / "mallory", MARKET, SystemClock())
    wire = Wire(router, node.identity)
    await wire.frames.put(NodeFrame(nonce=SessionNonce(nonce=b"n" * 32)))
    nonce = (await anext(wire.sent)).nonce.nonce
    await wire.frames.put(NodeFrame(proof=make_proof(mallory, MARKET, router.identity, nonce)))
    with pytest.raises(PermissionDenied):
        await asyncio.wait_for(wire.task, 5)


async def test_attack_a_replayed_proof_is_refused(router, node):
    wire = Wire(router, node.identity)
    await wire.frames.put(NodeFrame(nonce=SessionNonce(nonce=b"n" * 32)))
    old = make_proof(node, MARKET, router.identity, b"o" * 32)
    await wire.frames.put(NodeFrame(proof=old))
    with pytest.raises(TrueweightError):
        await asyncio.wait_for(wire.task, 5)
    assert not wire.session.is_open


async def test_a_node_that_never_proves_itself_is_dropped(router, monkeypatch):
    monkeypatch.setattr(node_session, "HANDSHAKE_MS", 50.0)
    wire = Wire(router)
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(wire.task, 5)
    assert (await anext(wire.sent)).nonce.nonce


async def test_channel_holds_back_a_fast_writer_and_notices_a_reader_who_leaves():
    channel = Channel()
    for i in range(CAPACITY):
        await channel.put(i, 1000)
    with pytest.raises(DeadlineExceeded):
        await channel.put(99, 20)
    assert [await channel.get() for _ in range(CAPACITY)] == list(range(CAPACITY))
    with pytest.raises(DeadlineExceeded):  # the last item is not dealt with yet
        await channel.drained(20)
    reading = asyncio.create_task(channel.get())
    await channel.drained(1000)
    reading.cancel()
    channel.hang_up()
    for action in (channel.put(1, 1000), channel.drained(1000)):
        with pytest.raises(ClientGone):
            await action


def test_an_unknown_model_directory_is_refused_at_start(tmp_path):
    from trueweight.router.commands import _model_dir

    assert _model_dir(f"m={tmp_path}") == ("m", tmp_path)
    for wrong in ("m", f"={tmp_path}", "m=/nowhere/at/all"):
        with pytest.raises(InvalidRequest):
            _model_dir(wrong)


def test_key_commands_make_list_and_revoke(tmp_path):
    import json

    from click.testing import CliRunner

    from trueweight.router.commands import router as group

    run = lambda *args: CliRunner().invoke(group, ["key", *args], catch_exceptions=False)  # noqa: E731
    made = json.loads(
        run("create", "--data", str(tmp_path), "--account", "client:a", "--json").output
    )
    assert made["key"].startswith("tw-")
    listed = json.loads(run("list", "--data", str(tmp_path), "--json").output)
    assert [k["key_id"] for k in listed] == [made["key_id"]]
    assert made["key"] not in json.dumps(listed)
    run("revoke", "--data", str(tmp_path), made["key_id"])
    listed = json.loads(run("list", "--data", str(tmp_path), "--json").output)
    assert listed[0]["revoked_unix_ms"]


def captured(number):
    return Captured(assignment_digest=number.to_bytes(32, "big"), bill_id=b"b" * 16)


async def test_reports_of_captures_ride_along_and_go_alone_after_a_while(wire, monkeypatch):
    wire.session.report(captured(1))
    wire.session.start(Dispatch(), 8)
    frame = await anext(wire.sent)
    assert len(frame.dispatches) == len(frame.captured) == 1
    monkeypatch.setattr(node_session, "REPORT_AFTER_S", 0.01)
    for number in range(2, 2000):
        wire.session.report(captured(number))
    first = await asyncio.wait_for(anext(wire.sent), 10)
    second = await asyncio.wait_for(anext(wire.sent), 10)
    assert (len(first.captured), len(second.captured)) == (1024, 974)


async def test_reports_to_a_node_that_is_gone_are_dropped(wire):
    wire.session.close("gone")
    wire.session.report(captured(1))
    assert not wire.session._reports
