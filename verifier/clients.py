"""Who paid for which receipt, as the log tells. Pure.

A bill names its hold, and the hold's transfer its client. A node's own claim has no bill: when its
hold expires the receipts are the leaves just before the transfers that pay for them, in that order.
Only open holds are remembered, so what a client opens and closes makes nobody forget another's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from trueweight.protos.v1.ledger_pb2 import Movement, TransferBatch, TransferRecord
from trueweight.verifier.leaves import Recent

# Receipts of one operation without a bill: what the ledger settles at a time is less.
MAX_CLAIMS = 100_000
_NODE = "node-locked:"
_ENDS = (TransferRecord.POST, TransferRecord.VOID, TransferRecord.EXPIRE)


class Clients:
    """Tell it of receipts, bills and transfers in leaf order."""

    def __init__(self, max_holds: int) -> None:
        self._holds: Recent[bytes, str] = Recent(max_holds)
        # Receipts whose bill or payment is still to come: leaf after leaf up to ``_last``.
        self._unpaid: deque[tuple[bytes, str]] = deque(maxlen=MAX_CLAIMS)
        self._last = -1
        self._operation, self._claimant = b"", ""

    def receipt(self, index: int, digest: bytes, node_id: str) -> None:
        """A receipt leaf that no bill named before."""
        if index != self._last + 1:
            self._unpaid.clear()
        self._unpaid.append((digest, node_id))
        self._last = index

    def bill(self, hold_id: bytes) -> str:
        """The client of a billed hold; empty if the log does not tell."""
        self._unpaid.clear()
        return self._holds.get(hold_id) or ""

    def transfer(self, index: int, batch: TransferBatch) -> Iterator[tuple[bytes, str]]:
        """Receipts that these movements pay for without a bill, and who pays."""
        follows = index == self._last + 1 or batch.operation_id == self._operation
        self._operation = batch.operation_id
        if not follows:
            self._unpaid.clear()
        for movement in batch.movements:
            yield from self._move(batch.operation_id, movement)

    def _move(self, operation_id: bytes, movement: Movement) -> Iterator[tuple[bytes, str]]:
        if movement.phase == TransferRecord.PENDING and movement.reason == "hold":
            self._holds.put(operation_id, movement.debit_account)
        elif movement.phase in _ENDS:
            self._holds.pop(movement.pending_id)
            self._claimant = movement.debit_account if movement.reason == "claim" else ""
        elif movement.reason == "earning" and self._claimant:
            yield from self._paid(movement.credit_account.removeprefix(_NODE))

    def _paid(self, node_id: str) -> Iterator[tuple[bytes, str]]:
        """The next receipt of this node; those before it earned nothing, so nothing moved."""
        while self._unpaid:
            digest, earner = self._unpaid.popleft()
            if earner == node_id:
                yield digest, self._claimant
                return
