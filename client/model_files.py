"""Signed models on disk: the directory, and next to it manifest, OpenSSF bundle and its key."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from trueweight.client.model_signature import ensure_key, public_pem, sign_model, verify_model
from trueweight.protos.envelope import MAX_ENVELOPE_BYTES, Opened, open_envelope, ring_of, seal
from trueweight.protos.errors import InvalidRequest, NotFound, WeightsRefused
from trueweight.protos.identity import Signer
from trueweight.protos.manifest import Progress, build_manifest, check_directory
from trueweight.protos.v1.market_pb2 import Member
from trueweight.protos.v1.model_pb2 import Manifest, RegistryEntry
from trueweight.runtime.clock import Clock
from trueweight.runtime.market import Market


@dataclass(frozen=True, slots=True)
class ModelPaths:
    """Where the signed files of a model directory lie."""

    directory: Path

    def _beside(self, ending: str) -> Path:
        return self.directory.with_name(self.directory.name + ending)

    @property
    def manifest(self) -> Path:
        """The signed manifest."""
        return self._beside(".manifest")

    @property
    def bundle(self) -> Path:
        """The OpenSSF Model Signing bundle."""
        return self._beside(".openssf.sig")

    @property
    def bundle_key(self) -> Path:
        """Public key that the bundle is checked with, PEM."""
        return self._beside(".openssf.pub")


def paths_of(directory: Path) -> ModelPaths:
    """Paths beside a directory, also when it is given as "." or with a trailing slash."""
    absolute = directory.absolute()
    return ModelPaths(absolute if absolute.name != ".." else absolute.resolve())


def sign_directory(
    directory: Path,
    *,
    market_id: str,
    signer: Signer,
    keys: Path,
    name: str,
    revision: str,
    licence: str,
    clock: Clock,
    openssf: bool = True,
    progress: Progress | None = None,
) -> Opened[Manifest]:
    """Writes manifest and OpenSSF bundle next to the directory. Raises WeightsRefused."""
    paths = paths_of(directory)
    bundle_digest = _sign_openssf(paths, keys) if openssf else b""
    manifest = build_manifest(
        directory,
        market_id=market_id,
        name=name or paths.directory.name,
        revision=revision,
        licence=licence,
        now_unix_ms=clock.now_unix_ms(),
        model_signature_sha256=bundle_digest,
        progress=progress,
    )
    envelope = seal(manifest, signer)
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise WeightsRefused(f"{directory} has too many files for one manifest")
    _replace(paths.manifest, envelope)
    return open_envelope(envelope, Manifest, ring_of([signer.key_event], market_id), market_id)


def open_manifest(path: Path, market: Market) -> Opened[Manifest]:
    """A manifest file, signed by a publisher of the market. Raises TrueweightError."""
    envelope = _read(path, MAX_ENVELOPE_BYTES)
    opened = open_envelope(envelope, Manifest, market.ring, market.market_id)
    if not market.has_role(opened.signer, Member.PUBLISHER):
        raise WeightsRefused(f"{path} is not signed by a publisher of this market")
    return opened


def verify_directory(directory: Path, manifest: Manifest, progress: Progress | None = None) -> str:
    """Checks every byte against the manifest, and the OpenSSF bundle if the manifest names one.

    Returns what was checked, for people. Raises WeightsRefused."""
    check_directory(directory, manifest, progress)
    if not manifest.model_signature_sha256:
        return "files match the signed manifest; it names no OpenSSF signature"
    paths = paths_of(directory)
    if not paths.bundle.exists() or not paths.bundle_key.exists():
        return "files match the signed manifest; the OpenSSF signature is not at hand"
    bundle = _read(paths.bundle, MAX_ENVELOPE_BYTES)
    if hashlib.sha256(bundle).digest() != manifest.model_signature_sha256:
        raise WeightsRefused(f"{paths.bundle} is not the signature that the manifest names")
    verify_model(directory, paths.bundle_key, paths.bundle)
    return "files match the signed manifest and the OpenSSF signature"


def check_model_id(model_id: str) -> None:
    """Raises InvalidRequest for a name that clients, paths or options could not carry."""
    printable = model_id.isprintable() and not set(model_id) & {" ", "="}
    if not 1 <= len(model_id) <= 128 or not printable:
        raise InvalidRequest('a model id has 1 to 128 printable characters, no blank and no "="')
    if set(model_id.split("/")) & {"", ".", ".."}:
        raise InvalidRequest("the parts of a model id are names, not directories")


def registry_entry(
    model_id: str,
    manifest: Opened[Manifest],
    market_signer: Signer,
    market: Market,
    now_ms: int,
    *,
    revoked: bool = False,
) -> bytes:
    """The envelope that sells a manifest under a name, or takes the name back. Only the market's
    key may sign it."""
    if market_signer.identity != market.market_id:
        raise InvalidRequest(
            "only the market's own key registers models", hint="Use --keys DIR/keys/market."
        )
    check_model_id(model_id)
    entry = RegistryEntry(
        market_id=market.market_id,
        model_id=model_id,
        manifest_digest=manifest.digest,
        publisher=manifest.signer,
        manifest_envelope=manifest.envelope,
        issued_at_unix_ms=now_ms,
        revoked=revoked,
    )
    return seal(entry, market_signer)


def _sign_openssf(paths: ModelPaths, keys: Path) -> bytes:
    key = ensure_key(keys)
    sign_model(paths.directory, key, paths.bundle)
    _replace(paths.bundle_key, public_pem(key))
    return hashlib.sha256(paths.bundle.read_bytes()).digest()


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _read(path: Path, most: int) -> bytes:
    try:
        if path.stat().st_size > most:
            raise InvalidRequest(f"{path} is too large")
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFound(
            f"{path} does not exist", hint="Make it with 'trueweight model sign'."
        ) from None
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None
