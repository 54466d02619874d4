"""Audits of one receipt by several verifiers, blind to one another. Pure.

Every verifier draws with its own secret, so some receipts are owed to several. A verifier of such
a market commits to its verdict before anybody's margins on that receipt are public, or it may count
as copied (``protos.blind_verdicts``). Verdicts wait until everybody who asked for the receipt has
committed, or until the window is over.
"""

from __future__ import annotations

import hashlib
import hmac

from trueweight.protos.audit import BLIND_BYTES, margin_commitment
from trueweight.protos.blind_verdicts import payload_without_blind
from trueweight.protos.v1.audit_pb2 import MarginCommitment, Verdict

_BLIND_TAG = b"trueweight/margin-blind/v1\x00"


def blind_for(secret: bytes, receipt_digest: bytes) -> bytes:
    """The blind of one verdict, derived so that it survives a crash."""
    return hmac.digest(secret, _BLIND_TAG + receipt_digest, hashlib.sha256)[:BLIND_BYTES]


def commit(verdict: Verdict, blind: bytes) -> MarginCommitment:
    """The commitment to a verdict."""
    return MarginCommitment(
        market_id=verdict.market_id,
        verifier_id=verdict.verifier_id,
        receipt_digest=verdict.receipt_digest,
        commitment=margin_commitment(blind, payload_without_blind(verdict)),
    )
