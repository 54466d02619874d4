"""The router's side of one session with a node, whoever dialled.

One frame carries what all requests on the session have to say. A lost session fails all its
calls at once; a silent one is lost when its lease is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from trueweight.protos.errors import (
    BadSignature,
    DeadlineExceeded,
    OverCapacity,
    PermissionDenied,
    Unavailable,
)
from trueweight.protos.identity import KeyRing, Signer
from trueweight.protos.v1.node_pb2 import (
    Cancel,
    Captured,
    Dispatch,
    Load,
    NodeFrame,
    RouterFrame,
    SessionNonce,
    Stop,
    Window,
)
from trueweight.router.calls import Call, Finished, Lost, NewTokens, Outgoing, Rejected
from trueweight.runtime.clock import Clock
from trueweight.runtime.handshake import NONCE_BYTES, check_proof, make_proof, new_nonce

log = logging.getLogger(__name__)

HANDSHAKE_MS = 10_000.0
MAX_CALLS = 4096
# Twice an honest node's longest (see its outbox).
MAX_NODE_FRAME_BYTES = 2 * 1024 * 1024
_MAX_FRAME_BYTES = 4 * 1024 * 1024
MAX_OUTBOX = 4 * MAX_CALLS
# Reports of captures ride in frames that go out anyway, or in one of their own after this time.
REPORT_AFTER_S = 1.0
_MAX_REPORTS = 65_536
MAX_FRAME_REPORTS = 1_024


@dataclass(frozen=True, slots=True)
class SessionIdentity:
    """Who this router is, for the handshake."""

    signer: Signer
    market_id: str
    ring: KeyRing
    random: Callable[[int], bytes]
    clock: Clock


class NodeSession:
    """``run`` lives as long as the session; ``outgoing`` yields what to send meanwhile.

    ``expected`` is the node's identity if it is known (dialled), else empty (it dialled).
    """

    def __init__(self, me: SessionIdentity, expected: str = "") -> None:
        self._me, self._expected = me, expected
        self.node_id = ""
        self.offer = b""
        self.load = Load()
        self.draining = False
        self.is_open = False
        # Called when it takes no more work.
        self.on_end: Callable[[], None] = lambda: None
        self.last_heard_ms = me.clock.monotonic_ms()
        self._calls: dict[int, Call] = {}
        self._next_call = 1
        self._outbox: deque[RouterFrame] = deque()
        # A full one forgets the oldest: their node claims what was not reported.
        self._reports: deque[Captured] = deque(maxlen=_MAX_REPORTS)
        self._report_timer: asyncio.TimerHandle | None = None
        self._wake = asyncio.Event()
        self._closing = False
        self._out = Outgoing(self._stop, self._cancel, self._grant, self._forget)

    async def run(
        self,
        incoming: AsyncIterator[NodeFrame],
        on_open: Callable[[NodeSession], Awaitable[None]],
        lease_ms: Callable[[], float],
    ) -> None:
        """Handshake, then frames until the session ends. ``on_open`` is called once the node has
        proved itself; ``lease_ms`` says how long silence is borne. Raises the errors of the
        handshake; whatever happens, every call is told and ``outgoing`` ends."""
        reason = "the session ended"
        try:
            async with asyncio.timeout(HANDSHAKE_MS / 1000):
                await self._shake_hands(incoming)
                self.is_open = True
                await on_open(self)
            await self._read(incoming, lease_ms)
        except TimeoutError:
            reason = "the node did not prove itself in time"
            raise DeadlineExceeded(reason) from None
        except (DeadlineExceeded, Unavailable, BadSignature) as error:
            reason = error.message
            raise
        finally:
            self.close(reason)

    async def outgoing(self) -> AsyncIterator[RouterFrame]:
        """Frames to send; ends when the session does."""
        while True:
            while self._outbox:
                yield self._take()
            if self._closing:
                return
            self._wake.clear()
            await self._wake.wait()

    def start(self, dispatch: Dispatch, window: int) -> Call:
        """Sends an assignment. ``call`` and ``window_tokens`` of the dispatch are set here.

        Raises Unavailable if the session is over or draining, OverCapacity if it is full.
        """
        if not self.is_open or self._closing or self.draining:
            raise Unavailable("the session with the node is over")
        if len(self._calls) >= MAX_CALLS:
            raise OverCapacity("too many requests at once on one session")
        call = Call(self._next_call, window, self._out)
        self._next_call += 1
        self._calls[call.number] = call
        dispatch.call, dispatch.window_tokens = call.number, window
        self._send(RouterFrame(dispatches=[dispatch]))
        return call

    def report(self, captured: Captured) -> None:
        """Tells the node, soon, what the ledger has captured."""
        if not self.is_open or self._closing:
            return
        self._reports.append(captured)
        if self._report_timer is None:
            loop = asyncio.get_running_loop()
            self._report_timer = loop.call_later(REPORT_AFTER_S, self._send_reports)

    def close(self, reason: str) -> None:
        """Ends the session: all calls are lost."""
        was_open, self.is_open, self._closing = self.is_open, False, True
        if self._report_timer is not None:
            self._report_timer.cancel()
        for call in list(self._calls.values()):
            call.deliver(Lost(reason))
        self._calls.clear()
        self._wake.set()
        if was_open:
            self.on_end()

    async def _shake_hands(self, incoming: AsyncIterator[NodeFrame]) -> None:
        nonce = new_nonce(self._me.random)
        self._send(RouterFrame(nonce=SessionNonce(nonce=nonce)))
        first = await _next(incoming)
        if len(first.nonce.nonce) != NONCE_BYTES or first.proof:
            raise BadSignature("the first frame of a session is a nonce of 32 bytes")
        proof = make_proof(self._me.signer, self._me.market_id, self._expected, first.nonce.nonce)
        self._send(RouterFrame(proof=proof))
        second = await _next(incoming)
        self.node_id, _ = check_proof(
            second.proof,
            market_id=self._me.market_id,
            my_identity=self._me.signer.identity,
            my_nonce=nonce,
            ring=self._me.ring,
        )
        if self._expected not in ("", self.node_id):
            raise PermissionDenied("another node answered than the one that was dialled")
        self.offer = second.offer
        self._heard()

    async def _read(
        self, incoming: AsyncIterator[NodeFrame], lease_ms: Callable[[], float]
    ) -> None:
        watch = asyncio.create_task(self._watch(lease_ms))
        read = asyncio.create_task(self._read_forever(incoming))
        try:
            await asyncio.wait({watch, read}, return_when=asyncio.FIRST_COMPLETED)
            if read.done():
                read.result()
                return
            raise DeadlineExceeded("the node was not heard for its whole lease")
        finally:
            for task in (watch, read):
                task.cancel()
            await asyncio.gather(watch, read, return_exceptions=True)

    async def _read_forever(self, incoming: AsyncIterator[NodeFrame]) -> None:
        async for frame in incoming:
            self._heard()
            self._receive(frame)

    async def _watch(self, lease_ms: Callable[[], float]) -> None:
        while True:
            left_ms = self.last_heard_ms + lease_ms() - self._me.clock.monotonic_ms()
            if left_ms <= 0:
                return
            await self._me.clock.sleep_ms(min(left_ms + 1, 1_000.0))

    def _receive(self, frame: NodeFrame) -> None:
        if frame.draining and not self.draining:
            self.draining = True
            self.on_end()
        if frame.HasField("load"):
            # A copy: a part would keep the whole frame.
            self.load = Load()
            self.load.CopyFrom(frame.load)
        for tokens in frame.tokens:
            if call := self._calls.get(tokens.call):
                call.deliver(NewTokens(tuple(tokens.token_ids)))
        for rejected in frame.rejected:
            if call := self._calls.get(rejected.call):
                call.deliver(Rejected(rejected.code[:64], rejected.message[:300]))
        for finished in frame.finished:
            if call := self._calls.get(finished.call):
                call.deliver(Finished(finished.receipt))

    def _heard(self) -> None:
        self.last_heard_ms = self._me.clock.monotonic_ms()

    def _stop(self, call: int, at: int) -> None:
        self._send(RouterFrame(stops=[Stop(call=call, at=at)]))

    def _cancel(self, call: int) -> None:
        self._send(RouterFrame(cancels=[Cancel(call=call)]))

    def _grant(self, call: int, tokens: int) -> None:
        self._send(RouterFrame(windows=[Window(call=call, tokens=tokens)]))

    def _forget(self, call: int) -> None:
        self._calls.pop(call, None)

    def _send_reports(self) -> None:
        self._report_timer = None
        if self._reports:
            self._send(RouterFrame())  # _take fills it

    def _send(self, frame: RouterFrame) -> None:
        if self._closing:
            return
        if len(self._outbox) >= MAX_OUTBOX:
            # A node that does not read this much is gone for all purposes.
            self.close("the node does not read")
            return
        self._outbox.append(frame)
        self._wake.set()

    def _take(self) -> RouterFrame:
        """Everything waiting as one frame, up to a size; handshake frames go alone."""
        frame = self._outbox.popleft()
        if frame.HasField("nonce") or frame.proof:
            return frame
        size = frame.ByteSize()
        while self._outbox and size < _MAX_FRAME_BYTES:
            following = self._outbox.popleft()
            size += following.ByteSize()
            frame.MergeFrom(following)
        while self._reports and len(frame.captured) < MAX_FRAME_REPORTS:
            frame.captured.append(self._reports.popleft())
        if self._reports and not self._outbox:
            self._send(RouterFrame())
        return frame


async def _next(incoming: AsyncIterator[NodeFrame]) -> NodeFrame:
    with contextlib.suppress(StopAsyncIteration):
        return await anext(incoming)
    raise Unavailable("the node left during the handshake")
