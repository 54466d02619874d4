"""Sealed transcripts: what a router hands to exactly the verifier named in a logged AuditRequest.

A transcript is encrypted under a data key of its own; the data key is wrapped to the verifier's
X25519 key. Byte layout, so that a stranger can implement it:

- data:    ChaCha20-Poly1305(data key, nonce, Transcript bytes, associated data = receipt digest)
- wrapped: ChaCha20-Poly1305(wrapping key, twelve zero bytes, data key, associated data = receipt
  digest). The zero nonce is safe because the ephemeral key, and so the wrapping key, is used once.
- wrapping key: HKDF-SHA256(X25519 secret, salt = ephemeral public key || verifier's public key,
  info = "trueweight/transcript-wrap/v1", 32 bytes)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from trueweight.protos.errors import BadSignature

KEY_BYTES = 32
NONCE_BYTES = 12
_INFO = b"trueweight/transcript-wrap/v1"
_ZERO_NONCE = bytes(NONCE_BYTES)


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """A data key that only the owner of one X25519 key can unwrap."""

    ephemeral_public_key: bytes
    wrapped_key: bytes


def seal_data(data_key: bytes, nonce: bytes, data: bytes, receipt_digest: bytes) -> bytes:
    """Encrypts a transcript. ``nonce`` must be fresh for this data key."""
    return ChaCha20Poly1305(data_key).encrypt(nonce, data, receipt_digest)


def open_data(data_key: bytes, nonce: bytes, ciphertext: bytes, receipt_digest: bytes) -> bytes:
    """Decrypts a transcript. Raises BadSignature if key, nonce or bytes are not the right ones."""
    try:
        return ChaCha20Poly1305(data_key).decrypt(nonce, ciphertext, receipt_digest)
    except (InvalidTag, ValueError):
        raise BadSignature("the transcript does not open with this key") from None


def wrap_key(
    data_key: bytes, their_public_key: bytes, receipt_digest: bytes, random: Callable[[int], bytes]
) -> WrappedKey:
    """Wraps a data key to a verifier's X25519 public key. Raises BadSignature for a bad key."""
    ephemeral = X25519PrivateKey.from_private_bytes(random(KEY_BYTES))
    public = ephemeral.public_key().public_bytes_raw()
    key = _wrapping_key(ephemeral, their_public_key, public, their_public_key)
    wrapped = ChaCha20Poly1305(key).encrypt(_ZERO_NONCE, data_key, receipt_digest)
    return WrappedKey(public, wrapped)


def unwrap_key(wrapped: WrappedKey, private_key: X25519PrivateKey, receipt_digest: bytes) -> bytes:
    """The data key. Raises BadSignature if it was not wrapped to this key for this receipt."""
    mine = private_key.public_key().public_bytes_raw()
    ephemeral = wrapped.ephemeral_public_key
    key = _wrapping_key(private_key, ephemeral, ephemeral, mine)
    return open_data(key, _ZERO_NONCE, wrapped.wrapped_key, receipt_digest)


def _wrapping_key(
    private_key: X25519PrivateKey, peer: bytes, ephemeral_public: bytes, verifier_public: bytes
) -> bytes:
    try:
        secret = private_key.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError:
        raise BadSignature("malformed X25519 public key") from None
    salt = ephemeral_public + verifier_public
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=_INFO).derive(secret)
