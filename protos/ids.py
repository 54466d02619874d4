"""Identifiers: UUIDv7 for requests, holds, bills and operations."""

from __future__ import annotations

import hashlib

ID_BYTES = 16


def uuid7(unix_ms: int, random: bytes) -> bytes:
    """A UUIDv7 (RFC 9562, section 5.7) from a time and 10 random bytes."""
    if len(random) != 10:
        raise ValueError("uuid7 needs exactly 10 random bytes")
    return _of_version(7, unix_ms.to_bytes(6, "big") + random)


def derived_id(tag: str, *parts: bytes) -> bytes:
    """A deterministic 16-byte id (UUIDv8 layout) for operations derived from other evidence."""
    digest = hashlib.sha256(tag.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return _of_version(8, digest.digest()[:ID_BYTES])


def as_uuid7(id_: bytes) -> bytes:
    """The same id in the form of a UUIDv7."""
    return _of_version(7, id_)


def is_uuid7(id_: bytes) -> bool:
    """True if an id of 16 bytes has the form of a UUIDv7."""
    return id_[6] >> 4 == 7


def _of_version(version: int, id_: bytes) -> bytes:
    value = bytearray(id_)
    value[6] = version << 4 | (value[6] & 0x0F)
    value[8] = 0x80 | (value[8] & 0x3F)
    return bytes(value)
