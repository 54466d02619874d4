"""Typed reading of one JSON object, with errors that name the parameter and say what to send."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trueweight.protos.errors import InvalidRequest, UnsupportedParameter

MAX_INT64 = 2**63 - 1
MIN_INT64 = -(2**63)
_MAX_NAME_CHARS = 64


class Fields:
    """Takes known fields out of a JSON object; whatever is left at the end is refused by name.

    A missing field and ``null`` mean the same: the default.
    """

    def __init__(self, body: Mapping[str, Any], prefix: str = "") -> None:
        self._left = {key: value for key, value in body.items() if value is not None}
        self._prefix = prefix

    def take(self, name: str) -> Any:
        """The raw value, or None."""
        return self._left.pop(name, None)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """An integer in [low, high]; booleans and floats are not integers."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.invalid(name, "must be an integer")
        if not low <= value <= high:
            raise self.invalid(name, f"must be between {low} and {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """A finite number in [low, high]."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.invalid(name, "must be a number")
        if not low <= value <= high or not math.isfinite(value):
            raise self.invalid(name, f"must be between {low} and {high}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """A boolean."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.invalid(name, "must be true or false")
        return value

    def text(self, name: str, max_chars: int, *, may_be_empty: bool = False) -> str | None:
        """A string of at most ``max_chars``, not empty unless it may be."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.invalid(name, "must be a string")
        if len(value) > max_chars or (not value and not may_be_empty):
            raise self.invalid(name, f"must have {1 - may_be_empty} to {max_chars} characters")
        return value

    def object(self, name: str) -> Fields | None:
        """A nested object."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.invalid(name, "must be an object")
        return Fields(value, prefix=f"{self._prefix}{name}.")

    def neutral(self, accepted: Mapping[str, tuple[Any, ...]]) -> None:
        """Drops parameters that are not supported when their value would change nothing."""
        for name, values in accepted.items():
            value = self._left.get(name)
            if value is None:
                continue
            if not any(type(value) is type(v) and value == v for v in values):
                raise self.unsupported(name)
            del self._left[name]

    def finish(self) -> None:
        """Refuses by name whatever was not taken."""
        for name in sorted(self._left):
            raise self.unsupported(name)

    def invalid(self, name: str, what: str) -> InvalidRequest:
        """An error about one parameter."""
        full = self._full(name)
        return InvalidRequest(f"'{full}' {what}.", param=full)

    def refused(self, name: str, error: InvalidRequest) -> InvalidRequest:
        """The same error, about this parameter."""
        return InvalidRequest(error.message, hint=error.hint, param=self._full(name))

    def unsupported(self, name: str) -> UnsupportedParameter:
        """A refusal of one parameter."""
        full = self._full(name)
        return UnsupportedParameter(
            f"'{full}' is not supported with this value.",
            hint="Leave it out or send null; it is never ignored silently.",
            param=full,
        )

    def _full(self, name: str) -> str:
        return self._prefix + name[:_MAX_NAME_CHARS]
