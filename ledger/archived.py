"""Reading what ``ledger archive`` has moved out of the database.

An archive is a directory of SQLite files, one per run, each with the very rows of ``bundle`` and
``transfer`` that left: so nothing needs another format, and fsck checks them as before.
"""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from trueweight.ledger.deadline import bound_sqlite
from trueweight.ledger.findings import stream
from trueweight.protos.errors import InvalidRequest, NotFound, StorageError

Row = tuple[Any, ...]
SUFFIX = ".archive"
BUNDLE_COLUMNS = ("first_index", "leaves", "kinds", "merged_at", "body")
TRANSFER_COLUMNS = (
    "sequence", "operation_id", "ordinal", "debit", "credit", "amount", "phase", "pending_id",
    "reason", "created_at",
)  # fmt: skip
# Sides of a transfer by which a file finds it. SQLite puts the sequence behind each by itself.
INDEXED = ("debit", "credit")
_BUNDLES = f"SELECT {', '.join(BUNDLE_COLUMNS)} FROM bundle"  # noqa: S608
_TRANSFERS = f"SELECT {', '.join(TRANSFER_COLUMNS)} FROM transfer"  # noqa: S608


@dataclass(frozen=True, slots=True)
class Part:
    """One file: leaves [first_index, below) and transfers (after, sequence]."""

    path: Path
    market: str
    first_index: int
    below: int
    after: int
    sequence: int


class Archive:
    """All parts of a directory, in order. Raises StorageError if one is missing or damaged."""

    def __init__(self, directory: Path, market: str) -> None:
        self._directory, self._market = directory, market
        if not directory.is_dir():
            raise NotFound(f"there is no archive at {directory}")
        self.parts = sorted(
            (_read_part(path) for path in directory.glob(f"*{SUFFIX}")),
            key=lambda part: part.first_index,
        )
        index = sequence = 0
        for part in self.parts:
            if part.market != market:
                raise StorageError(f"{part.path} is another market's archive")
            if (part.first_index, part.after) != (index, sequence):
                raise StorageError(
                    f"the archive lacks leaves {index} to {part.first_index - 1}",
                    hint="Put the missing file back.",
                )
            index, sequence = part.below, part.sequence
        self.below, self.sequence = index, sequence

    def at(self, below: int) -> Archive:
        """What books had in the archive when they said so: leaves below an index. A run may have
        moved more since, even leaves that those books do not have yet. Raises StorageError if it
        is not all there."""
        whole = self if self.below >= below else Archive(self._directory, self._market)
        if whole.below < below:
            raise StorageError(
                f"the archive lacks leaves {whole.below} to {below - 1}",
                hint="Put the missing file back.",
            )
        if whole.below == below:
            return whole
        part = copy(whole)
        part.parts = [p for p in whole.parts if p.below <= below]
        part.below = part.parts[-1].below if part.parts else 0
        part.sequence = part.parts[-1].sequence if part.parts else 0
        return part

    def bundles(self, place: int, limit: int, mask: int = 0) -> list[Row]:
        """Bundles that hold leaf ``place`` or later ones, of a mask's kinds, oldest first."""
        found: list[Row] = []
        first = "SELECT COALESCE(MAX(first_index), 0) FROM bundle WHERE first_index <= ?"
        kinds = "AND (kinds & ?) <> 0 " if mask else "AND ? = 0 "
        sql = f"{_BUNDLES} WHERE first_index >= ({first}) {kinds}ORDER BY first_index LIMIT ?"
        for part in self.parts:
            if part.below > place and len(found) < limit:
                found += _query(part, sql, (place, mask, limit - len(found)))
        return found

    def transfers(
        self, after: int, limit: int, account_no: int | None = None, end: int | None = None
    ) -> list[Row]:
        """Transfers with a higher sequence (of one account; up to ``end``), oldest first."""
        end = self.sequence if end is None else end
        sql, sides = transfers_sql(account_no is not None)
        found: list[Row] = []
        for part in self.parts:
            if part.sequence > after and part.after < end and len(found) < limit:
                left = limit - len(found)
                values = (account_no, after, end, left) * sides if sides else (after, end)
                found += _query(part, sql, (*values, left))
        return found

    def all_bundles(self) -> Iterator[Row]:
        """Every bundle, without holding more than a few in memory."""
        for part in self.parts:
            yield from _stream(part, f"{_BUNDLES} ORDER BY first_index")

    def all_transfers(self, columns: Sequence[str]) -> Iterator[Row]:
        """Every transfer."""
        for part in self.parts:
            yield from _stream(
                part,
                f"SELECT {', '.join(columns)} FROM transfer ORDER BY sequence",  # noqa: S608
            )


