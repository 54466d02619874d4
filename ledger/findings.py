"""What a check of the books finds, and how its two halves read a database."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

log = logging.getLogger(__name__)
MAX_FINDINGS = 100
_STEP = 5_000
_numbers = itertools.count()
Progress = Callable[[str, int, int], None]
# What becomes of a check that meets a value which no ledger writes, such as a text for a number.
NONSENSE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# SQLite has no error of its own for what a row holds.
_SQLITE_NONSENSE = ("integer overflow", "Could not decode to UTF-8")


@dataclass
class Findings:
    """What is wrong, bounded; and what was looked at."""

    problems: list[str] = field(default_factory=list)
    more: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, problem: str) -> None:
        """Notes a problem."""
        if len(self.problems) < MAX_FINDINGS:
            self.problems.append(problem)
        else:
            self.more += 1

    def include(self, other: Findings) -> None:
        """Adds what another part of the check has found."""
        for problem in other.problems:
            self.add(problem)
        self.more += other.more
        self.counts |= other.counts

    @property
    def clean(self) -> bool:
        return not self.problems


class Tally:
    """Whether two streams have the same rows, in whatever order, without keeping any: the sum of
    their hashes, under a key that nobody who writes rows can know."""

    def __init__(self) -> None:
        self.key = os.urandom(16)
        self.sum = 0

    def add(self, row: bytes) -> None:
        """A row of the first stream."""
        self.sum += hash(self.key + row)

    def take(self, row: bytes) -> None:
        """A row of the second."""
        self.sum -= hash(self.key + row)


@contextmanager
def to_the_end(findings: Findings, what: str) -> Iterator[None]:
    """A check that ends early because of what some row holds has found something. Whoever changes
    a database may put anything into it (into SQLite, a text for a number too)."""
    try:
        yield
    except NONSENSE as error:
        _cut_short(findings, what, f"{type(error).__name__}: {error}")
    except sa.exc.DBAPIError as error:
        if not _is_about_a_row(error):
            raise
        _cut_short(findings, what, str(error.orig).partition("\n")[0])


def _cut_short(findings: Findings, what: str, why: str) -> None:
    log.debug("a check of %s ended early", what, exc_info=True)
    findings.add(f"{what} hold something that no ledger writes, and are not checked further: {why}")


def _is_about_a_row(error: sa.exc.DBAPIError) -> bool:
    text = str(error.orig)
    return isinstance(error, sa.exc.DataError) or any(said in text for said in _SQLITE_NONSENSE)


def snapshot(engine: sa.Engine) -> sa.Connection:
    """A connection that sees one moment, however long the reading takes."""
    connection = engine.connect()
    if engine.dialect.name == "sqlite":
        # Its driver opens no transaction to read; PostgreSQL's has the isolation for it.
        connection.exec_driver_sql("BEGIN")
    return connection


def stream(connection: sa.Connection, sql: str) -> Iterator[tuple[Any, ...]]:
    """Rows of a query of any size, as tuples from the driver itself: SQLAlchemy's rows would cost
    more than all that is done with millions of them. Binary values are bytes."""
    with _driver_errors(connection, sql), closing(_cursor(connection)) as cursor:
        cursor.execute(sql)
        while part := cursor.fetchmany(_STEP):
            yield from part


def _cursor(connection: sa.Connection) -> Any:
    """One that leaves at the server what was not asked for."""
    driver: Any = connection.connection.driver_connection
    if connection.dialect.name == "sqlite":
        return driver.cursor()
    return driver.cursor(name=f"fsck_{next(_numbers)}", binary=True)


@contextmanager
def _driver_errors(connection: sa.Connection, sql: str) -> Iterator[None]:
    """The driver's errors as SQLAlchemy's, like those of all other queries."""
    base = connection.dialect.loaded_dbapi.Error
    try:
        yield
    except base as error:
        raise sa.exc.DBAPIError.instance(
            sql, None, error, base, dialect=connection.dialect
        ) from error


def count(connection: sa.Connection, sql: str) -> int:
    """What a query counts."""
    return int(connection.execute(sa.text(sql)).scalar_one())


def exact(number: Any) -> int:
    """What a query adds up. Raises ValueError for what cannot be a sum of integers."""
    if isinstance(number, float):
        raise ValueError(f"{number} is no integer")
    return int(number)


def kept_rows(
    connection: sa.Connection, table: str, columns: Sequence[str]
) -> Iterator[tuple[Any, ...]]:
    """What is kept of leaves, in their order."""
    sql = f"SELECT {', '.join(columns)} FROM {table} ORDER BY log_index"  # noqa: S608
    return stream(connection, sql)
