"""A model's own chat template, rendered in a sandbox with bounds on time and size.

Templates come from registered, signed manifests; the sandbox is there because a publisher is not
this router's operator. The date is passed in, so that anybody can render the same text again.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trueweight.protos.errors import EngineError, InvalidRequest

_MAX_TEMPLATE_CHARS = 512 * 1024
_MAX_RENDERED_CHARS = 12 * 1024 * 1024
_MAX_RENDER_MS = 2_000.0
_MAX_REPEAT = 10_000
# They build strings of any length from short arguments.
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox plus a time budget, checked at every attribute, item and call."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        self._budget = threading.local()
        for name in ("center", "indent", "pprint", "random"):
            self.filters.pop(name, None)
        self.globals["raise_exception"] = _raise_exception
        self.filters["tojson"] = _to_json

    def start(self, until_ms: float) -> None:
        """Sets this thread's deadline on the monotonic clock."""
        self._budget.until_ms = until_ms

    def check_time(self) -> None:
        """Raises SecurityError once the deadline has passed."""
        if time.monotonic() * 1000 > getattr(self._budget, "until_ms", float("inf")):
            raise SecurityError("the template takes too long")

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check_time()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check_time()
        return super().getitem(obj, argument)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.check_time()
        return super().call(context, obj, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _PADDING:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "**" or (not numbers and max(_length(left), _length(right)) > _MAX_REPEAT):
            raise SecurityError(f"operator {operator} is not allowed here")
        return super().call_binop(context, operator, left, right)


def _length(value: Any) -> int:
    return value if isinstance(value, int) else len(value) if hasattr(value, "__len__") else 0


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own escapes for HTML; models were trained on plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=min(indent, 8) if indent else None)


def _raise_exception(message: Any) -> str:
    raise TemplateError(str(message)[:200])


@dataclass(frozen=True, slots=True)
class TemplateVariables:
    """What a template sees besides the messages."""

    bos_token: str
    eos_token: str
    # ISO date, for example "2026-11-23": the only clock a template has.
    date: str


class ChatTemplate:
    """A compiled template; ``sha256`` is over its text in UTF-8. Safe to use from threads."""

    def __init__(self, text: str) -> None:
        if len(text) > _MAX_TEMPLATE_CHARS:
            raise EngineError("the chat template is too long")
        self.sha256 = hashlib.sha256(text.encode()).digest()
        self._sandbox = _Sandbox()
        try:
            self._template = self._sandbox.from_string(text)
        # Jinja's own, and whatever Python says of the code that Jinja makes of it.
        except Exception as error:  # noqa: BLE001
            raise EngineError(f"the chat template does not compile: {str(error)[:200]}") from None

    def render(self, messages: Sequence[dict[str, str]], variables: TemplateVariables) -> str:
        """The prompt's text. Raises InvalidRequest if the template refuses the messages."""
        self._sandbox.start(time.monotonic() * 1000 + _MAX_RENDER_MS)
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=list(messages),
                add_generation_prompt=True,
                bos_token=variables.bos_token,
                eos_token=variables.eos_token,
                date_string=variables.date,
                strftime_now=_fixed_clock(variables.date),
                tools=None,
            ):
                size += len(piece)
                self._sandbox.check_time()
                if size > _MAX_RENDERED_CHARS:
                    raise SecurityError("the prompt is too long")
                pieces.append(piece)
        except TemplateError as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {str(error)[:200]}",
                hint="Check roles and their order.",
                param="messages",
            ) from None
        except (TypeError, ValueError, KeyError, IndexError, ArithmeticError, RecursionError):
            raise InvalidRequest(
                "The model's chat template cannot render these messages.", param="messages"
            ) from None
        return "".join(pieces)


def _fixed_clock(date: str) -> Callable[[str], str]:
    moment = time.strptime(date, "%Y-%m-%d")
    return lambda form: time.strftime(str(form)[:64], moment)
