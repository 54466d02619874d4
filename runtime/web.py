"""Serving HTTP to strangers: a bound on connections, and a time in which each must say something.

aiohttp bounds sizes but not waits: a peer that connects and stays silent, sends its header a byte a
minute, or does not read its answer would hold a connection for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from aiohttp import web

from trueweight.protos.errors import Unavailable

Handler = Callable[[web.Request], Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """``idle_s``: how long a connection may be without a request under way. ``request_s``: how
    long a handler may take, after which the answer is 504."""

    connections: int = 512
    idle_s: float = 15.0
    request_s: float = 10.0


class HttpServer:
    """An aiohttp application behind limits. ``start`` and ``stop`` once each."""

    def __init__(self, app: web.Application, address: str, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._guards: dict[asyncio.BaseTransport | None, _Guard] = {}
        app.middlewares.insert(0, self._middleware())
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        self._address = address
        self._server: asyncio.Server | None = None
        self.endpoint = ""

    async def start(self) -> None:
        """Raises Unavailable if the address is taken."""
        await self._runner.setup()
        host, _, port = self._address.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(self._connection, host, int(port), backlog=256)
        except OSError as error:
            await self._runner.cleanup()
            raise Unavailable(
                f"cannot listen on {self._address}: {error.strerror}",
                hint="Is the port taken? Use port 0.",
            ) from None
        self.endpoint = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for guard in list(self._guards.values()):
            guard.abort()
        await self._runner.cleanup()

    def _connection(self) -> asyncio.BaseProtocol:
        handler = cast(asyncio.Protocol, self._runner.server and self._runner.server())
        return _Guard(handler, self._guards, self._limits)

    def _middleware(self) -> Any:
        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            guard = self._guards.get(request.transport)
            if guard is not None:
                guard.busy = True
            try:
                async with asyncio.timeout(self._limits.request_s):
                    return cast(web.StreamResponse, await handler(request))
            except TimeoutError:
                raise web.HTTPGatewayTimeout from None
            finally:
                if guard is not None:
                    guard.rest()

        return guarded


class _Guard(asyncio.Protocol):
    """Stands before aiohttp's protocol of one connection and ends it when it idles too long."""

    def __init__(
        self,
        inner: asyncio.Protocol,
        guards: dict[asyncio.BaseTransport | None, _Guard],
        limits: Limits,
    ) -> None:
        self._inner, self._guards, self._limits = inner, guards, limits
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.busy = False

    def rest(self) -> None:
        """No request is under way from now on; the answer must be read and the next one begun."""
        self.busy = False
        self._arm()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._inner.connection_made(transport)
        if len(self._guards) >= self._limits.connections:
            self._transport.abort()
            return
        self._guards[transport] = self
        self._arm()

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._guards.pop(self._transport, None)
        if self._timer is not None:
            self._timer.cancel()
        self._inner.connection_lost(error)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._limits.idle_s, self._expire)

    def _expire(self) -> None:
        if not self.busy:
            self.abort()
