"""Digests of token sequences: the only thing about a text that enters the public log."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SALT_BYTES = 16
_TAG = b"trueweight/tokens/v1\x00"


def token_digest(salt: bytes, token_ids: Sequence[int] | NDArray[np.int64]) -> bytes:
    """SHA-256(tag, 16-byte salt, ids as little-endian u32). Raises ValueError if out of range."""
    if len(salt) != SALT_BYTES:
        raise ValueError(f"a salt has {SALT_BYTES} bytes")
    try:
        ids = np.asarray(token_ids, dtype=np.int64)
    except OverflowError:
        raise ValueError("token id out of u32 range") from None
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) > 0xFFFFFFFF):
        raise ValueError("token id out of u32 range")
    return hashlib.sha256(_TAG + salt + ids.astype("<u4").tobytes()).digest()
