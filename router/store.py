"""The router's own SQLite: one writer with group commit, full durability, bounded queues.

Holds API keys (hashed), the journal of captures, what clients may read back, and transcripts
(encrypted). Nothing here is needed to check the books: those are the ledger's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    create_engine,
    event,
)
from sqlalchemy.exc import SQLAlchemyError

from trueweight.protos.errors import OverCapacity, StorageError

T = TypeVar("T")
_MAX_QUEUED_WRITES = 8192
_MAX_WRITES_PER_COMMIT = 256
_BUSY_MS = 10_000

metadata = MetaData()

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", String(32), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("account", String(128), nullable=False),
    Column("secret_sha256", LargeBinary(32), nullable=False),
    Column("created_unix_ms", BigInteger, nullable=False),
    Column("revoked_unix_ms", BigInteger),
)

# Bills on their way to the ledger. state: 0 to be captured, 1 captured, 2 refused.
captures = Table(
    "captures",
    metadata,
    Column("bill_id", LargeBinary(16), primary_key=True),
    Column("request_id", LargeBinary(16), nullable=False),
    Column("operation", LargeBinary, nullable=False),
    Column("state", Integer, nullable=False),
    Column("detail", String(500), nullable=False, default=""),
    Column("created_unix_ms", BigInteger, nullable=False),
)
Index("captures_by_state", captures.c.state)
Index("captures_by_request", captures.c.request_id)
Index("captures_by_age", captures.c.created_unix_ms)

# What a client may read back about a request: a JSON document without salts or text.
requests = Table(
    "requests",
    metadata,
    Column("request_id", LargeBinary(16), primary_key=True),
    Column("account", String(128), nullable=False),
    Column("document", LargeBinary, nullable=False),
    Column("created_unix_ms", BigInteger, nullable=False),
)
Index("requests_by_age", requests.c.created_unix_ms)

transcripts = Table(
    "transcripts",
    metadata,
    Column("receipt_digest", LargeBinary(32), primary_key=True),
    Column("request_id", LargeBinary(16), nullable=False),
    Column("nonce", LargeBinary(12), nullable=False),
    Column("ciphertext", LargeBinary, nullable=False),
    Column("created_unix_ms", BigInteger, nullable=False),
)
Index("transcripts_by_request", transcripts.c.request_id)
Index("transcripts_by_age", transcripts.c.created_unix_ms)

# One data key per transcript, wrapped by the master key. Destroying the row erases the text.
data_keys = Table(
    "data_keys",
    metadata,
    Column("receipt_digest", LargeBinary(32), primary_key=True),
    Column("wrapped", LargeBinary, nullable=False),
)


@dataclass
class _Write(Generic[T]):
    work: Callable[[Connection], T]
    done: asyncio.Future[T]
    erases: bool = False


class Store:
    """``write`` returns after the commit reached the disk; concurrent writes share commits.

    Works may run twice (a failed group is repeated one by one), so they must only touch the
    connection. Errors: StorageError, OverCapacity.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 10})
        event.listen(self._engine, "connect", _configure)
        try:
            metadata.create_all(self._engine)
        except SQLAlchemyError as error:
            raise StorageError(f"cannot open {path}: {type(error).__name__}") from error
        path.chmod(0o600)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="router-store-write")
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="router-store-read")
        self._queue: deque[_Write[Any]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Runs ``work`` in a transaction and returns its result once it is durable."""
        return await self._enqueue(work)

    async def erase(self, work: Callable[[Connection], T]) -> T:
        """The same for a ``work`` that destroys something: what the write-ahead log still has of
        it is gone, too."""
        return await self._enqueue(work, erases=True)

    async def _enqueue(self, work: Callable[[Connection], T], *, erases: bool = False) -> T:
        if len(self._queue) >= _MAX_QUEUED_WRITES:
            raise OverCapacity("the router's journal is behind", hint="Try again later.")
        item: _Write[T] = _Write(work, asyncio.get_running_loop().create_future(), erases)
        self._queue.append(item)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        return await item.done

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Runs ``work`` on a reading connection."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, self.read_now, work)

    def read_now(self, work: Callable[[Connection], T]) -> T:
        """The same, in the calling thread; for commands."""
        try:
            with self._engine.connect() as connection:
                return work(connection)
        except SQLAlchemyError as error:
            raise StorageError(f"reading failed: {type(error).__name__}") from error

    def write_now(self, work: Callable[[Connection], T]) -> T:
        """One transaction in the calling thread; for commands."""
        try:
            with self._engine.begin() as connection:
                return work(connection)
        except SQLAlchemyError as error:
            raise StorageError(f"writing failed: {type(error).__name__}") from error

    async def close(self) -> None:
        """Waits for queued writes, then closes."""
        if self._task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._writer.shutdown(wait=True)
        self._readers.shutdown(wait=True)
        self._engine.dispose()

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            count = min(len(self._queue), _MAX_WRITES_PER_COMMIT)
            group = [self._queue.popleft() for _ in range(count)]
            outcomes = await loop.run_in_executor(self._writer, self._commit, group)
            for item, outcome in zip(group, outcomes, strict=True):
                if item.done.done():
                    continue
                if isinstance(outcome, BaseException):
                    item.done.set_exception(outcome)
                else:
                    item.done.set_result(outcome)

    def _commit(self, group: list[_Write[Any]]) -> list[Any]:
        try:
            outcomes = self.write_now(lambda c: [item.work(c) for item in group])
        # Whatever went wrong belongs to one of them: find out which.
        except Exception:  # noqa: BLE001
            outcomes = [self._commit_one(item) for item in group]
        if not any(item.erases for item in group):
            return outcomes
        try:
            self._empty_log()
        except StorageError as error:
            return [error if item.erases else o for item, o in zip(group, outcomes, strict=True)]
        return outcomes

    def _empty_log(self) -> None:
        """Moves the write-ahead log into the database and cuts it off. Raises StorageError."""
        try:
            with self._engine.connect() as connection:
                is_busy = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").scalar()
        except SQLAlchemyError as error:
            raise StorageError(f"writing failed: {type(error).__name__}") from error
        if is_busy:
            raise StorageError(
                "what was erased may still be in the write-ahead log: a reader keeps it",
                hint="Erase it again.",
            )

    def _commit_one(self, item: _Write[Any]) -> Any:
        try:
            return self.write_now(item.work)
        except Exception as error:  # noqa: BLE001  (handed to the caller)
            return error


def _configure(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        f"busy_timeout={_BUSY_MS}",
        # Erased keys must not stay readable in free pages.
        "secure_delete=ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
