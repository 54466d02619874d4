"""Hostile inputs by mutation, guided by behaviour. Deterministic for a seed, microseconds a case.

Three kinds of damage: to bytes (flips, cuts, repeats), to one field of a message (extremes, wrong
sizes, unknown enum values, floods of repeated values), and to one place of a JSON document. An
input that makes the code under test answer in a way not seen before joins the corpus, so that the
next ones start from there: a poor man's coverage, without the cost of tracing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

MAX_CORPUS = 2_000
MAX_GROWN_BYTES = 4_096
_FLOOD = 300
_INTEGERS = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, -1)
_FLOATS = (0.0, -1.0, 1e38, float("inf"), float("-inf"), float("nan"))
_JSON: tuple[Any, ...] = (None, True, -1, 0, 2**70, 1e308, "", "x", "é" * 300, [], {}, [[[]]], [1])


class Mutator:
    """Makes cases and learns which were interesting."""

    def __init__(self, seed: int) -> None:
        # Not for secrets: the same cases on every machine.
        self.random = random.Random(seed)  # noqa: S311
        self._behaviours: set[str] = set()

    def is_new(self, behaviour: str) -> bool:
        """True the first time the code under test behaves so."""
        if behaviour in self._behaviours:
            return False
        self._behaviours.add(behaviour)
        return True

    @property
    def behaviours(self) -> int:
        """Different ways in which the code under test answered."""
        return len(self._behaviours)

    def damaged(self, data: bytes) -> bytes:
        """Bytes with 1 to 4 things wrong."""
        body = bytearray(data)
        for _ in range(self.random.randint(1, 4)):
            self._damage(body)
        return bytes(body)

    def _damage(self, body: bytearray) -> None:
        draw, size = self.random, len(body)
        at = draw.randrange(size + 1)
        match draw.randrange(5):
            case 0 if size:
                body[at % size] = draw.randrange(256)
            case 1 if size:
                body[at % size] ^= 1 << draw.randrange(8)
            case 2:
                del body[at : at + draw.randint(1, 16)]
            case 3 if size < MAX_GROWN_BYTES:
                body[at:at] = body[at : at + draw.randint(1, 32)] or b"\x00"
            case _:
                body[at:at] = draw.randbytes(draw.randint(1, 8))

    def spoil(self, message: Message) -> None:
        """Damages one field of a message in place, at any depth."""
        while True:
            fields: list[Any] = list(message.DESCRIPTOR.fields)
            field = self.random.choice(fields)
            deeper = field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated
            if deeper and self.random.random() < 0.7:
                message = getattr(message, field.name)
                continue
            break
        if self.random.randrange(5) == 0:
            message.ClearField(field.name)
        elif field.is_repeated:
            self._flood(message, field)
        elif not deeper:
            setattr(message, field.name, self._value(field))

    def _flood(self, message: Message, field: FieldDescriptor) -> None:
        values = getattr(message, field.name)
        count = self.random.choice((1, 2, _FLOOD))
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for _ in range(count):
                self.spoil(values.add())
        else:
            values.extend(self._value(field) for _ in range(count))

    def _value(self, field: FieldDescriptor) -> Any:
        kind = field.cpp_type
        if kind == FieldDescriptor.CPPTYPE_STRING:
            size = self.random.choice((0, 1, 16, 31, 32, 33, 64, _FLOOD))
            data = self.random.randbytes(size)
            return data.hex() if field.type == FieldDescriptor.TYPE_STRING else data
        if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
            return self.random.choice(_FLOATS)
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return bool(self.random.randrange(2))
        low, high = _RANGES[kind]
        return min(high, max(low, self.random.choice(_INTEGERS)))

    def spoiled_json(self, document: dict[str, Any]) -> dict[str, Any]:
        """The document with something else in one place; the document itself stays."""
        spoiled = dict(document)
        key = self.random.choice(sorted(spoiled))
        value = spoiled[key]
        if isinstance(value, dict) and value and self.random.randrange(2):
            spoiled[key] = self.spoiled_json(value)
        elif self.random.randrange(6) == 0:
            del spoiled[key]
        else:
            spoiled[key] = self.random.choice(_JSON)
        return spoiled


_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}


class Corpus:
    """Inputs to start from, the given ones and those that showed new behaviour."""

    def __init__(self, mutator: Mutator, seeds: list[bytes]) -> None:
        self._mutator, self._inputs = mutator, list(seeds)

    def pick(self) -> bytes:
        """One of them."""
        return self._mutator.random.choice(self._inputs)

    def run(self, data: bytes, behave: Callable[[bytes], str]) -> str:
        """Feeds an input to the code under test; keeps it if it behaved in a new way."""
        behaviour = behave(data)
        if self._mutator.is_new(behaviour) and len(self._inputs) < MAX_CORPUS:
            self._inputs.append(data)
        return behaviour
