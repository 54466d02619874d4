"""Refunds of convictions that are made in steps, in the books' half of ``fsck``."""

from __future__ import annotations

from collections import defaultdict

import sqlalchemy as sa

from trueweight.ledger.accounts import TREASURY, TREASURY_ACCOUNT
from trueweight.ledger.findings import Findings
from trueweight.ledger.restitution import set_aside
from trueweight.ledger.values import Restitution

_ROWS = f"SELECT {', '.join(Restitution._fields)} FROM restitution"  # noqa: S608
_LEFT_OUT = sa.text(
    "SELECT COUNT(*) FROM leg WHERE node_id = :node AND log_index >= :first AND log_index < :next "
    "AND charge > 0 AND refunded = 0"
)


def check_restitutions(connection: sa.Connection, findings: Findings) -> None:
    """What is set aside is what clients are still to get, and receipts are refunded in order."""
    left: defaultdict[str, int] = defaultdict(int)
    rows = connection.execute(sa.text("SELECT node_id FROM node WHERE convicted = 1"))
    convicted = {row[0] for row in rows}
    for row in connection.execute(sa.text(_ROWS)):
        known = Restitution(*row)
        if known.is_open:
            left[set_aside(known.node_id)] += known.budget if known.is_counting else known.unpaid
        if known.is_open and known.node_id not in convicted:
            findings.add(f"clients of {known.node_id} are refunded, and it is not convicted")
        if not known.is_open and known.seen != known.total:
            findings.add(f"the refunds of the conviction of {known.node_id} are not complete")
        if not known.is_counting and _left_out(connection, known):
            findings.add(f"the conviction of {known.node_id} has left out receipts")
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


def _left_out(connection: sa.Connection, known: Restitution) -> bool:
    span = {"node": known.node_id, "first": known.first_index, "next": known.next_index}
    return bool(connection.execute(_LEFT_OUT, span).scalar_one())
