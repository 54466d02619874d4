"""Key files of one identity: root key, operational key and the event that certifies it.

A directory holds ``root.pem`` (may be moved offline), ``operational.pem``, ``key-event.bin`` and
the TLS pair made by ``trueweight.runtime.tls``. Private files are 0600 and never logged.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from trueweight.protos.envelope import (
    apply_key_event,
    parse_envelope,
    parse_payload,
    seal_key_event,
)
from trueweight.protos.errors import InvalidRequest
from trueweight.protos.identity import KeyRing, Signer, key_id, public_bytes
from trueweight.protos.v1.envelope_pb2 import KeyEvent
from trueweight.runtime.clock import Clock

_ROOT, _OPERATIONAL, EVENT = "root.pem", "operational.pem", "key-event.bin"


def write_private(path: Path, data: bytes) -> None:
    """Creates a file that only its owner can read; refuses to overwrite."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_private(path: Path, data: bytes) -> None:
    """Puts a file that only its owner can read in an older one's place, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    write_private(temporary, data)
    temporary.replace(path)


def create_keys(
    directory: Path, market_id: str | None, clock: Clock, operator: Path | None = None
) -> Signer:
    """Makes a new identity. ``market_id`` None means that this *is* the market's own identity.
    ``operator`` is the key directory of whoever owns it; its root key signs as well.

    Raises InvalidRequest if the directory already holds keys.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if _has_keys(directory):
        raise InvalidRequest(f"{directory} already holds keys", hint="Use them, or name another.")
    root, operational = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    identity = key_id(public_bytes(root))
    event = KeyEvent(
        market_id=market_id or identity,
        identity=identity,
        root_public_key=public_bytes(root),
        operational_public_key=public_bytes(operational),
        action=KeyEvent.CERTIFY,
        sequence=1,
        issued_at_unix_ms=clock.now_unix_ms(),
    )
    sealed = _seal(event, root, operational, _load_root(operator) if operator else None)
    write_private(directory / EVENT, sealed)
    write_private(directory / _OPERATIONAL, _pem(operational))
    write_private(directory / _ROOT, _pem(root))
    return Signer(identity, operational, sealed)


def _has_keys(directory: Path) -> bool:
    """True if the directory holds any part of an identity."""
    return any((directory / name).exists() for name in (_ROOT, _OPERATIONAL, EVENT))


def load_signer(directory: Path) -> Signer:
    """The operational signer of a key directory. The root key is not read."""
    try:
        event_bytes = (directory / EVENT).read_bytes()
        key = _load(directory / _OPERATIONAL)
    except FileNotFoundError:
        raise InvalidRequest(
            f"{directory} holds no keys",
            hint="Make them with 'trueweight market init' or 'trueweight node up'.",
        ) from None
    event = parse_payload(parse_envelope(event_bytes), KeyEvent)
    ring = apply_key_event(KeyRing(), event_bytes, event.market_id)
    signer = Signer(event.identity, key, event_bytes)
    if ring.identity_of(signer.key_id) != event.identity:
        raise InvalidRequest(f"the keys in {directory} do not belong together")
    return signer


def load_or_create(
    directory: Path, market_id: str, clock: Clock, operator: Path | None = None
) -> Signer:
    """The signer of a directory, made first if there is none; its operator is declared if it was
    not. Raises InvalidRequest if that needs a root key that is not at hand."""
    if not _has_keys(directory):
        return create_keys(directory, market_id, clock, operator)
    signer = load_signer(directory)
    return _declare(directory, signer, _load_root(operator), clock) if operator else signer


def _load_root(directory: Path) -> Ed25519PrivateKey:
    """The root key of a key directory."""
    try:
        return _load(directory / _ROOT)
    except FileNotFoundError:
        raise InvalidRequest(
            f"{directory} holds no {_ROOT}", hint="Bring the root key here for this one command."
        ) from None


def _declare(directory: Path, signer: Signer, operator: Ed25519PrivateKey, clock: Clock) -> Signer:
    """Certifies the same operational key again, with its operator, unless that was done."""
    event = parse_payload(parse_envelope(signer.key_event), KeyEvent)
    if event.operator_public_key == public_bytes(operator):
        return signer
    event.sequence += 1
    event.issued_at_unix_ms = clock.now_unix_ms()
    sealed = _seal(event, _load_root(directory), signer.key, operator)
    replace_private(directory / EVENT, sealed)
    return Signer(signer.identity, signer.key, sealed)


def _seal(
    event: KeyEvent,
    root: Ed25519PrivateKey,
    operational: Ed25519PrivateKey,
    operator: Ed25519PrivateKey | None,
) -> bytes:
    if operator is None:
        return seal_key_event(event, root, operational)
    event.operator_public_key = public_bytes(operator)
    return seal_key_event(event, root, operational, operator)


def _pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _load(path: Path) -> Ed25519PrivateKey:
    if path.stat().st_mode & 0o077:
        raise InvalidRequest(f"{path} can be read by others", hint=f"Run: chmod 600 {path}")
    key = load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidRequest(f"{path} is not an Ed25519 key")
    return key
