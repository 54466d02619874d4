"""What verifiers commit to before others' margins are known, as its table keeps it.

Together with its verifier's first commitment a verdict tells, when it becomes a leaf, since when
its signer was bound to it. Whether it was copied follows from that and from the other verdicts on
its receipt (``protos.blind_verdicts``), at a conviction.
"""

from __future__ import annotations

from typing import NamedTuple

from trueweight.ledger.requests import DIGEST_BYTES, NONE, check_digest
from trueweight.protos.blind_verdicts import Committed
from trueweight.protos.v1.audit_pb2 import MarginCommitment


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
