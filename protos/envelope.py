"""DSSE v1 envelopes: sign exact bytes, verify before parsing, never re-serialise.

Verification is a numbered procedure (see ``open_envelope``) with one failure type.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError, Message

from trueweight.protos.errors import BadSignature, Conflict
from trueweight.protos.identity import KeyRing, Signer, check_signature, key_id, public_bytes
from trueweight.protos.v1 import audit_pb2, envelope_pb2, market_pb2, model_pb2

MAX_ENVELOPE_BYTES = 16 * 1024 * 1024
MAX_SIGNATURES = 8
MAX_TYPE_BYTES = 128
_PREFIX, _SUFFIX = "application/vnd.trueweight.", ".v1+proto"

M = TypeVar("M", bound=Message)

# Short names of payload types. They are also the kinds of log entries.
_TYPES: dict[str, type[Message]] = {
    "key-event": envelope_pb2.KeyEvent,
    "access-token": envelope_pb2.AccessToken,
    "session-proof": envelope_pb2.SessionProof,
    "manifest": model_pb2.Manifest,
    "registry-entry": model_pb2.RegistryEntry,
    "market-descriptor": market_pb2.MarketDescriptor,
    "offer": market_pb2.Offer,
    "assignment": market_pb2.Assignment,
    "receipt": market_pb2.Receipt,
    "bill": market_pb2.Bill,
    "suspension": market_pb2.Suspension,
    "reinstatement": market_pb2.Reinstatement,
    "epoch-open": audit_pb2.EpochOpen,
    "epoch-reveal": audit_pb2.EpochReveal,
    "audit-request": audit_pb2.AuditRequest,
    "margin-commitment": audit_pb2.MarginCommitment,
    "verdict": audit_pb2.Verdict,
    "calibration": audit_pb2.Calibration,
    "conviction": audit_pb2.Conviction,
}
_KIND_OF = {cls: kind for kind, cls in _TYPES.items()}


@dataclass(frozen=True)
class Opened(Generic[M]):
    """A verified message: who signed it, its digest and the bytes it came in."""

    message: M
    signer: str
    digest: bytes
    envelope: bytes


def payload_type(message_type: type[Message]) -> str:
    """The DSSE payload type of a message class."""
    return f"{_PREFIX}{_KIND_OF[message_type]}{_SUFFIX}"


def kind_of_type(type_uri: str) -> str | None:
    """The short name of a payload type ("receipt"), or None if it is not ours."""
    kind = type_uri.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    return kind if kind in _TYPES and type_uri == f"{_PREFIX}{kind}{_SUFFIX}" else None


def message_class(kind: str) -> type[Message]:
    """The message class of a short name. Raises KeyError."""
    return _TYPES[kind]


def pre_authentication_encoding(type_uri: str, payload: bytes) -> bytes:
    """DSSE v1 PAE: "DSSEv1" SP len SP type SP len SP payload."""
    kind = type_uri.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def message_digest(type_uri: str, payload: bytes) -> bytes:
    """SHA-256 of the pre-authentication encoding."""
    return hashlib.sha256(pre_authentication_encoding(type_uri, payload)).digest()


def seal(message: Message, signer: Signer) -> bytes:
    """Serialises once, signs with the operational key and returns the envelope's bytes."""
    return _seal_with(message, signer.key)


def seal_key_event(event: envelope_pb2.KeyEvent, *keys: Ed25519PrivateKey) -> bytes:
    """A KeyEvent signed by all of these: the root key, for CERTIFY the operational key, and the
    root key of the operator that it names."""
    return _seal_with(event, *keys)


def _seal_with(message: Message, *keys: Ed25519PrivateKey) -> bytes:
    uri = payload_type(type(message))
    payload = message.SerializeToString(deterministic=True)
    encoding = pre_authentication_encoding(uri, payload)
    return envelope_pb2.Envelope(
        payload_type=uri,
        payload=payload,
        signatures=[
            envelope_pb2.Signature(key_id=key_id(public_bytes(key)), signature=key.sign(encoding))
            for key in keys
        ],
    ).SerializeToString()


def parse_envelope(data: bytes) -> envelope_pb2.Envelope:
    """The envelope, with its bounds checked and nothing of its payload parsed."""
    if len(data) > MAX_ENVELOPE_BYTES:
        raise BadSignature("the envelope is too large")
    envelope = envelope_pb2.Envelope()
    try:
        envelope.ParseFromString(data)
    except DecodeError:
        raise BadSignature("not an envelope") from None
    if not 1 <= len(envelope.signatures) <= MAX_SIGNATURES:
        raise BadSignature("an envelope has 1 to 8 signatures")
    if len(envelope.payload_type) > MAX_TYPE_BYTES:
        raise BadSignature("the payload type is too long")
    return envelope


