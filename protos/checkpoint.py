"""Checkpoints of the log: C2SP tlog-checkpoint text in a C2SP signed note (Ed25519).

<origin>
<size>
<base64 root>
time <unix ms>            (extension line)

— <origin> <base64 of 4-byte key hash and signature>
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from trueweight.protos.errors import BadSignature, InvalidRequest
from trueweight.protos.identity import check_signature, public_bytes
from trueweight.protos.merkle import HASH_BYTES

MAX_NOTE_BYTES = 8 * 1024
MAX_SIGNATURES = 16
_ED25519 = b"\x01"
_HASH_BYTES = 4
_DASH = "\u2014 "
_TIME = "time "


@dataclass(frozen=True, slots=True)
class LogState:
    """What a checkpoint says: this log had this root at this size, at this time."""

    origin: str
    size: int
    root: bytes
    issued_at_unix_ms: int


def log_origin(market_id: str) -> str:
    """Name of a market's log, and of the key that signs its checkpoints."""
    return f"trueweight/{market_id}"


def format_note(state: LogState) -> str:
    """The text that is signed; ends with a newline. Raises InvalidRequest."""
    _check_name(state.origin)
    if state.size < 0 or len(state.root) != HASH_BYTES or state.issued_at_unix_ms < 0:
        raise InvalidRequest("not a log state")
    root = base64.b64encode(state.root).decode()
    return f"{state.origin}\n{state.size}\n{root}\n{_TIME}{state.issued_at_unix_ms}\n"


def key_hash(name: str, public_key: bytes) -> bytes:
    """First 4 bytes of SHA-256(name, newline, 0x01, key): tells which key signed."""
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + public_key).digest()[:_HASH_BYTES]


def verifier_key(name: str, public_key: bytes) -> str:
    """The key in the format that signed-note tools take: name+hash+base64."""
    encoded = base64.b64encode(_ED25519 + public_key).decode()
    return f"{name}+{key_hash(name, public_key).hex()}+{encoded}"


def sign_note(state: LogState, key: Ed25519PrivateKey) -> str:
    """The whole signed note, signed under the log's own name."""
    text = format_note(state)
    signature = key_hash(state.origin, public_bytes(key)) + key.sign(text.encode())
    return f"{text}\n{_DASH}{state.origin} {base64.b64encode(signature).decode()}\n"


def open_note(note: str, origin: str, public_key: bytes) -> LogState:
    """Verifies the signature, then parses. Signatures by other keys are ignored, as the format
    demands. Raises BadSignature."""
    if len(note) > MAX_NOTE_BYTES:
        raise BadSignature("the checkpoint is too long")
    text, separator, signatures = note.rpartition("\n\n")
    if not separator or not signatures.endswith("\n"):
        raise BadSignature("not a signed note")
    text += "\n"
    wanted = key_hash(origin, public_key)
    for line in signatures.splitlines()[:MAX_SIGNATURES]:
        signature = _signature_of(line, origin)
        if signature is not None and signature[:_HASH_BYTES] == wanted:
            check_signature(public_key, signature[_HASH_BYTES:], _utf8(text))
            return _parse(text, origin)
    raise BadSignature("no signature by the log's key on this checkpoint")


def _signature_of(line: str, origin: str) -> bytes | None:
    if not line.startswith(_DASH):
        raise BadSignature("not a signature line")
    name, separator, encoded = line.removeprefix(_DASH).partition(" ")
    if not separator:
        raise BadSignature("not a signature line")
    return _base64(encoded) if name == origin else None


def _parse(text: str, origin: str) -> LogState:
    lines = text.split("\n")
    if len(lines) < 4 or lines[-1] or lines[0] != origin:
        raise BadSignature("not a checkpoint of this log")
    root = _base64(lines[2])
    if len(root) != HASH_BYTES:
        raise BadSignature("the checkpoint's root has the wrong length")
    times = [_decimal(line.removeprefix(_TIME)) for line in lines[3:-1] if line.startswith(_TIME)]
    return LogState(origin, _decimal(lines[1]), root, times[0] if times else 0)


def _decimal(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 19 or str(int(text)) != text:
        raise BadSignature("not a decimal number without leading zeros")
    return int(text)


def _base64(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadSignature("not base64") from None
    # Unused trailing bits must be zero, so that a note has one spelling only.
    if base64.b64encode(data).decode() != text:
        raise BadSignature("not canonical base64")
    return data


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise BadSignature("the checkpoint is not UTF-8") from None


def _check_name(name: str) -> None:
    if not name or "+" in name or any(c.isspace() for c in name):
        raise InvalidRequest("a log's name has no spaces and no plus sign")
