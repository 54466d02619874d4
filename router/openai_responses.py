"""OpenAI's response objects, stream chunks and error bodies. Pure: values in, bytes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from trueweight.protos.errors import InvalidRequest, NotFound, TrueweightError
from trueweight.protos.money import format_credits
from trueweight.protos.v1.market_pb2 import FinishReason

DONE = b"data: [DONE]\n\n"
_LENGTH = frozenset({FinishReason.LENGTH, FinishReason.DEADLINE})


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of tokens and what the request cost in nanocredits."""

    prompt_tokens: int
    completion_tokens: int
    cost_nano: int

    def as_json(self) -> dict[str, Any]:
        """OpenAI's usage with two more fields: ``cost`` (credits, exact decimal text) and
        ``cost_nano`` (integer)."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "cost": format_credits(self.cost_nano),
            "cost_nano": self.cost_nano,
        }


def finish_reason(reason: FinishReason) -> str:
    """OpenAI's word for why an output ended: cut short is "length", everything else "stop"."""
    return "length" if reason in _LENGTH else "stop"


@dataclass(frozen=True, slots=True)
class Shape:
    """Which of the two APIs a response is for, and what all its objects share."""

    is_chat: bool
    response_id: str
    model: str
    created: int

    def full(self, text: str, finish: str, usage: Usage) -> bytes:
        """The whole answer of a request without streaming."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        kind = "chat.completion" if self.is_chat else "text_completion"
        return orjson.dumps(self._object(kind, [choice]) | {"usage": usage.as_json()})

    def chunk(
        self, text: str | None, finish: str | None = None, *, first: bool = False, usage: bool
    ) -> bytes:
        """One server-sent event with new text. ``usage``: the client asked for usage, so every
        chunk but the last carries a null one."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if self.is_chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            if text is not None:
                delta["content"] = text
            choice["delta"] = delta
        else:
            choice["text"] = text or ""
        body = self._object(self._chunk_kind, [choice])
        return event(body | {"usage": None} if usage else body)

    def usage_chunk(self, usage: Usage) -> bytes:
        """The last event of a stream that asked for usage: no choices."""
        return event(self._object(self._chunk_kind, []) | {"usage": usage.as_json()})

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.response_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "choices": choices,
        }


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


def error_body(error: TrueweightError) -> dict[str, Any]:
    """OpenAI's error object. ``code`` is the stable lower-case code."""
    return {
        "error": {
            "message": str(error),
            "type": error.openai_type,
            "param": error.param,
            "code": _openai_code(error),
        }
    }


def _openai_code(error: TrueweightError) -> str:
    if isinstance(error, NotFound) and error.param == "model":
        return "model_not_found"
    if type(error) is InvalidRequest:
        return "invalid_request"
    return error.code.lower()


def model_object(model_id: str, created: int, owner: str, extra: dict[str, Any]) -> dict[str, Any]:
    """One entry of /v1/models."""
    return {"id": model_id, "object": "model", "created": created, "owned_by": owner, **extra}


def model_list(models: list[dict[str, Any]]) -> dict[str, Any]:
    """/v1/models."""
    return {"object": "list", "data": models}
