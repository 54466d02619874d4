"""``ledger archive``: moves old leaves and transfers into a file, so that the database stays small.

What goes are bundles of frequent kinds (receipts, bills, transfers) and the transfers they record.
Balances, holds, idempotency, the digest index, Merkle tiles, checkpoints and rare evidence stay, so
the ledger serves, judges and proves as before. The file is written, synced and checked against the
Merkle tiles before anything is deleted; a run that was killed is simply run again.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from trueweight.ledger import bundle
from trueweight.ledger.archived import (
    BUNDLE_COLUMNS,
    INDEXED,
    SUFFIX,
    TRANSFER_COLUMNS,
    Archive,
    Row,
)
from trueweight.ledger.leaves import TRANSFER, parse_batch
from trueweight.ledger.tiles import WIDTH
from trueweight.protos.errors import StorageError, Unavailable
from trueweight.protos.merkle import HASH_BYTES, leaf_hash
from trueweight.runtime.locks import only_one

# Rows deleted in one transaction: the writer waits no longer than that takes.
BATCH = 2_000
_PER_QUERY = 256


@dataclass(frozen=True, slots=True)
class Archived:
    """What one run moved."""

    file: str
    leaves: int
    transfers: int
    below: int


def archive(engine: sa.Engine, directory: Path, older_than_unix_ms: int) -> Archived:
    """Moves what was merged before a time, as far as it is checkpointed and in full tiles. Raises
    Unavailable while another run writes to the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    # Files of two runs that overlap would make the whole directory unreadable.
    taken = Unavailable(f"another run writes to the archive at {directory}", hint="Let it finish.")
    with only_one(directory, taken):
        return _archive(engine, directory, older_than_unix_ms)


def _archive(engine: sa.Engine, directory: Path, older_than_unix_ms: int) -> Archived:
    with engine.connect() as connection:
        market = _meta(connection, "market", "")
        start = int(_meta(connection, "archived_below", "0"))
        after = int(_meta(connection, "archived_sequence", "0"))
        below = _boundary(connection, start, older_than_unix_ms)
    _finish(engine, start, after)  # of a run that was killed while it deleted
    known = Archive(directory, market)
    if known.below > start:
        # A run that was killed before it told the database: the file is whole.
        last = known.parts[-1]
        path, below, sequence = last.path, last.below, last.sequence
    elif known.below < start:
        raise StorageError(f"the archive at {directory} lacks what left the database before")
    elif below <= start:
        return Archived("", 0, 0, start)
    else:
        path = directory / f"leaves-{start:012d}-{below:012d}{SUFFIX}"
        sequence = _write(engine, path, {"market": market}, (start, below, after))
    _check(engine, Archive(directory, market), (start, below))
    _mark(engine, below, sequence)
    _finish(engine, below, sequence)
    return Archived(str(path), below - start, sequence - after, below)


def _boundary(connection: sa.Connection, start: int, older_than_unix_ms: int) -> int:
    """The end of the last bundle that may go and that ends with a full tile."""
    signed = connection.execute(sa.text("SELECT MAX(size) FROM checkpoint")).scalar() or 0
    rows = connection.execute(
        sa.text(
            "SELECT first_index + leaves, merged_at FROM bundle WHERE first_index >= :start "
            "ORDER BY first_index"
        ),
        {"start": start},
    )
    end = start
    for reached, merged_at in rows:
        if reached > signed or merged_at >= older_than_unix_ms:
            break
        end = int(reached)
    # The tile that is not full is computed from its leaves: they stay.
    return _bundle_start(connection, end // WIDTH * WIDTH, start)


def _bundle_start(connection: sa.Connection, place: int, start: int) -> int:
    found = connection.execute(
        sa.text("SELECT MAX(first_index) FROM bundle WHERE first_index <= :place"), {"place": place}
    ).scalar()
    return max(start, int(found or 0))


def _write(
    engine: sa.Engine, path: Path, facts: dict[str, Any], place: tuple[int, int, int]
) -> int:
    """Writes the file under another name, syncs it, and gives it its name; the last sequence."""
    start, below, after = place
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(temporary)) as target, engine.connect() as source:
            target.execute("PRAGMA synchronous=FULL")
            target.execute(
                f"CREATE TABLE bundle (first_index INTEGER PRIMARY KEY, "
                f"{', '.join(BUNDLE_COLUMNS[1:])})"
            )
            target.execute(
                f"CREATE TABLE transfer (sequence INTEGER PRIMARY KEY, "
                f"{', '.join(TRANSFER_COLUMNS[1:])})"
            )
            target.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT)")
            sequence = _copy_bundles(source, target, start, below)
            # The newest transfer stays: from it the writer knows where the books go on.
            newest = source.execute(sa.text("SELECT MAX(sequence) FROM transfer")).scalar() or 0
            sequence = max(after, min(sequence, int(newest) - 1))
            _copy_transfers(source, target, after, sequence)
            add_indexes(target)
            facts |= {"first_index": start, "below": below, "after": after, "sequence": sequence}
            target.executemany("INSERT INTO meta VALUES (?, ?)", facts.items())
            target.commit()
        _sync(temporary)
        temporary.chmod(0o400)
        temporary.replace(path)
        _sync(path.parent)
    except (sqlite3.Error, OSError) as error:
        raise StorageError(
            f"the archive cannot be written: {error}", hint="Is the disk full? Nothing was moved."
        ) from error
    return sequence


