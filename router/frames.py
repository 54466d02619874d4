"""Frames of nodes, weighed before they are taken apart.

An empty entry of two bytes becomes an object of forty, on the loop that serves everybody, and
identities are free: whoever sends may be anybody.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from google.protobuf.message import DecodeError

from trueweight.protos.errors import BadSignature
from trueweight.protos.v1.node_pb2 import NodeFrame
from trueweight.router.node_session import MAX_CALLS, MAX_NODE_FRAME_BYTES, NodeSession

# Tokens, a refusal and a receipt of every call; an honest node sends half of it at most.
MAX_FRAME_ITEMS = 3 * MAX_CALLS
# Before its proof a node sends a nonce, then the proof and its offer.
MAX_HANDSHAKE_BYTES = 160 * 1024
MAX_HANDSHAKE_ITEMS = 8
# Less than this is taken apart sooner than weighed.
_LIGHT_BYTES = 16 * 1024
# Of the wire format; groups do not occur.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


async def frames_of(
    session: NodeSession, incoming: AsyncIterator[bytes]
) -> AsyncIterator[NodeFrame]:
    """The frames of a session. Raises BadSignature for one that no honest node sends."""
    async for data in incoming:
        yield parse_frame(data, proven=session.is_open)


def parse_frame(data: bytes, *, proven: bool) -> NodeFrame:
    """One frame. Raises BadSignature if it is too much or no frame."""
    if len(data) > (MAX_NODE_FRAME_BYTES if proven else MAX_HANDSHAKE_BYTES):
        raise BadSignature("a frame is too long")
    if not proven:
        _weigh(data, MAX_HANDSHAKE_ITEMS)
    elif len(data) > _LIGHT_BYTES:
        _weigh(data, MAX_FRAME_ITEMS)
    try:
        return NodeFrame.FromString(data)
    except DecodeError:
        raise BadSignature("a message is no frame") from None


def _weigh(data: bytes, most: int) -> None:
    """Counts the fields of a message without looking into them."""
    at = fields = 0
    while at < len(data):
        fields += 1
        if fields > most:
            raise BadSignature("a frame says more than all calls of a session have to say")
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _BYTES:
            size, at = _varint(data, at)
            at += size
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise BadSignature("a message is no frame")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at this place and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at] if at < len(data) else 0
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    return value, at
