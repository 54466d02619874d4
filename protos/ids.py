"""Identifiers: UUIDv7 for requests, holds, bills and operations."""

from __future__ import annotations

import hashlib

ID_BYTES = 16


def uuid7(unix_ms: int, random: bytes) -> bytes:
    """A UUIDv7 (RFC 9562, section 5.7) from a time and 10 random bytes."""
    if len(random) != 10:
        raise ValueError("uuid7 needs exactly 10 random bytes")
    value = bytearray(unix_ms.to_bytes(6, "big") + random)
    value[6] = 0x70 | (value[6] & 0x0F)
    value[8] = 0x80 | (value[8] & 0x3F)
    return bytes(value)


def derived_id(tag: str, *parts: bytes) -> bytes:
    """A deterministic 16-byte id (UUIDv8 layout) for operations derived from other evidence."""
    digest = hashlib.sha256(tag.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    value = bytearray(digest.digest()[:ID_BYTES])
    value[6] = 0x80 | (value[6] & 0x0F)
    value[8] = 0x80 | (value[8] & 0x3F)
    return bytes(value)
