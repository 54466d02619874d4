"""The one writer thread: a bounded queue in, groups committed, answers out.

While one group is being committed callers queue up and form the next, so that the size of a
group follows the load without a timer. The thread also keeps the writer's lock, expires holds
and signs checkpoints.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trueweight.ledger.backend import Backend
from trueweight.ledger.books import Books, Committed
from trueweight.ledger.core import Outcome
from trueweight.ledger.values import Leaf, Prepared, Terms
from trueweight.protos.errors import OverCapacity, StorageError, TrueweightError, Unavailable
from trueweight.protos.identity import Signer

log = logging.getLogger(__name__)

MAX_QUEUED = 16_384
MAX_GROUP = 1_024
STANDBY_POLL_S = 0.2
HOUSEKEEPING_MS = 1_000.0
_RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class Call:
    """Operations of one caller and where the answer goes."""

    operations: Sequence[Prepared]
    answer: Any


Answer = tuple[Call, "list[Outcome] | TrueweightError"]


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the service gives the writer. ``deliver`` and ``committed`` run on the writer thread."""

    open_backend: Callable[[], Backend]
    now_unix_ms: Callable[[], int]
    monotonic_ms: Callable[[], float]
    expire: Callable[[], Prepared]
    deliver: Callable[[list[Answer]], None]
    committed: Callable[[int, tuple[Leaf, ...]], None]
    became_writer: Callable[[], None]


class Writer:
    """Start it, submit calls, stop it."""

    def __init__(self, terms: Terms, signer: Signer | None, hooks: Hooks) -> None:
        self._terms, self._signer, self._hooks = terms, signer, hooks
        self._queue: deque[Call] = deque()
        self._queued = 0
        self._wake = threading.Condition()
        self._stopping = False
        self._active = False
        self._housekept_ms = 0.0
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)

    @property
    def is_active(self) -> bool:
        """True while this process holds the writer's lock."""
        return self._active

    def start(self) -> None:
        self._thread.start()

    def submit(self, call: Call) -> None:
        """Queues a call. Raises OverCapacity, or Unavailable if another process writes."""
        with self._wake:
            if self._stopping or not self._active:
                raise Unavailable(
                    "this ledger is not the writer now", hint="Try again; a standby takes over."
                )
            if self._queued + len(call.operations) > MAX_QUEUED:
                raise OverCapacity(
                    "the ledger's queue is full", hint="Send the same operations again later."
                )
            self._queue.append(call)
            self._queued += len(call.operations)
            self._wake.notify()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Commits what is queued, then ends. Safe to call twice."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            backend: Backend | None = None
            try:
                backend = self._hooks.open_backend()
                if backend.acquire():
                    self._write(backend)
                else:
                    self._pause(STANDBY_POLL_S)
            except TrueweightError as error:
                log.warning("the writer starts over: %s", error)
                self._pause(_RETRY_S)
            except Exception:
                log.exception("the writer starts over after a bug")
                self._pause(_RETRY_S)
            finally:
                self._fail_queued()
                if backend is not None:
                    backend.close()

    def _write(self, backend: Backend) -> None:
        books = Books(backend, self._terms, self._signer)
        books.open()
        self._hooks.became_writer()
        self._hooks.committed(books.size, ())
        self._active = True
        log.info("writing the books")
        while True:
            calls = self._take()
            if calls:
                self._commit(books, calls)
            elif self._stopping:
                self._checkpoint(books)
                return
            self._keep_house(books)

    def _take(self) -> list[Call]:
        with self._wake:
            if not self._queue and not self._stopping:
                self._wake.wait(HOUSEKEEPING_MS / 4000)
            taken: list[Call] = []
            count = 0
            while self._queue and (
                not taken or count + len(self._queue[0].operations) <= MAX_GROUP
            ):
                call = self._queue.popleft()
                count += len(call.operations)
                taken.append(call)
            self._queued -= count
        return taken

    def _commit(self, books: Books, calls: list[Call]) -> None:
        try:
            done: Committed = books.apply(
                [call.operations for call in calls], self._hooks.now_unix_ms()
            )
        except TrueweightError as error:
            # Nothing was applied, or nobody knows (a lost connection): either way the callers
            # send the same ids again.
            self._hooks.deliver([(call, error) for call in calls])
            raise
        except Exception:
            failure = StorageError("the ledger failed; nothing was applied")
            self._hooks.deliver([(call, failure) for call in calls])
            raise
        self._hooks.committed(books.size, done.leaves)
        self._hooks.deliver(list(zip(calls, done.outcomes, strict=True)))

    def _keep_house(self, books: Books) -> None:
        now = self._hooks.monotonic_ms()
        if now - self._housekept_ms < HOUSEKEEPING_MS:
            return
        self._housekept_ms = now
        if books.has_due_holds(self._hooks.now_unix_ms()):
            done = books.apply([[self._hooks.expire()]], self._hooks.now_unix_ms())
            self._hooks.committed(books.size, done.leaves)
        self._checkpoint(books)

    def _checkpoint(self, books: Books) -> None:
        books.checkpoint(self._hooks.now_unix_ms())

    def _pause(self, seconds: float) -> None:
        with self._wake:
            if not self._stopping:
                self._wake.wait(seconds)

    def _fail_queued(self) -> None:
        with self._wake:
            self._active = False
            failed = list(self._queue)
            self._queue.clear()
            self._queued = 0
        if failed:
            error = Unavailable("the ledger lost its database", hint="Send the same ids again.")
            self._hooks.deliver([(call, error) for call in failed])
