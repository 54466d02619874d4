"""One group is judged while the one before it is committed: Python and the disk work side by side.

An answer still leaves only after its own group's commit. If a commit fails, what was judged on top
of it is void: it is judged again, or fails with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trueweight.ledger.backend import Backend, ConstraintViolated
from trueweight.ledger.books import Books, Committed, Judged
from trueweight.ledger.core import Outcome
from trueweight.ledger.values import Leaf, Prepared
from trueweight.protos.errors import StorageError, TrueweightError, Unavailable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """Operations of one caller and where the answer goes."""

    operations: Sequence[Prepared]
    answer: Any
    # Whose part of the queue it takes; all who are no members of the market share one.
    payer: str = ""
    # Of the court that its operations were prepared by (``Court.revocations``).
    revocations: int = 0
    # What comes after it is judged by other keys: it ends its group.
    has_key_event: bool = False
    # What it takes of the queue, in operations; 0: as many as it has.
    weight: int = 0

    @property
    def size(self) -> int:
        return self.weight or len(self.operations)


class KeysChanged(Unavailable):
    """A key was revoked after the operations were prepared: nothing was applied."""


Answer = tuple[Call, "list[Outcome] | TrueweightError"]


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the service gives the writer. ``deliver`` and ``committed`` run on the writer's threads,
    never on two at once."""

    open_backend: Callable[[], Backend]
    now_unix_ms: Callable[[], int]
    monotonic_ms: Callable[[], float]
    expire: Callable[[], Prepared]
    new_id: Callable[[], bytes]
    deliver: Callable[[list[Answer]], None]
    committed: Callable[[int, tuple[Leaf, ...]], None]
    became_writer: Callable[[], None]
    # Another process writes; called a few times a second.
    stands_by: Callable[[], None]
    # Of the court as of the last commit.
    revocations: Callable[[], int]


class Pipeline:
    """Belongs to the writer thread; ``committer`` is one other thread."""

    def __init__(
        self,
        books: Books,
        hooks: Hooks,
        committer: Executor,
        landed: Callable[[], None],
    ) -> None:
        self._books, self._hooks = books, hooks
        self._committer, self._landed = committer, landed
        self._flying: tuple[list[Call], Future[None]] | None = None

    @property
    def is_flying(self) -> bool:
        """True if a group was sent off and not waited for yet."""
        return self._flying is not None

    @property
    def has_landed(self) -> bool:
        """True if a group that was sent off has come to its end, good or bad."""
        return self._flying is not None and self._flying[1].done()

    def submit(self, calls: list[Call]) -> None:
        """Judges a group, waits for the one in flight and sends this one off. Every call gets its
        answer. Raises if the writer must start over."""
        with self._answered(calls):
            judged = self._judge(calls)
            if not self.land() or judged is None:
                # The ground has changed, or they read more than their keys, or what one of them
                # reads by the database refuses.
                self._apply(calls, self._books.apply)
                return
        flying = self._committer.submit(self._commit, calls, judged)
        self._flying = (calls, flying)
        flying.add_done_callback(lambda _: self._landed())

    def land(self) -> bool:
        """Waits for the group in flight. False if the database refused it and it was applied one
        by one instead. Raises if the writer must start over."""
        if self._flying is None:
            return True
        (calls, flying), self._flying = self._flying, None
        try:
            flying.result()
        except ConstraintViolated:
            log.exception("the database refused a group; applying it one by one")
            with self._answered(calls):
                self._books.forget()
                self._apply(calls, self._books.one_by_one)
            return False
        return True

    def abandon(self) -> None:
        """After a failure: the callers of a group that will not be judged again hear of it."""
        if self._flying is None:
            return
        (calls, flying), self._flying = self._flying, None
        if isinstance(flying.exception(), ConstraintViolated):
            self._fail(calls, Unavailable("the ledger starts over", hint="Send the same again."))

    @contextmanager
    def _answered(self, calls: list[Call], but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
        """Whatever fails inside (``but`` for one kind), these callers hear of it: nothing was
        applied, or nobody knows (a lost connection); either way they send the same ids again."""
        try:
            yield
        except but:
            raise
        except TrueweightError as error:
            self._fail(calls, error)
            raise
        except Exception:
            self._fail(calls, StorageError("the ledger failed; nothing was applied"))
            raise

    def _judge(self, calls: list[Call]) -> Judged | None:
        """None if they must be applied by ``apply``, which finds the guilty one if there is one."""
        try:
            return self._books.judge([call.operations for call in calls], self._hooks.now_unix_ms())
        except ConstraintViolated:
            log.exception("the database refused what a group asks for")
            return None

    def _commit(self, calls: list[Call], judged: Judged) -> None:
        # What the database refuses is applied one by one, and answered then.
        with self._answered(calls, but=ConstraintViolated):
            if not judged.book.applied:
                self._books.confirm()  # nothing is committed, which would have found out
            done = self._books.commit(judged)
        self._answer(calls, done)

    def _apply(
        self,
        calls: list[Call],
        apply: Callable[[Sequence[Sequence[Prepared]], int], Committed],
    ) -> None:
        done = apply([call.operations for call in calls], self._hooks.now_unix_ms())
        self._answer(calls, done)

    def _answer(self, calls: list[Call], done: Committed) -> None:
        self._hooks.committed(self._books.size, done.leaves)
        self._hooks.deliver(list(zip(calls, done.outcomes, strict=True)))

    def _fail(self, calls: list[Call], error: TrueweightError) -> None:
        self._hooks.deliver([(call, error) for call in calls])