def add_indexes(target: sqlite3.Connection) -> None:
    """What statements are read by, of every account. When all rows are there: that is cheapest."""
    for side in INDEXED:
        target.execute(f"CREATE INDEX transfer_{side} ON transfer ({side})")


def _copy_bundles(source: sa.Connection, target: sqlite3.Connection, start: int, below: int) -> int:
    """Copies bundles of frequent kinds; the last transfer that all bundles of the range record."""
    last = b""
    for rows in _pages(source, "bundle", BUNDLE_COLUMNS, (start - 1, below - 1)):
        for row in rows:
            for kind, body in bundle.unpack(row[1], bytes(row[4])):
                last = body if kind == TRANSFER else last
        _insert(target, "bundle", [r for r in rows if r[2] <= bundle.FREQUENT_MASK])
    batch = parse_batch(last)
    return batch.first_sequence + len(batch.movements) - 1 if last else 0


def _copy_transfers(
    source: sa.Connection, target: sqlite3.Connection, after: int, sequence: int
) -> None:
    copied = 0
    for rows in _pages(source, "transfer", TRANSFER_COLUMNS, (after, sequence)):
        copied += len(rows)
        _insert(target, "transfer", rows)
    if copied != sequence - after:
        raise StorageError("transfers are missing", hint="Run ledger fsck.")


def _pages(
    source: sa.Connection, table: str, columns: Sequence[str], span: tuple[int, int]
) -> Iterator[list[Row]]:
    """Rows with keys in (first, last], page by page."""
    first, last = span
    sql = sa.text(
        f"SELECT {', '.join(columns)} FROM {table} WHERE {columns[0]} > :first "  # noqa: S608
        f"AND {columns[0]} <= :last ORDER BY {columns[0]} LIMIT :limit"
    )
    while rows := source.execute(sql, {"first": first, "last": last, "limit": _PER_QUERY}).all():
        yield [tuple(row) for row in rows]
        first = rows[-1][0]


def _insert(target: sqlite3.Connection, table: str, rows: Sequence[Row]) -> None:
    if rows:
        marks = ",".join("?" * len(rows[0]))
        target.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)  # noqa: S608


def _check(engine: sa.Engine, archived: Archive, span: tuple[int, int]) -> None:
    """Every archived leaf must be the one whose hash is in the tiles that stay."""
    start, below = span
    with engine.connect() as connection:
        tile, number = b"", -1
        place = start
        while place < below:
            rows = archived.bundles(place, _PER_QUERY)
            if not rows or rows[0][0] >= below:
                return
            for first, count, _, _, body in rows:
                for index, (_, leaf) in enumerate(bundle.unpack(count, bytes(body)), first):
                    if index // WIDTH != number:
                        number = index // WIDTH
                        tile = _tile(connection, number)
                    at = index % WIDTH * HASH_BYTES
                    if leaf_hash(leaf) != tile[at : at + HASH_BYTES]:
                        raise StorageError(f"leaf {index} of the archive is not the log's")
                place = first + count


def _tile(connection: sa.Connection, number: int) -> bytes:
    found = connection.execute(
        sa.text("SELECT hashes FROM tile WHERE level = 0 AND number = :number"), {"number": number}
    ).scalar()
    return bytes(found or b"")


def _mark(engine: sa.Engine, below: int, sequence: int) -> None:
    with engine.begin() as connection:
        for key, value in (("archived_below", below), ("archived_sequence", sequence)):
            connection.execute(
                sa.text(
                    "INSERT INTO meta (key, value) VALUES (:key, :value) "
                    "ON CONFLICT (key) DO UPDATE SET value = excluded.value"
                ),
                {"key": key, "value": str(value)},
            )


def _finish(engine: sa.Engine, below: int, sequence: int) -> None:
    """Deletes what the archive has, a little at a time."""
    plans = (
        ("bundle", "first_index", f"kinds <= {bundle.FREQUENT_MASK} AND first_index < :end", below),
        ("transfer", "sequence", "sequence <= :end", sequence),
    )
    for table, key, condition, end in plans:
        chosen = f"SELECT {key} FROM {table} WHERE {condition} LIMIT {BATCH}"  # noqa: S608
        deleted = 1
        while deleted:
            with engine.begin() as connection:
                deleted = connection.execute(
                    sa.text(f"DELETE FROM {table} WHERE {key} IN ({chosen})"),  # noqa: S608
                    {"end": end},
                ).rowcount


def _meta(connection: sa.Connection, key: str, default: str) -> str:
    found = connection.execute(
        sa.text("SELECT value FROM meta WHERE key = :key"), {"key": key}
    ).scalar()
    return default if found is None else str(found)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
