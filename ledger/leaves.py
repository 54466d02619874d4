"""Leaf bodies: envelopes as received, and an operation's transfers as TransferBatch bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

from google.protobuf.message import DecodeError

from trueweight.ledger.accounts import CURRENCY
from trueweight.ledger.values import REASONS, Transfer
from trueweight.protos.errors import BadSignature
from trueweight.protos.v1 import ledger_pb2 as pb

TRANSFER = "transfer"
# More of one operation are several leaves, so that no leaf grows without bound.
MAX_MOVEMENTS = 256
_ONE = [bytes([n]) for n in range(128)]
_MORE = [bytes([n & 127 | 128, n >> 7 | 128]) for n in range(16_384)]
_LAST = [bytes([n & 127 | 128, n >> 7]) if n > 127 else bytes([n]) for n in range(16_384)]
# A movement's phase, the tag of its pending id, and its reason; what most of them end with in one.
_PHASES = [b"\x20" + bytes([phase]) for phase in range(6)]
_REASONS = {reason: b"\x32" + bytes([len(reason)]) + reason.encode() for reason in REASONS}
_ENDS = [{reason: phase + end for reason, end in _REASONS.items()} for phase in _PHASES]
_PENDING_IDS = [phase + b"\x2a" for phase in _PHASES]
_HEADS = [b"\x32" + length for length in _LAST]
# The most that comes before an operation's first movement: its id, sequence, currency and time.
_BEFORE_MOVEMENTS = 18 + 11 + 2 + len(CURRENCY) + 11
_CURRENCY = b"\x22" + bytes([len(CURRENCY)]) + CURRENCY.encode()


def encode_movement(  # noqa: PLR0917
    debit: str, credit: str, amount: int, phase: int, pending_id: bytes, reason: str
) -> bytes:
    """A Movement as the field of a TransferBatch, byte for byte what protobuf writes.

    By hand because there are five of these for every request, and parts repeat. All texts and
    ids are shorter than 128 bytes, so every length is one byte.
    """
    head = _sides(debit, credit)
    if amount:
        head = b"%b\x18%b" % (head, _varint(amount))
    if pending_id:
        body = b"".join(
            (head, _PENDING_IDS[phase], _ONE[len(pending_id)], pending_id, _REASONS[reason])
        )
    else:
        body = head + _ENDS[phase][reason]
    return _HEADS[len(body)] + body


def facts_digest(facts: Iterable[tuple[str, str]]) -> bytes:
    """Of the unique facts (kind and key) that an operation took; empty if there are none."""
    text = "".join(f"{kind}\0{key}\0" for kind, key in sorted(facts))
    return hashlib.sha256(text.encode()).digest() if text else b""


def encode_batches(
    operation_id: bytes,
    first_sequence: int,
    created_at_unix_ms: int,
    movements: Sequence[bytes],
    facts_sha256: bytes = b"",
) -> list[bytes]:
    """The leaves of one operation's encoded movements: one, unless there are very many."""
    end = b"\x3a%b%b" % (_ONE[len(facts_sha256)], facts_sha256) if facts_sha256 else b""
    head = b"\x0a%b%b\x10" % (_ONE[len(operation_id)], operation_id)
    tail = _head(created_at_unix_ms)
    first = b"".join((head, _varint(first_sequence), tail, *movements[:MAX_MOVEMENTS], end))
    if len(movements) <= MAX_MOVEMENTS:
        return [first]
    return [first] + [
        b"".join(
            (
                head,
                _varint(first_sequence + start),
                b"\x18" + _varint(start),
                tail,
                *movements[start : start + MAX_MOVEMENTS],
                end,
            )
        )
        for start in range(MAX_MOVEMENTS, len(movements), MAX_MOVEMENTS)
    ]


@lru_cache(maxsize=16_384)
def _sides(debit: str, credit: str) -> bytes:
    one, other = debit.encode(), credit.encode()
    return b"\x0a" + _ONE[len(one)] + one + b"\x12" + _ONE[len(other)] + other


@lru_cache(maxsize=16)
def _head(unix_ms: int) -> bytes:
    """Currency and time."""
    return _CURRENCY + b"\x28" + _varint(unix_ms)


def parse_batch(leaf: bytes) -> pb.TransferBatch:
    """A leaf of transfers. Raises BadSignature if it is none."""
    try:
        return pb.TransferBatch.FromString(leaf)
    except DecodeError:
        raise BadSignature("the leaf is not one of transfers") from None


def says_facts(leaf: bytes) -> bool:
    """True if the operation of a leaf of transfers took unique facts, and the leaf says so: last.
    Raises BadSignature."""
    return leaf[-34:-32] == b"\x3a\x20" and bool(parse_batch(leaf).facts_sha256)


def is_of(leaf: bytes, unix_ms: int) -> bool:
    """True if the transfers of a leaf, which is as this module writes it, were made then."""
    return _head(unix_ms) in leaf[:_BEFORE_MOVEMENTS]


def transfer_record(transfer: Transfer) -> pb.TransferRecord:
    """The public form of a transfer."""
    return pb.TransferRecord(
        id=transfer.id,
        sequence=transfer.sequence,
        debit_account=transfer.debit.id,
        credit_account=transfer.credit.id,
        amount_nano=transfer.amount,
        currency=CURRENCY,
        phase=transfer.phase,  # type: ignore[arg-type]
        pending_id=transfer.pending_id,
        reason=REASONS[transfer.reason - 1],
        operation_id=transfer.operation_id,
        created_at_unix_ms=transfer.created_at_unix_ms,
    )


def _varint(value: int) -> bytes:
    # Two 7-bit groups at a time.
    if value < 16_384:
        return _LAST[value]
    out = _MORE[value & 16_383]
    value >>= 14
    while value > 16_383:
        out += _MORE[value & 16_383]
        value >>= 14
    return out + _LAST[value]
