"""A model's own chat template, rendered by a child process with bounds on time, memory and size.

Templates come from registered, signed manifests; the bounds are there because a publisher is not
this router's operator. The date is passed in, so that anybody can render the same text again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trueweight.protos.errors import EngineError, InvalidRequest
from trueweight.router.template_child import BAD_TEMPLATE, DONE, REFUSED
from trueweight.router.template_pool import POOL

_MAX_TEMPLATE_CHARS = 512 * 1024


@dataclass(frozen=True, slots=True)
class TemplateVariables:
    """What a template sees besides the messages."""

    bos_token: str
    eos_token: str
    # ISO date, for example "2026-11-23": the only clock a template has.
    date: str


class ChatTemplate:
    """A template that compiles; ``sha256`` is over its text in UTF-8. Safe to use from threads,
    and blocking: not for an event loop."""

    def __init__(self, text: str) -> None:
        if len(text) > _MAX_TEMPLATE_CHARS:
            raise EngineError("the chat template is too long")
        try:
            self.sha256 = hashlib.sha256(text.encode()).digest()
        except UnicodeEncodeError:
            raise EngineError("the chat template is not UTF-8") from None
        self._text = text
        status, words = self._ask({"messages": None})
        if status != DONE:
            raise EngineError(f"the chat template does not compile: {words}")

    def render(self, messages: Sequence[dict[str, str]], variables: TemplateVariables) -> str:
        """The prompt's text. Raises InvalidRequest if the template refuses the messages, or takes
        too much for them, Unavailable if nothing can be rendered now."""
        try:
            status, text = self._ask({"messages": list(messages), **asdict(variables)})
        except TypeError:
            # Text that is no Unicode.
            status, text = b"", ""
        if status == DONE:
            return text
        if status in (REFUSED, BAD_TEMPLATE):
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {text}",
                hint="Check roles and their order.",
                param="messages",
            )
        raise InvalidRequest(
            "The model's chat template cannot render these messages.", param="messages"
        )

    def _ask(self, job: dict[str, Any]) -> tuple[bytes, str]:
        """Status and text."""
        answer = POOL.ask(self.sha256.hex(), self._text, job)
        if answer is None:
            return BAD_TEMPLATE, "it takes too much time or memory"
        return answer[:1], answer[1:].decode("utf-8", "replace")
