"""Logs: one line per event on stderr, never a prompt, an output or a key."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import TypeAlias

from trueweight.protos.errors import TrueweightError

_MAX_FRAMES, _MAX_CAUSES = 20, 4
_ExcInfo: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)


# What could end a line, or talk to a terminal, is shown instead of done.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_CONTROL |= {0x2028: "\\u2028", 0x2029: "\\u2029"}


class _Lines(logging.Formatter):
    """One line a message. Tracebacks keep their frames but not the words of foreign errors: those
    may quote a prompt or a key. Our own errors never do."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).translate(_CONTROL)

    def formatException(self, ei: _ExcInfo) -> str:
        return "\n".join(_frames(ei[1])) if ei[1] is not None else ""


def _frames(error: BaseException, causes: int = _MAX_CAUSES) -> Iterator[str]:
    inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if inner is not None and causes:
        yield from _frames(inner, causes - 1)
        yield "then"
    for frame in traceback.format_tb(error.__traceback__, -_MAX_FRAMES):
        yield frame.rstrip()
    words = f": {error}" if isinstance(error, TrueweightError) else ""
    yield f"{type(error).__name__}{words}"


class _JsonLines(_Lines):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "from": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


def configure(level: str = "info", *, as_json: bool = False) -> None:
    """Sets up the root logger on stderr; stdout stays for results."""
    handler = logging.StreamHandler(sys.stderr)
    if as_json:
        handler.setFormatter(_JsonLines())
    else:
        handler.setFormatter(
            _Lines("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")
        )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("grpc", "asyncio", "aiohttp.access", "numba", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
