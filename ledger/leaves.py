"""Leaf bodies: envelopes as received, and transfers as TransferRecord bytes."""

from __future__ import annotations

from functools import lru_cache

from trueweight.ledger.accounts import CURRENCY
from trueweight.ledger.values import REASONS, Leaf, Transfer, transfer_id
from trueweight.protos.v1 import ledger_pb2 as pb

TRANSFER = "transfer"
_ONE = [bytes([n]) for n in range(128)]
_MORE = [bytes([n & 127 | 128, n >> 7 | 128]) for n in range(16_384)]
_LAST = [bytes([n & 127 | 128, n >> 7]) if n > 127 else bytes([n]) for n in range(16_384)]
_PHASES = [
    b"\x32" + bytes([len(CURRENCY)]) + CURRENCY.encode() + b"\x38" + bytes([phase])
    for phase in range(6)
]
_REASONS = {reason: b"\x4a" + bytes([len(reason)]) + reason.encode() for reason in REASONS}


def transfer_leaf(transfer: Transfer) -> Leaf:
    """The leaf of a transfer: the record's bytes, stored as they are from now on."""
    (
        sequence, operation_id, ordinal, debit, credit, amount, phase, pending_id, reason, created,
    ) = transfer  # fmt: skip
    body = encode_transfer(
        transfer_id(operation_id, ordinal),
        sequence,
        debit[1],
        credit[1],
        amount,
        phase,
        pending_id,
        REASONS[reason - 1],
        operation_id,
        created,
    )
    return Leaf(TRANSFER, body, b"")


def encode_transfer(  # noqa: PLR0917
    id_: bytes,
    sequence: int,
    debit: str,
    credit: str,
    amount: int,
    phase: int,
    pending_id: bytes,
    reason: str,
    operation_id: bytes,
    created_at_unix_ms: int,
) -> bytes:
    """TransferRecord in protobuf's canonical form, byte for byte what protobuf writes.

    By hand because there are five of these for every request, and parts repeat. All texts and
    ids are shorter than 128 bytes, so every length is one byte.
    """
    return b"".join(
        (
            b"\x0a",
            _ONE[len(id_)],
            id_,
            b"\x10",
            _varint(sequence),
            _account(debit, credit),
            b"\x28" + _varint(amount) if amount else b"",
            _PHASES[phase],
            b"\x42" + _ONE[len(pending_id)] + pending_id if pending_id else b"",
            _REASONS[reason],
            b"\x52",
            _ONE[len(operation_id)],
            operation_id,
            _time(created_at_unix_ms),
        )
    )


@lru_cache(maxsize=16_384)
def _account(debit: str, credit: str) -> bytes:
    one, other = debit.encode(), credit.encode()
    return b"\x1a" + _ONE[len(one)] + one + b"\x22" + _ONE[len(other)] + other


@lru_cache(maxsize=16)
def _time(unix_ms: int) -> bytes:
    return b"\x58" + _varint(unix_ms)


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
