"""Attacks on a router by the messages that it reads before, and after, it knows whose they are."""

from __future__ import annotations

import asyncio
import random

import grpc.aio
import pytest

from trueweight.node.outbox import Outbox
from trueweight.protos.errors import BadSignature
from trueweight.protos.v1.node_pb2 import (
    Finished,
    Load,
    NodeFrame,
    Rejected,
    SessionNonce,
    Tokens,
)
from trueweight.router import frames
from trueweight.router.node_session import MAX_CALLS, MAX_NODE_FRAME_BYTES
from trueweight.router.offers import _MAX_OFFER_BYTES
from trueweight.runtime import rpc
from trueweight.runtime.handshake import _MAX_PROOF_BYTES

EMPTY_TOKENS = NodeFrame(tokens=[Tokens()]).SerializeToString()
# Entries that say something, and other fields, are weighed as well.
FLOODS = {
    "empty tokens": EMPTY_TOKENS,
    "tokens": NodeFrame(tokens=[Tokens(call=1)]).SerializeToString(),
    "finished": NodeFrame(finished=[Finished()]).SerializeToString(),
    "rejected": NodeFrame(rejected=[Rejected()]).SerializeToString(),
    "loads": NodeFrame(load=Load()).SerializeToString(),
    "booleans": NodeFrame(draining=True).SerializeToString(),
    "unknown numbers": b"\xad\x06abcd\xa9\x06abcdefgh",
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
@pytest.mark.parametrize("proven", [False, True])
def test_attack_a_frame_that_unfolds_is_not_taken_apart(flood, proven, monkeypatch):
    most = MAX_NODE_FRAME_BYTES if proven else frames.MAX_HANDSHAKE_BYTES
    monkeypatch.setattr(frames, "NodeFrame", None)
    with pytest.raises(BadSignature):
        frames.parse_frame(flood * (most // len(flood)), proven=proven)
    with pytest.raises(BadSignature, match="too long"):
        frames.parse_frame(bytes(most + 1), proven=proven)


def test_attack_a_stranger_says_little_before_its_proof():
    frames.parse_frame(EMPTY_TOKENS * 1000, proven=True)
    with pytest.raises(BadSignature):
        frames.parse_frame(EMPTY_TOKENS * 1000, proven=False)


def test_attack_messages_that_are_no_frames():
    draw = random.Random(7)
    good = longest_honest_frame().SerializeToString()
    for size in (*range(40), frames._LIGHT_BYTES + 1, 100_000):
        garbage = draw.randbytes(size)
        cut = good[: len(good) - size - 1]
        for data in (garbage, cut, b"\xff" * size, b'"' + b"\xff" * size, b"\x0b" * size):
            for proven in (False, True):
                try:
                    frames.parse_frame(data, proven=proven)
                except BadSignature:
                    continue
                assert NodeFrame.FromString(data).ByteSize() <= len(data)


def test_honest_frames_are_far_below_what_is_taken():
    handshake = (
        NodeFrame(nonce=SessionNonce(nonce=b"n" * 32)),
        NodeFrame(proof=b"p" * _MAX_PROOF_BYTES, offer=b"o" * _MAX_OFFER_BYTES),
    )
    for frame in handshake:
        assert frames.parse_frame(frame.SerializeToString(), proven=False) == frame
    longest = longest_honest_frame()
    data = longest.SerializeToString()
    assert frames.parse_frame(data, proven=True) == longest
    assert len(data) < 0.75 * MAX_NODE_FRAME_BYTES
    items = len(longest.tokens) + len(longest.finished) + len(longest.rejected)
    assert items < frames.MAX_FRAME_ITEMS / 2


def longest_honest_frame():
    outbox = Outbox()
    for call in range(MAX_CALLS):
        outbox.add_tokens(call, (200_000,) * 16)
    for call in range(MAX_CALLS, 2 * MAX_CALLS):
        outbox.add_finished(call, b"r" * 1_200)
        outbox.add_rejected(call, "INVALID_REQUEST", "x" * 500)
    outbox.set_load(Load(running=1))
    return outbox.take()


async def test_attack_a_stranger_sends_the_router_frames_that_unfold(bazaar):
    """Above the limit of a message they are not read, below it they are not taken apart."""
    async with bazaar(nodes=()) as market:
        member = market.router_member()
        channel = rpc.make_channel(member.endpoint, member.tls_certificate_pem)
        attach = channel.stream_stream(
            "/trueweight.v1.Router/Attach", request_serializer=lambda body: body
        )

        async def sent(message):
            async def messages():
                yield message
                await asyncio.sleep(5)

            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async for _ in attach(messages()):
                    pass
            return refused.value

        too_long = await sent(EMPTY_TOKENS * MAX_NODE_FRAME_BYTES)
        assert too_long.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        light = rpc.from_rpc_error(await sent(EMPTY_TOKENS * 20))
        assert light.code == BadSignature.code and "says more" in light.message
        await channel.close()
