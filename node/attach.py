"""For nodes that nobody can dial: the node opens the session and keeps it open."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc.aio

from trueweight.node.backoff import Backoff
from trueweight.node.context import NodeContext
from trueweight.node.session import NodeSession
from trueweight.protos.errors import TrueweightError, Unavailable
from trueweight.protos.v1.node_pb2 import NodeFrame, RouterFrame
from trueweight.protos.v1.router_pb2_grpc import RouterStub
from trueweight.runtime import rpc

log = logging.getLogger(__name__)

# A session that lasted this long was a good one: the next attempt is immediate again.
_GOOD_SESSION_MS = 10_000


class DialledStream:
    """A session that this node dialled."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def read(self) -> RouterFrame | None:
        try:
            frame = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise rpc.from_rpc_error(error) from error
        return None if frame is grpc.aio.EOF else frame

    async def write(self, frame: NodeFrame) -> None:
        try:
            await self._call.write(frame)
        except grpc.aio.AioRpcError as error:
            raise rpc.from_rpc_error(error) from error
        except asyncio.InvalidStateError as error:
            raise Unavailable("the router left") from error


async def attach_forever(
    node: NodeContext,
    channel: grpc.aio.Channel,
    router_id: str,
    on_session: Callable[[NodeSession], None],
    draining: Callable[[], bool],
) -> None:
    """Keeps one session with a router open until draining; ends only then or when cancelled."""
    stub = RouterStub(channel)
    backoff = Backoff(node.random)
    while not draining():
        started_ms = node.clock.monotonic_ms()
        call = stub.Attach()
        session = NodeSession(node, DialledStream(call), audience=router_id)
        on_session(session)
        try:
            await session.run()
            await call.done_writing()
        except TrueweightError as error:
            log.warning("session with router %s: %s", router_id, error)
        except asyncio.InvalidStateError:
            log.debug("the stream was closed already")
        finally:
            call.cancel()
        if draining():
            return
        if node.clock.monotonic_ms() - started_ms > _GOOD_SESSION_MS:
            backoff.reset()
        await node.clock.sleep_ms(backoff.next_ms())
