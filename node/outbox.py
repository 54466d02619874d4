"""What waits to be sent to a router, joined into as few frames as possible.

A gRPC message costs the same whatever its size, so all calls' tokens of an engine step share one.
"""

from __future__ import annotations

import asyncio
from collections import deque

from trueweight.protos.v1.node_pb2 import Finished, Load, NodeFrame, Rejected, Tokens

# Far above what one step makes; only a router that was away for long meets these.
MAX_FRAME_TOKENS = 65_536
# Receipts and refusals: with the tokens a frame is below 1 MiB.
_MAX_FRAME_ITEMS = 512
# Above this the session stops reading, so that a flood of bad dispatches cannot fill memory.
MAX_BACKLOG_ITEMS = 8_192


class Outbox:
    """Collects; ``take`` builds the next frame. Tokens of a call stay in order and before its
    Finished. Token memory is bounded by the calls' windows, the rest by ``room``."""

    def __init__(self) -> None:
        self._tokens: dict[int, list[int]] = {}
        self._finished: deque[Finished] = deque()
        self._rejected: deque[Rejected] = deque()
        self._load: Load | None = None
        self._draining = False
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def add_tokens(self, call: int, token_ids: tuple[int, ...]) -> None:
        """The call's next output ids."""
        self._tokens.setdefault(call, []).extend(token_ids)
        self._filled.set()

    def add_finished(self, call: int, receipt: bytes) -> None:
        """The call's end: the envelope of its receipt."""
        self._finished.append(Finished(call=call, receipt=receipt))
        self._changed()

    def add_rejected(self, call: int, code: str, message: str) -> None:
        """The call's end without a receipt; the message is cut to 500 characters."""
        self._rejected.append(Rejected(call=call, code=code, message=message[:500]))
        self._changed()

    def set_load(self, load: Load) -> None:
        """The newest load replaces an older one that was not sent yet."""
        self._load = load
        self._filled.set()

    def announce_draining(self) -> None:
        """The next frame says that no new calls are taken."""
        self._draining = True
        self._filled.set()

    @property
    def empty(self) -> bool:
        """True if nothing waits to be sent."""
        return not (
            self._tokens or self._finished or self._rejected or self._load or self._draining
        )

    @property
    def urgent(self) -> bool:
        """True if somebody waits for the end of a call, not only for more tokens."""
        return bool(self._finished or self._rejected)

    async def filled(self) -> None:
        """Waits until there is something to send."""
        await self._filled.wait()

    async def room(self) -> None:
        """Waits until the backlog is small enough to take more work."""
        await self._room.wait()

    def take(self) -> NodeFrame:
        """The next frame; empty if nothing waits."""
        frame = NodeFrame(draining=self._draining)
        self._draining = False
        if self._load is not None:
            frame.load.CopyFrom(self._load)
            self._load = None
        self._take_tokens(frame)
        self._take_finished(frame)
        while self._rejected and len(frame.rejected) < _MAX_FRAME_ITEMS:
            frame.rejected.append(self._rejected.popleft())
        if self.empty:
            self._filled.clear()
        self._changed(wake=False)
        return frame

    def _take_tokens(self, frame: NodeFrame) -> None:
        budget = MAX_FRAME_TOKENS
        while self._tokens and budget > 0:
            call, waiting = next(iter(self._tokens.items()))
            frame.tokens.append(Tokens(call=call, token_ids=waiting[:budget]))
            if len(waiting) <= budget:
                del self._tokens[call]
            else:
                del waiting[:budget]
            budget -= len(frame.tokens[-1].token_ids)

    def _take_finished(self, frame: NodeFrame) -> None:
        for _ in range(min(len(self._finished), _MAX_FRAME_ITEMS)):
            done = self._finished.popleft()
            if done.call in self._tokens:
                self._finished.append(done)
            else:
                frame.finished.append(done)

    def _changed(self, *, wake: bool = True) -> None:
        if wake:
            self._filled.set()
        if len(self._finished) + len(self._rejected) >= MAX_BACKLOG_ITEMS:
            self._room.clear()
        else:
            self._room.set()
