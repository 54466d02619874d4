"""Leaf bodies: envelopes as received, and transfers as TransferRecord bytes."""

from __future__ import annotations

from trueweight.ledger.accounts import CURRENCY
from trueweight.ledger.values import REASONS, Leaf, Transfer
from trueweight.protos.v1 import ledger_pb2 as pb

TRANSFER = "transfer"


def transfer_leaf(transfer: Transfer) -> Leaf:
    """The leaf of a transfer: the record's bytes, stored as they are from now on."""
    return Leaf(TRANSFER, transfer_record(transfer).SerializeToString(), b"")


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
