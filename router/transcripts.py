"""Transcripts at rest: a data key each, wrapped by the router's master key; erasure destroys it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from sqlalchemy import Connection, delete, insert, select, update

from trueweight.protos.errors import Erased, InvalidRequest, NotFound, StorageError
from trueweight.protos.transcript_box import KEY_BYTES, NONCE_BYTES, open_data, seal_data
from trueweight.protos.v1.audit_pb2 import Transcript
from trueweight.router.store import data_keys, transcripts
from trueweight.runtime.keys import write_private

_MASTER_KEY = "transcript-master.key"
_WRAP_TAG = b"trueweight/router-transcript/v1\x00"


@dataclass(frozen=True, slots=True)
class SealedTranscript:
    """A transcript as it lies in the store, with its data key unwrapped."""

    data_key: bytes
    nonce: bytes
    ciphertext: bytes


def load_master_key(directory: Path, random: Callable[[int], bytes]) -> bytes:
    """The router's master key; made on first use, readable by its owner only."""
    path = directory / _MASTER_KEY
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(path, random(KEY_BYTES))
    if path.stat().st_mode & 0o077:
        raise InvalidRequest(f"{path} can be read by others", hint=f"Run: chmod 600 {path}")
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise StorageError(f"{path} is not a master key")
    return key


class TranscriptBox:
    """Seals and opens transcripts. Its methods are works for ``Store``."""

    def __init__(self, master_key: bytes, random: Callable[[int], bytes] = os.urandom) -> None:
        self._master, self._random = ChaCha20Poly1305(master_key), random

    def put(
        self, receipt_digest: bytes, request_id: bytes, transcript: Transcript, now_unix_ms: int
    ) -> Callable[[Connection], None]:
        """A work that stores a transcript. Encryption happens now, in the caller's thread."""
        data_key, nonce = self._random(KEY_BYTES), self._random(NONCE_BYTES)
        row = {
            "receipt_digest": receipt_digest,
            "request_id": request_id,
            "nonce": nonce,
            "ciphertext": seal_data(
                data_key, nonce, transcript.SerializeToString(), receipt_digest
            ),
            "created_unix_ms": now_unix_ms,
        }
        wrapped = self._wrap(data_key, receipt_digest)

        def work(connection: Connection) -> None:
            connection.execute(insert(transcripts).values(**row))
            connection.execute(
                insert(data_keys).values(receipt_digest=receipt_digest, wrapped=wrapped)
            )

        return work

    def get(self, receipt_digest: bytes) -> Callable[[Connection], SealedTranscript]:
        """A work that finds a sealed transcript. Raises Erased if its client had it destroyed,
        NotFound if there is none."""
        query = (
            select(transcripts.c.nonce, transcripts.c.ciphertext, data_keys.c.wrapped)
            .join(
                data_keys, data_keys.c.receipt_digest == transcripts.c.receipt_digest, isouter=True
            )
            .where(transcripts.c.receipt_digest == receipt_digest)
        )

        def work(connection: Connection) -> SealedTranscript:
            row = connection.execute(query).first()
            if row is None:
                raise NotFound("There is no transcript for this receipt; it may have been erased.")
            if row.wrapped is None:
                raise Erased("The transcript was erased at its client's request.")
            key = self._unwrap(row.wrapped, receipt_digest)
            return SealedTranscript(key, row.nonce, row.ciphertext)

        return work

    def open(self, sealed: SealedTranscript, receipt_digest: bytes) -> Transcript:
        """The plain transcript."""
        data = open_data(sealed.data_key, sealed.nonce, sealed.ciphertext, receipt_digest)
        return Transcript.FromString(data)

    def _wrap(self, data_key: bytes, receipt_digest: bytes) -> bytes:
        nonce = self._random(NONCE_BYTES)
        return nonce + self._master.encrypt(nonce, data_key, _WRAP_TAG + receipt_digest)

    def _unwrap(self, wrapped: bytes, receipt_digest: bytes) -> bytes:
        try:
            return self._master.decrypt(
                wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], _WRAP_TAG + receipt_digest
            )
        except (InvalidTag, ValueError):
            raise StorageError(
                "a transcript's key does not open", hint=f"Was {_MASTER_KEY} replaced?"
            ) from None


def erase_request(request_id: bytes) -> Callable[[Connection], int]:
    """A work that destroys keys and texts of one request; how many there were. What stays is that
    its client wanted it so: a transcript that is missing without that is refunded."""

    def work(connection: Connection) -> int:
        digests = list(
            connection.scalars(
                select(transcripts.c.receipt_digest)
                .join(data_keys, data_keys.c.receipt_digest == transcripts.c.receipt_digest)
                .where(transcripts.c.request_id == request_id)
            )
        )
        connection.execute(delete(data_keys).where(data_keys.c.receipt_digest.in_(digests)))
        connection.execute(
            update(transcripts)
            .where(transcripts.c.receipt_digest.in_(digests))
            .values(nonce=b"", ciphertext=b"")
        )
        return len(digests)

    return work


def erase_before(unix_ms: int, limit: int) -> Callable[[Connection], int]:
    """A work that destroys at most ``limit`` transcripts older than a time; how many it did."""

    def work(connection: Connection) -> int:
        digests = list(
            connection.scalars(
                select(transcripts.c.receipt_digest)
                .where(transcripts.c.created_unix_ms < unix_ms)
                .limit(limit)
            )
        )
        _erase(connection, digests)
        return len(digests)

    return work


def _erase(connection: Connection, digests: list[bytes]) -> None:
    connection.execute(delete(data_keys).where(data_keys.c.receipt_digest.in_(digests)))
    connection.execute(delete(transcripts).where(transcripts.c.receipt_digest.in_(digests)))
