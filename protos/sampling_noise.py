"""Noise of tw-gumbel-1: MurmurHash3 over (seed, position, token) and a Gumbel variate from it.

``hash_u32`` and ``uniform`` are bit-exact everywhere; ``gumbel`` is the fp64 value rounded to
fp32, and any implementation within 1e-6 of it (relative) conforms.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

U32 = NDArray[np.uint32]
F32 = NDArray[np.float32]
_MASK = 0xFFFFFFFF
_C1, _C2 = 0xCC9E2D51, 0x1B873593
# -ln(2^-24): 1 - u is clamped below at 2^-24, because the largest u rounds to 1 in fp32.
_MAX_EXPONENTIAL = 24 * math.log(2.0)


def position(prompt_len: int, output_index: int) -> int:
    """Absolute position that keys the noise of output ``output_index`` (0-based, with prefix)."""
    return prompt_len + output_index - 1


def hash_u32(seed: int, pos: int, token_ids: NDArray[np.integer]) -> U32:
    """MurmurHash3 x86 32 (initial value 0, length 16) over the little-endian words
    seed_lo, seed_hi, pos, token; ``seed`` and ``pos`` are taken modulo 2^64 and 2^32."""
    state = 0
    for word in (seed & _MASK, (seed >> 32) & _MASK, pos & _MASK):
        state = _mix_scalar(state, word)
    # asarray().astype() wraps modulo 2^32 in C, which is what the hash wants.
    key = np.asarray(token_ids).astype(np.uint32)
    key = _rotate_left(key * np.uint32(_C1), 15) * np.uint32(_C2)
    h = _rotate_left(key ^ np.uint32(state), 13)
    h = h * np.uint32(5) + np.uint32(0xE6546B64)
    h ^= np.uint32(16)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    result: U32 = h
    return result


def uniform(h: U32) -> F32:
    """fp32 of (h + 0.5) * 2^-32, rounded once: both halves are exact, only their sum rounds."""
    high = (h >> np.uint32(16)).astype(np.float32) * np.float32(2.0**-16)
    low = ((h & np.uint32(0xFFFF)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    result: F32 = high + low
    return result


def gumbel_of(u: F32) -> F32:
    """g = -ln(-log1p(-u)), with 1 - u clamped below at 2^-24."""
    with np.errstate(divide="ignore"):
        exponential = np.minimum(-np.log1p(-u.astype(np.float64)), _MAX_EXPONENTIAL)
    result: F32 = (-np.log(exponential)).astype(np.float32)
    return result


def gumbel(seed: int, pos: int, vocabulary_size: int) -> F32:
    """The noise of every token of the vocabulary at one position."""
    return gumbel_of(uniform(hash_u32(seed, pos, np.arange(vocabulary_size, dtype=np.uint32))))


def _mix_scalar(state: int, word: int) -> int:
    word = (word * _C1) & _MASK
    word = ((word << 15) | (word >> 17)) & _MASK
    state ^= (word * _C2) & _MASK
    state = ((state << 13) | (state >> 19)) & _MASK
    return (state * 5 + 0xE6546B64) & _MASK


def _rotate_left(value: U32, shift: int) -> U32:
    result: U32 = (value << np.uint32(shift)) | (value >> np.uint32(32 - shift))
    return result
