"""The database: where it is, and bringing its schema up to date at start."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from trueweight.protos.errors import InvalidRequest, StorageError

_MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_MS = 5_000
# For PostgreSQL: a dead peer, or a network that swallows everything, is noticed after 5 s.
TCP_OPTIONS: dict[str, Any] = {
    "keepalives": 1,
    "keepalives_idle": 2,
    "keepalives_interval": 1,
    "keepalives_count": 3,
    "tcp_user_timeout": 4000,
}
_BUSY_STEP_S = 0.02
MIGRATION_LOCK = 0x7472756578
# After the lock is ours a new snapshot must show what was committed meanwhile.
_MIGRATION: dict[str, dict[str, str]] = {
    "sqlite": {},
    "postgresql": {"isolation_level": "READ COMMITTED"},
}


def normal_url(url: str) -> sa.URL:
    """A database URL with the driver that is used here. A bare path means SQLite."""
    if "://" not in url:
        url = f"sqlite:///{url}"
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise InvalidRequest(
            "not a database URL", hint="Write sqlite:///books.db or postgresql://…"
        ) from None
    backend = parsed.get_backend_name()
    if backend == "sqlite" and parsed.database:
        return parsed.set(drivername="sqlite")
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    raise InvalidRequest(
        f"{backend} is not supported", hint="Use SQLite (a file) or PostgreSQL 15 or later."
    )


def sqlite_path(url: sa.URL) -> Path:
    """The file of a SQLite URL."""
    return Path(str(url.database))


def make_engine(url: sa.URL) -> sa.Engine:
    """A small pool for migrations and reads."""
    if url.get_backend_name() == "sqlite":
        engine = sa.create_engine(url, pool_size=4, connect_args={"timeout": BUSY_MS / 1000})
        sa.event.listen(engine, "connect", _sqlite_reader)
        return engine
    return sa.create_engine(
        url,
        pool_size=4,
        pool_pre_ping=True,
        pool_timeout=10,
        isolation_level="REPEATABLE READ",
        connect_args={"connect_timeout": 5, **TCP_OPTIONS},
    )


def migrate(engine: sa.Engine) -> None:
    """Applies missing migrations, in one transaction."""
    if engine.dialect.name == "sqlite":
        path = sqlite_path(engine.url)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Balances are nobody else's; SQLite gives its side files the mode of the database.
        path.touch(mode=0o600)
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    try:
        # Two processes may start at once: the second waits, then sees what the first did.
        with engine.execution_options(**_MIGRATION[engine.dialect.name]).begin() as connection:
            if engine.dialect.name == "sqlite":
                # The driver opens no transaction for DDL, and each statement would be synced.
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except sa.exc.OperationalError as error:
        raise StorageError(f"the database cannot be opened: {_first_line(error)}") from error


def is_current(engine: sa.Engine) -> bool:
    """True if the schema is the one this program was written for."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    head = ScriptDirectory.from_config(config).get_current_head()
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision() == head


def use_wal(connection: sqlite3.Connection) -> None:
    """Puts the database into WAL mode. SQLite's own busy timeout does not cover the switch, so that
    of two processes that start at once on an empty database one would be told it is locked."""
    deadline = time.monotonic() + BUSY_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            locked = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
            if not locked or time.monotonic() > deadline:
                raise
            time.sleep(_BUSY_STEP_S)


def _sqlite_reader(connection: sqlite3.Connection, _: object) -> None:
    use_wal(connection)
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute(f"PRAGMA busy_timeout={BUSY_MS}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
