"""gRPC the way every role uses it: TLS, bounds, deadlines, named callers, one error mapping."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio

from trueweight.protos.envelope import open_envelope, parse_envelope, parse_payload, ring_of, seal
from trueweight.protos.errors import (
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    TrueweightError,
    Unauthenticated,
    Unavailable,
    error_for,
)
from trueweight.protos.identity import KeyRing, Signer
from trueweight.protos.v1.envelope_pb2 import AccessToken
from trueweight.runtime.clock import Clock
from trueweight.runtime.tls import PINNED_NAME, channel_credentials, server_credentials

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
# Of one connection. Each may send a message, which is read whole before anybody knows whose it is.
_MAX_CONCURRENT_STREAMS = 1024
TLS_HANDSHAKE_MS = 10_000
TOKEN_LIFETIME_MS = 5 * 60_000
TOKEN_SKEW_MS = 60_000
_MAX_TOKEN_BYTES = 8 * 1024
_TOKEN_KEY = "trueweight-access-bin"  # noqa: S105  (a metadata name)
_CODE_KEY, _HINT_KEY = "trueweight-code", "trueweight-hint"
_KEEPALIVE: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

T = TypeVar("T")


@dataclass(frozen=True)
class Caller:
    """Who calls: a verified identity. ``None`` identity means anonymous."""

    identity: str | None = None


def make_server(*, max_request_bytes: int = MAX_MESSAGE_BYTES) -> grpc.aio.Server:
    """A server with bounded messages and streams; add services, then ``listen``."""
    return grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", max_request_bytes),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            *_KEEPALIVE,
            ("grpc.max_concurrent_streams", _MAX_CONCURRENT_STREAMS),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.so_reuseport", 0),
            # Silent strangers do not keep a connection.
            ("grpc.server_handshake_timeout_ms", TLS_HANDSHAKE_MS),
        ]
    )


def host_and_port(text: str) -> tuple[str, int] | None:
    """Both of HOST:PORT as they are written, the host perhaps empty; None if it is not that."""
    host, colon, port = text.rpartition(":")
    is_number = port.isascii() and port.isdigit() and len(port) <= len("65535")
    if not colon or not is_number or int(port) > 65535:
        return None
    return host, int(port)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; no host means loopback. Raises InvalidRequest."""
    found = host_and_port(address)
    if found is None:
        raise InvalidRequest(f"{address[:100]!r} is not HOST:PORT", hint="Write 127.0.0.1:0.")
    host, port = found
    return host or "127.0.0.1", port


def listen(server: grpc.aio.Server, address: str, keys: Path) -> str:
    """Binds with the certificate of a key directory; returns host:port with the real port."""
    host, wanted = split_address(address)
    try:
        port = server.add_secure_port(f"{host}:{wanted}", server_credentials(keys))
    except RuntimeError:
        port = 0
    if port == 0:
        raise Unavailable(
            f"cannot listen on {address}",
            hint="Is the port taken, or the address another machine's? Name one with port 0.",
        )
    return f"{host}:{port}"


def make_channel(
    endpoint: str, pinned_pem: str, *, max_response_bytes: int = MAX_MESSAGE_BYTES
) -> grpc.aio.Channel:
    """A channel to the one server that holds this certificate's key."""
    return grpc.aio.secure_channel(
        endpoint,
        channel_credentials(pinned_pem),
        options=[
            ("grpc.max_receive_message_length", max_response_bytes),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            *_KEEPALIVE,
            ("grpc.ssl_target_name_override", PINNED_NAME),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 5_000),
            # Two services on one machine must not share a connection with another pin.
            ("grpc.use_local_subchannel_pool", 1),
        ],
    )


class AccessTokens:
    """Makes (and re-uses until they age) the tokens that prove who is calling."""

    def __init__(
        self, signer: Signer, market_id: str, clock: Clock, random: Callable[[int], bytes]
    ) -> None:
        self._signer, self._market_id = signer, market_id
        self._clock, self._random = clock, random
        self._cache: dict[str, tuple[int, bytes]] = {}

    def metadata(self, audience: str) -> tuple[tuple[str, bytes], ...]:
        """Call metadata for a server's identity."""
        now = self._clock.now_unix_ms()
        made, token = self._cache.get(audience, (0, b""))
        if not token or now - made > TOKEN_LIFETIME_MS // 2:
            token = self._make(audience, now)
            self._cache[audience] = (now, token)
        return ((_TOKEN_KEY, token),)

    def _make(self, audience: str, now: int) -> bytes:
        return seal(
            AccessToken(
                market_id=self._market_id,
                subject=self._signer.identity,
                audience=audience,
                issued_at_unix_ms=now,
                expires_at_unix_ms=now + TOKEN_LIFETIME_MS,
                nonce=self._random(16),
                key_event=self._signer.key_event,
            ),
            self._signer,
        )


