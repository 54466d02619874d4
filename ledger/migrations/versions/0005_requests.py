"""Audits asked for, and what a node that is reinstated needs.

Revision ID: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from trueweight.ledger import bundle
from trueweight.ledger.values import REASON_NO
from trueweight.protos.envelope import parse_envelope
from trueweight.protos.v1.audit_pb2 import AuditRequest

revision = "0005"
down_revision = "0003"
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    table = op.create_table(
        "audit_request",
        sa.Column("log_index", BIG, primary_key=True, autoincrement=False),
        sa.Column("verifier_id", sa.Text, nullable=False),
        sa.Column("receipt_digest", sa.LargeBinary, nullable=False),
        sa.Column("node_id", sa.Text, nullable=False),
        sa.Column("receipt_index", sa.BigInteger, nullable=False),
        sa.Column("captured_at", sa.BigInteger, nullable=False),
        sa.Column("verdict_index", sa.BigInteger, nullable=False),
    )
    op.create_index(
        "audit_request_once", "audit_request", ["receipt_digest", "verifier_id"], unique=True
    )
    unanswered = sa.text("verdict_index < 0")
    op.create_index(
        "audit_request_open",
        "audit_request",
        ["node_id", "captured_at", "receipt_index"],
        sqlite_where=unanswered,
        postgresql_where=unanswered,
    )
    op.create_index("verdict_receipt", "verdict", ["receipt_digest", "verifier_id", "log_index"])
    _fill(table)
    _forbid_deletes()
    _add_to_nodes()


def _fill(table: sa.Table) -> None:
    """Requests that were logged before this table was."""
    connection = op.get_bind()
    rows = connection.execute(
        sa.text(
            "SELECT first_index, leaves, body FROM bundle WHERE kinds > 7 AND (kinds & :mask) <> 0 "
            "ORDER BY first_index"
        ),
        {"mask": bundle.mask_of(["audit-request"])},
    )
    found: dict[tuple[str, bytes], int] = {}
    for first, count, body in rows.fetchall():
        for index, (kind, leaf) in enumerate(bundle.unpack(count, bytes(body)), first):
            if kind == "audit-request":
                message = AuditRequest.FromString(parse_envelope(leaf).payload)
                found.setdefault((message.verifier_id, message.receipt_digest), index)
    if found:
        op.bulk_insert(table, [_row(connection, *key, at) for key, at in found.items()])


def _row(
    connection: sa.Connection, verifier_id: str, receipt_digest: bytes, log_index: int
) -> dict[str, object]:
    found = connection.execute(
        sa.text(
            "SELECT node_id, log_index, captured_at FROM leg "
            "WHERE receipt_digest = :d AND log_index < :i"
        ),
        {"d": receipt_digest, "i": log_index},
    ).fetchall()
    leg = tuple(found[0]) if found else ("", -1, 0)
    verdict = connection.execute(
        sa.text(
            "SELECT MIN(log_index) FROM verdict WHERE receipt_digest = :d AND verifier_id = :v "
            "AND log_index > :i"
        ),
        {"d": receipt_digest, "v": verifier_id, "i": log_index},
    ).scalar_one()
    return {
        "log_index": log_index,
        "verifier_id": verifier_id,
        "receipt_digest": receipt_digest,
        "node_id": leg[0],
        "receipt_index": leg[1],
        "captured_at": leg[2],
        "verdict_index": -1 if verdict is None else verdict,
    }


def _forbid_deletes() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.execute(
            "CREATE TRIGGER audit_request_no_delete BEFORE DELETE ON audit_request "
            "BEGIN SELECT RAISE(ABORT, 'audit_request rows are history'); END"
        )
    else:
        op.execute(
            "CREATE TRIGGER audit_request_history BEFORE DELETE ON audit_request "
            "FOR EACH ROW EXECUTE FUNCTION trueweight_history()"
        )


def _add_to_nodes() -> None:
    zero = sa.text("0")
    op.add_column("node", sa.Column("reinstated", BIG, nullable=False, server_default=zero))
    op.add_column("node", sa.Column("forfeited", BIG, nullable=False, server_default=zero))
    # What was archived is not seen: then less may be paid back, never more.
    op.execute(
        sa.text(
            "UPDATE node SET forfeited = (SELECT COALESCE(SUM(t.amount), 0) FROM transfer t "
            "JOIN account a ON a.no = t.debit WHERE t.reason = :reason "
            "AND a.id IN ('node-locked:' || node.node_id, 'node-bond:' || node.node_id)) "
            "WHERE convicted <> 0"
        ).bindparams(reason=REASON_NO["forfeit"])
    )


def downgrade() -> None:
    raise NotImplementedError("books are not deleted by a migration")
