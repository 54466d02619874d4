"""The rows of commitments and verdicts as they follow from the log: for books that have the leaves
already (a migration) and to check those that have both (``fsck``)."""

from __future__ import annotations

import sqlalchemy as sa

from trueweight.ledger.audits import VerdictRow, verdict_row
from trueweight.ledger.commitments import CommitmentRow, commitment_row
from trueweight.protos.blind_verdicts import bound_since, opening_of
from trueweight.protos.v1.audit_pb2 import MarginCommitment, Verdict


class BlindFold:
    """Give it every commitment and verdict of a log, in the order of the leaves."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self._commitments: dict[tuple[str, bytes], CommitmentRow] = {}
        self._judged: set[tuple[str, bytes]] = set()

    def commitment(
        self, message: MarginCommitment, index: int, merged_at: int
    ) -> CommitmentRow | None:
        """What is kept of a commitment; None if an earlier one counts, or none ever can."""
        row = commitment_row(message)
        if row is None or row.key in self._commitments:
            return None
        row = row._replace(log_index=index, merged_at=merged_at)
        self._commitments[row.key] = row
        return row

    def verdict(self, message: Verdict, index: int) -> VerdictRow:
        """What is kept of a verdict."""
        row = verdict_row(message)
        found = self._commitments.get(row.key)
        mine, received = None, None
        if found is not None:
            mine, received = found.committed, self._received(row.receipt_digest, index)
        is_first = row.key not in self._judged
        self._judged.add(row.key)
        bound = bound_since(opening_of(message), index, mine, received)
        return row._replace(log_index=index, is_first=int(is_first), bound_since=bound)

    def _received(self, receipt_digest: bytes, before: int) -> int | None:
        """When the receipt became a leaf; None if it did not before the leaf at an index."""
        captured_at = self._connection.execute(
            sa.text(
                "SELECT captured_at FROM leg WHERE receipt_digest = :digest AND log_index < :before"
            ),
            {"digest": receipt_digest, "before": before},
        ).scalar()
        return None if captured_at is None else int(captured_at)
