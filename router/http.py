"""The OpenAI API over HTTP: thin routes around ``Front``."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

import orjson
from aiohttp import web

from trueweight.protos.errors import InvalidRequest, PayloadTooLarge, TrueweightError
from trueweight.protos.ids import ID_BYTES
from trueweight.router.answers import AnswerEvent, Completed, Failed, TextDelta
from trueweight.router.front import Front
from trueweight.router.http_body import MAX_BODY_BYTES, Bodies
from trueweight.router.http_errors import error_of_http, error_response
from trueweight.router.json_bodies import JsonBodies
from trueweight.router.lifecycle import RequestRun
from trueweight.router.openai_requests import ParsedRequest, parse_chat, parse_completion
from trueweight.router.openai_responses import (
    DONE,
    Shape,
    Usage,
    error_body,
    event,
    finish_reason,
    model_list,
    model_object,
)
from trueweight.router.planning import MAX_CLIENT_NONCE_BYTES
from trueweight.runtime.http_server import Handler, Seats, seated, writing

log = logging.getLogger(__name__)

_FRONT: web.AppKey[Front] = web.AppKey("front", Front)
_BODIES: web.AppKey[Bodies] = web.AppKey("bodies", Bodies)
_JSON_BODIES: web.AppKey[JsonBodies] = web.AppKey("json_bodies", JsonBodies)
_NONCE_HEADER = "x-trueweight-nonce"
_JSON = "application/json"


def make_app(front: Front, seats: Seats) -> web.Application:
    """The application, for ``HttpServer``."""
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[seated(seats), _errors])
    app[_FRONT], app[_BODIES], app[_JSON_BODIES] = front, Bodies(), JsonBodies()
    app.router.add_post("/v1/chat/completions", _chat)
    app.router.add_post("/v1/completions", _completion)
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/v1/models/{model:.+}", _model)
    app.router.add_get("/v1/receipts/{id}", _receipt)
    app.router.add_delete("/v1/receipts/{id}/transcript", _erase)
    app.router.add_get("/healthz", _health)
    app.router.add_get("/metrics", _metrics)
    return app


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error leaves as an OpenAI error body, and with an id to ask about."""
    front, fallback_id = request.app[_FRONT], os.urandom(16).hex()
    try:
        response = await handler(request)
    except TrueweightError as error:
        response = error_response(error)
    except web.HTTPRequestEntityTooLarge:
        response = error_response(
            PayloadTooLarge(f"The body has more than {MAX_BODY_BYTES} bytes.", hint="Shorten it.")
        )
    except web.HTTPException as error:
        response = error_response(error_of_http(error), status=error.status)
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:
        log.exception("request %s failed", fallback_id)
        response = error_response(TrueweightError("Internal error.", hint="Try again."))
    if not response.prepared:
        response.headers.setdefault("x-request-id", fallback_id)
    if request.path.startswith("/v1/"):
        front.metrics.requests.labels(str(response.status)).inc()
    return response


async def _chat(request: web.Request) -> web.StreamResponse:
    return await _answer(request, parse_chat)


async def _completion(request: web.Request) -> web.StreamResponse:
    return await _answer(request, parse_completion)


async def _answer(
    request: web.Request, parse: Callable[[Any], ParsedRequest]
) -> web.StreamResponse:
    front, started = request.app[_FRONT], asyncio.get_running_loop().time()
    key = await front.who(request.headers.get("Authorization"))
    async with request.app[_BODIES].read(request, key.account) as body:
        parsed = await request.app[_JSON_BODIES].read(body, parse)
        run = await front.start(parsed, key, _client_nonce(request))
    writer = _Writer(request, front, run, parsed, started)
    try:
        return await writer.write()
    finally:
        # Whatever ended this handler: nobody reads any more.
        run.abandon()


