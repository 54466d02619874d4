"""OpenSSF Model Signing of a model directory, so that other tools can check the weights too.

The signature lies next to the directory, never inside it (it would be part of what it signs).
``model_signing`` imports slowly, so it is loaded only when it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from trueweight.protos.errors import InvalidRequest, TrueweightError, WeightsRefused
from trueweight.runtime.keys import write_private

PRIVATE_KEY = "model-signing.pem"


def ensure_key(directory: Path) -> Path:
    """The publisher's P-256 key for OpenSSF signatures; made on first use, 0600."""
    path = directory / PRIVATE_KEY
    if not path.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    elif path.stat().st_mode & 0o077:
        raise InvalidRequest(f"{path} can be read by others", hint=f"Run: chmod 600 {path}")
    return path


def public_pem(private_key: Path) -> bytes:
    """The public half, for verifiers."""
    key = load_pem_private_key(private_key.read_bytes(), password=None)
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def sign_model(directory: Path, private_key: Path, signature: Path) -> None:
    """Writes the OpenSSF bundle of a directory. Raises WeightsRefused."""
    library = _library()
    hashes = _hashing(library, directory)
    config = library.signing.Config().use_elliptic_key_signer(private_key=private_key)
    try:
        config.set_hashing_config(hashes).sign(directory, signature)
    except (OSError, ValueError) as error:
        raise WeightsRefused(f"{directory} cannot be signed: {error}") from None


def verify_model(directory: Path, public_key: Path, signature: Path) -> None:
    """Raises WeightsRefused unless the bundle is the key's and fits the directory's bytes."""
    library = _library()
    hashes = _hashing(library, directory)
    config = library.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    try:
        config.set_hashing_config(hashes).verify(directory, signature)
    # The library raises many types for malformed bundles, none of them documented.
    except Exception as error:  # noqa: BLE001
        raise WeightsRefused(
            f"the OpenSSF signature {signature} does not hold: {str(error)[:500]}",
            hint="Download the model again, or ask the publisher.",
        ) from None


def _library() -> Any:
    try:
        import model_signing  # noqa: PLC0415  (slow import)
    except ImportError as error:
        # model-signing 1.1.1 imports pyOpenSSL without declaring it.
        raise TrueweightError(
            f"OpenSSF Model Signing is not completely installed: {error}",
            hint="Install pyopenssl.",
        ) from None
    return model_signing


def _hashing(library: Any, directory: Path) -> Any:
    """Follows links (Hugging Face caches) and leaves out what manifests leave out: dot files."""
    hidden = list(directory.rglob(".*"))
    return library.hashing.Config().set_allow_symlinks(True).set_ignored_paths(paths=hidden)
