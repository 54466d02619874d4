"""Reads that end in time: what nobody waits for any more must not keep a thread and a connection.

A deadline belongs to the thread that reads. The database itself stops a statement that is still
running then: PostgreSQL by its statement timeout, SQLite by a progress handler.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import threading
import time
from collections.abc import Iterator
from typing import cast

import psycopg
import sqlalchemy as sa

from trueweight.protos.errors import DeadlineExceeded

# Instructions of SQLite's machine, some milliseconds: the handler needs Python's lock.
_STEPS = 100_000
# So much later a statement may end that is not the first of its transaction.
_SLACK_S = 0.5
_thread = threading.local()


@contextlib.contextmanager
def ends_by(at_s: float) -> Iterator[None]:
    """What this thread reads inside ends by a moment of ``time.monotonic()``."""
    before = _at()
    _thread.at = at_s
    try:
        yield
    finally:
        _thread.at = before


def left_s() -> float | None:
    """Seconds that this thread may still read; None: as long as it takes. Raises
    DeadlineExceeded when there are none."""
    at = _at()
    if at is None:
        return None
    left = at - time.monotonic()
    if left <= 0:
        raise too_late()
    return left


def too_late() -> DeadlineExceeded:
    """The error of a read that took too long."""
    return DeadlineExceeded("the database did not answer in time", hint="Ask again, or for less.")


@contextlib.contextmanager
def bound(connection: sa.Connection) -> Iterator[None]:
    """Statements of a connection end by this thread's deadline. Raises DeadlineExceeded."""
    left = left_s()
    if left is None:
        yield
        return
    if connection.dialect.name == "sqlite":
        with bound_sqlite(cast("sqlite3.Connection", connection.connection.driver_connection)):
            yield
        return
    _set_timeout(connection, left)
    try:
        yield
    except sa.exc.DBAPIError as error:
        if isinstance(error.orig, psycopg.errors.QueryCanceled):
            raise too_late() from error
        raise


def _set_timeout(connection: sa.Connection, left: float) -> None:
    """A round trip of its own, so not for every statement of a question."""
    now = time.monotonic()
    known = getattr(_thread, "timeout", None)
    if known is not None and known[:2] == (connection, _at()) and now - known[2] < _SLACK_S:
        return
    # For the transaction only: the connection goes back to the pool as it was.
    connection.exec_driver_sql(f"SET LOCAL statement_timeout = {math.ceil(left * 1000)}")
    _thread.timeout = (connection, _at(), now)


@contextlib.contextmanager
def bound_sqlite(connection: sqlite3.Connection) -> Iterator[None]:
    """The same for a connection of SQLite's own driver."""
    at = _at()
    if left_s() is None or at is None:
        yield
        return
    connection.set_progress_handler(lambda: time.monotonic() > at, _STEPS)
    try:
        yield
    except (sqlite3.OperationalError, sa.exc.OperationalError) as error:
        cause = error.orig if isinstance(error, sa.exc.OperationalError) else error
        if getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
            raise too_late() from error
        raise
    finally:
        connection.set_progress_handler(None, 0)


def _at() -> float | None:
    found: float | None = getattr(_thread, "at", None)
    return found