def transfers_sql(of_one_account: bool) -> tuple[str, int]:
    """One page of a file's transfers, and how many sides of them it looks at."""
    order = "ORDER BY sequence LIMIT ?"
    if not of_one_account:
        return f"{_TRANSFERS} WHERE sequence > ? AND sequence <= ? {order}", 0
    # Two index ranges, as in the database; files of early versions have no index and are scanned.
    pages = [
        f"SELECT * FROM (SELECT sequence FROM transfer WHERE {side} = ? "  # noqa: S608
        f"AND sequence > ? AND sequence <= ? {order})"
        for side in INDEXED
    ]
    return f"{_TRANSFERS} WHERE sequence IN ({' UNION '.join(pages)}) {order}", len(pages)


def archive_at(connection: sa.Connection, archive: Archive | None) -> Archive | None:
    """The archive as it belongs to the moment of the books that a connection sees. Raises
    InvalidRequest if they have one and it is not known where."""
    moved = connection.execute(
        sa.text("SELECT value FROM meta WHERE key = 'archived_below'")
    ).scalar()
    below = int(moved or 0)
    if archive is not None:
        return archive.at(below)
    if below:
        raise InvalidRequest(
            f"the leaves below {below} are in an archive", hint="Name its directory: --archive DIR."
        )
    return None


def bundles_of(connection: sa.Connection, archive: Archive | None) -> Iterator[Any]:
    """Every bundle of books, wherever it is."""
    sql = f"SELECT {', '.join(BUNDLE_COLUMNS)} FROM bundle ORDER BY first_index"  # noqa: S608
    rows = stream(connection, sql)
    return rows if archive is None else merged(archive.all_bundles(), rows)


def transfers_of(
    connection: sa.Connection, archive: Archive | None, columns: Sequence[str]
) -> Iterator[Any]:
    """Every transfer of books, wherever it is."""
    sql = f"SELECT {', '.join(columns)} FROM transfer ORDER BY sequence"  # noqa: S608
    rows = stream(connection, sql)
    return rows if archive is None else merged(archive.all_transfers(columns), rows)


def merged(archived: Iterable[Row], stored: Iterable[Row]) -> Iterator[Row]:
    """Rows of both in the order of their first column. What an interrupted run has left in both
    comes once; what differs comes twice, so that fsck finds it."""
    before: Row | None = None
    for row in heapq.merge(archived, stored, key=lambda r: r[0]):
        if row != before:
            yield row
        before = row


def _read_part(path: Path) -> Part:
    try:
        with closing(_open(path)) as connection:
            facts = dict(connection.execute("SELECT key, value FROM meta"))
        numbers = (int(facts[k]) for k in ("first_index", "below", "after", "sequence"))
        return Part(path, str(facts["market"]), *numbers)
    except (sqlite3.Error, KeyError, ValueError):
        raise StorageError(f"{path} is no archive, or it is damaged") from None


def _query(part: Part, sql: str, values: Sequence[Any]) -> list[Row]:
    try:
        with closing(_open(part.path)) as connection, bound_sqlite(connection):
            return connection.execute(sql, values).fetchall()
    except sqlite3.Error as error:
        raise StorageError(f"the archive {part.path} failed: {error}") from error


def _stream(part: Part, sql: str) -> Iterator[Row]:
    try:
        with closing(_open(part.path)) as connection:
            yield from connection.execute(sql)
    except sqlite3.Error as error:
        raise StorageError(f"the archive {part.path} failed: {error}") from error


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
