"""Pages of transfers: which rows, in which order, and how far one page may look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trueweight.ledger.accounts import kind_of
from trueweight.ledger.values import BUSY_KINDS, NOT_INDEXED, REASON_NO
from trueweight.protos.v1 import ledger_pb2 as pb

# Transfers that one page of a busy account looks through: such accounts are read in the order of
# the book, and most of what is there may be others'.
MAX_SPAN = 50_000
_TRANSFERS = (
    "SELECT t.sequence, t.operation_id, t.ordinal, d.id, c.id, t.amount, t.phase, t.pending_id, "
    "t.reason, t.created_at FROM transfer t JOIN account d ON d.no = t.debit "
    "JOIN account c ON c.no = t.credit"
)


@dataclass(frozen=True, slots=True)
class Page:
    """What is asked for: at most ``limit`` transfers of an account ("": of all) with sequences in
    (after, end], in books whose transfers go up to ``newest``."""

    account: str
    after: int
    end: int
    newest: int
    limit: int

    def answer(self, records: Sequence[pb.TransferRecord]) -> pb.ListTransfersResponse:
        """The response: what was found, where to go on, and whether there may be more."""
        after = records[-1].sequence if records else self.after
        if len(records) == self.limit:
            return pb.ListTransfersResponse(transfers=records, next_sequence=after, more=True)
        more = self.end < self.newest
        return pb.ListTransfersResponse(
            transfers=records, next_sequence=max(after, self.end) if more else after, more=more
        )


def page_of(account: str, after: int, limit: int, newest: int) -> Page:
    """The next page after a sequence, which is not the newest."""
    end = min(newest, after + MAX_SPAN) if is_busy(account) else newest
    return Page(account, after, end, newest, limit)


def is_busy(account: str) -> bool:
    """True if an account is in so many transfers that no index has all of them."""
    return bool(account) and kind_of(account) in BUSY_KINDS


def transfers_sql(account: str) -> str:
    """One page of the transfers of an account ("": of all), whose number is ``:number``."""
    where, order = "t.sequence > :after", "ORDER BY t.sequence LIMIT :limit"
    if not account:
        return f"{_TRANSFERS} WHERE {where} {order}"
    if is_busy(account):
        sides = "(t.debit = :number OR t.credit = :number)"
        return f"{_TRANSFERS} WHERE {where} AND t.sequence <= :end AND {sides} {order}"
    # Two index ranges; an OR over both columns would scan the table.
    pages = []
    for side, (reasons, _) in NOT_INDEXED.items():
        unseen = ", ".join(str(REASON_NO[reason]) for reason in reasons)
        page = (
            f"SELECT sequence FROM transfer WHERE {side} = :number "  # noqa: S608
            f"AND reason NOT IN ({unseen}) AND sequence > :after ORDER BY sequence LIMIT :limit"
        )
        pages.append(f"SELECT sequence FROM ({page}) {side}_side")  # noqa: S608
    return f"{_TRANSFERS} WHERE {where} AND t.sequence IN ({' UNION '.join(pages)}) {order}"
