"""The books' half of ``fsck``: balances, holds and legs from the transfers, and those in their
leaves."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from trueweight.ledger.accounts import (
    CURRENCY,
    EXTERNAL,
    NODE_LOCKED,
    TREASURY,
    clearing_of,
    kind_of,
    owner_of,
)
from trueweight.ledger.archived import TRANSFER_COLUMNS, Archive, archive_at, transfers_of
from trueweight.ledger.findings import (
    Findings,
    Progress,
    Tally,
    count,
    exact,
    snapshot,
    stream,
    to_the_end,
)
from trueweight.ledger.fsck_claims import check_claims
from trueweight.ledger.fsck_earnings import check_earnings
from trueweight.ledger.fsck_references import Taken, check_references
from trueweight.ledger.fsck_refunds import Refunds, Side, check_refunds
from trueweight.ledger.fsck_restitution import Aside, check_restitutions
from trueweight.ledger.fsck_spending import check_spending
from trueweight.ledger.fsck_transfers import TransferLeaves
from trueweight.ledger.values import (
    EXPIRE,
    HOLD,
    NOT_INDEXED,
    OPEN,
    PAYOUT,
    PENDING,
    POST,
    REASON_NO,
    SINGLE,
    VOID,
    WITHDRAWAL,
    transfer_id,
)
from trueweight.protos.errors import InvalidRequest
from trueweight.protos.money import MAX_NANO

_STATE_OF_PHASE = {POST: 2, VOID: 3, EXPIRE: 4}
_KIND_OF_REASON = {
    REASON_NO["hold"]: HOLD,
    REASON_NO["payout"]: PAYOUT,
    REASON_NO["bond-withdrawal"]: WITHDRAWAL,
}
_EARNED = (REASON_NO["earning"], REASON_NO["subsidy"])
_FEE, _POOL = REASON_NO["fee"], REASON_NO["pool"]
_FORFEIT, _REINSTATE = REASON_NO["forfeit"], REASON_NO["reinstate"]
_REFUND, _REWARD, _TREASURY = REASON_NO["refund"], REASON_NO["reward"], REASON_NO["treasury"]
_DEBT = REASON_NO["debt"]
_RAIL = (REASON_NO["deposit"], REASON_NO["bond-deposit"])
_PAYOUT = frozenset((REASON_NO["payout"], REASON_NO["bond-withdrawal"]))
# Reasons for which a row must stand beside the money.
_NOTED = frozenset((_FORFEIT, _REINSTATE, _REFUND, _REWARD, _TREASURY, _DEBT, *_RAIL))
# Transfers between two reports of progress.
_PART = 8_192
# Kinds of account that a reason must name on a side, because no index would find it there.
_DEBITED, _CREDITED = (
    {REASON_NO[reason]: kinds for reason in reasons} for reasons, kinds in NOT_INDEXED.values()
)


# Weights and tokens of a receipt are kept together, or not at all in old books.
_HALF_KEPT = """
SELECT COUNT(*) FROM leg WHERE (output_tokens IS NULL) <> (manifest_digest IS NULL)
OR refunded IS NULL OR refunded_node IS NULL
"""

# A first phase: numbers of both accounts, amount, and what it is for.
_First = tuple[int, int, int, int]


def _no_counters() -> list[int]:
    return [0, 0, 0, 0]


@dataclass
class _Fold:
    """What transfers come to: counters by account number, and what must stand beside them."""

    kinds: dict[int, int]
    names: dict[int, str]
    numbers: dict[str, int]
    counters: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(_no_counters))
    open: dict[bytes, _First] = field(default_factory=dict)
    # Resolved holds would be too many to keep.
    resolved: Tally = field(default_factory=Tally)
    earned: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    # By number of a client's clearing account and reason: what went to the market.
    shares: defaultdict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    # What convictions took from an account and reinstatements have not paid back.
    forfeited: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    refunds: Refunds = field(default_factory=Refunds)
    aside: Aside = field(default_factory=Aside)
    taken: Taken = field(default_factory=Taken)
    # Operations that were archived and are not known any more.
    forgotten: int = 0
    next: int = 1

    def note(self, reason: int, operation: bytes, sides: tuple[int, int], amount: int) -> None:
        """A transfer for one of ``_NOTED``."""
        debit, credit = (Side(self.kinds.get(no, 0), self.names.get(no, "?")) for no in sides)
        if reason == _FORFEIT:
            self.forfeited[sides[0]] += amount
            self.refunds.note_conviction(operation)
        elif reason == _REINSTATE:
            self.forfeited[sides[1]] -= amount
        elif reason == _REFUND:
            self.refunds.note(operation, debit, credit, amount)
        elif reason == _TREASURY and debit.kind == credit.kind == TREASURY:
            self.aside.note(operation, debit.name, credit.name, amount)
        elif reason == _REWARD:
            self.taken.facts[f"reward:{owner_of(credit.name)}"].add(operation)
        elif reason == _DEBT:
            self.taken.facts["debt"].add(operation)
            self.taken.debts[operation] = credit.name, amount
        elif reason in _RAIL:
            self.taken.facts[f"rail:{owner_of(debit.name)}"].add(operation)


def check_books(
    engine: sa.Engine, archive: Archive | None = None, progress: Progress = lambda *_: None
) -> Findings:
    """All that follows from transfers."""
    findings = Findings()
    with to_the_end(findings, "the balances"), snapshot(engine) as connection:
        archive = archive_at(connection, archive)
        accounts = {r[0]: r for r in connection.execute(sa.text("SELECT * FROM account"))}
        fold = _Fold(
            {no: row.kind for no, row in accounts.items()},
            {no: row.id for no, row in accounts.items()},
            {row.id: no for no, row in accounts.items()},
        )
        fold.refunds.expect_debts(connection)
        _fold_all(connection, archive, findings, fold, progress)
        _check_accounts(findings, fold, accounts)
        _check_pendings(connection, archive, findings, fold)
        _check_legs(connection, findings, fold)
        _check_nodes(connection, findings, fold, accounts)
        _check_forfeits(connection, findings, fold)
        check_refunds(connection, findings, fold.refunds)
        check_restitutions(connection, findings, fold.aside)
        check_claims(connection, findings)
        check_references(connection, findings, fold.taken)
        check_spending(connection, findings)
        _check_operations(connection, findings, fold)
    return findings


def _fold_all(
    connection: sa.Connection,
    archive: Archive | None,
    findings: Findings,
    fold: _Fold,
    progress: Progress,
) -> None:
    total = connection.execute(sa.text("SELECT MAX(sequence) FROM transfer")).scalar() or 0
    leaves = TransferLeaves(connection, archive, findings, fold.names)
    rows = iter(transfers_of(connection, archive, TRANSFER_COLUMNS))
    while part := list(itertools.islice(rows, _PART)):
        _fold_transfers(part, findings, fold)
        leaves.take(part)
        if archive is not None and part[0][0] <= archive.sequence:
            fold.forgotten += _forgotten(connection, part, archive.sequence)
        progress("transfers", fold.next - 1, total)
    leaves.finish()
    findings.counts["transfers"] = fold.next - 1


def _forgotten(connection: sa.Connection, part: list[Any], archived: int) -> int:
    """How many operations of archived transfers the database does not know."""
    ids = list({bytes(row[1]) for row in part if row[0] <= archived})
    query = sa.text("SELECT COUNT(*) FROM operation WHERE id IN :ids")
    query = query.bindparams(sa.bindparam("ids", expanding=True))
    return len(ids) - int(connection.execute(query, {"ids": ids}).scalar_one())


def _fold_transfers(rows: Iterable[Any], findings: Findings, fold: _Fold) -> None:
    counters, earned, resolved = fold.counters, fold.earned, fold.resolved
    shares = fold.shares
    inside = {no for no, kind in fold.kinds.items() if kind != EXTERNAL}
    for (
        sequence, operation, ordinal, debit_no, credit_no, amount, phase, pending, reason, _
    ) in rows:  # fmt: skip
        if sequence != fold.next:
            findings.add(f"transfers {fold.next} to {sequence - 1} are missing")
        fold.next = sequence + 1
        debit, credit = counters[debit_no], counters[credit_no]
        if (
            (reason in _DEBITED and fold.kinds.get(debit_no) not in _DEBITED[reason])
            or (reason in _CREDITED and fold.kinds.get(credit_no) not in _CREDITED[reason])
            or not 0 <= amount <= MAX_NANO
        ):
            findings.add(f"transfer {sequence} has other accounts or amounts than its reason has")
        if phase == SINGLE:
            debit[1] += amount
            credit[3] += amount
            if reason in _EARNED:
                earned[credit_no] += amount
            elif reason in (_FEE, _POOL):
                shares[debit_no, reason] += amount
            elif reason in _NOTED:
                fold.note(reason, bytes(operation), (debit_no, credit_no), amount)
        elif phase == PENDING:
            debit[0] += amount
            credit[2] += amount
            first = _first(debit_no, credit_no, amount, reason)
            fold.open[transfer_id(bytes(operation), ordinal)] = first
        else:
            held = fold.open.pop(bytes(pending or b""), None)
            if held is None or held[:2] != (debit_no, credit_no) or amount > held[2]:
                findings.add(f"transfer {sequence} resolves no open pending transfer")
                continue
            debit[0] -= held[2]
            debit[1] += amount
            credit[2] -= held[2]
            credit[3] += amount
            resolved.add(_resolution(pending, held, _STATE_OF_PHASE.get(phase, 0), amount))
            if reason in _PAYOUT:
                fold.taken.settled[bytes(operation)] = fold.names.get(credit_no, "?")
        if debit[3] - debit[1] - debit[0] < 0 and debit_no in inside:
            findings.add(f"transfer {sequence} overdraws {fold.names.get(debit_no, debit_no)}")


def _first(debit_no: int, credit_no: int, amount: int, reason: int) -> _First:
    return debit_no, credit_no, amount, _KIND_OF_REASON.get(reason, 0)


def _resolution(pending: bytes, first: _First, state: int, posted: int) -> bytes:
    return b"%b%d:%d:%d:%d:%d:%d" % (pending, *first, state, posted)


def _check_accounts(findings: Findings, fold: _Fold, accounts: dict[int, Any]) -> None:
    findings.counts["accounts"] = len(accounts)
    sums: defaultdict[str, list[int]] = defaultdict(_no_counters)
    for no, row in accounts.items():
        stored = [row.debits_pending, row.debits_posted, row.credits_pending, row.credits_posted]
        folded = fold.counters.pop(no, [0, 0, 0, 0])
        if stored != folded:
            findings.add(f"{row.id} has counters {stored}, its transfers give {folded}")
        if row.kind != _kind(row.id):
            findings.add(f"{row.id} is not of the kind that its name says")
        if row.currency != CURRENCY:
            findings.add(f"{row.id} is not in {CURRENCY}")
        if row.kind != EXTERNAL and stored[3] - stored[1] - stored[0] < 0:
            findings.add(f"{row.id} is overdrawn")
        known = sums[row.currency]
        sums[row.currency] = [a + b for a, b in zip(known, stored, strict=True)]
    for currency, (pending, debits, pending_too, credits) in sums.items():
        if (pending, debits) != (pending_too, credits):
            findings.add(f"debits and credits of all accounts in {currency} differ")
    for no in fold.counters:
        findings.add(f"transfers name account number {no}, which does not exist")


def _kind(account_id: str) -> int:
    try:
        return kind_of(account_id)
    except InvalidRequest:
        return 0


def _check_pendings(
    connection: sa.Connection, archive: Archive | None, findings: Findings, fold: _Fold
) -> None:
    count, resolved = 0, fold.resolved
    for id_, first, state, posted in _pending_rows(connection, fold):
        count += 1
        if state != OPEN:
            resolved.take(_resolution(id_, first, state, posted))
        elif fold.open.pop(id_, None) != first or posted != 0:
            findings.add(f"the open hold {id_.hex()} does not follow from its transfer")
    for id_ in fold.open:
        findings.add(f"the pending transfer {id_.hex()} has no open row")
    if resolved.sum:
        _name_resolved(connection, archive, findings, fold)
    findings.counts["holds"] = count


def _pending_rows(
    connection: sa.Connection, fold: _Fold
) -> Iterator[tuple[bytes, _First, int, int]]:
    """Id, what its transfer must have held, state and what was posted."""
    rows = stream(connection, "SELECT id, debit, credit, amount, kind, state, posted FROM pending")
    for id_, debit, credit, amount, kind, state, posted in rows:
        sides = fold.numbers.get(debit, -1), fold.numbers.get(credit, -1)
        yield bytes(id_), (*sides, amount, kind), state, posted


def _name_resolved(
    connection: sa.Connection, archive: Archive | None, findings: Findings, fold: _Fold
) -> None:
    """Something is wrong with resolved holds: now they are all kept, to say with which."""
    held: dict[bytes, _First] = {}
    said: dict[bytes, tuple[_First | None, int, int]] = {}
    for _, operation, ordinal, debit, credit, amount, phase, pending, reason in transfers_of(
        connection, archive, TRANSFER_COLUMNS[:-1]
    ):
        if phase == PENDING:
            held[transfer_id(bytes(operation), ordinal)] = _first(debit, credit, amount, reason)
        elif pending is not None:
            id_ = bytes(pending)
            said[id_] = (held.pop(id_, None), _STATE_OF_PHASE.get(phase, 0), amount)
    for id_, *row in _pending_rows(connection, fold):
        if row[1] != OPEN and said.pop(id_, None) != tuple(row):
            findings.add(f"the hold {id_.hex()} was not resolved as its row says")
    for id_ in said:
        findings.add(f"the resolved hold {id_.hex()} has no row")


def _check_legs(connection: sa.Connection, findings: Findings, fold: _Fold) -> None:
    """Legs sum to what the market got of them. (What holds paid for them, and that each is where
    its receipt is in the log, the log's half finds.)"""
    if count(connection, _HALF_KEPT):
        findings.add("of some receipts a part is forgotten")
    for client, fee, pool in connection.execute(
        sa.text("SELECT client, SUM(fee), SUM(pool) FROM leg GROUP BY client")
    ):
        clearing = fold.numbers.get(clearing_of(client), -1)
        shares = fold.shares[clearing, _FEE], fold.shares[clearing, _POOL]
        if shares != (exact(fee), exact(pool)):
            findings.add(f"the receipts of {client} are not what the market got of them")


def _check_nodes(
    connection: sa.Connection, findings: Findings, fold: _Fold, accounts: dict[int, Any]
) -> None:
    locked = {owner_of(a.id): no for no, a in accounts.items() if a.kind == NODE_LOCKED}
    for no in fold.earned.keys() - set(locked.values()):
        findings.add(f"{fold.names.get(no, no)} has earnings, and is no node's")
    check_earnings(
        connection,
        findings,
        {node: fold.earned.get(no, 0) for node, no in locked.items()},
        {node: _available(accounts[no]) for node, no in locked.items()},
        fold.refunds,
    )


def _available(account: Any) -> int:
    return exact(account.credits_posted - account.debits_posted - account.debits_pending)


def _check_forfeits(connection: sa.Connection, findings: Findings, fold: _Fold) -> None:
    """Nobody was or may be paid back more than convictions took from him."""
    left: defaultdict[str, int] = defaultdict(int)
    for no, amount in fold.forfeited.items():
        left[owner_of(fold.names.get(no, "?"))] += amount
    for node, amount in left.items():
        if amount < 0:
            findings.add(f"node {node} was paid back more than convictions took from it")
    for node, stored in connection.execute(sa.text("SELECT node_id, forfeited FROM node")):
        # Less where books were archived before the row knew, and where it has paid for refunds.
        if not 0 <= exact(stored) <= left.get(node, 0):
            findings.add(f"node {node} may be paid back more than convictions took from it")


def _check_operations(connection: sa.Connection, findings: Findings, fold: _Fold) -> None:
    """Whoever moved money is known by its operation. (What else was applied is in no transfer.)"""
    unknown = fold.forgotten + count(
        connection,
        "SELECT COUNT(*) FROM transfer t WHERE ordinal = 0 AND NOT EXISTS "
        "(SELECT 1 FROM operation o WHERE o.id = t.operation_id)",
    )
    if unknown:
        findings.add(f"{unknown} transfers belong to operations that were never applied")
