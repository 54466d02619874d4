"""Errors as HTTP responses with OpenAI's error bodies."""

from __future__ import annotations

import orjson
from aiohttp import web

from trueweight.protos.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    TrueweightError,
    Unavailable,
)
from trueweight.router.openai_responses import error_body

_RETRY_AFTER_S = 2


def error_response(error: TrueweightError, status: int | None = None) -> web.Response:
    """The response for one of our errors; ``Retry-After`` where trying again makes sense."""
    response = web.Response(
        body=orjson.dumps(error_body(error)),
        content_type="application/json",
        status=status or error.http_status,
    )
    if response.status in (429, 503):
        response.headers["Retry-After"] = str(_RETRY_AFTER_S)
    return response


def error_of_http(error: web.HTTPException) -> TrueweightError:
    """What one of aiohttp's own errors means to a client of this API."""
    if error.status == 404:
        return NotFound("There is no such path.", hint="The API is under /v1/.")
    if error.status == 405:
        allowed = error.headers.get("Allow", "another")
        return InvalidRequest("This path does not know the method.", hint=f"Use {allowed}.")
    if error.status == 408:
        return DeadlineExceeded("The body did not arrive in time.", hint="Send it without pauses.")
    if error.status >= 500:
        return Unavailable("The server cannot answer now.", hint="Try again in a moment.")
    return InvalidRequest(f"The request cannot be understood: {error.reason}")
