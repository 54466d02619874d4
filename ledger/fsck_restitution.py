"""Refunds of convictions that are made in steps, in both halves of ``fsck``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import sqlalchemy as sa

from trueweight.ledger.accounts import TREASURY, TREASURY_ACCOUNT, owner_of
from trueweight.ledger.findings import Findings, count, exact
from trueweight.ledger.restitution import set_aside
from trueweight.ledger.values import Restitution

_ROWS = f"SELECT {', '.join(Restitution._fields)} FROM restitution"  # noqa: S608
_UNKNOWN = """SELECT COUNT(*) FROM restitution r LEFT JOIN operation o ON o.id = r.operation_id
WHERE o.id IS NULL"""


class _Legs(NamedTuple):
    """The receipts of a conviction: what they cost, and how many there are."""

    # Below the place where the refunds go on: of those not refunded, of those refunded, and how
    # many are left out.
    counted: int
    done: int
    left_out: int
    # From there on: of those not refunded; how many there are; is one right before that place?
    waiting: int
    later: int
    before: int


_LEGS = sa.text("""
SELECT
  COALESCE(SUM(CASE WHEN log_index < :next AND refunded = 0 THEN charge END), 0),
  COALESCE(SUM(CASE WHEN log_index < :next AND refunded <> 0 THEN charge END), 0),
  COUNT(CASE WHEN log_index < :next AND refunded = 0 AND charge > 0 THEN 1 END),
  COALESCE(SUM(CASE WHEN log_index >= :next AND refunded = 0 THEN charge END), 0),
  COUNT(CASE WHEN log_index >= :next THEN 1 END),
  COUNT(CASE WHEN log_index = :before THEN 1 END)
FROM leg WHERE node_id = :node AND log_index >= :first AND log_index < :end
""")


@dataclass
class Aside:
    """What convictions set aside for the clients, as transfers say it."""

    # By operation and node.
    put: defaultdict[tuple[bytes, str], int] = field(default_factory=lambda: defaultdict(int))
    # By node: what was more than the clients had paid, and the market's.
    returned: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    def note(self, operation: bytes, debit: str, credit: str, amount: int) -> None:
        """A transfer between treasuries."""
        if debit == TREASURY_ACCOUNT:
            self.put[operation, owner_of(credit)] += amount
        else:
            self.returned[owner_of(debit)] += amount


def check_restitutions(
    connection: sa.Connection, findings: Findings, aside: Aside | None = None
) -> None:
    """What is set aside is what clients are still to get, and receipts are refunded in order."""
    left: defaultdict[str, int] = defaultdict(int)
    known = [Restitution(*row) for row in connection.execute(sa.text(_ROWS))]
    known = [row._replace(operation_id=bytes(row.operation_id)) for row in known]
    rows = connection.execute(sa.text("SELECT node_id FROM node WHERE convicted = 1"))
    convicted = {row[0] for row in rows}
    for row in known:
        if row.is_open:
            left[set_aside(row.node_id)] += row.budget if row.is_counting else row.unpaid
        if row.is_open and row.node_id not in convicted:
            findings.add(f"clients of {row.node_id} are refunded, and it is not convicted")
        for wrong in _wrong(row, _legs_of(connection, row)):
            findings.add(f"{wrong} of the conviction of {row.node_id}")
    if count(connection, _UNKNOWN):
        findings.add("refunds of convictions belong to operations that were never applied")
    if aside is not None:
        _check_aside(findings, known, aside)
    _check_accounts(connection, findings, left)


def _legs_of(connection: sa.Connection, known: Restitution) -> _Legs:
    values = {
        "node": known.node_id,
        "first": known.first_index,
        "end": known.end_index,
        "next": known.next_index,
        "before": known.next_index - 1,
    }
    return _Legs(*map(exact, connection.execute(_LEGS, values).one()))


def _wrong(known: Restitution, legs: _Legs) -> Iterator[str]:
    """What does not follow from the receipts. Those that were refunded before the conviction are in
    no sum, and nobody else refunds the others."""
    first, place, end = known.first_index, known.next_index, known.end_index
    if known.is_counting not in (0, 1) or not first <= place <= end:
        yield "nobody knows how far the refunds are"
    elif place not in (first, end) and not legs.before:
        yield "the refunds go on where no receipt ends"
    if known.is_counting:
        if (known.total, known.seen) != (legs.counted, 0):
            yield "the charges that were added up are not those of the receipts"
        return
    if legs.left_out:
        yield "receipts were left out of the refunds"
    if place < end and not legs.later:
        yield "nothing is left of the refunds that are under way"
    if known.total - known.seen != legs.waiting or not 0 <= known.seen <= legs.done:
        yield "the charges that were refunded are not those of the receipts"


def _check_aside(findings: Findings, known: list[Restitution], aside: Aside) -> None:
    put, returned = aside.put.copy(), aside.returned.copy()
    for row in known:
        if put.pop((row.operation_id, row.node_id), 0) != row.budget:
            findings.add(f"for clients of {row.node_id} another sum was set aside")
        if not row.is_counting:
            returned[row.node_id] -= row.budget - row.pay
    for (_, node), amount in put.items():
        if amount:
            findings.add(f"{amount} were set aside for clients of {node}, and nobody refunds them")
    for node, amount in returned.items():
        if amount:
            findings.add(f"what the clients of {node} do not need is not what the market got back")


def _check_accounts(
    connection: sa.Connection, findings: Findings, left: defaultdict[str, int]
) -> None:
    accounts = connection.execute(
        sa.text(
            "SELECT id, credits_posted - debits_posted - debits_pending FROM account "
            "WHERE kind = :kind AND id <> :market"
        ),
        {"kind": TREASURY, "market": TREASURY_ACCOUNT},
    )
    for account, available in accounts:
        if left.pop(account, 0) != available:
            findings.add(f"{account} does not have what clients are still to get")
    for account, amount in left.items():
        if amount:
            findings.add(f"{account} does not have what clients are still to get")


class Convicted(NamedTuple):
    """Where an operation that convicted is in the log."""

    node_id: str
    # Places at one of which it begins: its own evidence may be right before its transfers.
    begins: frozenset[int]
    # From where on it refunds: what the node's convictions said until then.
    since: frozenset[int]


def check_spans(
    connection: sa.Connection, findings: Findings, convicted: Mapping[bytes, Convicted]
) -> None:
    """In the log's half: refunds are of what came between the change point and the conviction."""
    for found in connection.execute(sa.text(_ROWS)):
        row = Restitution(*found)
        known = convicted.get(bytes(row.operation_id))
        # A conviction that found nothing to forfeit has no transfers.
        if known is None and row.budget == 0:
            continue
        if (
            known is None
            or known.node_id != row.node_id
            or row.end_index not in known.begins
            or row.first_index not in known.since
        ):
            findings.add(f"the refunds for clients of {row.node_id} follow from no conviction")
