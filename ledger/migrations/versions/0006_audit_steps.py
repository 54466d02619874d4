"""What a conviction follows from besides requests and verdicts: each verifier's epochs and
calibrations; and of each leg its output tokens and weights.

Legs settled before have neither, and carry no conviction.

Revision ID: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from trueweight.ledger import bundle
from trueweight.ledger.audits import STEP_KINDS, step_row
from trueweight.protos.envelope import digest_of, message_class, parse_envelope

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("leg", sa.Column("output_tokens", sa.BigInteger))
    op.add_column("leg", sa.Column("manifest_digest", sa.LargeBinary))
    op.add_column("claim", sa.Column("output_tokens", sa.BigInteger))
    op.add_column("claim", sa.Column("manifest_digest", sa.LargeBinary))
    table = op.create_table(
        "audit_step",
        sa.Column("log_index", BIG, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.SmallInteger, nullable=False),
        sa.Column("verifier_id", sa.Text, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )
    op.create_index("audit_step_kind", "audit_step", ["verifier_id", "kind", "log_index"])
    appeal = sa.Column("for_appeal", sa.SmallInteger, nullable=False, server_default=sa.text("0"))
    op.add_column("audit_request", appeal)
    columns = ["node_id", "verifier_id", "log_index"]
    op.create_index("audit_request_node", "audit_request", columns)
    _fill(table)
    _forbid_changes()


def _fill(table: sa.Table) -> None:
    """Statements that were logged before this table was."""
    connection = op.get_bind()
    rows = connection.execute(
        sa.text("SELECT first_index, leaves, body FROM bundle WHERE (kinds & :mask) <> 0"),
        {"mask": bundle.mask_of(STEP_KINDS)},
    )
    found = []
    for first, count, body in rows.fetchall():
        for index, (kind, leaf) in enumerate(bundle.unpack(count, bytes(body)), first):
            if kind in STEP_KINDS:
                message = message_class(kind).FromString(parse_envelope(leaf).payload)
                row = step_row(message, digest_of(leaf), leaf)
                if row is not None:
                    found.append(row._replace(log_index=index)._asdict())
    if found:
        op.bulk_insert(table, found)


def _forbid_changes() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for event in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER audit_step_no_{event.lower()} BEFORE {event} ON audit_step "
                "BEGIN SELECT RAISE(ABORT, 'audit_step rows are history'); END"
            )
    else:
        op.execute(
            "CREATE TRIGGER audit_step_history BEFORE UPDATE OR DELETE ON audit_step "
            "FOR EACH ROW EXECUTE FUNCTION trueweight_history()"
        )


def downgrade() -> None:
    raise NotImplementedError("books are not deleted by a migration")
