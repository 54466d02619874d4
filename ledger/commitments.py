"""What verifiers commit to before others' margins are known, as its table keeps it.

Together with its verifier's first commitment a verdict tells, when it becomes a leaf, since when
its signer was bound to it. Whether it was copied follows from that and from the other verdicts on
its receipt (``protos.blind_verdicts``), at a conviction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from trueweight.ledger.audits import VerdictRow, verdict_row
from trueweight.ledger.requests import DIGEST_BYTES, NONE, check_digest
from trueweight.protos.blind_verdicts import Committed, bound_since, opening_of
from trueweight.protos.v1.audit_pb2 import MarginCommitment, Verdict


class CommitmentRow(NamedTuple):
    """The first logged MarginCommitment of a verifier for a receipt. Empty ``commitment``: one that
    no verdict opens."""

    log_index: int
    verifier_id: str
    receipt_digest: bytes
    merged_at: int
    commitment: bytes

    @property
    def key(self) -> tuple[str, bytes]:
        """Who committed to a verdict on what."""
        return self.verifier_id, self.receipt_digest

    @property
    def committed(self) -> Committed:
        """As a verdict is held against it."""
        return Committed(self.log_index, self.merged_at, self.commitment)


def check_commitment(message: MarginCommitment) -> None:
    """Raises InvalidRequest for a commitment that its table does not keep."""
    check_digest(message.receipt_digest, "the commitment's receipt digest")
    check_digest(message.commitment, "the commitment")


def commitment_row(message: MarginCommitment) -> CommitmentRow | None:
    """The row of a commitment that is about to become a leaf. None if it is about no receipt: old
    logs may have such, and no verdict that counts belongs to them."""
    if len(message.receipt_digest) != DIGEST_BYTES:
        return None
    is_one = len(message.commitment) == DIGEST_BYTES
    commitment = message.commitment if is_one else b""
    return CommitmentRow(NONE, message.verifier_id, message.receipt_digest, 0, commitment)


class BlindFold:
    """The rows that a log gives for commitments and verdicts, in the order of its leaves.

    ``received`` tells when the receipt with a digest became a leaf; None if it did not before the
    leaf at an index.
    """

    def __init__(self, received: Callable[[bytes, int], int | None]) -> None:
        self._received = received
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
