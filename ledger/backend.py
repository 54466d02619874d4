"""The writer's own connection: the few statements of the hot path, on SQLite and PostgreSQL.

Both give the same four verbs (rows by key, insert, update, query) inside one explicit
transaction, in batches, because a round trip per row is 6 to 40 times slower.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import psycopg
import sqlalchemy as sa
from psycopg.abc import PQGen

from trueweight.ledger.schema import BUSY_MS, TCP_OPTIONS, sqlite_path, use_wal
from trueweight.protos.errors import StorageError, Unavailable
from trueweight.runtime.locks import take_lock

Row = tuple[Any, ...]
T = TypeVar("T")
# Any fixed number: the advisory lock that makes one process the writer of a database.
ADVISORY_LOCK = 0x7472756577
_KEYS_PER_QUERY = 500
# Rows per statement on SQLite: a long statement runs without Python's lock, so that the next group
# is judged meanwhile. Few sizes, so that statements stay prepared.
_ROWS_PER_STATEMENT = (512, 64, 8, 1)
_CACHE = "cache_size=-131072"  # KiB
# Pages (16 MiB): most groups write to pages that others have written to before, so each page goes
# back into the database once for many of them. The default is about one large group; much more
# would be a wait that callers notice.
_CHECKPOINT = "wal_autocheckpoint=4096"
# Column types of what is inserted by COPY, in SQL order.
_PG_TYPES: dict[type, str] = {bytes: "bytea", str: "text"}
_SETTINGS = (
    "synchronous_commit TO on",
    "statement_timeout TO '15s'",
    "lock_timeout TO '5s'",
    "idle_in_transaction_session_timeout TO '15s'",
    "tcp_keepalives_idle TO 2",
    "tcp_keepalives_interval TO 1",
    "tcp_keepalives_count TO 3",
    "tcp_user_timeout TO '4s'",
)
# Not on every system: a statement whose client is gone is ended.
_CONNECTION_CHECK = "client_connection_check_interval TO '1s'"
# Whoever holds the writer's lock is heard every second. A proxy between us and the database may
# hide that the writer's host is gone; its lock must not stay.
_LOCK_SETTING = "idle_session_timeout TO '15s'"
# So long the database may be silent during one statement; all of them are bounded. A proxy that
# stopped forwarding answers keepalives by itself.
PATIENCE_S = 10.0
_POLL_S = 0.1
# Values that no column takes, as the drivers and the database say it.
_UNFIT = (OverflowError, struct.error, UnicodeEncodeError)


class ConstraintViolated(StorageError):
    """The database itself refused a change: Python was about to break an invariant, or to store
    what no column takes."""

    retryable = False


class Backend(Protocol):
    """One connection, one transaction at a time, used from one thread."""

    def acquire(self) -> bool:
        """True if this process is now the only writer."""
        ...

    def confirm(self) -> None:
        """Raises unless this process still is the only writer; after ``acquire``."""
        ...

    def begin(self) -> None: ...

    def commit(self) -> None: ...

    def rollback(self) -> None: ...

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[Row]: ...

    def by_keys(self, select: str, column: str, keys: Iterable[Any]) -> list[Row]: ...

    def insert(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None: ...

    def update(
        self, table: str, changes: Sequence[str], keys: Sequence[str], rows: Sequence[Row]
    ) -> None:
        """Rows are the changed columns' values, then the keys'. A change ``"+name"`` adds."""
        ...

    def upsert(
        self, table: str, columns: Sequence[str], keys: int, rows: Sequence[Row]
    ) -> None: ...

    def close(self) -> None: ...


def open_backend(url: sa.URL) -> Backend:
    """The backend of a URL."""
    if url.get_backend_name() == "sqlite":
        return SqliteBackend(url)
    return PostgresBackend(url)


class SqliteBackend:
    """sqlite3 in WAL mode with synchronous=FULL; the writer's lock is a locked file beside it."""

    def __init__(self, url: sa.URL) -> None:
        # Whatever name it is opened by, there is one lock.
        self._path = sqlite_path(url).resolve()
        self._lock_path = self._path.with_name(f"{self._path.name}.writer")
        self._lock: int | None = None
        with _sqlite_errors():
            self._connection = sqlite3.connect(
                self._path,
                isolation_level=None,
                check_same_thread=False,
                timeout=BUSY_MS / 1000,
                cached_statements=256,
            )
            use_wal(self._connection)
            for pragma in ("synchronous=FULL", _CACHE, _CHECKPOINT):
                self._connection.execute(f"PRAGMA {pragma}")

    def acquire(self) -> bool:
        if self._lock is not None:
            return True
        self._lock = take_lock(self._lock_path)
        return self._lock is not None

    def confirm(self) -> None:
        # The lock belongs to the file, not to its name: another process may have locked a new one.
        try:
            named = self._lock_path.stat()
        except FileNotFoundError:
            raise _deposed() from None
        if self._lock is None or not os.path.samestat(os.fstat(self._lock), named):
            raise _deposed()

    def begin(self) -> None:
        if self._lock is not None:
            self.confirm()  # unlike PostgreSQL's, this lock does not go with the connection
        with _sqlite_errors():
            self._connection.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        with _sqlite_errors():
            self._connection.execute("COMMIT")

    def rollback(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        with _sqlite_errors():
            return self._connection.execute(sql, values).fetchall()

    def by_keys(self, select: str, column: str, keys: Iterable[Any]) -> list[Row]:
        found: list[Row] = []
        wanted = list(keys)
        with _sqlite_errors():
            for start in range(0, len(wanted), _KEYS_PER_QUERY):
                part = wanted[start : start + _KEYS_PER_QUERY]
                # Padded to a few sizes, so that statements stay prepared.
                size = next(s for s in (1, 8, 64, _KEYS_PER_QUERY) if s >= len(part))
                part += [part[-1]] * (size - len(part))
                marks = ",".join("?" * size)
                found += self._connection.execute(f"{select} WHERE {column} IN ({marks})", part)
        return found

    def insert(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        head = f"INSERT INTO {table} ({','.join(columns)}) VALUES "  # noqa: S608
        self._in_bulk(head, "", rows)

    def update(
        self, table: str, changes: Sequence[str], keys: Sequence[str], rows: Sequence[Row]
    ) -> None:
        names = [f"column{n}" for n in range(1, len(changes) + len(keys) + 1)]
        sets = ",".join(
            f"{c[1:]}={table}.{c[1:]}+v.{n}" if c[0] == "+" else f"{c}=v.{n}"
            for c, n in zip(changes, names, strict=False)
        )
        where = " AND ".join(
            f"{table}.{k}=v.{n}" for k, n in zip(keys, names[len(changes) :], strict=True)
        )
        head = f"UPDATE {table} SET {sets} FROM (VALUES "  # noqa: S608
        found = self._in_bulk(head, f") v WHERE {where}", rows)
        _check_count(found, len(rows), table)

    def upsert(self, table: str, columns: Sequence[str], keys: int, rows: Sequence[Row]) -> None:
        head, conflict = _upsert_sql(table, columns, keys)
        self._in_bulk(f"{head} VALUES ", conflict, rows)

    def _in_bulk(self, head: str, tail: str, rows: Sequence[Row]) -> int:
        """How many rows were changed."""
        place = found = 0
        with _sqlite_errors():
            while place < len(rows):
                size = next(s for s in _ROWS_PER_STATEMENT if s <= len(rows) - place)
                marks = f"({','.join('?' * len(rows[0]))})"
                sql = f"{head}{','.join([marks] * size)}{tail}"
                values = list(itertools.chain.from_iterable(rows[place : place + size]))
                found += self._connection.execute(sql, values).rowcount
                place += size
        return found

    def close(self) -> None:
        self.rollback()
        self._connection.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class _Connection(psycopg.Connection[Row]):
    """One that gives up on a database that says nothing for too long."""

    patience_s = PATIENCE_S

    def wait(self, gen: PQGen[T], interval: float = _POLL_S, timeout: float | None = None) -> T:
        try:
            return super().wait(gen, interval, timeout or self.patience_s)
        except psycopg.errors._WaitTimeout:
            # Whatever it still says would be taken for the answer to the next statement.
            self.close()
            raise psycopg.OperationalError("it does not answer") from None


class PostgresBackend:
    """psycopg 3. The advisory lock lives in the same session as the writes: a session that lost
    the lock has lost its connection, so that two processes can never both write."""

    def __init__(self, url: sa.URL) -> None:
        conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
        with _pg_errors():
            self._connection = _Connection.connect(
                conninfo,
                autocommit=True,
                connect_timeout=5,
                application_name="trueweight-ledger",
                # What the operator's URL says comes first.
                **{name: value for name, value in TCP_OPTIONS.items() if name not in url.query},
            )
            self._connection.execute(";".join(f"SET {s}" for s in _SETTINGS).encode())
            with contextlib.suppress(psycopg.errors.InvalidParameterValue):
                self._connection.execute(f"SET {_CONNECTION_CHECK}".encode())

    def acquire(self) -> bool:
        if not self.query("SELECT pg_try_advisory_lock(%s)", (ADVISORY_LOCK,))[0][0]:
            return False
        with _pg_errors():
            self._connection.execute(f"SET {_LOCK_SETTING}".encode())
        return True

    def confirm(self) -> None:
        with _pg_errors():
            # A pooler in between may have given us another session, which has no lock.
            held = self._connection.execute(
                "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() "
                "AND classid = %s AND objid = %s AND objsubid = 1",
                divmod(ADVISORY_LOCK, 1 << 32),
            ).fetchall()
        if not held:
            raise _deposed()

    def begin(self) -> None:
        with _pg_errors():
            self._connection.execute("BEGIN")

    def commit(self) -> None:
        with _pg_errors():
            self._connection.execute("COMMIT")

    def rollback(self) -> None:
        with contextlib.suppress(psycopg.Error):
            self._connection.execute("ROLLBACK")

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        with _pg_errors():
            return self._connection.execute(
                sql.replace("?", "%s").encode(), values, binary=True
            ).fetchall()

    def by_keys(self, select: str, column: str, keys: Iterable[Any]) -> list[Row]:
        wanted = list(keys)
        if not wanted:
            return []
        kind = _array_type(wanted[0])
        sql = f"{select} WHERE {column} = ANY(%s::{kind}[])"
        with _pg_errors():
            return self._connection.execute(sql.encode(), (_array(wanted),), binary=True).fetchall()

    def insert(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        if not rows:
            return
        for place, most in _PG_SMALL.get(table, ()):
            _check_small(table, most, [row[place] for row in rows])
        sql = f"COPY {table} ({','.join(columns)}) FROM STDIN (FORMAT BINARY)"
        with _pg_errors(), self._connection.cursor().copy(sql.encode()) as copy:
            copy.set_types(_PG_COLUMNS[table])
            for row in rows:
                copy.write_row(row)

    def update(
        self, table: str, changes: Sequence[str], keys: Sequence[str], rows: Sequence[Row]
    ) -> None:
        if not rows:
            return
        names = [c.lstrip("+") for c in changes]
        sets = ",".join(
            f"{n}=t.{n}+v.{n}" if c[0] == "+" else f"{n}=v.{n}"
            for n, c in zip(names, changes, strict=True)
        )
        where = " AND ".join(f"t.{k}=v.{k}" for k in keys)
        kinds = [_array_type(value) for value in rows[0]]
        arrays = ",".join(f"%s::{kind}[]" for kind in kinds)
        sql = (
            f"UPDATE {table} t SET {sets} FROM unnest({arrays}) "  # noqa: S608
            f"AS v({','.join([*names, *keys])}) WHERE {where}"
        )
        columns = [_array(column) for column in zip(*rows, strict=True)]
        with _pg_errors():
            cursor = self._connection.execute(sql.encode(), columns)
        _check_count(cursor.rowcount, len(rows), table)

    def upsert(self, table: str, columns: Sequence[str], keys: int, rows: Sequence[Row]) -> None:
        if rows:
            with _pg_errors():
                head, conflict = _upsert_sql(table, columns, keys)
                marks = ",".join(["%s"] * len(columns))
                sql = f"{head} VALUES ({marks}) {conflict}"
                self._connection.cursor().executemany(sql.encode(), rows)

    def close(self) -> None:
        with contextlib.suppress(psycopg.Error):
            self._connection.close()


_PG_COLUMNS: dict[str, list[str]] = {
    "account": ["int8", "text", "int2", "text", "int8", "int8", "int8", "int8"],
    "transfer": [
        "int8", "bytea", "int4", "int8", "int8", "int8", "int2", "bytea", "int2", "int8",
    ],
    "pending": [
        "bytea", "int2", "text", "text", "int8", "int8", "int2", "int8", "text", "text", "int8",
    ],
    "operation": ["bytea", "bytea", "int8", "int8"],
    "leg": [
        "bytea", "bytea", "text", "text", "int8", "int8", "int8", "int8", "int8", "int8", "int8",
        "int8", "int8", "int8", "bytea",
    ],
    "claim": ["bytea", "bytea", "bytea", "bytea", "text", "int8", "int8", "bytea"],
    "reference": ["text", "text", "bytea"],
    "debt": ["bytea", "text", "int8"],
    "bundle": ["int8", "int4", "int8", "int8", "bytea"],
    "evidence": ["bytea", "int8"],
    "verdict": [
        "int8", "text", "text", "bytea", "bytea", "text", "int8", "int8", "int2", "int2", "int8",
    ],
    "margin_commitment": ["int8", "text", "bytea", "int8", "bytea"],
    "audit_step": ["int8", "int2", "text", "int8", "bytea", "bytea"],
    "audit_request": ["int8", "text", "bytea", "text", "int8", "int8", "int8", "int2"],
    "tile": ["int2", "int8", "bytea"],
    "checkpoint": ["int8", "bytea", "text", "int8"],
    "meta": ["text", "text"],
}  # fmt: skip


_SMALL = {"int2": 2**15 - 1, "int4": 2**31 - 1}
# Columns that the driver fills with what is left of a larger number, without a word. Not of tables
# where these are constants of this program: many rows go there.
_PG_SMALL: dict[str, list[tuple[int, int]]] = {
    table: [(place, _SMALL[kind]) for place, kind in enumerate(kinds) if kind in _SMALL]
    for table, kinds in _PG_COLUMNS.items()
    if table not in ("account", "transfer", "pending")
}


def _check_small(table: str, most: int, values: list[int]) -> None:
    if max(values) > most or min(values) < -most:
        raise ConstraintViolated(f"a number is too large for its column of {table}")


def _array_type(value: Any) -> str:
    return _PG_TYPES.get(type(value), "bigint")


def _array(values: Sequence[Any]) -> str | list[Any]:
    """An array parameter. Numbers and ids, of which there are thousands, as one literal: the
    driver would dump them one by one in Python."""
    if isinstance(values[0], int):
        return f"{{{','.join(map(str, values))}}}"
    if isinstance(values[0], bytes):
        return '{"\\\\x' + '","\\\\x'.join(value.hex() for value in values) + '"}'
    return list(values)


def _upsert_sql(table: str, columns: Sequence[str], keys: int) -> tuple[str, str]:
    """What comes before and after the values."""
    sets = ",".join(f"{c}=excluded.{c}" for c in columns[keys:])
    return (
        f"INSERT INTO {table} ({','.join(columns)})",
        f" ON CONFLICT ({','.join(columns[:keys])}) DO UPDATE SET {sets}",
    )


def _deposed() -> Unavailable:
    return Unavailable("the writer's lock is lost", hint="Send the same operations again.")


def _check_count(found: int, expected: int, table: str) -> None:
    if found != expected:
        raise ConstraintViolated(
            f"{found} of {expected} rows of {table} were there to be changed",
            hint="Run ledger fsck.",
        )


@contextlib.contextmanager
def _sqlite_errors() -> Any:
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.DataError, *_UNFIT) as error:
        raise ConstraintViolated(f"the database refused: {error}") from error
    except (sqlite3.Error, OSError) as error:
        raise StorageError(
            f"the database failed: {error}", hint="Is the disk full? Nothing was half done."
        ) from error


@contextlib.contextmanager
def _pg_errors() -> Any:
    try:
        yield
    except (
        psycopg.errors.IntegrityError,
        psycopg.errors.DataError,
        # More than an index takes; the driver counts it among lost connections.
        psycopg.errors.ProgramLimitExceeded,
    ) as error:
        reason = error.diag.message_primary or str(error)
        raise ConstraintViolated(f"the database refused: {reason}") from error
    except _UNFIT as error:
        raise ConstraintViolated(f"the driver refused: {error}") from error
    except (psycopg.errors.DiskFull, psycopg.errors.OutOfMemory) as error:
        # The driver counts them among lost connections.
        raise StorageError(
            f"the database failed: {error.diag.message_primary}",
            hint="Is the disk full? Nothing was half done.",
        ) from error
    except psycopg.OperationalError as error:
        raise Unavailable(
            f"the database is not reachable: {str(error).partition(chr(10))[0]}",
            hint="Send the same operations again.",
        ) from error
    except psycopg.Error as error:
        raise StorageError(
            f"the database failed: {str(error).partition(chr(10))[0]}",
            hint="Nothing was half done.",
        ) from error
