"""Rows that stand beside the money, in the books' half of ``fsck``: what was refunded, is owed or
claimed, and facts that are taken once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import sqlalchemy as sa

from trueweight.ledger.accounts import external
from trueweight.ledger.findings import Findings, Tally, stream
from trueweight.protos.envelope import digest_of, parse_envelope, parse_payload
from trueweight.protos.errors import BadSignature
from trueweight.protos.v1.audit_pb2 import Verdict
from trueweight.protos.v1.market_pb2 import Receipt


@dataclass
class Refunds:
    """What refunds have paid: to each client account, and out of each node's locked and bond."""

    paid: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    by_node: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))


# A leg is refunded as a whole or not at all. Its node gives all of it back, unless the market pays
# for a router that cannot show the transcript of a leg that its node did not claim itself. (A leg
# that cost nothing is never marked as refunded.)
_WRONG_LEGS = f"""
SELECT COUNT(*) FROM leg l WHERE (refunded <> 0 OR refunded_node <> 0) AND (
  refunded NOT IN (0, charge) OR refunded_node NOT IN (0, node + subsidy)
  OR (charge > 0 AND refunded = 0)
  OR (charge > 0 AND refunded_node = 0 AND node + subsidy > 0 AND (
    NOT EXISTS (SELECT 1 FROM verdict v WHERE v.receipt_digest = l.receipt_digest
                AND v.outcome = {int(Verdict.MISSING_TRANSCRIPT)})
    OR EXISTS (SELECT 1 FROM claim c WHERE c.hold_id = l.hold_id
               AND c.receipt_digest = l.receipt_digest))))
"""  # noqa: S608


def check_refunds(connection: sa.Connection, findings: Findings, refunds: Refunds) -> None:
    """What legs were refunded was paid or is owed, and nothing else is."""
    if _count(connection, _WRONG_LEGS):
        findings.add("receipts are not refunded as a refund or a conviction does it")
    due = refunds.paid.copy()
    rows = connection.execute(
        sa.text(
            "SELECT creditor, SUM(d.amount), COUNT(*) - COUNT(o.id), MIN(d.amount) FROM debt d "
            "LEFT JOIN operation o ON o.id = d.operation_id GROUP BY creditor"
        )
    )
    for creditor, amount, unknown, least in rows:
        if unknown or least <= 0:
            findings.add(f"what is owed to {creditor} is not what operations left unpaid")
        # To nodes subsidies were owed once: the log's half finds them in their bills.
        if not creditor.startswith("node-locked:"):
            due[creditor] += int(amount)
    marked = connection.execute(
        sa.text("SELECT client, SUM(refunded) FROM leg WHERE refunded <> 0 GROUP BY client")
    )
    for client, amount in marked:
        if due.pop(client, 0) != int(amount):
            findings.add(f"the refunded receipts of {client} are not what was refunded and is owed")
    for client, amount in due.items():
        if amount:
            findings.add(f"{client} was refunded or is owed {amount} for no receipt")
    taken = connection.execute(
        sa.text("SELECT node_id, SUM(node) FROM leg WHERE refunded_node > 0 GROUP BY node_id")
    )
    returned = {node: int(amount) for node, amount in taken}
    for node, amount in refunds.by_node.items():
        if amount > returned.get(node, 0):
            findings.add(f"node {node} has refunded more than its receipts say")


_WRONG_CLAIMS = {
    "claims are on no hold, on more than it has, or on one that was voided": """
        SELECT COUNT(*) FROM (SELECT hold_id, SUM(charge) AS claimed FROM claim GROUP BY hold_id) c
        LEFT JOIN pending p ON p.id = c.hold_id AND p.kind = 1
        WHERE p.id IS NULL OR c.claimed > p.amount OR p.state = 3""",
    "holds that expired were not paid as they were claimed": """
        SELECT COUNT(*) FROM pending p LEFT JOIN
        (SELECT hold_id, SUM(charge) AS claimed FROM claim GROUP BY hold_id) c ON c.hold_id = p.id
        WHERE p.kind = 1 AND p.state = 4 AND p.posted <> COALESCE(c.claimed, 0)""",
    "claims were paid without their receipts": """
        SELECT COUNT(*) FROM claim c JOIN pending p ON p.id = c.hold_id AND p.state = 4
        LEFT JOIN leg l ON l.receipt_digest = c.receipt_digest WHERE l.receipt_digest IS NULL
        OR l.hold_id <> c.hold_id OR l.node_id <> c.node_id OR l.charge <> c.charge""",
    # The bill may carry another receipt for the assignment that was claimed.
    "holds were captured without what was claimed from them": """
        SELECT COUNT(*) FROM claim c JOIN pending p ON p.id = c.hold_id AND p.state = 2
        LEFT JOIN leg l ON l.receipt_digest = c.receipt_digest WHERE l.receipt_digest IS NULL
        AND NOT EXISTS (SELECT 1 FROM leg o WHERE o.node_id = c.node_id AND o.hold_id = c.hold_id)
        """,
}


def check_claims(connection: sa.Connection, findings: Findings) -> None:
    """Claims say what their receipts say, and were paid, once, out of their holds."""
    for problem, query in _WRONG_CLAIMS.items():
        if _count(connection, query):
            findings.add(problem)
    rows = stream(
        connection,
        "SELECT receipt, receipt_digest, assignment_digest, node_id, output_tokens FROM claim",
    )
    for receipt, digest, assignment, node, tokens in rows:
        stored = (bytes(digest), bytes(assignment), node)
        try:
            said = parse_payload(parse_envelope(bytes(receipt)), Receipt)
            found = (digest_of(bytes(receipt)), said.assignment_digest, said.node_id)
        except BadSignature:
            found = (b"", b"", "")
        # Claims of older books do not say how many tokens.
        if stored != found or tokens not in (None, said.output_tokens):
            findings.add(f"a claim of node {node} is not what its receipt says")


def check_references(
    connection: sa.Connection,
    findings: Findings,
    facts: Mapping[str, Tally],
    settled: dict[bytes, str],
) -> None:
    """Every deposit and reward took its reference, and no other operation did; what a rail calls a
    payout belongs to an operation that settled one. (Whether the references of convictions are
    those in the log, the log's half finds.)"""
    unknown = """SELECT COUNT(*) FROM reference r LEFT JOIN operation o ON o.id = r.operation_id
        WHERE o.id IS NULL"""
    if _count(connection, unknown):
        findings.add("references belong to operations that were never applied")
    for kind, key, operation in stream(connection, "SELECT kind, key, operation_id FROM reference"):
        name = f"reward:{key.rpartition(':')[0]}" if kind == "reward" else kind
        rail = kind.removeprefix("payout:")
        if name in facts:
            facts[name].take(bytes(operation))
        elif rail != kind:
            if settled.pop(bytes(operation), None) != external(rail):
                findings.add(f"the reference {key} of {kind} belongs to no payout")
        elif kind != "conviction":
            findings.add(f"the reference {key} of {kind} belongs to no transfer")
    for name, tally in facts.items():
        if tally.sum:
            findings.add(f"the references of {name} are not those of its transfers")


def _count(connection: sa.Connection, query: str) -> int:
    return int(connection.execute(sa.text(query)).scalar_one())
