"""The router's end of one dispatched assignment: a bounded inbox with a deadline on every wait."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from trueweight.protos.errors import DeadlineExceeded


@dataclass(frozen=True, slots=True)
class NewTokens:
    """More output ids, in order."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The node signed: envelope of its receipt, not checked yet."""

    receipt: bytes


@dataclass(frozen=True, slots=True)
class Rejected:
    """The node did not take it; nothing ran."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The session ended or the node broke the protocol. Nothing more will come."""

    reason: str


@dataclass(frozen=True, slots=True)
class Interrupted:
    """This side asked for the call to be looked at again (``Call.interrupt``)."""


CallEvent = NewTokens | Finished | Rejected | Lost | Interrupted


@dataclass(frozen=True, slots=True)
class Outgoing:
    """How a call talks back to its node."""

    stop: Callable[[int, int], None]
    cancel: Callable[[int], None]
    grant: Callable[[int, int], None]
    forget: Callable[[int], None]


class Call:
    """One assignment on a session. The node may be ``window`` tokens ahead of what ``next`` gave
    out, never more: that bounds the inbox whatever the client does."""

    def __init__(self, number: int, window: int, out: Outgoing) -> None:
        self.number = number
        self._window, self._out = window, out
        self._allowance = window
        self._ungranted = 0
        self._inbox: deque[CallEvent] = deque()
        self._news = asyncio.Event()
        self._over = self._ending = False

    async def next(self, timeout_ms: float) -> CallEvent:
        """The next event. Raises DeadlineExceeded."""
        if not self._inbox:
            self._news.clear()
            try:
                async with asyncio.timeout(max(0.0, timeout_ms) / 1000):
                    await self._news.wait()
            except TimeoutError:
                raise DeadlineExceeded("the node did not answer in time") from None
        event = self._inbox.popleft()
        if isinstance(event, NewTokens):
            self._consumed(len(event.token_ids))
        return event

    def stop(self, at: int) -> None:
        """Ends the output after exactly ``at`` tokens of this leg."""
        self._ending = True
        self._out.stop(self.number, at)

    def cancel(self) -> None:
        """Asks the node to abort and sign what it sent."""
        self._ending = True
        self._out.cancel(self.number)

    def interrupt(self) -> None:
        """Wakes ``next`` with Interrupted."""
        self._put(Interrupted())

    def close(self) -> None:
        """No more interest; later frames of this call are dropped."""
        self._over = True
        self._out.forget(self.number)

    def deliver(self, event: CallEvent) -> None:
        """Called by the session for everything that arrives."""
        if self._over:
            return
        if isinstance(event, NewTokens):
            self._allowance -= len(event.token_ids)
            if self._allowance < 0 or not event.token_ids:
                event = Lost("the node sent more tokens than it was allowed to")
                self.cancel()
        if isinstance(event, (Finished, Rejected, Lost)):
            self._over = True
            self._out.forget(self.number)
        self._put(event)

    def _put(self, event: CallEvent) -> None:
        self._inbox.append(event)
        self._news.set()

    def _consumed(self, tokens: int) -> None:
        # Granting in halves keeps the node busy and the messages few. Once the end was asked for,
        # no honest node has anything more to send.
        self._ungranted += tokens
        if not (self._over or self._ending) and self._ungranted * 2 >= self._window:
            self._out.grant(self.number, self._ungranted)
            self._allowance += self._ungranted
            self._ungranted = 0
