"""Request bodies: bounded in size, time and in how much of them is in memory at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from aiohttp import web

from trueweight.protos.errors import InvalidRequest, OverCapacity

MAX_BODY_BYTES = 8 * 1024 * 1024
BODY_TIMEOUT_S = 60.0
# Of all accounts together, and of each: a few clients must not use up the memory of the router.
_MAX_BODIES_BYTES = 256 * 1024 * 1024
MAX_BODIES_BYTES_PER_ACCOUNT = 64 * 1024 * 1024
# Nor may one client keep all connections busy with bodies that never end.
MAX_BODIES_PER_ACCOUNT = 512


class Bodies:
    """Reads bodies and knows how many bytes of them are in memory."""

    def __init__(self) -> None:
        self._total = 0
        self._of: Counter[str] = Counter()
        self._readers_of: Counter[str] = Counter()

    @asynccontextmanager
    async def read(self, request: web.Request, account: str) -> AsyncIterator[bytes]:
        """The body, counted until the block is left. Raises OverCapacity, InvalidRequest,
        HTTPRequestTimeout and HTTPRequestEntityTooLarge."""
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise InvalidRequest("Compressed bodies are not accepted.", hint="Send plain JSON.")
        _check_size(request.content_length or 0)
        body = bytearray()
        try:
            with self._reading(account):
                async with asyncio.timeout(BODY_TIMEOUT_S):
                    async for data in request.content.iter_any():
                        _check_size(len(body) + len(data))
                        self._take(len(data), account)
                        body += data
            yield bytes(body)
        finally:
            self._give(len(body), account)

    @contextmanager
    def _reading(self, account: str) -> Iterator[None]:
        if self._readers_of[account] >= MAX_BODIES_PER_ACCOUNT:
            raise _too_many()
        self._readers_of[account] += 1
        try:
            yield
        except TimeoutError:
            raise web.HTTPRequestTimeout from None
        finally:
            self._readers_of[account] -= 1
            if not self._readers_of[account]:
                del self._readers_of[account]

    def _take(self, size: int, account: str) -> None:
        if (
            self._total + size > _MAX_BODIES_BYTES
            or self._of[account] + size > MAX_BODIES_BYTES_PER_ACCOUNT
        ):
            raise _too_many()
        self._total += size
        self._of[account] += size

    def _give(self, size: int, account: str) -> None:
        self._total -= size
        self._of[account] -= size
        if not self._of[account]:
            del self._of[account]


def _check_size(size: int) -> None:
    if size > MAX_BODY_BYTES:
        raise web.HTTPRequestEntityTooLarge(max_size=MAX_BODY_BYTES, actual_size=size)


def _too_many() -> OverCapacity:
    return OverCapacity("Too many large or slow requests at once.", hint="Try again in a moment.")
