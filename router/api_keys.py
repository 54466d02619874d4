"""API keys: 256 random bits shown once, stored as a hash, bound to one client account."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from trueweight.protos.errors import InvalidRequest, NotFound, Unauthenticated
from trueweight.router.store import Store, api_keys
from trueweight.runtime.clock import Clock

PREFIX = "tw"
_KEY_PATTERN = re.compile(r"tw-([0-9a-f]{16})-([A-Za-z0-9_-]{43})")
_ACCOUNT_PATTERN = re.compile(r"client:[a-z0-9._-]{1,100}")
_MAX_KEY_CHARS = 128
# How long a revoked key may still work, and how long a lookup is remembered.
_CACHE_MS = 2_000.0
_MAX_CACHED = 10_000


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A stored key, without its secret."""

    key_id: str
    name: str
    account: str
    created_unix_ms: int
    revoked_unix_ms: int | None


def create_key(
    store: Store, account: str, name: str, clock: Clock, random: Callable[[int], bytes]
) -> tuple[ApiKey, str]:
    """A new key and its text, which is shown this once. Raises InvalidRequest."""
    if not _ACCOUNT_PATTERN.fullmatch(account):
        raise InvalidRequest(
            f"{account[:120]!r} is not a client account", hint="Write client:NAME, a-z 0-9 . _ -"
        )
    if len(name) > 128:
        raise InvalidRequest("a key's name has at most 128 characters")
    key_id = random(8).hex()
    secret = base64.urlsafe_b64encode(random(32)).decode().rstrip("=")
    key = ApiKey(key_id, name, account, clock.now_unix_ms(), None)
    row = {
        "key_id": key_id,
        "name": name,
        "account": account,
        "secret_sha256": _hash(secret),
        "created_unix_ms": key.created_unix_ms,
    }
    store.write_now(lambda c: c.execute(insert(api_keys).values(**row)) and None)
    return key, f"{PREFIX}-{key_id}-{secret}"


def revoke_key(store: Store, key_id: str, clock: Clock) -> None:
    """Ends a key for good. Raises NotFound."""
    now = clock.now_unix_ms()

    def work(connection: Connection) -> int:
        return connection.execute(
            update(api_keys)
            .where(api_keys.c.key_id == key_id, api_keys.c.revoked_unix_ms.is_(None))
            .values(revoked_unix_ms=now)
        ).rowcount

    if store.write_now(work) == 0:
        raise NotFound(
            f"there is no active key {key_id[:40]!r}", hint="See 'trueweight router key list'."
        )


def list_keys(store: Store) -> list[ApiKey]:
    """All keys, oldest first."""
    query = select(api_keys).order_by(api_keys.c.created_unix_ms, api_keys.c.key_id)
    return [
        ApiKey(r.key_id, r.name, r.account, r.created_unix_ms, r.revoked_unix_ms)
        for r in store.read_now(lambda c: list(c.execute(query)))
    ]


class KeyGate:
    """Answers who sends a request. Remembers answers for a moment, good and bad."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock
        # By SHA-256 of the presented text, so that no secret stays in memory.
        self._cache: OrderedDict[bytes, tuple[float, ApiKey | None]] = OrderedDict()

    async def check(self, authorization: str | None) -> ApiKey:
        """The key behind an Authorization header. Raises Unauthenticated."""
        presented = _bearer(authorization)
        mark = hashlib.sha256(presented.encode("utf-8", "surrogatepass")).digest()
        now = self._clock.monotonic_ms()
        cached = self._cache.get(mark)
        if cached is None or now - cached[0] > _CACHE_MS:
            cached = (now, await self._look_up(presented))
            self._cache[mark] = cached
            self._cache.move_to_end(mark)
            while len(self._cache) > _MAX_CACHED:
                self._cache.popitem(last=False)
        if cached[1] is None:
            raise Unauthenticated(
                "This API key is not known here or was revoked.",
                hint="Ask the market's operator for a key.",
            )
        return cached[1]

    async def _look_up(self, presented: str) -> ApiKey | None:
        match = _KEY_PATTERN.fullmatch(presented)
        if match is None:
            return None
        query = select(api_keys).where(api_keys.c.key_id == match[1])
        row = await self._store.read(lambda c: c.execute(query).first())
        if row is None or row.revoked_unix_ms is not None:
            return None
        if not hmac.compare_digest(row.secret_sha256, _hash(match[2])):
            return None
        return ApiKey(row.key_id, row.name, row.account, row.created_unix_ms, None)


def _bearer(authorization: str | None) -> str:
    scheme, _, text = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not text.strip():
        raise Unauthenticated(
            "No API key was sent.", hint="Send the header 'Authorization: Bearer tw-…'."
        )
    if len(text) > _MAX_KEY_CHARS:
        raise Unauthenticated("This is not an API key of this market.", hint="They begin with tw-.")
    return text.strip()


def _hash(secret: str) -> bytes:
    # The secret has 256 bits of entropy, so a plain hash cannot be searched.
    return hashlib.sha256(b"trueweight/api-key/v1\x00" + secret.encode()).digest()
