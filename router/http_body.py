"""Request bodies: bounded in size, time and in how much of them is in memory at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from trueweight.protos.errors import InvalidRequest, OverCapacity

MAX_BODY_BYTES = 8 * 1024 * 1024
BODY_TIMEOUT_S = 60.0
# Of all accounts together, and of each: a few clients must not use up the memory of the router.
MAX_BODIES_BYTES = 256 * 1024 * 1024
MAX_BODIES_BYTES_PER_ACCOUNT = 64 * 1024 * 1024


class Bodies:
    """Reads bodies and knows how many bytes are being read."""

    def __init__(self) -> None:
        self._total = 0
        self._of: Counter[str] = Counter()

    @contextmanager
    def room(self, request: web.Request, account: str) -> Iterator[None]:
        """Room for a body for as long as it is read and parsed. Raises OverCapacity."""
        # Without a length it may become as long as any.
        size = min(request.content_length or MAX_BODY_BYTES, MAX_BODY_BYTES)
        if (
            self._total + size > MAX_BODIES_BYTES
            or self._of[account] + size > MAX_BODIES_BYTES_PER_ACCOUNT
        ):
            raise OverCapacity("Too many large requests at once.", hint="Try again in a moment.")
        self._total += size
        self._of[account] += size
        try:
            yield
        finally:
            self._total -= size
            self._of[account] -= size
            if not self._of[account]:
                del self._of[account]


async def read_body(request: web.Request) -> bytes:
    """The body. Raises HTTPRequestTimeout, HTTPRequestEntityTooLarge, InvalidRequest."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise InvalidRequest("Compressed bodies are not accepted.", hint="Send plain JSON.")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout from None
