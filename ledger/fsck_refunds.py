"""What was refunded, and what is owed because it could not be, in the books' half of ``fsck``."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import sqlalchemy as sa

from trueweight.ledger.accounts import (
    CLIENT,
    NODE_BOND,
    NODE_LOCKED,
    TREASURY,
    TREASURY_ACCOUNT,
    owner_of,
)
from trueweight.ledger.findings import Findings, count, exact, stream


class Side(NamedTuple):
    """One of a transfer's two accounts."""

    kind: int
    name: str


@dataclass
class Refunds:
    """What refunds have paid, and who is behind what they could not pay."""

    # To each client account.
    paid: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    # By node: out of its locked earnings and its bond to clients; out of locked earnings at all.
    by_node: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    from_locked: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    # By operation that left debts: the client accounts that it refunded something.
    debtors: dict[bytes, set[str]] = field(default_factory=dict)
    # Those that undo many receipts at once, so that some clients may get nothing of it.
    convicting: set[bytes] = field(default_factory=set)

    def expect_debts(self, connection: sa.Connection) -> None:
        """Before the transfers are read: operations that the books say left debts."""
        rows = stream(connection, "SELECT DISTINCT operation_id FROM debt")
        self.debtors = {bytes(row[0]): set() for row in rows}

    def note(self, operation: bytes, debit: Side, credit: Side, amount: int) -> None:
        """A transfer that refunds."""
        if debit.kind == NODE_LOCKED:
            self.from_locked[owner_of(debit.name)] += amount
        if credit.kind != CLIENT:
            return
        self.paid[credit.name] += amount
        if debit.kind in (NODE_LOCKED, NODE_BOND):
            self.by_node[owner_of(debit.name)] += amount
        if operation in self.debtors:
            self.debtors[operation].add(credit.name)
            if debit.kind == TREASURY and debit.name != TREASURY_ACCOUNT:
                self.convicting.add(operation)

    def note_conviction(self, operation: bytes) -> None:
        """An operation that forfeits."""
        if operation in self.debtors:
            self.convicting.add(operation)

    def explains(self, operation: bytes, creditor: str, answer: tuple[int, int]) -> bool:
        """True if an operation, which answered with this amount and leaf, may have left this debt.
        One that found all accounts empty has moved nothing."""
        refunded = self.debtors.get(operation)
        if not refunded:
            return operation in self.convicting or answer == (0, -1)
        return creditor in refunded or operation in self.convicting


# A leg is refunded as a whole or not at all, and its node cannot give back more than it got. (A leg
# that cost nothing is never marked as refunded.)
_WRONG_LEGS = """
SELECT COUNT(*) FROM leg WHERE (refunded <> 0 OR refunded_node <> 0) AND (
  refunded NOT IN (0, charge) OR refunded_node NOT BETWEEN 0 AND node + subsidy
  OR (charge > 0 AND refunded = 0))
"""


# Of receipts of single refunds: how many there are, how many are marked so, and what their nodes
# gave back of those whose whole part was marked.
_REFUNDED = sa.text("""
SELECT node_id, COUNT(*), COUNT(CASE WHEN refunded = charge THEN 1 END),
  SUM(CASE WHEN refunded_node = node + subsidy THEN refunded_node ELSE 0 END)
FROM leg WHERE receipt_digest IN :digests GROUP BY node_id
""").bindparams(sa.bindparam("digests", expanding=True))
_CHUNK = 500


def check_single_refunds(connection: sa.Connection, findings: Findings) -> dict[str, int]:
    """Receipts that took the reference of a refund are marked. By node: what these marks say of
    whole parts that it gave back. (Older ledgers gave no such references.)"""
    keys = [r[0] for r in stream(connection, "SELECT key FROM reference WHERE kind = 'refund'")]
    whole: defaultdict[str, int] = defaultdict(int)
    for place in range(0, len(keys), _CHUNK):
        digests = [_digest(key) for key in keys[place : place + _CHUNK]]
        marked = 0
        for node, found, refunded, amount in connection.execute(_REFUNDED, {"digests": digests}):
            marked += min(found, refunded)
            whole[node] += exact(amount)
        if marked != len(digests):
            findings.add("receipts that were refunded are not marked so")
    return whole


def _digest(key: str) -> bytes:
    """Of a receipt; empty if the key is not written as the ledger writes it."""
    try:
        digest = bytes.fromhex(key)
    except ValueError:
        return b""
    return digest if digest.hex() == key else b""


def check_refunds(connection: sa.Connection, findings: Findings, refunds: Refunds) -> None:
    """What legs were refunded was paid or is owed, and nothing else is."""
    if count(connection, _WRONG_LEGS):
        findings.add("receipts are not refunded as a refund or a conviction does it")
    due = refunds.paid.copy()
    rows = stream(
        connection,
        "SELECT d.operation_id, d.creditor, d.amount, o.amount, o.log_index FROM debt d "
        "LEFT JOIN operation o ON o.id = d.operation_id",
    )
    for operation, creditor, amount, *answer in rows:
        # To nodes subsidies were owed once: the log's half finds them in their bills.
        is_subsidy = creditor.startswith("node-locked:")
        known = None not in answer
        if not is_subsidy:
            due[creditor] += amount
            known = known and refunds.explains(bytes(operation), creditor, tuple(answer))
        if not known or amount <= 0:
            findings.add(f"what is owed to {creditor} is not what operations left unpaid")
    marked = connection.execute(
        sa.text("SELECT client, SUM(refunded) FROM leg WHERE refunded <> 0 GROUP BY client")
    )
    for client, amount in marked:
        if due.pop(client, 0) != exact(amount):
            findings.add(f"the refunded receipts of {client} are not what was refunded and is owed")
    for client, amount in due.items():
        if amount:
            findings.add(f"{client} was refunded or is owed {amount} for no receipt")