class Authenticator:
    """Checks access tokens addressed to one server. Verified tokens are remembered, bounded."""

    _MAX_REMEMBERED = 1024

    def __init__(
        self,
        identity: str,
        market_id: str,
        ring: KeyRing | Callable[[], KeyRing],
        clock: Clock,
    ) -> None:
        """``ring`` may be a function: then keys revoked meanwhile do not count any more."""
        self._identity, self._market_id, self._clock = identity, market_id, clock
        self._ring_now = ring if callable(ring) else lambda: ring
        self._seen: OrderedDict[bytes, tuple[str, int]] = OrderedDict()
        self._seen_with: KeyRing | None = None

    def caller(self, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        """The caller of an RPC; anonymous without a token. Raises Unauthenticated."""
        for key, value in context.invocation_metadata() or ():
            if key == _TOKEN_KEY and isinstance(value, bytes):
                return Caller(self.check(value))
        return Caller()

    def check(self, token: bytes) -> str:
        """The identity that a token proves. Raises Unauthenticated."""
        now = self._clock.now_unix_ms()
        if (ring := self._ring_now()) is not self._seen_with:
            # Keys came or went: what was believed before is judged again.
            self._seen.clear()
            self._seen_with = ring
        known = self._seen.get(token)
        if known and now <= known[1] + TOKEN_SKEW_MS:
            return known[0]
        message = self._open(token, ring)
        if message.audience != self._identity:
            raise Unauthenticated("the access token is for another server")
        lifetime = message.expires_at_unix_ms - message.issued_at_unix_ms
        fresh = message.issued_at_unix_ms - TOKEN_SKEW_MS <= now
        if not fresh or now > message.expires_at_unix_ms + TOKEN_SKEW_MS or lifetime > 600_000:
            raise Unauthenticated("the access token is not valid now", hint="Check the clocks.")
        self._seen[token] = (message.subject, message.expires_at_unix_ms)
        while len(self._seen) > self._MAX_REMEMBERED:
            self._seen.popitem(last=False)
        return message.subject

    def _open(self, token: bytes, known: KeyRing) -> AccessToken:
        if len(token) > _MAX_TOKEN_BYTES:
            raise Unauthenticated("the access token is too long")
        claimed = parse_payload(parse_envelope(token), AccessToken)
        # A stranger brings its own key event; it proves a key for that identity and nothing more.
        try:
            ring = ring_of([claimed.key_event], self._market_id, known)
        except Conflict:
            raise Unauthenticated("the access token's key was replaced or revoked") from None
        opened = open_envelope(token, AccessToken, ring, self._market_id, signer=claimed.subject)
        return opened.message


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: TrueweightError) -> None:
    """Ends an RPC with one of our errors; its code and hint travel in the trailing metadata."""
    trailing = ((_CODE_KEY, error.code), (_HINT_KEY, _ascii(error.hint)))
    await context.abort(error.grpc_status, _ascii(error.message), trailing_metadata=trailing)


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode()[:1000]


def unary(method: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """Decorates a servicer's unary method: our errors become statuses, bugs become INTERNAL."""

    @functools.wraps(method)
    async def wrapped(self: Any, request: Any, context: Any) -> T:
        try:
            return await method(self, request, context)
        except TrueweightError as error:
            await abort(context, error)
            raise
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            log.exception("%s failed", method.__name__)
            await abort(context, TrueweightError("internal error; see the server's log"))
            raise error

    return wrapped


def streaming(method: Callable[..., AsyncIterator[T]]) -> Callable[..., AsyncIterator[T]]:
    """The same for methods that yield answers."""

    @functools.wraps(method)
    async def wrapped(self: Any, request: Any, context: Any) -> AsyncIterator[T]:
        try:
            async for item in method(self, request, context):
                yield item
        except TrueweightError as error:
            await abort(context, error)
        except (asyncio.CancelledError, grpc.aio.AbortError, GeneratorExit):
            raise
        except Exception:
            log.exception("%s failed", method.__name__)
            await abort(context, TrueweightError("internal error; see the server's log"))

    return wrapped


def from_rpc_error(error: grpc.aio.AioRpcError) -> TrueweightError:
    """Our error behind a failed call."""
    trailing = {k: v for k, v in error.trailing_metadata() or () if isinstance(v, str)}
    message = error.details() or error.code().name
    if _CODE_KEY in trailing:
        return error_for(trailing[_CODE_KEY], message, trailing.get(_HINT_KEY, ""))
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"no answer in time: {message}")
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return Unavailable(
            f"the server is not reachable: {message}",
            hint=trailing.get(_HINT_KEY) or "Does it run, at the address of the market file?",
        )
    if error.code() == grpc.StatusCode.UNAUTHENTICATED:
        return Unauthenticated(message)
    return TrueweightError(message)


async def call(
    method: Callable[..., Awaitable[T]],
    request: Any,
    *,
    timeout_ms: float,
    metadata: Sequence[tuple[str, str | bytes]] = (),
) -> T:
    """One unary call with a deadline; raises our errors."""
    try:
        return await method(request, timeout=timeout_ms / 1000, metadata=tuple(metadata))
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
