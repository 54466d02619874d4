"""Sources of grammars (structured output): what all roles must agree on to the byte.

A source is one JSON object in UTF-8 without spaces, with exactly one of the keys of ``KINDS``. Its
SHA-256 and the compiler are signed in the Assignment; the source itself travels beside it, in
``Dispatch`` and in the transcript. ``COMPILER`` names a compiler down to its version and the
settings that the node's ``grammar`` module gives it, because two versions may allow other tokens.

Nothing here compiles: that a source is well-formed does not say that it can be compiled.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import orjson

from trueweight.protos.errors import InvalidRequest, UnsupportedParameter
from trueweight.protos.sampling_parameters import Sampling

COMPILER_PACKAGE, COMPILER_VERSION = "llguidance", "1.7.6"
COMPILER = f"{COMPILER_PACKAGE}-{COMPILER_VERSION}/tw1"
KINDS = ("json_schema", "regex", "choice")
MAX_SOURCE_BYTES = 32 * 1024
MAX_DEPTH = 48
MAX_CHOICES = 256


def source_of(kind: str, value: Any) -> bytes:
    """The source of a JSON schema (an object), a regular expression (a string) or a choice (a list
    of distinct strings). Raises InvalidRequest, naming what is wrong with it."""
    try:
        source = orjson.dumps({kind: value})
    except (orjson.JSONEncodeError, RecursionError):
        raise _refuse("it cannot be written as JSON") from None
    parse_source(source)
    return source


def parse_source(source: bytes) -> tuple[str, Any]:
    """Kind and value of a source. Raises InvalidRequest for anything that is none."""
    if not 0 < len(source) <= MAX_SOURCE_BYTES:
        raise _refuse(f"its source has 1 to {MAX_SOURCE_BYTES} bytes")
    try:
        parsed = orjson.loads(source)
    except orjson.JSONDecodeError:
        raise _refuse("its source is not JSON") from None
    if not isinstance(parsed, dict) or len(parsed) != 1:
        raise _refuse(f"its source has exactly one key of {', '.join(KINDS)}")
    ((kind, value),) = parsed.items()
    if kind == "json_schema":
        _check_schema(value)
    elif kind == "regex":
        if not isinstance(value, str) or not value or "\0" in value:
            raise _refuse("a regular expression is a non-empty string")
    elif kind == "choice":
        _check_choice(value)
    else:
        raise _refuse(f"its source has exactly one key of {', '.join(KINDS)}")
    return kind, value


def digest_of_source(source: bytes) -> bytes:
    """What the Assignment signs."""
    return hashlib.sha256(source).digest()


def with_grammar(sampling: Sampling, source: bytes) -> Sampling:
    """The parameters with a grammar's digest and compiler."""
    return replace(sampling, grammar_sha256=digest_of_source(source), grammar_compiler=COMPILER)


def check_grammar(sampling: Sampling, source: bytes) -> None:
    """That ``source`` is the grammar of ``sampling`` (both may have none), and in a form that can
    be served. Raises UnsupportedParameter for another compiler, else InvalidRequest."""
    if not sampling.grammar_sha256:
        if source:
            raise _refuse("a source came without a signed digest")
        return
    if digest_of_source(source) != sampling.grammar_sha256:
        raise _refuse("the source is not what the signed digest names")
    if sampling.grammar_compiler != COMPILER:
        raise UnsupportedParameter(
            f"grammars are compiled by {COMPILER} here", param="response_format"
        )
    if not sampling.stop_token_ids:
        raise _refuse("an output under a grammar needs a stop id to end with")
    parse_source(source)


def _check_schema(value: Any) -> None:
    if not isinstance(value, dict):
        raise _refuse("a JSON schema is an object")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise _refuse(f"a JSON schema is nested at most {MAX_DEPTH} levels deep")


def _check_choice(value: Any) -> None:
    if (
        not isinstance(value, list)
        or not 1 <= len(value) <= MAX_CHOICES
        or not all(isinstance(text, str) and text for text in value)
        or len(set(value)) != len(value)
    ):
        raise _refuse(f"a choice is 1 to {MAX_CHOICES} distinct non-empty strings")


def _refuse(why: str) -> InvalidRequest:
    return InvalidRequest(f"The grammar is refused: {why}.", param="response_format")
