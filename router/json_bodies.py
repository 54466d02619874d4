"""Request bodies as JSON, without stopping everybody else.

The parser holds the interpreter's lock: what it costs is bounded before it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import orjson

from trueweight.protos.errors import InvalidRequest
from trueweight.router.workers import Workers

T = TypeVar("T")

# Above this, a body goes to a thread, one of them at a time.
_THREAD_ABOVE_BYTES = 64 * 1024
# Lists, objects, names and strings. A chat of as many messages and parts as are allowed has half
# as many; without a bound, 8 MiB of "[]," take a second.
_MAX_NODES = 131_072
# As many as there may be token ids in a prompt, and some.
_MAX_VALUES = 2**20 + _MAX_NODES


class JsonBodies:
    """Reads bodies; belongs to one event loop."""

    def __init__(self) -> None:
        self._workers = Workers("json", 1)

    async def read(self, body: bytes, parse: Callable[[Any], T]) -> T:
        """``parse`` of the document. Raises InvalidRequest if it is not JSON or has too many
        values, and what ``parse`` raises."""
        if len(body) <= _THREAD_ABOVE_BYTES:
            return parse(_document(body))
        return await self._workers.run(_read_large, body, parse)


def _read_large(body: bytes, parse: Callable[[Any], T]) -> T:
    nodes, values = _count(body)
    if nodes > _MAX_NODES or values > _MAX_VALUES:
        raise InvalidRequest(
            f"The JSON body has more than {_MAX_NODES} lists, objects, names and strings, or more "
            f"than {_MAX_VALUES} values.",
            hint="Join text parts and messages; shorten lists.",
        )
    return parse(_document(body))


def _count(body: bytes) -> tuple[int, int]:
    """Lists, objects, names and strings; and commas. In few calls that each run over all bytes
    quickly. Of what is no JSON, at least those before the place where a parser stops."""
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = bare.count(b'"') // 2
    if strings > _MAX_NODES:
        return strings, 0
    outside = b"".join(bare.split(b'"')[::2])
    return strings + outside.count(b"[") + outside.count(b"{"), outside.count(b",")


def _document(body: bytes) -> Any:
    """A JSON document. Raises InvalidRequest for anything else, invalid UTF-8 included."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(
            f"The body is not valid JSON: {str(error)[:200]}", hint="Send UTF-8 encoded JSON."
        ) from None
