"""Bytes of each token of a byte-level BPE tokenizer (GPT-2's alphabet)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

from tokenizers import Tokenizer


def _alphabet() -> dict[str, int]:
    """GPT-2's map: printable Latin-1 stands for itself, other bytes are moved up from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in set(printable)]
    table = {chr(b): b for b in printable}
    return table | {chr(256 + n): b for n, b in enumerate(moved)}


_ALPHABET = _alphabet()


def byte_table(
    tokenizer: Tokenizer, tokenizer_json: str, specials: Set[int]
) -> Mapping[int, bytes] | None:
    """Bytes by token id, special tokens left out; None if the tokenizer is not byte-level."""
    if not _is_byte_level(json.loads(tokenizer_json).get("decoder")):
        return None
    return {
        token_id: _bytes_of(token)
        for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items()
        if token_id not in specials
    }


def _bytes_of(token: str) -> bytes:
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:
        return token.encode()


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders") or []
        return len(parts) == 1 and _is_byte_level(parts[0])
    return decoder.get("type") == "ByteLevel"
