"""The messages of a /v1/chat/completions body as frozen values: roles and text. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from trueweight.protos.errors import InvalidRequest, UnsupportedParameter
from trueweight.router.fields import Fields

_MAX_MESSAGES = 4096
_MAX_PARTS = 1024
_MAX_PARTS_IN_ALL = 8192

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {
    "system": "system",
    # OpenAI renamed the role; open models' templates know the old name.
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message, its text parts joined."""

    role: Role
    content: str


def parse_messages(value: Any) -> tuple[Message, ...]:
    """The ``messages`` of a chat. Raises InvalidRequest with ``param`` set."""
    if not isinstance(value, list) or not 1 <= len(value) <= _MAX_MESSAGES:
        raise InvalidRequest(
            f"'messages' must be a list of 1 to {_MAX_MESSAGES} messages.", param="messages"
        )
    # Each costs microseconds even if it is empty.
    contents = [item.get("content") for item in value if isinstance(item, dict)]
    if sum(len(c) for c in contents if isinstance(c, list)) > _MAX_PARTS_IN_ALL:
        raise InvalidRequest(
            f"'messages' may have at most {_MAX_PARTS_IN_ALL} parts in all.",
            hint="Join text parts.",
            param="messages",
        )
    return tuple(_message(item, index) for index, item in enumerate(value))


def _message(item: Any, index: int) -> Message:
    where = f"messages[{index}]"
    if not isinstance(item, dict):
        raise InvalidRequest(f"'{where}' must be an object.", param=where)
    fields = Fields(item, prefix=f"{where}.")
    role = fields.take("role")
    if not isinstance(role, str):
        raise fields.invalid("role", "must be a string")
    if role in ("tool", "function"):
        raise UnsupportedParameter("Tool messages are not supported.", param=f"{where}.role")
    if role not in _ROLES:
        raise fields.invalid("role", f"must be one of {', '.join(_ROLES)}")
    content = _content(fields.take("content"), f"{where}.content")
    fields.neutral({"tool_calls": ([],), "name": ("",), "refusal": ("",), "annotations": ([],)})
    fields.finish()
    return Message(_ROLES[role], content)


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not 1 <= len(value) <= _MAX_PARTS:
        raise InvalidRequest(
            f"'{where}' must be a string or a list of 1 to {_MAX_PARTS} parts.", param=where
        )
    return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(value))


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise InvalidRequest(f"'{where}' must be an object with a type.", param=where)
    if part["type"] != "text":
        raise UnsupportedParameter(
            f"'{where}': only text is supported.", hint="Send text parts.", param=where
        )
    fields = Fields(part, prefix=f"{where}.")
    fields.take("type")
    text = fields.take("text")
    if not isinstance(text, str):
        raise fields.invalid("text", "must be a string")
    fields.finish()
    return text