class _Writer:
    """Turns one run's events into one response."""

    def __init__(
        self,
        request: web.Request,
        front: Front,
        run: RequestRun,
        parsed: ParsedRequest,
        started: float,
    ) -> None:
        self._request, self._front, self._run, self._parsed = request, front, run, parsed
        self._started = started
        plan = run.plan
        prefix = "chatcmpl-" if parsed.is_chat else "cmpl-"
        self._shape = Shape(
            is_chat=parsed.is_chat,
            response_id=prefix + plan.request_id.hex(),
            model=plan.model.model_id,
            created=int.from_bytes(plan.request_id[:6], "big") // 1000,
        )

    async def write(self) -> web.StreamResponse:
        first = await self._run.answers.get()
        metrics = self._front.metrics
        loop = asyncio.get_running_loop()
        metrics.first_token.observe(loop.time() - self._started)
        try:
            if isinstance(first, Failed):
                return self._failure(first)
            if self._parsed.stream:
                return await self._stream(first)
            if isinstance(first, Completed):
                return self._whole(first)
            raise TrueweightError("Internal error.", hint="Try again.")
        finally:
            metrics.duration.observe(loop.time() - self._started)

    def _whole(self, end: Completed) -> web.Response:
        body = self._shape.full(end.text, finish_reason(end.finish_reason), self._usage(end))
        return web.Response(
            body=body, content_type=_JSON, headers=self._headers(end.settled is not None)
        )

    def _failure(self, end: Failed) -> web.Response:
        response = error_response(end.error)
        response.headers.update(self._headers(end.settled is not None))
        return response

    async def _stream(self, first: AnswerEvent) -> web.StreamResponse:
        response = web.StreamResponse(headers=self._headers(charged=True))
        response.content_type = "text/event-stream"
        response.charset = "utf-8"
        response.headers["Cache-Control"] = "no-cache"
        async with writing(self._request):
            await response.prepare(self._request)
        item, is_first = first, True
        while True:
            data = self._data(item, is_first)
            is_last = not isinstance(item, TextDelta)
            async with writing(self._request):
                await response.write(data)
                if is_last:
                    await response.write_eof()
            if not isinstance(item, TextDelta):
                return response
            self._run.answer.written(item.tokens)
            item, is_first = await self._run.answers.get(), False

    def _data(self, item: AnswerEvent, is_first: bool) -> bytes:
        usage = self._parsed.include_usage
        if isinstance(item, TextDelta):
            return self._shape.chunk(item.text, first=is_first, usage=usage)
        if isinstance(item, Failed):
            # The status line is gone; this is how OpenAI's clients learn of it.
            return event(error_body(item.error))
        finish, used = finish_reason(item.finish_reason), self._usage(item)
        parts = []
        if item.text or is_first:
            parts.append(self._shape.chunk(item.text, first=is_first, usage=usage))
        parts.append(self._shape.chunk(None, finish, usage=usage))
        if usage:
            parts.append(self._shape.usage_chunk(used))
        return b"".join([*parts, DONE])

    def _usage(self, end: Completed) -> Usage:
        used = Usage(
            prompt_tokens=len(self._run.plan.prompt),
            completion_tokens=end.output_tokens,
            cost_nano=end.settled.charge_nano if end.settled else 0,
        )
        metrics = self._front.metrics
        metrics.tokens.labels("prompt").inc(used.prompt_tokens)
        metrics.tokens.labels("completion").inc(used.completion_tokens)
        metrics.charged.inc(used.cost_nano)
        return used

    def _headers(self, charged: bool) -> dict[str, str]:
        request_id = self._run.plan.request_id.hex()
        headers = {"x-request-id": request_id}
        if charged:
            headers["x-trueweight-receipt"] = request_id
        if self._run.route is not None:
            headers["x-trueweight-route"] = orjson.dumps(self._run.route.as_json()).decode()
        return headers


async def _models(request: web.Request) -> web.StreamResponse:
    front = request.app[_FRONT]
    await _optional_key(request)
    return _json(
        model_list(
            [
                model_object(m.model_id, m.registered_unix_ms // 1000, m.publisher, terms)
                for m, terms in front.models()
            ]
        )
    )


async def _model(request: web.Request) -> web.StreamResponse:
    front = request.app[_FRONT]
    await _optional_key(request)
    model, terms = front.model(request.match_info["model"])
    created = model.registered_unix_ms // 1000
    return _json(model_object(model.model_id, created, model.publisher, terms))


async def _receipt(request: web.Request) -> web.StreamResponse:
    front = request.app[_FRONT]
    key = await front.who(request.headers.get("Authorization"))
    return _json(await front.receipts.read(_request_id(request), key.account))


async def _erase(request: web.Request) -> web.StreamResponse:
    front = request.app[_FRONT]
    key = await front.who(request.headers.get("Authorization"))
    count = await front.receipts.erase(_request_id(request), key.account)
    return _json({"erased": count})


async def _health(request: web.Request) -> web.StreamResponse:
    return _json(request.app[_FRONT].health())


async def _metrics(request: web.Request) -> web.StreamResponse:
    return web.Response(
        body=request.app[_FRONT].metrics_text(), content_type="text/plain", charset="utf-8"
    )


async def _optional_key(request: web.Request) -> None:
    """The list of models is public, but a wrong key should not look right."""
    header = request.headers.get("Authorization")
    if header is not None:
        await request.app[_FRONT].who(header)


def _request_id(request: web.Request) -> bytes:
    text = request.match_info["id"]
    # Ids of answers ("chatcmpl-…") are accepted as well.
    text = text.rpartition("-")[2]
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != ID_BYTES:
        raise InvalidRequest(
            "A receipt id has 32 hex digits.", hint="See the header x-trueweight-receipt."
        )
    return found


def _client_nonce(request: web.Request) -> bytes:
    nonce = request.headers.get(_NONCE_HEADER, "").encode("utf-8", "surrogateescape")
    if len(nonce) > MAX_CLIENT_NONCE_BYTES:
        raise InvalidRequest(f"{_NONCE_HEADER} has at most {MAX_CLIENT_NONCE_BYTES} bytes.")
    return nonce


def _json(body: Any) -> web.Response:
    return web.Response(body=orjson.dumps(body), content_type=_JSON)
