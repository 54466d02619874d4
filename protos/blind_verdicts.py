"""Was a verdict copied? Pure: verifiers and the ledger decide by the same code.

Of receipts that several verifiers audit, each commits to its verdict before anybody's margins are
public. A verdict that another's came before is no evidence (it counts as zero), unless its signer
was bound to it by then: by a commitment that came before the other's verdict, or within
``BLIND_WINDOW_MS`` of the receipt. The window is why publishing early cannot shut others out.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from trueweight.protos.audit import margin_commitment
from trueweight.protos.errors import InvalidRequest
from trueweight.protos.v1.audit_pb2 import Verdict

BLIND_WINDOW_MS = 60_000
COPIED = "not committed to before another's margins were known"
# Since when a verdict was bound, if that is no leaf: blind whoever came first; not the committed
# one.
IN_TIME, NEVER = 0, 2**63 - 1


@dataclass(frozen=True, slots=True)
class Committed:
    """The first commitment of a verifier to its verdict on a receipt, as the log has it."""

    index: int
    merged_at_unix_ms: int
    commitment: bytes


def payload_without_blind(verdict: Verdict) -> bytes:
    """The bytes that a commitment binds."""
    bare = Verdict()
    bare.CopyFrom(verdict)
    bare.commitment_blind = b""
    return bare.SerializeToString(deterministic=True)


def opening_of(verdict: Verdict) -> bytes:
    """The one commitment that the verdict opens with the blind it carries; empty without one."""
    try:
        return margin_commitment(verdict.commitment_blind, payload_without_blind(verdict))
    except InvalidRequest:
        return b""


def opens(opening: bytes, committed: bytes) -> bool:
    """True if what was committed to is the verdict with this opening."""
    return bool(opening) and hmac.compare_digest(opening, committed)


def bound_since(
    opening: bytes, index: int, mine: Committed | None, receipt_merged_at_unix_ms: int | None
) -> int:
    """The leaf since which its signer was bound to a verdict (leaf ``index``), or ``IN_TIME`` or
    ``NEVER``. ``mine`` is its commitment and the last its receipt's time, None if the log had none
    before the verdict."""
    if mine is None:
        return index
    if not opens(opening, mine.commitment):
        return NEVER
    received = receipt_merged_at_unix_ms
    in_window = received is not None and mine.merged_at_unix_ms <= received + BLIND_WINDOW_MS
    return IN_TIME if in_window else mine.index


def is_copied(bound: int, first_of_others: int | None) -> bool:
    """True if another verifier's first verdict on the receipt (its leaf; None: there was none) came
    before the signer was bound to its own, or if the commitment does not open."""
    return bound == NEVER or (first_of_others is not None and first_of_others < bound)
