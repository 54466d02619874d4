"""Token ids to text, a step at a time, never splitting a character; and stop strings.

Pure apart from the tokenizer it is given. ``k`` counts tokens: the smallest number of output
tokens whose text contains the stop string, so that the router can tell the node to sign exactly
that many.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

_REPLACEMENT = "\ufffd"
# A character has at most 4 bytes, so at most 4 byte tokens; a few more for decoders that fuse.
# Beyond that a run of undecodable tokens is what the model said: show it.
_MAX_PENDING_TOKENS = 12


class IncrementalDecoder(Protocol):
    """Text of one output. The pieces joined equal the decoding of all ids at once."""

    def push(self, token_id: int) -> str:
        """New text that is certain after one more token; often empty, never half a character."""
        ...

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        ...


class ByteLevelDecoder:
    """For byte-level BPE: tokens are bytes, so UTF-8 itself says what is complete."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """For every other tokenizer: decodes a short window twice and emits the difference.

    The window keeps the tokens of the last emitted piece, because decoders treat the start of a
    text in their own way (leading blanks).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._read = 0

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._read < _MAX_PENDING_TOKENS:
            return ""
        return self._emit(text)

    def finish(self) -> str:
        return self._emit(self._decode(self._ids)) if self._read < len(self._ids) else ""

    def _emit(self, text: str) -> str:
        known = self._decode(self._ids[: self._read]) if self._read else ""
        piece = text[len(known) :]
        # Tokens without text (special ones) are dropped, so that the window stays short.
        self._ids = self._ids[self._read :] if piece else self._ids[: self._read]
        self._read = len(self._ids)
        return piece


@dataclass(frozen=True, slots=True)
class Piece:
    """Text to deliver after some tokens. ``stopped_at`` is set once a stop string appeared: the
    number of output tokens up to and including the one that completed it."""

    text: str
    stopped_at: int | None = None


class TextStream:
    """Ids in, deliverable text out; holds back what may become a stop string."""

    def __init__(self, decoder: IncrementalDecoder, stops: Iterable[str] = ()) -> None:
        self._decoder = decoder
        self._stops = tuple(stops)
        self._held = ""
        self._tokens = 0
        self._stopped_at: int | None = None

    def push(self, token_ids: Iterable[int]) -> Piece:
        """Text that is certain after these tokens. After a stop, everything is ignored."""
        out: list[str] = []
        for token_id in token_ids:
            if self._stopped_at is not None:
                break
            self._tokens += 1
            out.append(self._take(self._decoder.push(token_id)))
        return Piece("".join(out), self._stopped_at)

    def finish(self) -> Piece:
        """The rest, once no more tokens come."""
        if self._stopped_at is not None:
            return Piece("", self._stopped_at)
        text = self._take(self._decoder.finish())
        # A stop string in the very last characters empties what is held.
        text, self._held = text + self._held, ""
        return Piece(text, self._stopped_at)

    def _take(self, piece: str) -> str:
        if not self._stops:
            return piece
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._stopped_at, self._held = self._tokens, ""
            return text[: min(found)]
        keep = held_back(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that begins a stop string."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
