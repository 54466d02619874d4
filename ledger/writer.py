"""The one writer thread: a bounded queue in, groups judged and sent off to be committed.

While one group is being committed callers queue up and form the next, so that the size of a
group follows the load without a timer. The thread also keeps the writer's lock, expires holds
and signs checkpoints.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from trueweight.ledger.backend import Backend
from trueweight.ledger.books import Books
from trueweight.ledger.pipeline import Call, Hooks, KeysChanged, Pipeline
from trueweight.ledger.values import Terms
from trueweight.protos.errors import OverCapacity, TrueweightError, Unavailable
from trueweight.protos.identity import Signer

log = logging.getLogger(__name__)

# A caller may hold as much of the queue as he leaves free: one alone half of it, two a third each,
# and whoever comes new always finds room.
MAX_QUEUED = 16_384
# While a group is in flight the next is judged early only if it is a full one: every group has its
# price in statements, so small ones had better grow.
MAX_GROUP = 512
STANDBY_POLL_S = 0.2
HOUSEKEEPING_MS = 1_000.0
# Of which so much at most goes to expiring holds, so that nobody waits for a heap of them.
EXPIRE_BUDGET_MS = 300.0
_RETRY_S = 0.5


class Writer:
    """Start it, submit calls, stop it."""

    def __init__(self, terms: Terms, signer: Signer | None, hooks: Hooks) -> None:
        self._terms, self._signer, self._hooks = terms, signer, hooks
        self._queue: deque[Call] = deque()
        self._queued = 0
        self._queued_by: dict[str, int] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._active = False
        self._term = 0
        self._housekept_ms = 0.0
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)

    @property
    def is_active(self) -> bool:
        """True while this process holds the writer's lock."""
        return self._active

    def start(self) -> None:
        self._thread.start()

    @property
    def term(self) -> int:
        """Which of the times that this process is the writer it is now. Raises Unavailable if
        another writes."""
        self._check_active()
        return self._term

    def submit(self, call: Call) -> None:
        """Queues a call. Raises OverCapacity, or Unavailable if another process writes."""
        with self._wake:
            self._check_active()
            size = call.size
            own = self._queued_by.get(call.payer, 0) + size
            if own > MAX_QUEUED - self._queued:
                raise OverCapacity(
                    "the ledger's queue is full, or this caller's part of it",
                    hint="Send the same operations again later.",
                )
            self._queue.append(call)
            self._queued += size
            self._queued_by[call.payer] = own
            self._wake.notify()

    def _check_active(self) -> None:
        if self._stopping or not self._active:
            raise Unavailable(
                "this ledger is not the writer now", hint="Try again; a standby takes over."
            )

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
            reader: Backend | None = None
            try:
                backend = self._hooks.open_backend()
                if backend.acquire():
                    reader = self._hooks.open_backend()
                    self._write(backend, reader)
                else:
                    self._hooks.stands_by()
                    self._pause(STANDBY_POLL_S)
            except TrueweightError as error:
                log.warning("the writer starts over: %s", error)
                self._pause(_RETRY_S)
            except Exception:
                log.exception("the writer starts over after a bug")
                self._pause(_RETRY_S)
            finally:
                self._fail_queued()
                for opened in (backend, reader):
                    if opened is not None:
                        opened.close()

    def _write(self, backend: Backend, reader: Backend) -> None:
        books = Books(backend, self._terms, self._signer, reader)
        books.open()
        self._hooks.became_writer()
        self._hooks.committed(books.size, ())
        self._term += 1
        self._active = True
        log.info("writing the books")
        with ThreadPoolExecutor(1, thread_name_prefix="ledger-commit") as committer:
            pipeline = Pipeline(books, self._hooks, committer, self._nudge)
            try:
                self._serve(books, pipeline)
            finally:
                pipeline.abandon()

    def _serve(self, books: Books, pipeline: Pipeline) -> None:
        while True:
            calls = self._take(pipeline, busy=books.has_chores)
            if calls:
                self._submit(pipeline, calls)
            else:
                pipeline.land()
                if self._stopping and not self._queue:
                    books.checkpoint(self._hooks.now_unix_ms())
                    return
            if books.has_chores:
                # A little between any two groups, so that neither waits long for the other.
                pipeline.land()
                self._do_chore(books)
            if self._hooks.monotonic_ms() - self._housekept_ms >= HOUSEKEEPING_MS:
                pipeline.land()
                books.confirm()
                self._keep_house(books)

    def _submit(self, pipeline: Pipeline, calls: list[Call]) -> None:
        """Sends a group off, but for calls that were prepared before a key was revoked: a signature
        counts by the keys of its own place in the log."""
        now = self._hooks.revocations()
        fresh = [call for call in calls if call.revocations == now]
        if len(fresh) < len(calls):
            error = KeysChanged("a key was revoked meanwhile", hint="Send the same again.")
            self._hooks.deliver([(call, error) for call in calls if call.revocations != now])
        if fresh:
            pipeline.submit(fresh)
            if fresh[-1].has_key_event:
                pipeline.land()

    def _take(self, pipeline: Pipeline, *, busy: bool) -> list[Call]:
        """The next group; empty when the one in flight has landed and nothing waits, or when there
        is something else to do."""
        with self._wake:
            if not busy:
                self._wake.wait_for(lambda: self._has_work(pipeline), HOUSEKEEPING_MS / 4000)
            taken: list[Call] = []
            count = 0
            while self._queue and (not taken or count + self._queue[0].size <= MAX_GROUP):
                call = self._pop()
                if call.answer.done():
                    continue  # the caller gave up, and was told nothing
                count += call.size
                taken.append(call)
                if call.has_key_event:
                    break
        return taken

    def _pop(self) -> Call:
        call = self._queue.popleft()
        size = call.size
        self._queued -= size
        left = self._queued_by[call.payer] - size
        if left:
            self._queued_by[call.payer] = left
        else:
            del self._queued_by[call.payer]
        return call

    def _has_work(self, pipeline: Pipeline) -> bool:
        if self._stopping or pipeline.has_landed:
            return True
        return self._queued >= (MAX_GROUP if pipeline.is_flying else 1)

    def _nudge(self) -> None:
        with self._wake:
            self._wake.notify()

    def _keep_house(self, books: Books) -> None:
        """With nothing in flight."""
        started = self._housekept_ms = self._hooks.monotonic_ms()
        while books.has_due_holds(self._hooks.now_unix_ms()):
            done = books.apply([[self._hooks.expire()]], self._hooks.now_unix_ms())
            self._hooks.committed(books.size, done.leaves)
            refused = done.outcomes[0][0].error
            if refused or self._hooks.monotonic_ms() - started >= EXPIRE_BUDGET_MS:
                break
        books.checkpoint(self._hooks.now_unix_ms())

    def _do_chore(self, books: Books) -> None:
        done = books.chore(self._hooks.new_id(), self._hooks.now_unix_ms())
        if done is not None:
            self._hooks.committed(books.size, done.leaves)

    def _pause(self, seconds: float) -> None:
        with self._wake:
            if not self._stopping:
                self._wake.wait(seconds)

    def _fail_queued(self) -> None:
        with self._wake:
            self._active = False
            failed = list(self._queue)
            self._queue.clear()
            self._queued_by.clear()
            self._queued = 0
        if failed:
            error = Unavailable("the ledger lost its database", hint="Send the same ids again.")
            self._hooks.deliver([(call, error) for call in failed])
