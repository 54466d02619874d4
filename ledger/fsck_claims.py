"""What nodes claimed from holds that their router did not settle, and what is kept of how much they
did: in both halves of ``fsck``."""

from __future__ import annotations

import sqlalchemy as sa

from trueweight.ledger.findings import Findings, count, exact, stream
from trueweight.ledger.movements import MAX_HOLD_MS
from trueweight.protos.envelope import digest_of, parse_envelope, parse_payload
from trueweight.protos.errors import BadSignature, InvalidRequest
from trueweight.protos.money import charge_nano
from trueweight.protos.v1.market_pb2 import Bill, BillLeg, Receipt

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
        OR l.hold_id <> c.hold_id OR l.node_id <> c.node_id OR l.charge <> c.charge
        OR COALESCE(l.output_tokens, -1) <> COALESCE(c.output_tokens, -1)
        OR l.manifest_digest <> c.manifest_digest
        OR (l.manifest_digest IS NULL) <> (c.manifest_digest IS NULL)""",
    "claims are for other weights than their receipts": """
        SELECT COUNT(*) FROM claim c LEFT JOIN leg l ON l.receipt_digest = c.receipt_digest
        WHERE l.manifest_digest <> c.manifest_digest
        OR (c.manifest_digest IS NULL) <> (c.output_tokens IS NULL)""",
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
        if count(connection, query):
            findings.add(problem)
    rows = stream(
        connection,
        "SELECT receipt, receipt_digest, assignment_digest, node_id, output_tokens, charge "
        "FROM claim",
    )
    for receipt, digest, assignment, node, tokens, charge in rows:
        stored = (bytes(digest), bytes(assignment), node)
        try:
            said = parse_payload(parse_envelope(bytes(receipt)), Receipt)
            found = (digest_of(bytes(receipt)), said.assignment_digest, said.node_id)
        except BadSignature:
            found = (b"", b"", "")
        # Claims of older books do not say how many tokens.
        if stored != found or tokens not in (None, said.output_tokens) or exact(charge) < 0:
            findings.add(f"a claim of node {node} is not what its receipt says")


class Claims:
    """Claims that a bill has replaced, against that bill, in the log's half."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        rows = stream(
            connection,
            "SELECT DISTINCT c.hold_id FROM claim c JOIN pending p ON p.id = c.hold_id "
            "AND p.state = 2",
        )
        self._holds = {bytes(row[0]) for row in rows}

    def bill(self, findings: Findings, bill: Bill) -> None:
        """A leaf that is a bill: at its prices a claim is for what its receipt says."""
        if bill.hold_id not in self._holds:
            return
        billed = {leg.assignment_digest: leg for leg in bill.legs}
        rows = self._connection.execute(
            sa.text("SELECT assignment_digest, receipt, charge FROM claim WHERE hold_id = :hold"),
            {"hold": bill.hold_id},
        )
        for assignment, receipt, charge in rows.fetchall():
            leg = billed.get(bytes(assignment))
            if leg is not None and charge != _worth(bytes(receipt), leg):
                findings.add(f"a claim of node {leg.node_id} is not for what its receipt is worth")


def _worth(receipt: bytes, leg: BillLeg) -> int | None:
    """What a whole receipt costs at the prices of its assignment, which a bill names too."""
    try:
        said = parse_payload(parse_envelope(receipt), Receipt)
        return charge_nano(
            said.prompt_tokens,
            said.output_tokens,
            leg.ask_input_nano_per_mtok,
            leg.ask_output_nano_per_mtok,
        )
    except (BadSignature, InvalidRequest):
        return None


class Tokens:
    """Receipts that do not say how many tokens they have, in the log's half: only those may that
    were settled, or claimed, before the ledger kept it. Then every receipt was found by an entry in
    ``evidence``, too."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        # When the first receipt was settled that says it; and whether some before it do not.
        self.since: int | None = None
        self._some_are_old = False

    def unknown(self, findings: Findings, place: int, digest: bytes, *, is_indexed: bool) -> None:
        """One that does not. ``is_indexed``: it is found in ``evidence``."""
        if self.since is None and is_indexed:
            self._some_are_old = True
            return
        claims = sa.text(
            "SELECT COUNT(*) FROM claim WHERE receipt_digest = :digest AND output_tokens IS NULL"
        )
        if not self._connection.execute(claims, {"digest": digest}).scalar_one():
            findings.add(f"nothing is kept of how many tokens the receipt in leaf {place} has")

    def finish(self, findings: Findings) -> None:
        """After the last leaf."""
        if self.since is None:
            return
        # A hold that was taken later is due later.
        latest = self.since + MAX_HOLD_MS if self._some_are_old else -1
        wrong = sa.text(
            "SELECT COUNT(*) FROM claim c JOIN pending p ON p.id = c.hold_id "
            "WHERE c.output_tokens IS NULL AND p.due > :latest"
        )
        if self._connection.execute(wrong, {"latest": latest}).scalar_one():
            findings.add("nothing is kept of how many tokens claimed receipts have")
