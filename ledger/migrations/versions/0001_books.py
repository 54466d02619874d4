"""Accounts, transfers, pending transfers, evidence and the Merkle log.

Revision ID: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# SQLite makes only an INTEGER primary key the row id itself.
BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
EXTERNAL = 9
OPEN = 1
# Rows that, once written, are history.
IMMUTABLE = ("transfer", "operation", "bundle", "tile", "checkpoint", "reference", "debt")


def upgrade() -> None:
    _create_books()
    _create_pending()
    _create_evidence()
    _create_log()
    if op.get_bind().dialect.name == "sqlite":
        _sqlite_triggers()
    else:
        _postgresql_triggers()


def _create_books() -> None:
    op.create_table(
        "account",
        sa.Column("no", BIG, primary_key=True, autoincrement=False),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("kind", sa.SmallInteger, nullable=False),
        sa.Column("currency", sa.Text, nullable=False),
        sa.Column("debits_pending", sa.BigInteger, nullable=False),
        sa.Column("debits_posted", sa.BigInteger, nullable=False),
        sa.Column("credits_pending", sa.BigInteger, nullable=False),
        sa.Column("credits_posted", sa.BigInteger, nullable=False),
        sa.CheckConstraint(
            "debits_pending >= 0 AND debits_posted >= 0 "
            "AND credits_pending >= 0 AND credits_posted >= 0",
            name="counters_not_negative",
        ),
        sa.CheckConstraint(
            f"kind = {EXTERNAL} OR credits_posted - debits_posted - debits_pending >= 0",
            name="never_overdrawn",
        ),
    )
    op.create_table(
        "transfer",
        sa.Column("sequence", BIG, primary_key=True, autoincrement=False),
        sa.Column("operation_id", sa.LargeBinary, nullable=False),
        sa.Column("ordinal", sa.Integer, nullable=False),
        sa.Column("debit", sa.BigInteger, nullable=False),
        sa.Column("credit", sa.BigInteger, nullable=False),
        sa.Column("amount", sa.BigInteger, nullable=False),
        sa.Column("phase", sa.SmallInteger, nullable=False),
        sa.Column("pending_id", sa.LargeBinary, nullable=True),
        sa.Column("reason", sa.SmallInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.CheckConstraint("amount >= 0", name="amount_not_negative"),
        sa.CheckConstraint("debit <> credit", name="two_sides"),
        sa.CheckConstraint(
            "(phase IN (1, 2)) = (pending_id IS NULL)", name="second_phase_names_the_first"
        ),
    )
    # (operation_id, ordinal) is unique because operation ids are: see the operation table.
    # One resolution per pending transfer, enforced here and not only in Python.
    op.create_index(
        "resolved_once",
        "transfer",
        ["pending_id"],
        unique=True,
        sqlite_where=sa.text("pending_id IS NOT NULL"),
        postgresql_where=sa.text("pending_id IS NOT NULL"),
    )
    op.create_index("transfer_debit", "transfer", ["debit", "sequence"])
    op.create_index("transfer_credit", "transfer", ["credit", "sequence"])


def _create_pending() -> None:
    op.create_table(
        "pending",
        sa.Column("id", sa.LargeBinary, primary_key=True),
        sa.Column("kind", sa.SmallInteger, nullable=False),
        sa.Column("debit", sa.Text, nullable=False),
        sa.Column("credit", sa.Text, nullable=False),
        sa.Column("amount", sa.BigInteger, nullable=False),
        sa.Column("posted", sa.BigInteger, nullable=False),
        sa.Column("state", sa.SmallInteger, nullable=False),
        sa.Column("due", sa.BigInteger, nullable=False),
        sa.Column("api_key_id", sa.Text, nullable=False),
        sa.Column("router_id", sa.Text, nullable=False),
        sa.CheckConstraint("amount > 0 AND posted BETWEEN 0 AND amount", name="posted_within_held"),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "pending_due",
        "pending",
        ["due"],
        sqlite_where=sa.text(f"state = {OPEN}"),
        postgresql_where=sa.text(f"state = {OPEN}"),
    )
    op.create_table(
        "operation",
        sa.Column("id", sa.LargeBinary, primary_key=True),
        sa.Column("body_hash", sa.LargeBinary, nullable=False),
        sa.Column("amount", sa.BigInteger, nullable=False),
        sa.Column("log_index", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )


def _create_evidence() -> None:
    op.create_table(
        "leg",
        sa.Column("receipt_digest", sa.LargeBinary, primary_key=True),
        sa.Column("hold_id", sa.LargeBinary, nullable=False),
        sa.Column("node_id", sa.Text, nullable=False),
        sa.Column("client", sa.Text, nullable=False),
        sa.Column("charge", sa.BigInteger, nullable=False),
        sa.Column("fee", sa.BigInteger, nullable=False),
        sa.Column("pool", sa.BigInteger, nullable=False),
        sa.Column("node", sa.BigInteger, nullable=False),
        sa.Column("subsidy", sa.BigInteger, nullable=False),
        sa.Column("log_index", sa.BigInteger, nullable=False),
        sa.Column("captured_at", sa.BigInteger, nullable=False),
        sa.Column("refunded", sa.BigInteger, nullable=False),
        sa.Column("refunded_node", sa.BigInteger, nullable=False),
        sa.CheckConstraint("fee + pool + node = charge", name="split_is_exact"),
        sa.CheckConstraint("refunded BETWEEN 0 AND charge", name="refunds_within_charge"),
        sqlite_with_rowid=False,
    )
    op.create_index("leg_node", "leg", ["node_id", "log_index"])
    op.create_table(
        "claim",
        sa.Column("hold_id", sa.LargeBinary, primary_key=True),
        sa.Column("assignment_digest", sa.LargeBinary, primary_key=True),
        sa.Column("receipt_digest", sa.LargeBinary, nullable=False),
        sa.Column("receipt", sa.LargeBinary, nullable=False),
        sa.Column("node_id", sa.Text, nullable=False),
        sa.Column("charge", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "reference",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, primary_key=True),
        sa.Column("operation_id", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "spending",
        sa.Column("api_key_id", sa.Text, primary_key=True),
        sa.Column("limit_nano", sa.BigInteger, nullable=False),
        sa.Column("spent", sa.BigInteger, nullable=False),
        sa.CheckConstraint("spent >= 0 AND limit_nano >= 0", name="spending_not_negative"),
    )
    op.create_table(
        "node",
        sa.Column("node_id", sa.Text, primary_key=True),
        sa.Column("released", sa.BigInteger, nullable=False),
        sa.Column("convicted", sa.SmallInteger, nullable=False),
    )
    op.create_table(
        "debt",
        sa.Column("operation_id", sa.LargeBinary, primary_key=True),
        sa.Column("creditor", sa.Text, primary_key=True),
        sa.Column("amount", sa.BigInteger, nullable=False),
    )


def _create_log() -> None:
    op.create_table(
        "bundle",
        sa.Column("first_index", BIG, primary_key=True, autoincrement=False),
        sa.Column("leaves", sa.Integer, nullable=False),
        sa.Column("kinds", sa.BigInteger, nullable=False),
        sa.Column("merged_at", sa.BigInteger, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )
    # Bundles with rare kinds of evidence, so that a follower need not read every receipt.
    rare = sa.text("kinds > 7")
    op.create_index(
        "bundle_rare", "bundle", ["first_index"], sqlite_where=rare, postgresql_where=rare
    )
    op.create_table(
        "evidence",
        sa.Column("digest", sa.LargeBinary, primary_key=True),
        sa.Column("log_index", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "tile",
        sa.Column("level", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("hashes", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "checkpoint",
        sa.Column("size", BIG, primary_key=True, autoincrement=False),
        sa.Column("root", sa.LargeBinary, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("issued_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "meta",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )


def _sqlite_triggers() -> None:
    for table in IMMUTABLE:
        for event in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{event.lower()} BEFORE {event} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} rows are history'); END"
            )
    op.execute(
        "CREATE TRIGGER pending_once BEFORE UPDATE ON pending "
        f"WHEN OLD.state <> {OPEN} OR NEW.state = {OPEN} OR NEW.amount <> OLD.amount "
        "OR NEW.debit <> OLD.debit OR NEW.credit <> OLD.credit OR NEW.id <> OLD.id "
        "BEGIN SELECT RAISE(ABORT, 'a pending transfer is resolved exactly once'); END"
    )
    op.execute(
        "CREATE TRIGGER pending_no_delete BEFORE DELETE ON pending "
        "BEGIN SELECT RAISE(ABORT, 'pending rows are history'); END"
    )


def _postgresql_triggers() -> None:
    op.execute(
        "CREATE FUNCTION trueweight_history() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION '% rows are history', TG_TABLE_NAME "
        "USING ERRCODE = 'integrity_constraint_violation'; END $$"
    )
    for table in (*IMMUTABLE, "pending"):
        events = "DELETE" if table == "pending" else "UPDATE OR DELETE"
        op.execute(
            f"CREATE TRIGGER {table}_history BEFORE {events} ON {table} "
            "FOR EACH ROW EXECUTE FUNCTION trueweight_history()"
        )
    op.execute(
        "CREATE TRIGGER pending_once BEFORE UPDATE ON pending FOR EACH ROW "
        f"WHEN (OLD.state <> {OPEN} OR NEW.state = {OPEN} OR NEW.amount <> OLD.amount "
        "OR NEW.debit <> OLD.debit OR NEW.credit <> OLD.credit OR NEW.id <> OLD.id) "
        "EXECUTE FUNCTION trueweight_history()"
    )


def downgrade() -> None:
    raise NotImplementedError("books are not deleted by a migration")
