"""One session with a router over a stream of frames, whichever side dialled.

Every dispatched call ends in exactly one Rejected or one signed receipt. If the router is lost,
all calls are cancelled and their partial receipts are kept in the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

from trueweight.node.admission import Refused, Situation, admit
from trueweight.node.call_runner import CallRunner
from trueweight.node.calls import (
    Cancelled,
    DeadlinePassed,
    EngineFailed,
    StopAt,
    WindowGrown,
)
from trueweight.node.context import NodeContext
from trueweight.node.outbox import Outbox
from trueweight.protos.errors import (
    BadSignature,
    DeadlineExceeded,
    InvalidRequest,
    OverCapacity,
    PermissionDenied,
    StorageError,
    Unavailable,
)
from trueweight.protos.identity import KeyRing
from trueweight.protos.v1.node_pb2 import Dispatch, NodeFrame, RouterFrame, SessionNonce
from trueweight.runtime.handshake import NONCE_BYTES, check_proof, make_proof, new_nonce

log = logging.getLogger(__name__)

MAX_FRAME_REPORTS = 1_024
# A router joins at most 16,384 messages to a frame.
_MAX_FRAME_ITEMS = 20_000
_DISPATCHES_AT_ONCE = 64
# How long at most a frame that ends a call is held back for others.
_URGENT_MS = 5.0


class FrameStream(Protocol):
    """The two directions of a session. ``read`` gives None at the end; both may raise
    Unavailable when the other side is gone."""

    async def read(self) -> RouterFrame | None: ...

    async def write(self, frame: NodeFrame) -> None: ...


class NodeSession:
    """``run`` lives as long as the session; ``drain`` lets running calls end and refuses others.

    ``audience`` is the router's identity if the node dialled it, else empty.
    """

    def __init__(
        self,
        node: NodeContext,
        stream: FrameStream,
        audience: str = "",
        on_open: Callable[[NodeSession], None] = lambda _session: None,
    ) -> None:
        """``on_open`` is called once the router has proved itself; what it raises ends the
        session."""
        self._node, self._stream, self._audience = node, stream, audience
        self._on_open = on_open
        self._handshake: asyncio.Task[None] | None = None
        self._outbox = Outbox()
        self._calls: dict[int, CallRunner] = {}
        self._engine_tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.router_id = ""
        self.ended = False
        self._ring = KeyRing()

    async def run(self) -> None:
        """Raises BadSignature, PermissionDenied or DeadlineExceeded if the handshake fails, and
        InvalidRequest if the router breaks the protocol."""
        try:
            await self._shake_hands_in_time()
            self._on_open(self)
            log.info("session with router %s", self.router_id)
            await self._serve()
        finally:
            self._lose_calls()
            await self._wait_for_engine()
            self.ended = True
            log.info("session with router %s ended", self.router_id or "nobody")

    def drain(self) -> None:
        """No new dispatches; the session ends by itself when running calls have."""
        self._draining = True
        self._outbox.announce_draining()

    def abandon(self) -> None:
        """Ends a session whose handshake is not over, in favour of a newer one."""
        if self._handshake is not None:
            self._handshake.cancel()

    def end(self) -> None:
        """Ends the session soon: running calls get receipts for what they sent, which the router
        still receives if it reads."""
        self.drain()
        for runner in list(self._calls.values()):
            runner.feed(EngineFailed())
        self._idle.set()

    async def _shake_hands_in_time(self) -> None:
        self._handshake = asyncio.create_task(self._shake_hands())
        timeout_s = self._node.timing.handshake_ms / 1000
        try:
            done, _ = await asyncio.wait([self._handshake], timeout=timeout_s)
        finally:
            self._handshake.cancel()
        if not done:
            raise DeadlineExceeded("the router did not prove itself in time")
        if self._handshake.cancelled():
            raise OverCapacity("too many sessions are being opened", hint="Try again.")
        self._handshake.result()

    async def _shake_hands(self) -> None:
        my_nonce = new_nonce(self._node.random)
        await self._stream.write(NodeFrame(nonce=SessionNonce(nonce=my_nonce)))
        first = await self._read_handshake()
        if len(first.nonce.nonce) != NONCE_BYTES or first.proof:
            raise BadSignature("the first frame of a session is a nonce of 32 bytes")
        proof = make_proof(
            self._node.signer, self._node.market_id, self._audience, first.nonce.nonce
        )
        await self._stream.write(NodeFrame(proof=proof, offer=self._node.offer()))
        second = await self._read_handshake()
        self.router_id, self._ring = check_proof(
            second.proof,
            market_id=self._node.market_id,
            my_identity=self._node.signer.identity,
            my_nonce=my_nonce,
            ring=self._node.ring,
        )
        if self.router_id not in self._node.router_ids:
            raise PermissionDenied("this is not a router of the market that the node works for")
        if self._audience not in ("", self.router_id):
            raise PermissionDenied("another router answered than the one that was dialled")

    async def _read_handshake(self) -> RouterFrame:
        frame = await self._stream.read()
        if frame is None:
            raise Unavailable("the router left during the handshake")
        if frame.dispatches or frame.stops or frame.cancels or frame.windows or frame.captured:
            raise BadSignature("the router sent work before its proof")
        return frame

    async def _serve(self) -> None:
        self._outbox.set_load(self._node.load())
        tasks = [
            asyncio.create_task(work())
            for work in (self._read_forever, self._write_forever, self._tick_forever)
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except Unavailable as error:
            log.info("router %s is gone: %s", self.router_id, error)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read_forever(self) -> None:
        while (frame := await self._stream.read()) is not None:
            items = len(frame.dispatches) + len(frame.windows) + len(frame.stops)
            if items + len(frame.cancels) > _MAX_FRAME_ITEMS:
                raise InvalidRequest("the router's frame says more than all its calls have to say")
            for number, dispatch in enumerate(frame.dispatches, 1):
                self._dispatch(dispatch)
                if number % _DISPATCHES_AT_ONCE == 0:
                    # Others have their turn, and refusals leave before they pile up.
                    await asyncio.sleep(0)
                    await self._outbox.room()
            for window in frame.windows:
                if runner := self._calls.get(window.call):
                    runner.feed(WindowGrown(window.tokens))
            for stop in frame.stops:
                if runner := self._calls.get(stop.call):
                    runner.feed(StopAt(stop.at))
            for cancel in frame.cancels:
                if runner := self._calls.get(cancel.call):
                    runner.feed(Cancelled())
            if frame.captured:
                self._note_captured(frame)
            await self._outbox.room()

    def _note_captured(self, frame: RouterFrame) -> None:
        if len(frame.captured) > MAX_FRAME_REPORTS:
            raise InvalidRequest("the router reports too many captures at once")
        try:
            self._node.journal.note_reports(
                [(report.assignment_digest, report.bill_id) for report in frame.captured]
            )
        except StorageError as error:
            # Then these are claimed, and refused: that costs a call, not money.
            log.error("%s", error)

    def _dispatch(self, dispatch: Dispatch) -> None:
        if dispatch.call in self._calls:
            raise InvalidRequest("the router used a call number twice")
        workload, now = self._node.workload, self._node.clock.now_unix_ms()
        situation = Situation(
            router_id=self.router_id,
            ring=self._ring,
            running=workload.running,
            draining=self._draining,
            now_unix_ms=now,
            was_seen=workload.was_seen,
        )
        decision = admit(dispatch, self._node.terms, situation)
        if isinstance(decision, Refused):
            log.debug("refused a dispatch: %s", decision.code)
            self._outbox.add_rejected(dispatch.call, decision.code, decision.message)
            return
        opened = decision.opened
        try:
            workload.remember(opened.digest, opened.message.issued_at_unix_ms, now)
        except OverCapacity as error:
            self._outbox.add_rejected(dispatch.call, error.code, str(error))
            return
        runner = CallRunner(dispatch.call, decision, self._node, self._outbox, self._forget)
        self._calls[dispatch.call] = runner
        self._idle.clear()
        workload.running += 1
        task = runner.start()
        self._engine_tasks.add(task)
        task.add_done_callback(self._engine_tasks.discard)

    def _forget(self, runner: CallRunner) -> None:
        del self._calls[runner.call]
        self._node.workload.running -= 1
        if not self._calls:
            self._idle.set()

    async def _write_forever(self) -> None:
        timing, clock = self._node.timing, self._node.clock
        last_ms = clock.monotonic_ms() - timing.coalesce_ms
        while not (self._draining and self._outbox.empty and not self._calls):
            await self._something_to_do()
            await self._coalesce(last_ms)
            if self._outbox.empty:
                continue
            last_ms = clock.monotonic_ms()
            try:
                async with asyncio.timeout(timing.write_ms / 1000):
                    await self._stream.write(self._outbox.take())
            except TimeoutError:
                raise Unavailable("the router does not read") from None

    async def _coalesce(self, last_frame_ms: float) -> None:
        """Gives the calls of one engine step time to join one frame. After a pause a frame leaves
        at once; one with a receipt or a rejection hardly waits."""
        timing, clock = self._node.timing, self._node.clock
        await clock.sleep_ms(0)
        while not self._outbox.urgent:
            left_ms = last_frame_ms + timing.coalesce_ms - clock.monotonic_ms()
            if left_ms <= 0:
                return
            await clock.sleep_ms(min(_URGENT_MS, left_ms))

    async def _something_to_do(self) -> None:
        if not self._draining:
            await self._outbox.filled()
            return
        # While draining, the end of the last call matters as well as new frames.
        waits = [asyncio.create_task(w) for w in (self._outbox.filled(), self._idle.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _tick_forever(self) -> None:
        timing, clock = self._node.timing, self._node.clock
        next_load_ms = clock.monotonic_ms() + timing.heartbeat_ms
        while True:
            await clock.sleep_ms(timing.deadline_tick_ms)
            now_ms = clock.monotonic_ms()
            for runner in [r for r in self._calls.values() if r.deadline_at_ms <= now_ms]:
                runner.feed(DeadlinePassed())
            if now_ms >= next_load_ms:
                next_load_ms = now_ms + timing.heartbeat_ms
                self._outbox.set_load(self._node.load())

    def _lose_calls(self) -> None:
        for runner in list(self._calls.values()):
            runner.feed(Cancelled())

    async def _wait_for_engine(self) -> None:
        """Until the engine has let go of every job; bounded, because the session is over."""
        if self._engine_tasks:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._node.timing.abort_ms / 1000):
                    await asyncio.gather(*self._engine_tasks, return_exceptions=True)
