"""The books in one database: applies groups of operations, each group in one transaction.

``apply`` does one group at a time. ``judge`` and ``commit`` do the same in two steps, so that one
thread judges the next group while another commits the last one: ``judge`` reads the database on a
connection of its own, and what the group in flight has changed out of that group's book. Everything
remembered between groups can be read again from the database, and is after any failure.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from trueweight.ledger import bundle, restitution
from trueweight.ledger.backend import Backend, ConstraintViolated
from trueweight.ledger.book import Book
from trueweight.ledger.core import Outcome, chains, run, stands_alone
from trueweight.ledger.load import Cache, Numbers, load, open_restitutions
from trueweight.ledger.prepare import SYSTEM
from trueweight.ledger.save import remember, save
from trueweight.ledger.tiles import Edge, TileReader
from trueweight.ledger.values import Leaf, Prepared, Terms
from trueweight.protos.checkpoint import LogState, log_origin, sign_note
from trueweight.protos.errors import StorageError, TrueweightError
from trueweight.protos.identity import Signer
from trueweight.protos.merkle import leaf_hash, leaf_hashes_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Committed:
    """What one transaction did: outcomes per call, and the leaves others wait for."""

    outcomes: list[list[Outcome]]
    leaves: tuple[Leaf, ...] = ()
    first_index: int = 0


@dataclass(frozen=True, slots=True)
class Judged:
    """A group that was judged and waits for its transaction."""

    book: Book
    outcomes: list[list[Outcome]]
    now_unix_ms: int


class Books:
    """Owns the writer's connection, and one to read by the side of it."""

    def __init__(
        self,
        backend: Backend,
        terms: Terms,
        signer: Signer | None,
        reader: Backend | None = None,
    ) -> None:
        self._backend, self._terms, self._signer = backend, terms, signer
        self._side = reader or backend
        self._cache = Cache()
        # Where the next group goes on, whether or not the last one is committed yet.
        self._numbers: Numbers | None = None
        self._recent: Book | None = None
        # The log's right edge as of the last commit.
        self._edge: Edge | None = None
        self._checkpointed = -1
        # Nodes whose clients cannot be refunded: a bug, which must not keep the writer busy.
        self._given_up: set[str] = set()

    @property
    def size(self) -> int:
        """Leaves in the log."""
        return self._current_edge().size

    def open(self) -> None:
        """Reads where the books go on. Raises StorageError if they are another market's."""
        self.forget()
        self._claim_market()
        self._current()

    def confirm(self) -> None:
        """Raises if another process may write."""
        self._backend.confirm()

    def forget(self) -> None:
        """Drops everything remembered; nothing may be in flight."""
        self._cache = Cache()
        self._numbers, self._recent, self._edge = None, None, None

    def apply(self, calls: Sequence[Sequence[Prepared]], now_unix_ms: int) -> Committed:
        """One transaction for all calls. If the database refuses it, each chain gets its own, so
        that only the guilty one fails."""
        try:
            return self._apply(calls, now_unix_ms)
        except ConstraintViolated:
            log.exception("the database refused a group; applying it one by one")
            return self.one_by_one(calls, now_unix_ms)

    def judge(self, calls: Sequence[Sequence[Prepared]], now_unix_ms: int) -> Judged | None:
        """What the calls come to after everything judged so far; None if they must be applied by
        ``apply``, because they read more than their keys."""
        group = _segments(calls)
        if len(group) != 1 or stands_alone(group[0][0]):
            return None
        numbers = self._current()
        snapshot = load(
            self._side,
            self._cache,
            [operation for chain in group[0] for operation in chain],
            self._terms,
            numbers,
            now_unix_ms=now_unix_ms,
            recent=self._recent,
        )
        results, book = run(group[0], snapshot, self._terms)
        remember(self._cache, book)
        self._recent = book
        self._numbers = _after(numbers, book)
        return Judged(book, _by_call(calls, results), now_unix_ms)

    def commit(self, judged: Judged) -> Committed:
        """The transaction of a judged group. After an error nothing of it is stored, or nobody
        knows; what was judged on top of it is void then, and ``forget`` is due."""
        book = judged.book
        if not book.applied:
            return Committed(judged.outcomes)
        edge = self._current_edge()
        backend = self._backend
        backend.begin()
        try:
            save(backend, book)
            edge = self._save_leaves(edge, book.leaves, judged.now_unix_ms)
            backend.commit()
        except BaseException:
            backend.rollback()
            raise
        self._edge = edge
        return Committed(judged.outcomes, tuple(book.leaves), book.snapshot.next_index)

    def checkpoint(self, now_unix_ms: int) -> LogState | None:
        """Signs and stores a checkpoint if the log has grown; None if there is nothing to do."""
        edge = self._current_edge()
        if self._signer is None or edge.size == self._checkpointed:
            return None
        state = LogState(log_origin(self._terms.market_id), edge.size, edge.root(), now_unix_ms)
        note = sign_note(state, self._signer.key)
        with _Transaction(self):
            if not self._backend.query("SELECT 1 FROM checkpoint WHERE size = ?", (edge.size,)):
                self._backend.insert(
                    "checkpoint",
                    ("size", "root", "note", "issued_at"),
                    [(edge.size, state.root, note, now_unix_ms)],
                )
        self._checkpointed = edge.size
        return state

    def has_due_holds(self, now_unix_ms: int) -> bool:
        """True if some hold has expired and waits for an Expire."""
        return bool(
            self._side.query(
                "SELECT 1 FROM pending WHERE state = 1 AND kind = 1 AND due <= ? LIMIT 1",
                (now_unix_ms,),
            )
        )

    @property
    def has_chores(self) -> bool:
        """True if there is work that nobody waits for: refunds of a conviction, sums."""
        return bool(self._cache.earnings.behind) or self._next_restitution() is not None

    def chore(self, new_id: bytes, now_unix_ms: int) -> Committed | None:
        """A little of it, with nothing in flight; ``new_id`` is for an operation, if it is one."""
        node_id = self._next_restitution()
        if node_id is None:
            if self._cache.earnings.behind:
                self._cache.earnings.start_group()
                self._cache.earnings.go_on(self._side)
            return None
        done = self.apply([[restitution.step_of(node_id, new_id, SYSTEM)]], now_unix_ms)
        if done.outcomes[0][0].error is not None:
            log.error("the clients of %s are not refunded: %s", node_id, done.outcomes[0][0].error)
            self._given_up.add(node_id)
        return done

    def _next_restitution(self) -> str | None:
        waiting = open_restitutions(self._side, self._cache)
        return next((node for node in waiting if node not in self._given_up), None)

    def close(self) -> None:
        self._backend.close()
        if self._side is not self._backend:
            self._side.close()

    def _apply(self, calls: Sequence[Sequence[Prepared]], now_unix_ms: int) -> Committed:
        outcomes: list[Outcome] = []
        leaves: list[Leaf] = []
        first = numbers = self._current()
        self._cache.earnings.start_group()
        with _Transaction(self):
            for segment in _segments(calls):
                operations = [operation for chain in segment for operation in chain]
                snapshot = load(
                    self._backend,
                    self._cache,
                    operations,
                    self._terms,
                    numbers,
                    now_unix_ms=now_unix_ms,
                )
                results, book = run(segment, snapshot, self._terms)
                outcomes += results
                if book.applied:
                    save(self._backend, book)
                    # Later segments of this transaction read through the cache.
                    remember(self._cache, book)
                    leaves += book.leaves
                    numbers = _after(numbers, book)
            edge = self._save_leaves(self._current_edge(), leaves, now_unix_ms)
        self._numbers, self._recent, self._edge = numbers, None, edge
        return Committed(_by_call(calls, outcomes), tuple(leaves), first.next_index)

    def _save_leaves(self, edge: Edge, leaves: list[Leaf], now_unix_ms: int) -> Edge:
        if not leaves:
            return edge
        mask, body = bundle.pack(leaves)
        self._backend.insert(
            "bundle",
            ("first_index", "leaves", "kinds", "merged_at", "body"),
            [(edge.size, len(leaves), mask, now_unix_ms, body)],
        )
        edge, tiles = edge.extend(leaf_hashes_of([leaf.body for leaf in leaves]))
        self._backend.insert("tile", ("level", "number", "hashes"), tiles)
        return edge

    def one_by_one(self, calls: Sequence[Sequence[Prepared]], now_unix_ms: int) -> Committed:
        """A transaction for each chain."""
        first = self._current().next_index
        outcomes: list[list[Outcome]] = []
        leaves: list[Leaf] = []
        for call in calls:
            results: list[Outcome] = []
            for chain in chains(call):
                try:
                    done = self._apply([chain], now_unix_ms)
                except ConstraintViolated as error:
                    results += [Outcome("refused", error=error) for _ in chain]
                    continue
                results += done.outcomes[0]
                leaves += done.leaves
            outcomes.append(results)
        return Committed(outcomes, tuple(leaves), first)

    def _current(self) -> Numbers:
        if self._numbers is None:
            query = self._backend.query
            sequence = query("SELECT COALESCE(MAX(sequence), 0) FROM transfer")[0][0]
            account = query("SELECT COALESCE(MAX(no), 0) FROM account")[0][0]
            size = self._current_edge().size
            self._numbers = Numbers(int(sequence) + 1, size, int(account) + 1)
        return self._numbers

    def _current_edge(self) -> Edge:
        if self._edge is None:
            row = self._backend.query(
                "SELECT first_index + leaves FROM bundle ORDER BY first_index DESC LIMIT 1"
            )
            size = int(row[0][0]) if row else 0
            self._edge = TileReader(self._read_tile, self._read_leaves).edge(size)
        return self._edge

    def _read_tile(self, level: int, number: int) -> bytes | None:
        rows = self._backend.query(
            "SELECT hashes FROM tile WHERE level = ? AND number = ?", (level, number)
        )
        return bytes(rows[0][0]) if rows else None

    def _read_leaves(self, first: int, count: int) -> list[bytes]:
        rows = self._backend.query(
            "SELECT first_index, leaves, body FROM bundle WHERE first_index < ? AND first_index >= "
            "(SELECT COALESCE(MAX(first_index), 0) FROM bundle WHERE first_index <= ?) "
            "ORDER BY first_index",
            (first + count, first),
        )
        return leaf_hashes(rows, first, count)

    def _claim_market(self) -> None:
        with _Transaction(self):
            rows = self._backend.query("SELECT value FROM meta WHERE key = 'market'")
            if not rows:
                self._backend.insert("meta", ("key", "value"), [("market", self._terms.market_id)])
            elif rows[0][0] != self._terms.market_id:
                raise StorageError(
                    "these books belong to another market", hint="Name another database."
                )


