"""TLS with pinned self-signed certificates: no certificate authority to trust or to run.

Every server has its own certificate; whoever dials it got that certificate from a signed
document (an Offer or the MarketDescriptor) and accepts no other.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from trueweight.protos.errors import InvalidRequest
from trueweight.runtime.keys import write_private

# Every certificate carries this name; the pin is the certificate itself, not the name.
PINNED_NAME = "node.trueweight"
CERTIFICATE, PRIVATE_KEY = "tls-cert.pem", "tls-key.pem"
_LIFETIME_DAYS = 3650
_MAX_PEM_BYTES = 16 * 1024


def ensure_certificate(directory: Path, now_unix_ms: int) -> str:
    """The directory's certificate as PEM; made on first use."""
    path = directory / CERTIFICATE
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        key, certificate = _make(now_unix_ms)
        write_private(directory / PRIVATE_KEY, key)
        path.write_bytes(certificate)
    return path.read_text()


def _make(now_unix_ms: int) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, PINNED_NAME)])
    start = datetime.datetime.fromtimestamp(now_unix_ms / 1000, tz=datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # A day of slack for clocks that differ.
        .not_valid_before(start - datetime.timedelta(days=1))
        .not_valid_after(start + datetime.timedelta(days=_LIFETIME_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(PINNED_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private, certificate.public_bytes(Encoding.PEM)


def server_credentials(directory: Path) -> grpc.ServerCredentials:
    """Credentials of a server from its key directory."""
    try:
        key = (directory / PRIVATE_KEY).read_bytes()
        certificate = (directory / CERTIFICATE).read_bytes()
    except FileNotFoundError as error:
        raise InvalidRequest(f"{error.filename} is missing", hint="Re-create the keys.") from None
    return grpc.ssl_server_credentials([(key, certificate)])


def channel_credentials(pinned_pem: str) -> grpc.ChannelCredentials:
    """Credentials that accept exactly the server holding this certificate's key."""
    data = pinned_pem.encode()
    if not data or len(data) > _MAX_PEM_BYTES:
        raise InvalidRequest("the TLS certificate to pin is missing or too long")
    try:
        certificates = x509.load_pem_x509_certificates(data)
    except ValueError:
        raise InvalidRequest("the TLS certificate to pin is not PEM") from None
    if len(certificates) != 1:
        raise InvalidRequest("pin exactly one TLS certificate")
    return grpc.ssl_channel_credentials(root_certificates=data)
