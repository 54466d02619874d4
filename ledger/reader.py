"""Reading the books: balances, transfers, holds, the log and its proofs. Never writes.

Methods block on the database; the service calls them on its own small pool of threads.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from trueweight.ledger import bundle, deadline
from trueweight.ledger.accounts import CURRENCY, Account
from trueweight.ledger.archived import Archive, merged
from trueweight.ledger.books import leaf_hashes
from trueweight.ledger.findings import snapshot
from trueweight.ledger.leaves import transfer_record
from trueweight.ledger.statements import Page, is_busy, page_of, transfers_sql
from trueweight.ledger.tiles import WIDTH as TILE_WIDTH
from trueweight.ledger.tiles import TileReader
from trueweight.ledger.values import HOLD, Transfer
from trueweight.protos import merkle
from trueweight.protos.errors import InvalidRequest, NotFound, StorageError
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1 import log_pb2

T = TypeVar("T")
MAX_ACCOUNTS = 1024
MAX_PAGE = 1000
MAX_SEQUENCE = 2**63 - 1
MAX_PAGE_BYTES = 4 * 1024 * 1024
_BUNDLES_PER_QUERY = 64
# A tile has 2^8 hashes.
TILE_BITS = 8
_ACCOUNT = (
    "SELECT no, id, kind, debits_pending, debits_posted, credits_pending, credits_posted "
    "FROM account"
)


def _at_one_moment(method: Callable[..., T]) -> Callable[..., T]:
    """All statements of a question see the books of one moment: between two of them others write,
    and ``ledger archive`` moves rows away."""

    @functools.wraps(method)
    def wrapped(self: Reader, *args: Any) -> T:
        with self._moment():
            return method(self, *args)

    return wrapped


class Reader:
    """Reads through a connection pool. Raises StorageError when the database fails, and
    DeadlineExceeded when the thread's deadline has passed (``trueweight.ledger.deadline``)."""

    def __init__(self, engine: sa.Engine, archive: Path | None = None) -> None:
        self._engine, self._archive_path = engine, archive
        self._archive: Archive | None = None
        self._tile_lock = threading.Lock()
        # Each thread's connection while it answers a question of several statements.
        self._local = threading.local()
        self._tiles = TileReader(self._read_tile, self._read_leaves)

    def close(self) -> None:
        self._engine.dispose()

    # -- accounts -----------------------------------------------------------------------------

    def balances(self, accounts: Sequence[str]) -> list[pb.AccountRecord]:
        """Records in the order asked for; accounts that do not exist are left out."""
        if len(accounts) > MAX_ACCOUNTS:
            raise InvalidRequest(f"at most {MAX_ACCOUNTS} accounts at once")
        statement = sa.text(f"{_ACCOUNT} WHERE id IN :ids").bindparams(
            sa.bindparam("ids", expanding=True)
        )
        rows = self._rows(statement, {"ids": list(accounts)})
        found = {row[1]: account_record(row) for row in rows}
        return [found[name] for name in accounts if name in found]

    def all_balances(self, after: str, limit: int) -> list[pb.AccountRecord]:
        """A page of all accounts, by id."""
        rows = self._rows(
            sa.text(f"{_ACCOUNT} WHERE id > :after ORDER BY id LIMIT :limit"),
            {"after": after, "limit": page_size(limit)},
        )
        return [account_record(row) for row in rows]

    @_at_one_moment
    def transfers(self, account: str, after: int, limit: int) -> pb.ListTransfersResponse:
        """Transfers of an account (of all for "") with a higher sequence, oldest first. A page may
        have none and still say that there are more behind ``next_sequence``."""
        newest = self._newest_sequence() if is_busy(account) else MAX_SEQUENCE
        if after >= newest:  # also what no database can count to
            return pb.ListTransfersResponse(next_sequence=after)
        page = page_of(account, after, page_size(limit), newest)
        number = None
        if account:
            found = self._rows(sa.text("SELECT no FROM account WHERE id = :id"), {"id": account})
            if not found:
                return pb.ListTransfersResponse(next_sequence=after)
            number = int(found[0][0])
        archived = self._archived_transfers(page, number)
        if archived is not None:
            return archived
        rows = self._rows(
            sa.text(transfers_sql(account)),
            {"number": number, "after": after, "end": page.end, "limit": page.limit},
        )
        return page.answer([stored_record(row) for row in rows])

    def hold(self, hold_id: bytes) -> pb.HoldRecord:
        """The hold. Raises NotFound."""
        rows = self._rows(
            sa.text(
                "SELECT id, debit, amount, posted, state, due FROM pending "
                "WHERE id = :id AND kind = :kind"
            ),
            {"id": hold_id, "kind": HOLD},
        )
        if not rows:
            raise NotFound("there is no such hold")
        row = rows[0]
        return pb.HoldRecord(
            hold_id=bytes(row[0]),
            account=row[1],
            amount_nano=row[2],
            captured_nano=row[3],
            state=row[4],
            expires_at_unix_ms=row[5],
        )

    # -- the log ------------------------------------------------------------------------------

    def size(self) -> int:
        """Leaves in the log."""
        rows = self._rows(
            sa.text("SELECT first_index + leaves FROM bundle ORDER BY first_index DESC LIMIT 1"), {}
        )
        return int(rows[0][0]) if rows else 0

    @_at_one_moment
    def read_log(self, from_index: int, limit: int, kinds: Sequence[str]) -> pb.ReadLogResponse:
        """A page of leaves, and where to go on."""
        size, limit = self.size(), page_size(limit)
        response = pb.ReadLogResponse(tree_size=size, next_index=max(from_index, size))
        mask = bundle.mask_of(kinds)
        if kinds and not mask:
            return response
        wanted = frozenset(kinds)
        # A bundle may be megabytes, of which a proof needs one leaf.
        place, taken, most = from_index, 0, 1
        while place < size:
            rows = self._bundles(place, size, mask, most)
            for first, count, _, merged_at, body in rows:
                for index, (kind, leaf) in enumerate(bundle.unpack(count, bytes(body)), first):
                    if index < place or (wanted and kind not in wanted):
                        continue
                    if len(response.entries) == limit or taken > MAX_PAGE_BYTES:
                        response.next_index = index
                        return response
                    taken += len(leaf)
                    response.entries.append(
                        log_pb2.LogEntry(
                            index=index, kind=kind, body=leaf, merged_at_unix_ms=merged_at
                        )
                    )
                # A gap of archived bundles may follow one that ends before ``place``.
                place = max(place, first + count)
            if len(rows) < most:
                break
            most = min(2 * most, _BUNDLES_PER_QUERY)
        return response

    def checkpoint(self, size: int | None = None) -> log_pb2.Checkpoint:
        """The newest checkpoint, or the one of a size. Raises NotFound."""
        where = "" if size is None else "WHERE size = :size"
        rows = self._rows(
            sa.text(
                f"SELECT note, size, root, issued_at FROM checkpoint {where} "  # noqa: S608
                "ORDER BY size DESC LIMIT 1"
            ),
            {} if size is None else {"size": size},
        )
        if not rows:
            raise NotFound("there is no such checkpoint yet", hint="Ask again in a second.")
        note, at, root, issued = rows[0]
        return log_pb2.Checkpoint(note=note, size=at, root=bytes(root), issued_at_unix_ms=issued)

    @_at_one_moment
    def inclusion(self, request: pb.InclusionProofRequest) -> pb.InclusionProofResponse:
        """Proof that a leaf is in the tree of a checkpoint. Raises NotFound."""
        checkpoint = self._checkpoint_for(request.tree_size)
        size = request.tree_size or checkpoint.size
        index = self._index_of(request, size)
        if index >= size:
            raise NotFound(
                "the leaf is not covered by a checkpoint yet", hint="Ask again in a second."
            )
        entry = self.read_log(index, 1, ()).entries[0]
        path = self._with_tiles(lambda: merkle.inclusion_path(index, size, self._tiles.fetch))
        return pb.InclusionProofResponse(
            entry=entry,
            proof=log_pb2.InclusionProof(index=index, tree_size=size, path=path),
            checkpoint=checkpoint,
        )

    @_at_one_moment
    def consistency(self, old_size: int, new_size: int) -> log_pb2.ConsistencyProof:
        """Proof that a smaller tree is a prefix of a larger one."""
        if new_size > self.size():
            raise InvalidRequest("the log is not that large")
        path = self._with_tiles(
            lambda: merkle.consistency_path(old_size, new_size, self._tiles.fetch)
        )
        return log_pb2.ConsistencyProof(old_size=old_size, new_size=new_size, path=path)

    @_at_one_moment
    def tile(self, level: int, number: int, width: int) -> bytes:
        """The first ``width`` hashes of a Merkle tile. Raises NotFound if the log lacks them."""
        size = self.size() >> (TILE_BITS * level)
        if not 1 <= width <= TILE_WIDTH or number * TILE_WIDTH + width > size:
            raise NotFound("the log has no such tile")
        first = number * TILE_WIDTH
        return self._with_tiles(
            lambda: b"".join(
                self._tiles.fetch(TILE_BITS * level, first + place) for place in range(width)
            )
        )

    def key_events(self, place: int = 0) -> tuple[list[bytes], int]:
        """Published key events from a place in the log on, in its order, and where to go on."""
        found: list[bytes] = []
        if place > self.size():
            place = 0  # of an older copy of the books
        while True:
            page = self.read_log(place, MAX_PAGE, ("key-event",))
            found += [entry.body for entry in page.entries]
            place = page.next_index
            if place >= page.tree_size:
                return found, place

    def _checkpoint_for(self, tree_size: int) -> log_pb2.Checkpoint:
        if tree_size:
            if tree_size > self.size():
                raise InvalidRequest("the log is not that large")
            try:
                return self.checkpoint(tree_size)
            except NotFound:
                pass
        return self.checkpoint()

    def _index_of(self, request: pb.InclusionProofRequest, size: int) -> int:
        which = request.WhichOneof("which")
        if which == "index":
            return int(request.index)
        if which == "message_digest":
            rows = self._rows(
                # A receipt is found in what it moved.
                sa.text(
                    "SELECT log_index FROM evidence WHERE digest = :digest UNION "
                    "SELECT log_index FROM leg WHERE receipt_digest = :digest"
                ),
                {"digest": request.message_digest},
            )
            if rows:
                return int(rows[0][0])
        elif which == "leaf_hash" and len(request.leaf_hash) == merkle.HASH_BYTES:
            return self._find_leaf(request.leaf_hash, size)
        raise NotFound("there is no such leaf in the log")

    def _find_leaf(self, wanted: bytes, size: int) -> int:
        # Rare, so there is no index for it: a scan over 32 bytes a leaf, newest first.
        whole = size // 256 * 256
        tail = self._with_tiles(lambda: self._read_leaves(whole, size - whole))
        if wanted in tail:
            return whole + tail.index(wanted)
        function = "instr(hashes, :h)" if self._sqlite else "position(:h IN hashes)"
        rows = self._rows(
            sa.text(
                f"SELECT number, hashes FROM tile WHERE level = 0 AND {function} > 0 "  # noqa: S608
                "ORDER BY number DESC LIMIT 8"
            ),
            {"h": wanted},
        )
        for number, hashes in rows:
            data = bytes(hashes)
            place = data.find(wanted)
            if place % merkle.HASH_BYTES == 0:
                return int(number) * 256 + place // merkle.HASH_BYTES
        raise NotFound("there is no such leaf in the log")

    # -- database -----------------------------------------------------------------------------

    @property
    def _sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    def _bundles(self, place: int, size: int, mask: int, most: int) -> Sequence[Any]:
        """The first of the bundles that hold leaves [place, size) of the mask's kinds."""
        archive = None
        if not mask or mask & bundle.FREQUENT_MASK:  # the others are never archived
            archive = self._archive_for("archived_below", place)
        where = ""
        if mask:
            where = "AND (kinds & :mask) <> 0"
            if not mask & bundle.FREQUENT_MASK:
                where += " AND kinds > 7"  # lets the partial index answer
        rows = self._rows(
            sa.text(
                "SELECT first_index, leaves, kinds, merged_at, body FROM bundle "  # noqa: S608
                "WHERE first_index >= (SELECT COALESCE(MAX(first_index), 0) FROM bundle "
                f"WHERE first_index <= :place) AND first_index < :size {where} "
                "ORDER BY first_index LIMIT :limit"
            ),
            {"place": place, "size": size, "mask": mask, "limit": most},
        )
        if archive is None:
            return rows
        both = merged(archive.bundles(place, most, mask), rows)
        return list(itertools.islice(both, most))

    def _archive_for(self, mark: str, place: int) -> Archive | None:
        """The archive if it has something at or after a place. Raises NotFound if it is needed and
        this ledger does not know where it is."""
        rows = self._rows(
            sa.text(
                "SELECT key, value FROM meta "
                "WHERE key IN ('market', 'archived_below', 'archived_sequence')"
            ),
            {},
        )
        facts = {row[0]: row[1] for row in rows}
        end = int(facts.get(mark, 0))
        if place >= end:
            return None
        if self._archive_path is None:
            raise NotFound(
                "what is asked for was archived", hint="Start the ledger with --archive DIR."
            )
        if self._archive is None:
            self._archive = Archive(self._archive_path, facts["market"])
        known = self._archive.at(int(facts["archived_below"]))
        if known.below > self._archive.below:
            self._archive = known
        return known

    def _newest_sequence(self) -> int:
        # Never archived.
        return int(self._rows(sa.text("SELECT MAX(sequence) FROM transfer"), {})[0][0] or 0)

    def _archived_transfers(
        self, page: Page, number: int | None
    ) -> pb.ListTransfersResponse | None:
        """The page if it is in the archive; None: it is in the database."""
        archive = self._archive_for("archived_sequence", page.after)
        if archive is None:
            return None
        end = min(page.end, archive.sequence)
        rows = archive.transfers(page.after, page.limit, number, end)
        if not rows and end == archive.sequence:
            return None
        statement = sa.text("SELECT no, id FROM account WHERE no IN :numbers").bindparams(
            sa.bindparam("numbers", expanding=True)
        )
        numbers = {no for row in rows for no in row[3:5]}
        names = {row[0]: row[1] for row in self._rows(statement, {"numbers": list(numbers)})}
        records = [stored_record((*r[:3], names[r[3]], names[r[4]], *r[5:])) for r in rows]
        return replace(page, end=end).answer(records)

    def _with_tiles(self, work: Callable[[], T]) -> T:
        left = deadline.left_s()
        if not self._tile_lock.acquire(timeout=-1 if left is None else left):
            raise deadline.too_late()
        try:
            with self._moment():
                return work()
        finally:
            self._tile_lock.release()

    def _read_tile(self, level: int, number: int) -> bytes | None:
        rows = self._rows(
            sa.text("SELECT hashes FROM tile WHERE level = :level AND number = :number"),
            {"level": level, "number": number},
        )
        return bytes(rows[0][0]) if rows else None

    def _read_leaves(self, first: int, count: int) -> list[bytes]:
        rows = self._rows(
            sa.text(
                "SELECT first_index, leaves, body FROM bundle WHERE first_index < :end "
                "AND first_index >= (SELECT COALESCE(MAX(first_index), 0) FROM bundle "
                "WHERE first_index <= :first) ORDER BY first_index"
            ),
            {"first": first, "end": first + count},
        )
        return leaf_hashes([tuple(row) for row in rows], first, count)

    def _rows(self, statement: Any, values: dict[str, Any]) -> Sequence[Any]:
        with self._moment() as connection, _database_errors(), deadline.bound(connection):
            return connection.execute(statement, values).fetchall()

    @contextmanager
    def _moment(self) -> Iterator[sa.Connection]:
        """The connection of the question that this thread answers."""
        known: sa.Connection | None = getattr(self._local, "connection", None)
        if known is not None:
            yield known
            return
        with _database_errors():
            opened = snapshot(self._engine)
        try:
            self._local.connection = opened
            yield opened
        finally:
            self._local.connection = None
            opened.close()


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        raise StorageError(
            f"the database failed: {str(error).partition(chr(10))[0][:200]}"
        ) from error


def page_size(limit: int) -> int:
    """Between 1 and 1,000; 0 means the most."""
    return min(limit, MAX_PAGE) if limit else MAX_PAGE


def account_record(row: Sequence[Any]) -> pb.AccountRecord:
    """From (no, id, kind, four counters)."""
    debits_pending, debits_posted, credits_pending, credits_posted = row[3:7]
    return pb.AccountRecord(
        account=row[1],
        kind=row[2],
        currency=CURRENCY,
        debits_pending_nano=str(debits_pending),
        debits_posted_nano=str(debits_posted),
        credits_pending_nano=str(credits_pending),
        credits_posted_nano=str(credits_posted),
        available_nano=str(credits_posted - debits_posted - debits_pending),
    )


def stored_record(row: Sequence[Any]) -> pb.TransferRecord:
    """From a row of the transfer table with both account ids."""
    debit, credit = Account(0, row[3], 0), Account(0, row[4], 0)
    return transfer_record(
        Transfer(
            row[0], bytes(row[1]), row[2], debit, credit, row[5], row[6], bytes(row[7] or b""),
            row[8], row[9],
        )
    )  # fmt: skip
