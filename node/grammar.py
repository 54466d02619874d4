"""Grammars (structured output): which tokens an output may go on with.

Compiled with llguidance, whose limits count work instead of time: building a grammar, one step of
it and its memory are bounded, and where a limit strikes it strikes on every machine alike. One
class serves generation and scoring, so that a node masks what a verifier recomputes.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trueweight.protos.errors import InvalidRequest, UnsupportedParameter
from trueweight.protos.grammar import (
    COMPILER,
    COMPILER_PACKAGE,
    COMPILER_VERSION,
    digest_of_source,
    parse_source,
)
from trueweight.protos.model_directory import read_facts

Mask = NDArray[np.bool_]
# Part of what COMPILER stands for: changing one is another compiler.
_LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "max_grammar_size": 60_000,
    "max_lexer_states": 20_000,
    "step_max_items": 20_000,
    "max_items_in_row": 1_000,
}
# One way to write a value: without a choice of spaces, a weak model cannot go on with them forever.
_JSON = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
    "lenient": False,
}
# Building happens inside an engine step too, where all requests wait for it.
_MOST_BUILD_CPU_S = 0.25
_MAX_REMEMBERED = 256


class Grammars:
    """Compiles grammars for one model's tokenizer."""

    def __init__(
        self, tokenizer_json: str, vocabulary_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        """Raises UnsupportedParameter if this tokenizer or this installation cannot."""
        guidance = _guidance()
        self.vocabulary_size = vocabulary_size
        self._eos = list(eos_token_ids)
        self._remembered: OrderedDict[bytes, str] = OrderedDict()
        self._turn = asyncio.Lock()
        try:
            self._tokenizer = guidance.LLTokenizer(
                tokenizer_json, n_vocab=vocabulary_size, eos_token=self._eos
            )
        except (ValueError, TypeError) as error:
            raise UnsupportedParameter(
                "this model's tokenizer cannot serve grammars", param="response_format"
            ) from error

    @classmethod
    def from_directory(cls, directory: Path, vocabulary_size: int) -> Grammars | None:
        """For a model directory; None if its tokenizer or this installation has no grammars."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            return None
        eos = read_facts(directory).eos_token_ids
        try:
            return cls(path.read_text(encoding="utf-8"), vocabulary_size, eos) if eos else None
        except UnsupportedParameter:
            return None

    async def check(self, source: bytes) -> None:
        """Raises InvalidRequest if the grammar cannot be compiled or costs too much. In a thread,
        one at a time; what it found is remembered."""
        digest = digest_of_source(source)
        async with self._turn:
            if digest not in self._remembered:
                self._remembered[digest] = await asyncio.to_thread(self._trouble, source)
                if len(self._remembered) > _MAX_REMEMBERED:
                    self._remembered.popitem(last=False)
        if trouble := self._remembered.get(digest, ""):
            raise InvalidRequest(f"The grammar is refused: {trouble}.", param="response_format")

    def _trouble(self, source: bytes) -> str:
        started = time.thread_time()
        try:
            matcher = self.matcher(source)
        except InvalidRequest as error:
            return error.message
        matcher.compute_bitmask()
        if matcher.is_error():
            return _words(matcher.get_error())
        if time.thread_time() - started > _MOST_BUILD_CPU_S:
            return "it takes too long to compile"
        return ""

    def matcher(self, source: bytes) -> Any:
        """A fresh matcher. Raises InvalidRequest if the source does not compile."""
        guidance = _guidance()
        matcher = guidance.LLMatcher(
            self._tokenizer,
            _grammar_text(source),
            log_level=0,
            limits=guidance.LLParserLimits(**_LIMITS, verbose_errors=False),
        )
        if matcher.is_error():
            raise InvalidRequest(_words(matcher.get_error()), param="response_format")
        return matcher

    def cursor(self, source: bytes, stop_ids: Sequence[int]) -> GrammarCursor:
        """Masks of one request. Raises InvalidRequest if the source does not compile."""
        return GrammarCursor(self, source, stop_ids, self._eos)


class GrammarCursor:
    """Walks along one output.

    Stop ids are allowed exactly where the grammar may end. Where it cannot go on (it is complete,
    a limit struck, or the output left it) only they are.
    """

    def __init__(
        self, grammars: Grammars, source: bytes, stop_ids: Sequence[int], eos_ids: Sequence[int]
    ) -> None:
        self._grammars, self._source = grammars, source
        self._stops = np.array(sorted(set(stop_ids)), dtype=np.intp)
        self._never_text = np.array(sorted({*stop_ids, *eos_ids}), dtype=np.intp)
        self._ends = frozenset(self._never_text.tolist())
        self._bits = np.zeros((grammars.vocabulary_size + 31) // 32, dtype=np.uint32)
        self._matcher = grammars.matcher(source)
        self._taken = 0
        self._over = False

    def mask_after(self, output: Sequence[int] | NDArray[np.int32], length: int) -> Mask:
        """What may follow ``output[:length]`` (prefix included). Going back to a smaller length
        starts again from the beginning."""
        if length < self._taken:
            self._matcher, self._taken, self._over = self._grammars.matcher(self._source), 0, False
        for index in range(self._taken, length):
            self._take(int(output[index]))
        self._taken = length
        return self._mask()

    def _take(self, token: int) -> None:
        if not self._over:
            self._over = token in self._ends or not self._matcher.consume_token(token)

    def _mask(self) -> Mask:
        size = self._grammars.vocabulary_size
        if not self._over and not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
            if not self._matcher.is_error():
                bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[:size]
                mask = bits.view(np.bool_)
                mask[self._never_text] = False
                mask[self._stops] = self._matcher.is_accepting()
                if mask.any():
                    return mask
        mask = np.zeros(size, dtype=np.bool_)
        mask[self._stops] = True
        return mask


def _grammar_text(source: bytes) -> str:
    matcher = _guidance().LLMatcher
    kind, value = parse_source(source)
    try:
        if kind == "json_schema":
            text: str = matcher.grammar_from_json_schema(value, overrides=_JSON)
        elif kind == "regex":
            text = matcher.grammar_from_regex(value)
        else:
            text = matcher.grammar_from_regex("|".join(map(_literal, value)))
    except ValueError as error:
        raise InvalidRequest(_words(str(error)), param="response_format") from error
    return text


def _literal(text: str) -> str:
    return "".join(f"\\{c}" if c in r"\.+*?()|[]{}^$" else c for c in text)


def _words(error: str) -> str:
    """The first line of what the compiler says, short and printable; it may quote the source."""
    line = error.strip().split("\n", 1)[0]
    return re.sub(r"[^\x20-\x7e]", "?", line)[:200] or "it does not compile"


@lru_cache(maxsize=1)
def _guidance() -> Any:
    """The compiler, if it is the one that COMPILER names. Raises UnsupportedParameter."""
    try:
        found = importlib.metadata.version(COMPILER_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        found = "nothing"
    if found != COMPILER_VERSION:
        raise UnsupportedParameter(
            f"grammars need {COMPILER}; installed is {found}", param="response_format"
        )
    import llguidance  # noqa: PLC0415 - not every installation has it

    return llguidance
