"""Sealed transcripts open for the named verifier and nobody else."""

import os

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from trueweight.protos import transcript_box as box
from trueweight.protos.errors import BadSignature

RECEIPT = b"r" * 32


def sealed(public_key: bytes):
    key, nonce = os.urandom(32), os.urandom(12)
    return box.wrap_key(key, public_key, RECEIPT, os.urandom), key, nonce


def test_the_named_verifier_reads_the_transcript():
    private = X25519PrivateKey.generate()
    wrapped, key, nonce = sealed(private.public_key().public_bytes_raw())
    data = box.seal_data(key, nonce, b"tokens", RECEIPT)
    unwrapped = box.unwrap_key(wrapped, private, RECEIPT)
    assert box.open_data(unwrapped, nonce, data, RECEIPT) == b"tokens"


def test_another_key_another_receipt_and_flipped_bits_do_not_open():
    private = X25519PrivateKey.generate()
    wrapped, key, nonce = sealed(private.public_key().public_bytes_raw())
    data = box.seal_data(key, nonce, b"tokens", RECEIPT)
    with pytest.raises(BadSignature):
        box.unwrap_key(wrapped, X25519PrivateKey.generate(), RECEIPT)
    with pytest.raises(BadSignature):
        box.unwrap_key(wrapped, private, b"s" * 32)
    with pytest.raises(BadSignature):
        box.open_data(key, nonce, data[:-1] + bytes([data[-1] ^ 1]), RECEIPT)


@pytest.mark.parametrize("public", [b"", b"short", bytes(32)])
def test_hostile_public_keys_are_refused(public):
    with pytest.raises(BadSignature):
        box.wrap_key(os.urandom(32), public, RECEIPT, os.urandom)
