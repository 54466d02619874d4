"""The log over HTTP, for anybody: checkpoint, tiles, leaves, inclusion and consistency proofs.

``/checkpoint`` and ``/tile/…`` are those of C2SP tlog-tiles, so that its monitors and witnesses can
follow this log; leaves and proofs are JSON, because leaves here may be larger than the 64 KiB that
its entry bundles allow. Everything is signed or hashes to what is signed, so TLS adds privacy only.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import re
from typing import Any

import orjson
from aiohttp import web

from trueweight.ledger.service import Ledger
from trueweight.protos.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    OverCapacity,
    TrueweightError,
)
from trueweight.protos.merkle import HASH_BYTES
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1 import log_pb2
from trueweight.runtime.http_server import Handler, Seats, seated

log = logging.getLogger(__name__)

MAX_LEAVES = 256
MAX_IN_FLIGHT = 64
MAX_CONNECTIONS = 512
ANSWER_S = 10.0
MAX_NUMBER = 2**63 - 1
_LEDGER: web.AppKey[Ledger] = web.AppKey("ledger", Ledger)
_JSON = "application/json"
# x001/x234/067, and for a tile that is not full .p/WIDTH behind it.
_TILE = re.compile(r"((?:x\d{3}/){0,6}\d{3})(?:\.p/(\d{1,3}))?")
_FOREVER = "public, max-age=31536000, immutable"


def make_app(ledger: Ledger, seats: Seats) -> web.Application:
    """The application, for ``HttpServer``."""
    app = web.Application(client_max_size=1024, middlewares=[seated(seats), _bounded(), _errors])
    app[_LEDGER] = ledger
    app.router.add_get("/checkpoint", _checkpoint)
    app.router.add_get("/tile/{level:[0-9]{1,2}}/{number:.+}", _tile)
    app.router.add_get("/v1/leaves", _leaves)
    app.router.add_get("/v1/inclusion", _inclusion)
    app.router.add_get("/v1/consistency", _consistency)
    app.router.add_get("/healthz", _health)
    return app


def _bounded() -> Any:
    in_flight = [0]

    @web.middleware
    async def bounded(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuses at once what would only wait in front of the reader threads."""
        if in_flight[0] >= MAX_IN_FLIGHT:
            return error_response(OverCapacity("too many questions at once", hint="Ask again."))
        in_flight[0] += 1
        try:
            async with asyncio.timeout(ANSWER_S):
                return await handler(request)
        except TimeoutError:
            return error_response(DeadlineExceeded("the answer took too long", hint="Ask again."))
        finally:
            in_flight[0] -= 1

    return bounded


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except TrueweightError as error:
        return error_response(error)
    except web.HTTPException as error:
        return error_response(InvalidRequest(error.reason), status=error.status)
    except ConnectionError:
        raise
    except Exception:
        log.exception("%s failed", request.path)
        return error_response(TrueweightError("Internal error.", hint="Ask again."))


async def _checkpoint(request: web.Request) -> web.Response:
    found = await request.app[_LEDGER].checkpoint()
    return web.Response(text=found.note, headers={"Cache-Control": "no-cache"})


async def _tile(request: web.Request) -> web.Response:
    match = _TILE.fullmatch(request.match_info["number"])
    if match is None:
        raise InvalidRequest("not a tile", hint="Write /tile/LEVEL/x001/234 or …/234.p/WIDTH.")
    number = int(match[1].replace("x", "").replace("/", ""))
    width = int(match[2] or 256)
    body = await request.app[_LEDGER].tile(int(request.match_info["level"]), number, width)
    return web.Response(
        body=body, content_type="application/octet-stream", headers={"Cache-Control": _FOREVER}
    )


async def _leaves(request: web.Request) -> web.Response:
    start = _number(request, "from", 0)
    limit = max(1, min(MAX_LEAVES, _number(request, "limit", MAX_LEAVES)))
    kinds = [kind for kind in request.query.get("kinds", "").split(",") if kind][:16]
    page = await request.app[_LEDGER].read_log(start, limit, kinds)
    return _json(
        {
            "leaves": [_leaf(entry) for entry in page.entries],
            "next": page.next_index,
            "tree_size": page.tree_size,
        }
    )


async def _inclusion(request: web.Request) -> web.Response:
    wanted = pb.InclusionProofRequest(tree_size=_number(request, "tree_size", 0))
    # By hash alone is for members over gRPC: finding it is a scan, and this is for everybody. The
    # ledger refuses it to strangers there, too.
    if ("index" in request.query) == ("digest" in request.query):
        raise InvalidRequest("name one leaf", hint="By index or by digest.")
    if "index" in request.query:
        wanted.index = _number(request, "index")
    else:
        wanted.message_digest = _hash(request, "digest")
    found = await request.app[_LEDGER].inclusion(wanted)
    return _json(
        {
            "index": found.proof.index,
            "tree_size": found.proof.tree_size,
            "path": [_text(node) for node in found.proof.path],
            "leaf": _leaf(found.entry),
            "checkpoint": found.checkpoint.note,
        }
    )


async def _consistency(request: web.Request) -> web.Response:
    old, new = _number(request, "old"), _number(request, "new")
    found = await request.app[_LEDGER].consistency(old, new)
    path = [_text(node) for node in found.path]
    return _json({"old_size": found.old_size, "new_size": found.new_size, "path": path})


async def _health(request: web.Request) -> web.Response:
    """200 on the writer and on a standby alike; load balancers look at ``writer``."""
    return _json({"ok": True, "writer": request.app[_LEDGER].is_writer})


def _leaf(entry: log_pb2.LogEntry) -> dict[str, Any]:
    return {
        "index": entry.index,
        "kind": entry.kind,
        "body": _text(entry.body),
        "merged_at_unix_ms": entry.merged_at_unix_ms,
    }


def _number(request: web.Request, name: str, default: int | None = None) -> int:
    text = request.query.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 19:
        raise InvalidRequest(f"{name} is not a number")
    return min(int(text), MAX_NUMBER)


def _hash(request: web.Request, name: str) -> bytes:
    text = request.query.get(name, "")
    try:
        value = bytes.fromhex(text) if text.isascii() else b""
    except ValueError:
        value = b""
    if len(value) != HASH_BYTES:
        raise InvalidRequest(f"{name} is not 64 hexadecimal digits")
    return value


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _json(value: Any) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type=_JSON)


def error_response(error: TrueweightError, status: int | None = None) -> web.Response:
    """An error as JSON."""
    body = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
    headers = {"Retry-After": "1"} if error.retryable else {}
    status = status or (404 if isinstance(error, NotFound) else error.http_status)
    return web.Response(body=orjson.dumps(body), content_type=_JSON, status=status, headers=headers)
