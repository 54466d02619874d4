"""Audits that were asked for in the log: they come before verdicts that refund, and hold releases.

A request (but for an appeal's) holds what its receipt and later ones earned until the verifier's
verdict is logged. One that is never answered must not hold for ever: it ends ``HOLDS_MS`` after the
receipt's settlement window, counted from the receipt's capture, so that whoever asks late holds
nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from trueweight.protos.errors import InvalidRequest
from trueweight.protos.v1.audit_pb2 import AuditRequest

HOLDS_MS = 24 * 3600 * 1000
DIGEST_BYTES = 32
# No receipt of this digest was settled when the audit was asked for; no verdict yet.
NONE = -1


class RequestRow(NamedTuple):
    """The first logged AuditRequest of a verifier for a receipt, as its table keeps it."""

    log_index: int
    verifier_id: str
    receipt_digest: bytes
    # The receipt as it was settled.
    node_id: str = ""
    receipt_index: int = NONE
    captured_at: int = 0
    # Leaf of the verifier's first verdict after it.
    verdict_index: int = NONE
    # 1: to repeat another's audit. It holds nothing, and no evidence comes of it.
    for_appeal: int = 0

    @property
    def key(self) -> tuple[str, bytes]:
        """Who asked for what."""
        return self.verifier_id, self.receipt_digest

    def is_answered_by(self, verdict_index: int) -> bool:
        """True if this verdict is the audit that was asked for, of a receipt that was settled."""
        settled = self.receipt_index != NONE and not self.for_appeal
        return settled and self.verdict_index == verdict_index


def check_digest(digest: bytes, what: str) -> None:
    """Raises InvalidRequest unless it has the length of a digest: tables are indexed by them."""
    if len(digest) != DIGEST_BYTES:
        raise InvalidRequest(f"{what} does not have 32 bytes")


def request_row(message: AuditRequest) -> RequestRow:
    """The row of a request that is about to become a leaf."""
    return RequestRow(
        NONE, message.verifier_id, message.receipt_digest, for_appeal=int(message.for_appeal)
    )


def held_since_unix_ms(now_unix_ms: int, window_ms: int) -> int:
    """Requests for receipts captured after this hold releases."""
    return now_unix_ms - window_ms - HOLDS_MS
