"""Leaves of one commit in one row: few rows, and any leaf found without parsing the others.

Layout: for n leaves, n kind bytes, n little-endian u32 lengths, then the bodies.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence

from trueweight.ledger.values import Leaf
from trueweight.protos.errors import StorageError

# Numbers are stored: append only. The first three are the frequent ones (see ``RARE``).
KINDS = (
    "transfer", "receipt", "bill", "key-event", "registry-entry", "calibration", "epoch-open",
    "epoch-reveal", "audit-request", "margin-commitment", "verdict", "conviction", "suspension",
    "reinstatement",
)  # fmt: skip
_NUMBER = {kind: number for number, kind in enumerate(KINDS)}
# A bundle's mask above this has evidence that is worth an index of its own.
FREQUENT_MASK = 0b111


def mask_of(kinds: Iterable[str]) -> int:
    """Bit mask of kinds; unknown ones match nothing."""
    mask = 0
    for kind in kinds:
        if kind in _NUMBER:
            mask |= 1 << _NUMBER[kind]
    return mask


def pack(leaves: Sequence[Leaf]) -> tuple[int, bytes]:
    """Kinds mask and body of a bundle."""
    numbers = bytes([_NUMBER[leaf.kind] for leaf in leaves])
    lengths = struct.pack(f"<{len(leaves)}I", *[len(leaf.body) for leaf in leaves])
    mask = 0
    for number in set(numbers):
        mask |= 1 << number
    return mask, b"".join([numbers, lengths, *[leaf.body for leaf in leaves]])


def unpack(count: int, body: bytes) -> Iterator[tuple[str, bytes]]:
    """(kind, leaf body) in order. Raises StorageError if the bytes are not a bundle."""
    try:
        numbers = body[:count]
        lengths = struct.unpack_from(f"<{count}I", body, count)
        kinds = [KINDS[number] for number in numbers]
    except (struct.error, IndexError):
        raise StorageError("a bundle of leaves is damaged", hint="Run ledger fsck.") from None
    place = 5 * count
    if place + sum(lengths) != len(body):
        raise StorageError("a bundle of leaves is damaged", hint="Run ledger fsck.")
    for kind, length in zip(kinds, lengths, strict=True):
        yield kind, body[place : place + length]
        place += length
