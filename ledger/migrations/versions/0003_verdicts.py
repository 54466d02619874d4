"""What each logged verdict says, so that a conviction can be recomputed.

Revision ID: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from trueweight.ledger import bundle
from trueweight.protos.envelope import parse_envelope
from trueweight.protos.v1.audit_pb2 import Verdict

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    table = op.create_table(
        "verdict",
        sa.Column("log_index", BIG, primary_key=True, autoincrement=False),
        sa.Column("verifier_id", sa.Text, nullable=False),
        sa.Column("node_id", sa.Text, nullable=False),
        sa.Column("receipt_digest", sa.LargeBinary, nullable=False),
        sa.Column("calibration_digest", sa.LargeBinary, nullable=False),
        sa.Column("parameter_class", sa.Text, nullable=False),
        sa.Column("sum_x_nano", sa.BigInteger, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("outcome", sa.SmallInteger, nullable=False),
    )
    op.create_index("verdict_node", "verdict", ["node_id", "verifier_id", "log_index"])
    _fill(table)
    _forbid_changes()


def _fill(table: sa.Table) -> None:
    """Verdicts that were logged before this table was."""
    connection = op.get_bind()
    mask = bundle.mask_of(["verdict"])
    rows = connection.execute(
        sa.text(
            "SELECT first_index, leaves, body FROM bundle WHERE kinds > 7 AND (kinds & :mask) <> 0"
        ),
        {"mask": mask},
    )
    found = []
    for first, count, body in rows.fetchall():
        for index, (kind, leaf) in enumerate(bundle.unpack(count, bytes(body)), first):
            if kind == "verdict":
                verdict = Verdict.FromString(parse_envelope(leaf).payload)
                found.append(
                    {
                        "log_index": index,
                        "verifier_id": verdict.verifier_id,
                        "node_id": verdict.node_id,
                        "receipt_digest": verdict.receipt_digest,
                        "calibration_digest": verdict.calibration_digest,
                        "parameter_class": verdict.parameter_class,
                        "sum_x_nano": min(verdict.sum_x_nano, 2**63 - 1),
                        "tokens": verdict.scored_tokens,
                        "outcome": int(verdict.outcome),
                    }
                )
    if found:
        op.bulk_insert(table, found)


def _forbid_changes() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for event in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER verdict_no_{event.lower()} BEFORE {event} ON verdict "
                "BEGIN SELECT RAISE(ABORT, 'verdict rows are history'); END"
            )
    else:
        op.execute(
            "CREATE TRIGGER verdict_history BEFORE UPDATE OR DELETE ON verdict "
            "FOR EACH ROW EXECUTE FUNCTION trueweight_history()"
        )


def downgrade() -> None:
    raise NotImplementedError("books are not deleted by a migration")