def digest_of(data: bytes) -> bytes:
    """Digest of the message inside an envelope's bytes, without judging its signature."""
    envelope = parse_envelope(data)
    return message_digest(envelope.payload_type, envelope.payload)


def open_envelope(
    data: bytes, message_type: type[M], ring: KeyRing, market_id: str, *, signer: str | None = None
) -> Opened[M]:
    """Verifies, then parses.

    1. The bytes are an envelope within bounds. 2. Its type is the expected one. 3. A signature
    by a certified key holds over the pre-authentication encoding; with ``signer``, one of that
    identity's. 4. Only now the payload is parsed. 5. It belongs to this market.
    Raises BadSignature at the first that fails.
    """
    envelope = parse_envelope(data)  # 1
    if envelope.payload_type != payload_type(message_type):  # 2
        raise BadSignature(f"expected a {_KIND_OF[message_type]}, got something else")
    encoding = pre_authentication_encoding(envelope.payload_type, envelope.payload)
    identity = _signed_by(envelope, encoding, ring, signer)  # 3
    message = parse_payload(envelope, message_type)  # 4
    if getattr(message, "market_id", market_id) != market_id:  # 5
        raise BadSignature("the message belongs to another market")
    return Opened(message, identity, hashlib.sha256(encoding).digest(), data)


def parse_payload(envelope: envelope_pb2.Envelope, message_type: type[M]) -> M:
    """The payload as a message, signature not judged: only for bytes verified before."""
    message = message_type()
    try:
        message.ParseFromString(envelope.payload)
    except DecodeError:
        raise BadSignature("the signed payload is not what its type says") from None
    return message


def _signed_by(
    envelope: envelope_pb2.Envelope, encoding: bytes, ring: KeyRing, signer: str | None
) -> str:
    for signature in envelope.signatures:
        identity = ring.identity_of(signature.key_id)
        if identity is None or (signer is not None and identity != signer):
            continue
        return ring.verify(signature.key_id, signature.signature, encoding)
    raise BadSignature("no signature by an entitled key")


def apply_key_event(ring: KeyRing, data: bytes, market_id: str) -> KeyRing:
    """The ring after a KeyEvent; replays are ignored, older sequence numbers refused.

    1. The root key in the event hashes to the identity it names, for this market. 2. The root key
    signed it; 3. so did the operational key that it certifies: whoever only knows a public key
    cannot claim it; 4. and the operator that it names. 5. It is newer than what is known. 6. The
    key is nobody else's. Raises BadSignature (1 to 4) or Conflict.
    """
    envelope = parse_envelope(data)
    if envelope.payload_type != payload_type(envelope_pb2.KeyEvent):
        raise BadSignature("expected a key-event, got something else")
    # The root key is inside the payload, so this one type is parsed to find the key; nothing of
    # it is used unless the signature holds.
    event = parse_payload(envelope, envelope_pb2.KeyEvent)
    if key_id(event.root_public_key) != event.identity or event.market_id != market_id:  # 1
        raise BadSignature("the key event names another identity or market")
    certifies = event.action == envelope_pb2.KeyEvent.CERTIFY
    if not certifies and event.action != envelope_pb2.KeyEvent.REVOKE:
        raise BadSignature("the key event has no action")
    operational, operator = event.operational_public_key, event.operator_public_key
    _check_signed_by(envelope, event.root_public_key, "root key")  # 2
    if certifies:
        _check_signed_by(envelope, operational, "operational key, which proves its possession")  # 3
    if operator:
        _check_signed_by(envelope, operator, "operator that it names")  # 4
    known = ring.sequences.get(event.identity)
    holder = ring.identity_of(key_id(operational))
    if known is not None and event.sequence <= known:  # 5
        if holder == event.identity:
            return ring
        raise Conflict("the key event is older than what is known")
    if holder not in (None, event.identity):  # 6
        raise Conflict("the key event is about another identity's key")
    if operator:
        ring = ring.with_operator(event.identity, key_id(operator))
    if certifies:
        return ring.with_key(event.identity, operational, event.sequence)
    return ring.without_key(event.identity, operational, event.sequence)


def _check_signed_by(envelope: envelope_pb2.Envelope, public_key: bytes, who: str) -> None:
    wanted = key_id(public_key)
    for signature in envelope.signatures:
        if signature.key_id == wanted:
            encoding = pre_authentication_encoding(envelope.payload_type, envelope.payload)
            return check_signature(public_key, signature.signature, encoding)
    raise BadSignature(f"the key event is not signed by the {who}")


def ring_of(events: Iterable[bytes], market_id: str, base: KeyRing | None = None) -> KeyRing:
    """A ring from KeyEvent envelopes, in order, on top of ``base``."""
    ring = base or KeyRing()
    for event in events:
        ring = apply_key_event(ring, event, market_id)
    return ring
