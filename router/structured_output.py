"""``response_format`` (OpenAI) and ``structured_outputs`` (vLLM) as the source of a grammar. Pure.

Here is checked what can be without a compiler; whether a grammar compiles and what it costs is the
node's to say.
"""

from __future__ import annotations

from typing import Any

import orjson

from trueweight.protos.errors import InvalidRequest
from trueweight.protos.grammar import MAX_SOURCE_BYTES, source_of
from trueweight.router.fields import Fields

_FORMAT, _VLLM = "response_format", "structured_outputs"
_ANY_OBJECT = {"type": "object"}
_MAX_DESCRIPTION_CHARS = 4096
MAX_NAME_CHARS = 64


def take_grammar(fields: Fields) -> bytes:
    """Takes both parameters; the source they ask for, empty for plain text. Raises InvalidRequest
    and UnsupportedParameter with ``param`` set."""
    by_format, by_vllm = _response_format(fields), _structured_outputs(fields)
    if by_format and by_vllm:
        raise fields.invalid(_VLLM, f"and '{_FORMAT}' exclude each other")
    return by_format or by_vllm


def _response_format(fields: Fields) -> bytes:
    wanted = fields.object(_FORMAT)
    if wanted is None:
        return b""
    kind = wanted.take("type")
    source = b""
    if kind == "json_object":
        source = source_of("json_schema", _ANY_OBJECT)
    elif kind == "json_schema":
        source = _named_schema(wanted)
    elif not isinstance(kind, str):
        raise wanted.invalid("type", "must be a string")
    elif kind != "text":
        raise wanted.unsupported("type")
    wanted.finish()
    return source


def _named_schema(wanted: Fields) -> bytes:
    named = wanted.object("json_schema")
    if named is None:
        raise wanted.invalid("json_schema", "is missing")
    named.text("name", MAX_NAME_CHARS)
    named.flag("strict")  # every schema is kept strictly here
    # For the model's eyes, of which we show it nothing.
    named.text("description", _MAX_DESCRIPTION_CHARS, may_be_empty=True)
    schema = named.take("schema")
    named.finish()
    return _source(named, "schema", "json_schema", schema)


def _structured_outputs(fields: Fields) -> bytes:
    wanted = fields.object(_VLLM)
    if wanted is None:
        return b""
    sources = []
    for name, kind in (("json", "json_schema"), ("regex", "regex"), ("choice", "choice")):
        if (value := wanted.take(name)) is not None:
            sources.append(_source(wanted, name, kind, _parsed(value) if name == "json" else value))
    if wanted.flag("json_object"):
        sources.append(source_of("json_schema", _ANY_OBJECT))
    wanted.neutral(
        {
            "disable_any_whitespace": (True, False),  # there is none to choose
            "disable_fallback": (True, False),
        }
    )
    wanted.finish()
    if len(sources) != 1:
        raise fields.invalid(_VLLM, "must have exactly one of json, regex, choice, json_object")
    return sources[0]


def _parsed(value: Any) -> Any:
    """vLLM also takes a schema as JSON text."""
    if not isinstance(value, str) or len(value) > MAX_SOURCE_BYTES:
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return None


def _source(fields: Fields, name: str, kind: str, value: Any) -> bytes:
    try:
        return source_of(kind, value)
    except InvalidRequest as error:
        raise fields.refused(name, error) from error
