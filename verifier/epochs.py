"""Epochs: secrets committed to before and revealed after, and the rates frozen in between.

Pure, except ``SecretStore``, which keeps one file per epoch (0600) written before the commitment
is published, so that a verifier killed at any moment can still audit and reveal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from trueweight.protos.audit import commitment
from trueweight.protos.errors import NotFound, StorageError
from trueweight.protos.v1.audit_pb2 import AuditRequest, EpochOpen, NodeRate
from trueweight.protos.v1.market_pb2 import MarketDescriptor
from trueweight.verifier.selection import MAX_RATES

SECRET_BYTES = 32
PPM = 1_000_000
_WRAP_INFO = b"trueweight/audit-wrap-key/v1"


@dataclass(frozen=True, slots=True)
class RatePolicy:
    """How the share of audited requests falls with evidence. Rates are parts per million."""

    # A node is a newcomer, audited in full, until this many of its tokens were audited.
    newcomer_tokens: int = 50_000
    floor_ppm: int = 10_000
    epoch_ms: int = 10 * 60_000
    audit_deadline_ms: int = 5 * 60_000
    # A transcript that does not open for this long after the receipt's leaf is missing.
    transcript_patience_ms: int = 60_000
    charge_reference_nano: int = 0
    # Second opinions on what other verifiers audit.
    duplicate_ppm: int = 100_000
    # Largest gain that the market believes; None: any.
    max_gain_tokens: int | None = None


def within_terms(policy: RatePolicy, descriptor: MarketDescriptor) -> RatePolicy:
    """The policy as far as the market's terms let it be: an epoch outside them does not count."""
    if not descriptor.HasField("audit_terms"):
        return policy
    terms = descriptor.audit_terms
    return replace(
        policy,
        floor_ppm=max(policy.floor_ppm, terms.floor_ppm),
        duplicate_ppm=max(policy.duplicate_ppm, terms.duplicate_rate_ppm),
        charge_reference_nano=min(policy.charge_reference_nano, terms.max_charge_reference_nano),
        max_gain_tokens=terms.max_gain_tokens,
    )


@dataclass(frozen=True, slots=True)
class Standing:
    """What a node's rate depends on. ``needed_ppm`` is the rate that deterrence asks for."""

    audited_tokens: int = 0
    suspect: bool = False
    needed_ppm: int = 0


def rate_ppm(policy: RatePolicy, standing: Standing) -> int:
    """100 % for newcomers and suspects, then falling as 1 / audited tokens to the floor."""
    if standing.suspect or standing.audited_tokens <= policy.newcomer_tokens:
        return PPM
    by_evidence = policy.newcomer_tokens * PPM // standing.audited_tokens
    return min(PPM, max(policy.floor_ppm, by_evidence, standing.needed_ppm))


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """A verifier's epoch, and what time it is."""

    market_id: str
    verifier_id: str
    epoch: int
    now_unix_ms: int


def open_epoch(
    plan: EpochPlan,
    secret: bytes,
    policy: RatePolicy,
    standings: Mapping[str, Standing],
    gain_tokens: int = 0,
) -> EpochOpen:
    """The commitment, the frozen rates and the power of an epoch. Nodes at the default rate are
    left out."""
    most = policy.max_gain_tokens
    rates = {node: rate_ppm(policy, standing) for node, standing in standings.items()}
    below = sorted(node for node, rate in rates.items() if rate != PPM)[:MAX_RATES]
    return EpochOpen(
        market_id=plan.market_id,
        verifier_id=plan.verifier_id,
        epoch=plan.epoch,
        commitment=commitment(secret),
        rates=[NodeRate(node_id=node, rate_ppm=rates[node]) for node in below],
        default_rate_ppm=PPM,
        charge_reference_nano=policy.charge_reference_nano,
        opened_at_unix_ms=plan.now_unix_ms,
        audit_deadline_ms=policy.audit_deadline_ms,
        gain_tokens=gain_tokens if most is None else min(most, gain_tokens),
        duplicate_rate_ppm=policy.duplicate_ppm,
    )


def wrap_private_key(
    secret: bytes, receipt_digest: bytes, duplicate_index: int
) -> X25519PrivateKey:
    """The key that a transcript is wrapped to; ``secret`` is ``SecretStore.wrapping``.

    Derived, so that a request made before a crash can still be opened after it. Never derived
    from an epoch's secret: that one is revealed.
    """
    info = _WRAP_INFO + receipt_digest + duplicate_index.to_bytes(4, "little")
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)
    return X25519PrivateKey.from_private_bytes(key)


def audit_request(
    context: EpochPlan,
    wrapping_secret: bytes,
    assignment_digest: bytes,
    receipt_digest: bytes,
    *,
    for_appeal: bool = False,
) -> AuditRequest:
    """The request that a transcript is opened by, with the key that it is wrapped to."""
    key = wrap_private_key(wrapping_secret, receipt_digest, 0)
    return AuditRequest(
        market_id=context.market_id,
        verifier_id=context.verifier_id,
        epoch=context.epoch,
        assignment_digest=assignment_digest,
        receipt_digest=receipt_digest,
        wrap_public_key=key.public_key().public_bytes_raw(),
        requested_at_unix_ms=context.now_unix_ms,
        for_appeal=for_appeal,
    )


class SecretStore:
    """Secrets in ``directory``: one per epoch, and one for wrapping that is never revealed."""

    def __init__(self, directory: Path, random: Callable[[int], bytes]) -> None:
        self._directory, self._random = directory, random
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def get(self, epoch: int) -> bytes:
        """The secret of an epoch. Raises NotFound if this verifier never had it."""
        return self._read(f"{epoch}.secret")

    def get_or_create(self, epoch: int) -> bytes:
        """The secret of an epoch; on disk before this returns."""
        return self._read_or_create(f"{epoch}.secret")

    def wrapping(self) -> bytes:
        """The secret behind this verifier's transcript keys."""
        return self._read_or_create("wrapping.secret")

    def _read_or_create(self, name: str) -> bytes:
        try:
            return self._read(name)
        except NotFound:
            secret = self._random(SECRET_BYTES)
            _write_once(self._directory / name, secret)
            return secret

    def _read(self, name: str) -> bytes:
        try:
            secret = (self._directory / name).read_bytes()
        except FileNotFoundError:
            raise NotFound(
                f"the verifier's data directory has no {name}",
                hint="Was it replaced? Epochs opened with the lost secret cannot be audited.",
            ) from None
        if len(secret) != SECRET_BYTES:
            raise StorageError(f"{name} is damaged", hint="Restore the verifier's data directory.")
        return secret


def _write_once(path: Path, secret: bytes) -> None:
    """Complete or absent after a crash: written aside, flushed, then renamed."""
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
