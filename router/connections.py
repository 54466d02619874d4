"""Keeps a session to every registered node that can be dialled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc.aio

from trueweight.protos.errors import TrueweightError, Unavailable
from trueweight.protos.v1.node_pb2 import RouterFrame
from trueweight.router.fleet import Fleet, NodeRecord
from trueweight.router.frames import frames_of
from trueweight.router.node_session import (
    MAX_NODE_FRAME_BYTES,
    NodeSession,
    SessionIdentity,
)
from trueweight.runtime import rpc

log = logging.getLogger(__name__)

_SESSION = "/trueweight.v1.Node/Session"
_PAUSES_MS = (200.0, 500.0, 1_000.0, 2_000.0, 5_000.0)


class Connections:
    """One task per dialled node, for as long as its registration is fresh."""

    def __init__(self, me: SessionIdentity, fleet: Fleet) -> None:
        self._me, self._fleet = me, fleet
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._dialled: dict[str, tuple[NodeRecord, tuple[str, str]]] = {}
        self._hurry: dict[str, asyncio.Event] = {}

    def ensure(self, record: NodeRecord) -> None:
        """Starts dialling a node unless that is under way; a new endpoint is dialled anew."""
        node_id, target = record.node_id, _target(record)
        task = self._tasks.get(node_id)
        if task is not None and not task.done():
            dialled, to = self._dialled[node_id]
            if dialled is record and to == target:
                # It has just registered, so it is there: no reason to wait any longer.
                self._hurry[node_id].set()
                return
            task.cancel()
        if target[0]:
            self._dialled[node_id] = (record, target)
            self._hurry[node_id] = asyncio.Event()
            self._tasks[node_id] = asyncio.create_task(self._keep(record, target))

    async def close(self) -> None:
        """Ends all sessions."""
        for record in self._fleet.all():
            if record.session is not None:
                record.session.close("the router is going away")
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, record: NodeRecord, target: tuple[str, str]) -> None:
        failures = 0
        channel = None
        try:
            channel = rpc.make_channel(*target, max_response_bytes=MAX_NODE_FRAME_BYTES)
            while self._is_wanted(record):
                started = self._me.clock.monotonic_ms()
                await self._dial(record, channel)
                if self._me.clock.monotonic_ms() - started > 10_000:
                    failures = 0
                await self._pause(record.node_id, _PAUSES_MS[min(failures, len(_PAUSES_MS) - 1)])
                failures += 1
        finally:
            if self._tasks.get(record.node_id) is asyncio.current_task():
                # Registering is free: nothing of a node stays once it is not dialled any more.
                for table in (self._tasks, self._dialled, self._hurry):
                    table.pop(record.node_id)
            if channel is not None:
                await channel.close(grace=None)

    async def _pause(self, node_id: str, pause_ms: float) -> None:
        # Never less than the first pause, so that nobody can make this router dial in a loop.
        await self._me.clock.sleep_ms(_PAUSES_MS[0])
        hurry = self._hurry[node_id]
        hurry.clear()
        try:
            async with asyncio.timeout((pause_ms - _PAUSES_MS[0]) / 1000):
                await hurry.wait()
        except TimeoutError:
            return

    async def _dial(self, record: NodeRecord, channel: grpc.aio.Channel) -> None:
        session = NodeSession(self._me, record.node_id)
        # Answers come as bytes, to be weighed first.
        method: grpc.aio.StreamStreamMultiCallable[RouterFrame, bytes] = channel.stream_stream(
            _SESSION, request_serializer=RouterFrame.SerializeToString
        )
        call = method(session.outgoing())
        try:
            await session.run(
                frames_of(session, _messages(call)),
                lambda s: self.adopt(record, s),
                lambda: _lease(record),
            )
            log.info("session with node %s ended", record.node_id)
        except TrueweightError as error:
            log.info("no session with node %s: %s", record.node_id, error)
        finally:
            call.cancel()
            self.drop(record, session)

    def drop(self, record: NodeRecord, session: NodeSession) -> None:
        """A session is over."""
        if record.session is session:
            record.session = None
        self._fleet.wake(record)

    async def adopt(self, record: NodeRecord, session: NodeSession) -> None:
        """A session has proved itself; an older one of the same node ends."""
        if record.session is not None and record.session is not session:
            record.session.close("the node opened another session")
        record.session = session
        session.on_end = lambda: self._fleet.wake(record)
        log.info("session with node %s", record.node_id)
        self._fleet.wake(record)

    def _is_wanted(self, record: NodeRecord) -> bool:
        """A node that neither answers nor registers for three leases is not dialled any more, nor
        one that had to make room for others."""
        if self._fleet.get(record.node_id) is not record:
            return False
        silent_ms = self._me.clock.monotonic_ms() - record.last_heard_ms()
        return silent_ms < 3 * _lease(record)


def _target(record: NodeRecord) -> tuple[str, str]:
    return record.offer.endpoint, record.offer.tls_certificate_pem


def _lease(record: NodeRecord) -> float:
    return float(record.offer.lease_ms)


async def _messages(
    call: grpc.aio.StreamStreamCall[RouterFrame, bytes],
) -> AsyncIterator[bytes]:
    try:
        async for message in call:
            yield message
    except grpc.aio.AioRpcError as error:
        # Its words stay out of logs and answers: it knows prompts.
        code = rpc.from_rpc_error(error).code
        raise Unavailable(
            f"the node is not reachable or ended the session ({code})",
            hint="'trueweight node describe' asks it.",
        ) from None
