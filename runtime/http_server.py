"""HTTP for strangers: sockets bounded in number, in time, and in what they may cost.

aiohttp closes a connection that sends no complete head within ``IDLE_S``, at its start or between
two requests. This adds a bound on their number: when it is reached, the connection that has waited
longest for a head gives way, so that idle strangers never lock out a client that has a request.
``seated`` adds a bound on how long a peer may take to read its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

from aiohttp import web

from trueweight.protos.errors import InvalidRequest, TrueweightError, Unavailable
from trueweight.runtime.rpc import split_address

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
WRITE_TIMEOUT_S = 60.0
# Longer than reverse proxies keep their idle connections.
IDLE_S = 75.0
# Reading on after an early refusal lets a client that is still sending see the answer.
_LINGER_S = 2.0
# At the end requests were drained before: whoever still sends or reads now is not waited for long.
_SHUTDOWN_S = 3.0
# Files that the process needs besides connections.
_SPARE_FILES = 256
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\nContent-Length: 0\r\n"
    b"Connection: close\r\n\r\n"
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
# Makes the body of an error as the served API writes it.
ErrorResponse = Callable[[TrueweightError], web.Response]


class Seats:
    """How many connections there may be, and which of them only wait."""

    def __init__(self, most: int = MAX_CONNECTIONS) -> None:
        self._most = most
        self._open: dict[Connection, asyncio.Transport] = {}
        # In order of when they began to wait for a request's head.
        self._waiting: dict[Connection, None] = {}

    @property
    def taken(self) -> int:
        """Connections that are open."""
        return len(self._open)

    def take(self, connection: Connection, transport: asyncio.Transport) -> bool:
        """A seat for a new connection; False if all are busy with requests."""
        while len(self._open) >= self._most:
            if not self._waiting:
                return False
            idle = next(iter(self._waiting))
            # Abort: a peer that does not read would keep a closing one open.
            self._open[idle].abort()
            self.leave(idle)
        self._open[connection] = transport
        self._waiting[connection] = None
        return True

    def busy(self, connection: object) -> None:
        """A request of this connection is being answered."""
        if isinstance(connection, Connection):
            self._waiting.pop(connection, None)

    def waits(self, connection: object) -> None:
        """It was answered; the next one may come."""
        if isinstance(connection, Connection) and connection in self._open:
            self._waiting[connection] = None

    def leave(self, connection: Connection) -> None:
        """The connection is over."""
        self._open.pop(connection, None)
        self._waiting.pop(connection, None)


class Connection(web.RequestHandler):
    """One client connection. Says nothing to logs of what strangers send."""

    __slots__ = ("_error_response", "_seats")

    def __init__(self, server: web.Server, seats: Seats, error_response: ErrorResponse) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=IDLE_S,
            lingering_time=_LINGER_S,
            access_log=None,  # type: ignore[arg-type]  # as web.AppRunner documents it
            # Compressed bodies are refused; a small one could unpack to anything.
            auto_decompress=False,
        )
        self._seats, self._error_response = seats, error_response

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not all event loops' transports derive from asyncio.Transport.
        stream = cast(asyncio.Transport, transport)
        if not self._seats.take(self, stream):
            stream.write(_FULL)
            stream.close()
            return
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._seats.leave(self)
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What aiohttp answers to a head that is no HTTP, or too long. Its own version logs the
        offending line, which may hold an API key."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way already")
        log.debug("refused a malformed request: %s", type(exc).__name__)
        error: TrueweightError = InvalidRequest(
            "The request's head is not HTTP/1.1, or a line of it is too long.",
            hint="Lines of at most 8190 bytes, at most 128 headers.",
        )
        if status >= 500:
            log.error("answering failed: %s", type(exc).__name__)
            error = TrueweightError("Internal error.", hint="Try again.")
        response = self._error_response(error)
        response.force_close()
        return response


class HttpServer:
    """Serves an application; ``endpoint`` is the real host:port once it is started.
    ``error_response`` answers what is not even HTTP."""

    def __init__(self, app: web.Application, seats: Seats, error_response: ErrorResponse) -> None:
        # A client who leaves cancels its handler; the request itself runs in a task of its own.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S)
        self._seats, self._error_response = seats, error_response
        self._server: asyncio.Server | None = None
        self.endpoint = ""

    async def start(self, address: str) -> None:
        """Listens at host:port. Raises Unavailable if the address is taken."""
        host, port = split_address(address)
        await self._runner.setup()
        server = self._runner.server
        if server is None:
            raise Unavailable("the HTTP server was closed before it began")
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: Connection(server, self._seats, self._error_response),
                host.strip("[]"),
                port,
                backlog=1024,
            )
        except OSError as error:
            raise Unavailable(
                f"cannot listen on {address}: {error.strerror}",
                hint="Is the port taken? Use port 0.",
            ) from None
        self.endpoint = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """No new connections; ends the open ones in good order."""
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()


def seated(seats: Seats) -> Any:
    """The outermost middleware: writes whole answers itself, so that a client who does not read
    them is given up, and keeps the connection's seat while the request runs."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        seats.busy(request.protocol)
        try:
            response = await handler(request)
            if not response.prepared:
                async with writing(request):
                    await response.prepare(request)
                    await response.write_eof()
            return response
        finally:
            seats.waits(request.protocol)

    return middleware


@contextlib.asynccontextmanager
async def writing(request: web.Request) -> AsyncIterator[None]:
    """A bound on how long a client may take to read what is written here."""
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            yield
    except TimeoutError:
        # Closing would wait for it to read.
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the client does not read") from None


def make_seats(most: int = MAX_CONNECTIONS) -> Seats:
    """As many seats as this process may have files, raising the soft limit as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return Seats(most)
    return Seats(max(1, min(most, soft - _SPARE_FILES)))
