"""A small bounded pipe from a running request to whoever writes its answer."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from trueweight.protos.errors import DeadlineExceeded, TrueweightError

T = TypeVar("T")
CAPACITY = 16


class ClientGone(TrueweightError):
    """Nobody reads the answer any more."""

    code = "CLIENT_GONE"
    http_status = 499


class Channel(Generic[T]):
    """One writer, one reader. ``hang_up`` by the reader makes every later ``put`` fail."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()
        self._reading = False
        self._gone = False

    @property
    def is_gone(self) -> bool:
        """True once the reader has hung up."""
        return self._gone

    async def put(self, item: T, timeout_ms: float) -> None:
        """Raises ClientGone, or DeadlineExceeded if the reader is too slow."""
        await self._until(lambda: len(self._items) < CAPACITY, timeout_ms)
        self._items.append(item)
        self._changed.set()

    async def drained(self, timeout_ms: float) -> None:
        """Waits until everything was taken and dealt with. Raises as ``put`` does."""
        await self._until(lambda: self._reading and not self._items, timeout_ms)

    async def get(self) -> T:
        """The next item. Asking for it says that the one before was dealt with."""
        self._reading = True
        self._taken.set()
        while not self._items:
            self._changed.clear()
            await self._changed.wait()
        self._reading = False
        item = self._items.popleft()
        self._taken.set()
        return item

    def hang_up(self) -> None:
        """The reader leaves."""
        self._gone = True
        self._taken.set()

    async def _until(self, condition: Callable[[], bool], timeout_ms: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, timeout_ms) / 1000):
                while not self._gone and not condition():
                    self._taken.clear()
                    await self._taken.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                "The answer was not read in time.", hint="Read the stream without pauses."
            ) from None
        if self._gone:
            raise ClientGone("the client is gone")
