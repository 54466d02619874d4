"""The node's own record of signed receipts, kept until the hold that pays for them is over.

It survives kill -9, so that a node whose router withholds the capture can claim at the ledger,
and it refuses to run a receipted assignment twice.
"""

from __future__ import annotations

import logging
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from trueweight.protos.errors import StorageError

log = logging.getLogger(__name__)

MAX_CLAIMS = 256
_SCHEMA = """
CREATE TABLE IF NOT EXISTS receipts (
  assignment_digest BLOB PRIMARY KEY,
  hold_id BLOB NOT NULL,
  hold_expires_at_unix_ms INTEGER NOT NULL,
  assignment BLOB NOT NULL,
  receipt BLOB NOT NULL,
  claimed INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS receipts_by_expiry ON receipts (hold_expires_at_unix_ms);
"""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A receipt with what pays for it. ``assignment`` and ``receipt`` are envelopes. A leg that
    died is not ``claimable``; it is kept only so that it is not run again."""

    assignment_digest: bytes
    hold_id: bytes
    hold_expires_at_unix_ms: int
    assignment: bytes
    receipt: bytes
    claimable: bool = True


class ReceiptJournal:
    """SQLite in WAL mode. Writes reach the operating system, not the disk, before ``record``
    returns: enough for a killed process, and cheap enough for the event loop (about 50 µs)."""

    def __init__(self, path: Path | None = None) -> None:
        """``path`` None keeps the journal in memory."""
        try:
            self._db = sqlite3.connect(path or ":memory:", isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise StorageError(
                f"cannot open the receipt journal {path}: {error}", hint="Is the disk full?"
            ) from error

    def record(self, entry: JournalEntry) -> None:
        """Raises StorageError."""
        self._run(
            "INSERT OR IGNORE INTO receipts VALUES (?, ?, ?, ?, ?, ?)",
            (
                entry.assignment_digest,
                entry.hold_id,
                entry.hold_expires_at_unix_ms,
                entry.assignment,
                entry.receipt,
                int(not entry.claimable),
            ),
        )

    def knows(self, assignment_digest: bytes) -> bool:
        """True if a receipt for this assignment was signed and is still kept."""
        query = "SELECT 1 FROM receipts WHERE assignment_digest = ?"
        return bool(self._run(query, (assignment_digest,)))

    def due(self, expiring_before_unix_ms: int) -> list[JournalEntry]:
        """Unclaimed entries whose hold ends before a time, the most urgent first, at most 256."""
        rows = self._run(
            "SELECT assignment_digest, hold_id, hold_expires_at_unix_ms, assignment, receipt "
            "FROM receipts WHERE claimed = 0 AND hold_expires_at_unix_ms < ? "
            "ORDER BY hold_expires_at_unix_ms LIMIT ?",
            (expiring_before_unix_ms, MAX_CLAIMS),
        )
        return [JournalEntry(*row) for row in rows]

    def mark_claimed(self, assignment_digest: bytes) -> None:
        """The ledger has answered; there is nothing more to ask for."""
        self._run(
            "UPDATE receipts SET claimed = 1 WHERE assignment_digest = ?", (assignment_digest,)
        )

    def forget_expired(self, before_unix_ms: int) -> None:
        """Drops entries whose hold ended before a time."""
        self._run("DELETE FROM receipts WHERE hold_expires_at_unix_ms < ?", (before_unix_ms,))

    def close(self) -> None:
        self._db.close()

    def _run(
        self, sql: str, values: tuple[object, ...]
    ) -> list[tuple[bytes, bytes, int, bytes, bytes]]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"the receipt journal failed: {error}") from error