class _Transaction:
    """BEGIN … COMMIT; on any error ROLLBACK, and everything remembered is read anew."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def __enter__(self) -> None:
        self._books._backend.begin()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        backend = self._books._backend
        if kind is None:
            try:
                backend.commit()
                return
            except TrueweightError:
                backend.rollback()
                self._books.forget()
                raise
        backend.rollback()
        self._books.forget()


def leaf_hashes(rows: Sequence[tuple[int, int, bytes]], first: int, count: int) -> list[bytes]:
    """Leaf hashes [first, first + count) out of bundle rows. Raises StorageError on a gap."""
    hashes: list[bytes] = []
    for start, leaves, body in rows:
        for place, (_, leaf) in enumerate(bundle.unpack(leaves, bytes(body)), start=start):
            if first <= place < first + count:
                hashes.append(leaf_hash(leaf))
    if len(hashes) != count:
        raise StorageError("leaves of the log are missing", hint="Run ledger fsck.")
    return hashes


def _segments(calls: Sequence[Sequence[Prepared]]) -> list[list[list[Prepared]]]:
    """Chains in order; an operation that reads more than its keys is a segment of its own."""
    segments: list[list[list[Prepared]]] = [[]]
    for call in calls:
        for chain in chains(call):
            if stands_alone(chain):
                segments += [[chain], []]
            else:
                segments[-1].append(chain)
    return [segment for segment in segments if segment]


def _by_call(
    calls: Sequence[Sequence[Prepared]], outcomes: Sequence[Outcome]
) -> list[list[Outcome]]:
    found, place = [], 0
    for call in calls:
        found.append(list(outcomes[place : place + len(call)]))
        place += len(call)
    return found


def _after(numbers: Numbers, book: Book) -> Numbers:
    return Numbers(
        numbers.next_sequence + len(book.transfers),
        numbers.next_index + len(book.leaves),
        numbers.next_account + book.created_accounts,
    )
