"""Identities and keys: who may have signed what.

An identity is the key id of a *root* public key. A root key certifies operational keys through
signed KeyEvents; only operational keys sign everything else. Root keys may stay offline.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from nacl.bindings import crypto_sign_open
from nacl.exceptions import CryptoError
from rpds import HashTrieMap

from trueweight.protos.errors import BadSignature, Conflict

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
MAX_OPERATORS = 8


def key_id(public_key: bytes) -> str:
    """Lower-case base32 of the first 20 bytes of SHA-256 over a raw public key."""
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise BadSignature("a public key has 32 bytes")
    return base64.b32encode(hashlib.sha256(public_key).digest()[:20]).decode().lower()


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The raw 32-byte public key of a private key."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


@dataclass(frozen=True)
class Signer:
    """An identity's operational key in use. ``key_event`` is the envelope that certifies it."""

    identity: str
    key: Ed25519PrivateKey = field(repr=False)
    key_event: bytes = field(repr=False)

    @cached_property
    def key_id(self) -> str:
        """Kept: to derive the public key takes longer than to sign."""
        return key_id(public_bytes(self.key))


@dataclass(frozen=True)
class KeyRing:
    """Operational keys by key id, with the identity each belongs to.

    A value: adding an event returns a new ring, which shares all but the change with the old one.
    Events must arrive in order of ``sequence``.
    """

    keys: HashTrieMap[str, tuple[str, bytes]] = field(default_factory=HashTrieMap)
    sequences: HashTrieMap[str, int] = field(default_factory=HashTrieMap)
    # Every operator that an identity ever declared, by identity.
    operators: HashTrieMap[str, frozenset[str]] = field(default_factory=HashTrieMap)

    def owners_of(self, identity: str) -> frozenset[str]:
        """The identity itself and every operator it ever declared."""
        return self.operators.get(identity, frozenset()) | {identity}

    def have_common_owner(self, one: str, other: str) -> bool:
        """True if both are declared to belong to the same owner, or one owns the other. What
        nobody declared cannot be known."""
        return not self.owners_of(one).isdisjoint(self.owners_of(other))

    def identity_of(self, operational_key_id: str) -> str | None:
        """The identity that an operational key speaks for, or None if nobody's."""
        entry = self.keys.get(operational_key_id)
        return entry[0] if entry else None

    def keys_of(self, identity: str) -> list[bytes]:
        """The public keys that speak for an identity now."""
        return [key for owner, key in self.keys.values() if owner == identity]

    def lost_since(self, before: KeyRing) -> dict[str, tuple[str, bytes]]:
        """The keys that counted in an earlier ring, one event ago, and do not any more."""
        if len(self.keys) >= len(before.keys):
            return {}
        return {name: entry for name, entry in before.keys.items() if name not in self.keys}

    def verify(self, operational_key_id: str, signature: bytes, message: bytes) -> str:
        """The identity whose key made this signature. Raises BadSignature."""
        entry = self.keys.get(operational_key_id)
        if entry is None:
            raise BadSignature(f"key {operational_key_id[:40]!r} is not certified here")
        check_signature(entry[1], signature, message)
        return entry[0]

    def with_key(self, identity: str, public_key: bytes, sequence: int) -> KeyRing:
        """A ring that also knows this operational key."""
        return replace(
            self,
            keys=self.keys.insert(key_id(public_key), (identity, public_key)),
            sequences=self.sequences.insert(identity, sequence),
        )

    def without_key(self, identity: str, public_key: bytes, sequence: int) -> KeyRing:
        """A ring that no longer accepts this operational key."""
        keys = self.keys.discard(key_id(public_key))
        return replace(self, keys=keys, sequences=self.sequences.insert(identity, sequence))

    def with_operator(self, identity: str, operator: str) -> KeyRing:
        """A ring that also knows this owner. Raises Conflict beyond eight of one identity."""
        known = self.operators.get(identity, frozenset()) | {operator}
        if len(known) > MAX_OPERATORS:
            raise Conflict(f"an identity declares at most {MAX_OPERATORS} operators")
        return replace(self, operators=self.operators.insert(identity, known))


def check_signature(public_key: bytes, signature: bytes, message: bytes) -> None:
    """Raises BadSignature unless the Ed25519 signature holds.

    By libsodium everywhere, so that no two roles can differ about a signature. It is stricter than
    RFC 8032 asks: keys and R of small order, and points and S that are not canonical, are refused.
    So whatever passes here passes with any other verifier.
    """
    if len(public_key) != PUBLIC_KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        raise BadSignature("malformed key or signature")
    try:
        crypto_sign_open(signature + message, public_key)
    except CryptoError:
        raise BadSignature("the signature does not hold") from None
