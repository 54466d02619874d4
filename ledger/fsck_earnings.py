"""What nodes earned, gave back and still have locked, in the books' half of ``fsck``.

What a node has locked is what its receipts earned, less what refunds took of that and less what was
released. A conviction takes all that is locked, so that this holds again when it is taken back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from trueweight.ledger.findings import Findings, exact
from trueweight.ledger.fsck_refunds import Refunds, check_single_refunds

# ``whole``: of the refunded receipts whose whole part of the node was marked.
_SUMS = """
SELECT node_id, SUM(node + subsidy), SUM(refunded_node),
  SUM(CASE WHEN refunded_node = node + subsidy THEN refunded_node ELSE 0 END),
  SUM(CASE WHEN refunded <> 0 THEN node ELSE 0 END)
FROM leg GROUP BY node_id
"""


@dataclass(frozen=True, slots=True)
class _Sums:
    """What a node's receipts come to."""

    earned: int = 0
    taken_back: int = 0
    whole: int = 0
    # What clients got back, or are owed, of the node's part.
    refunded: int = 0


def check_earnings(
    connection: sa.Connection,
    findings: Findings,
    earned: Mapping[str, int],
    locked: Mapping[str, int],
    refunds: Refunds,
) -> None:
    """By node: what transfers say it earned, and what it has locked now."""
    known_whole = check_single_refunds(connection, findings)
    rows = connection.execute(sa.text(_SUMS))
    sums = {node: _Sums(*map(exact, values)) for node, *values in rows}
    known = connection.execute(sa.text("SELECT node_id, released, convicted FROM node"))
    released, convicted = {}, set()
    for node, amount, is_convicted in known:
        released[node] = exact(amount)
        if is_convicted:
            convicted.add(node)
    for node in (
        sums.keys() | earned.keys() | locked.keys() | refunds.by_node.keys() | released.keys()
    ):
        legs = sums.get(node, _Sums())
        if legs.earned != earned.get(node, 0):
            findings.add(f"the receipts of node {node} are not what it earned")
        too_much = refunds.by_node.get(node, 0) > legs.refunded
        if too_much or refunds.from_locked.get(node, 0) > legs.taken_back:
            findings.add(f"node {node} has refunded more than its receipts say")
        if node not in convicted:
            left = legs.earned - legs.taken_back - released.get(node, 0)
            most = legs.whole - known_whole.get(node, 0)
            _check_locked(findings, node, locked.get(node, 0) - left, most)


def _check_locked(findings: Findings, node: str, excess: int, most: int) -> None:
    """Older ledgers marked the whole part of the node as taken back from it, whatever account had
    paid for that: so much more may be locked than is left to be released, and stays so. Their
    refunds took no references."""
    if excess < 0:
        findings.add(f"node {node} has {-excess} less locked than its receipts have left it")
    elif excess > most:
        findings.add(f"node {node} has {excess} more locked than its receipts have left it")
