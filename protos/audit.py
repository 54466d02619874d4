"""Who is audited: decided by a committed secret, checkable by anyone once it is revealed."""

from __future__ import annotations

import hashlib
import hmac

from trueweight.protos.errors import BadSignature, InvalidRequest

SECRET_BYTES = 32
BLIND_BYTES = 16
DIGEST_BYTES = 32
PPM = 10**6
_SECRET_TAG = b"trueweight/epoch-secret/v1\x00"
_MARGIN_TAG = b"trueweight/margins/v1\x00"


def commitment(secret: bytes) -> bytes:
    """SHA-256(tag, secret): what EpochOpen publishes before the epoch."""
    if len(secret) != SECRET_BYTES:
        raise InvalidRequest(f"an epoch secret has {SECRET_BYTES} bytes")
    return hashlib.sha256(_SECRET_TAG + secret).digest()


def check_reveal(secret: bytes, committed: bytes) -> None:
    """Raises BadSignature unless the revealed secret is the committed one."""
    if len(secret) != SECRET_BYTES or not hmac.compare_digest(commitment(secret), committed):
        raise BadSignature("the revealed secret is not the one that was committed to")


def is_owed(
    secret: bytes,
    assignment_digest: bytes,
    rate_ppm: int,
    charge_nano: int,
    charge_reference_nano: int,
) -> bool:
    """True if a verifier with this secret owes an audit of this assignment.

    Exact integers: the first 8 bytes (big-endian) of HMAC-SHA256(secret, digest) must be below
    rate * weight * 2^64 with weight = min(1, charge / reference), or 1 if reference is 0.
    The rate is capped at one; a free request has weight 0 unless reference is 0.
    """
    if len(secret) != SECRET_BYTES or len(assignment_digest) != DIGEST_BYTES:
        raise InvalidRequest("secret and assignment digest have 32 bytes each")
    if min(rate_ppm, charge_nano, charge_reference_nano) < 0:
        raise InvalidRequest("rates and charges are not negative")
    share, whole = min(rate_ppm, PPM), PPM
    if charge_reference_nano > 0:
        share *= min(charge_nano, charge_reference_nano)
        whole *= charge_reference_nano
    drawn = int.from_bytes(hmac.digest(secret, assignment_digest, "sha256")[:8], "big")
    return drawn * whole < share << 64


def margin_commitment(blind: bytes, verdict_payload: bytes) -> bytes:
    """SHA-256(tag, 16-byte blind, Verdict payload without its blind): MarginCommitment."""
    if len(blind) != BLIND_BYTES:
        raise InvalidRequest(f"a blind has {BLIND_BYTES} bytes")
    return hashlib.sha256(_MARGIN_TAG + blind + verdict_payload).digest()
