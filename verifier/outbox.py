"""Finished verdicts that are committed to but not public yet, kept on disk byte for byte.

Scoring again after a crash might give another last digit, and the commitment binds every byte.
"""

from __future__ import annotations

from pathlib import Path

from google.protobuf.message import DecodeError

from trueweight.protos.errors import StorageError
from trueweight.protos.v1.audit_pb2 import Verdict
from trueweight.runtime.keys import write_private


class Outbox:
    """One file per verdict in ``directory``, named by its receipt."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._verdicts: dict[bytes, Verdict] = {}
        for path in directory.glob("*.tmp"):
            path.unlink()
        for path in directory.glob("*.verdict"):
            self._verdicts[bytes.fromhex(path.stem)] = _read(path)

    def __contains__(self, receipt_digest: bytes) -> bool:
        return receipt_digest in self._verdicts

    def get(self, receipt_digest: bytes) -> Verdict:
        """A kept verdict. Raises KeyError."""
        return self._verdicts[receipt_digest]

    def put(self, verdict: Verdict) -> None:
        """Keeps a verdict; on disk before this returns. The first one of a receipt stays."""
        digest = verdict.receipt_digest
        if digest in self._verdicts:
            return
        temporary = self._path(digest).with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        write_private(temporary, verdict.SerializeToString(deterministic=True))
        temporary.replace(self._path(digest))
        self._verdicts[digest] = verdict

    def remove(self, receipt_digest: bytes) -> None:
        """The verdict is public."""
        if self._verdicts.pop(receipt_digest, None) is not None:
            self._path(receipt_digest).unlink(missing_ok=True)

    def _path(self, receipt_digest: bytes) -> Path:
        return self._directory / f"{receipt_digest.hex()}.verdict"


def _read(path: Path) -> Verdict:
    try:
        return Verdict.FromString(path.read_bytes())
    except DecodeError:
        raise StorageError(
            f"{path.name} in the verifier's outbox is damaged", hint="Restore it or delete it."
        ) from None
