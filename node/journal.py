"""The node's own record of signed receipts, kept until the hold that pays for them is over.

It survives kill -9, so that a node whose router withholds the capture can claim at the ledger,
and it refuses to run a receipted assignment twice.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trueweight.protos.errors import StorageError

log = logging.getLogger(__name__)

MAX_CLAIMS = 256
_MAX_MATCHED = 10_000
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
-- What routers say that the ledger has captured, until the ledger says so too.
CREATE TABLE IF NOT EXISTS reports (
  assignment_digest BLOB PRIMARY KEY,
  bill_id BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS reports_by_bill ON reports (bill_id);
-- Earnings that the node's own account shows and that no receipt was matched with yet.
CREATE TABLE IF NOT EXISTS earnings (
  bill_id BLOB PRIMARY KEY,
  legs INTEGER NOT NULL,
  seen_at_unix_ms INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cursor (sequence INTEGER NOT NULL);
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

    def note_reports(self, reports: Sequence[tuple[bytes, bytes]]) -> None:
        """Routers say that these (assignment digest, bill id) are captured. Only what this journal
        holds unclaimed is kept, so that a router cannot fill it."""
        self._many(
            "INSERT OR IGNORE INTO reports SELECT assignment_digest, ? FROM receipts "
            "WHERE assignment_digest = ? AND claimed = 0",
            [(bill, assignment) for assignment, bill in reports],
        )

    def has_reports(self) -> bool:
        """True if a report waits for the ledger's word."""
        return bool(self._run("SELECT 1 FROM reports LIMIT 1", ()))

    def earnings_cursor(self) -> int:
        """Sequence of the last transfer of the node's account that was looked at."""
        rows = self._run("SELECT sequence FROM cursor", ())
        return int(rows[0][0]) if rows else 0

    def note_earnings(self, bills: Mapping[bytes, int], sequence: int, now_unix_ms: int) -> None:
        """The node's account shows as many earnings of these bills, up to that transfer."""
        with self._transaction():
            self._many(
                "INSERT INTO earnings VALUES (?, ?, ?) "
                "ON CONFLICT (bill_id) DO UPDATE SET legs = legs + excluded.legs",
                [(bill, legs, now_unix_ms) for bill, legs in bills.items()],
            )
            self._run("DELETE FROM cursor", ())
            self._run("INSERT INTO cursor VALUES (?)", (sequence,))

    def settle_reports(self) -> int:
        """Ends what both a router and the ledger call captured; how many receipts. Each earning
        answers for one receipt, whatever a router says about others."""
        with self._transaction():
            return self._settle_reports()

    def _settle_reports(self) -> int:
        matched = self._run(
            "SELECT r.assignment_digest, r.bill_id FROM reports r "
            "JOIN earnings e ON e.bill_id = r.bill_id WHERE e.legs > 0 LIMIT ?",
            (_MAX_MATCHED,),
        )
        left: dict[bytes, int] = {}
        settled = 0
        for assignment, bill in ((row[0], row[1]) for row in matched):
            if bill not in left:
                rows = self._run("SELECT legs FROM earnings WHERE bill_id = ?", (bill,))
                left[bill] = int(rows[0][0])
            if left[bill] > 0:
                left[bill] -= 1
                settled += 1
                self.mark_claimed(assignment)
        self._many(
            "UPDATE earnings SET legs = ? WHERE bill_id = ?",
            [(n, bill) for bill, n in left.items()],
        )
        return settled

    def mark_claimed(self, assignment_digest: bytes) -> None:
        """The ledger has answered; there is nothing more to ask for."""
        self._run(
            "UPDATE receipts SET claimed = 1 WHERE assignment_digest = ?", (assignment_digest,)
        )
        self._run("DELETE FROM reports WHERE assignment_digest = ?", (assignment_digest,))

    def forget_expired(self, before_unix_ms: int) -> None:
        """Drops entries whose hold ended before a time."""
        self._run("DELETE FROM receipts WHERE hold_expires_at_unix_ms < ?", (before_unix_ms,))
        self._run("DELETE FROM earnings WHERE seen_at_unix_ms < ?", (before_unix_ms,))
        self._run(
            "DELETE FROM reports WHERE assignment_digest NOT IN "
            "(SELECT assignment_digest FROM receipts)",
            (),
        )

    def close(self) -> None:
        """Closes the database; nothing may be called afterwards."""
        self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing. Left open after an error it would swallow every receipt from then on."""
        self._run("BEGIN IMMEDIATE", ())
        try:
            yield
            self._run("COMMIT", ())
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.rollback()
            raise

    def _many(self, sql: str, rows: Sequence[tuple[object, ...]]) -> None:
        try:
            self._db.executemany(sql, rows)
        except sqlite3.Error as error:
            raise StorageError(f"the receipt journal failed: {error}") from error

    def _run(self, sql: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"the receipt journal failed: {error}") from error
