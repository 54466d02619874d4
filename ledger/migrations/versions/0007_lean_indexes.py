"""Transfers are indexed by the accounts that people ask about. A client's clearing account, fees
and the pool are in almost every transfer; their statements are read in the order of the book.

Revision ID: 0007
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# Numbers of reasons: earning, fee, pool (debit a clearing account); hold, capture (credit it), fee,
# pool (credit the market's).
NOT_INDEXED = {"debit": "5, 6, 7", "credit": "3, 4, 6, 7"}


def upgrade() -> None:
    for side, reasons in NOT_INDEXED.items():
        op.drop_index(f"transfer_{side}", "transfer")
        where = sa.text(f"reason NOT IN ({reasons})")
        op.create_index(
            f"transfer_{side}",
            "transfer",
            [side, "sequence"],
            sqlite_where=where,
            postgresql_where=where,
        )

    if op.get_bind().dialect.name == "sqlite":
        _append_legs()


def _append_legs() -> None:
    """SQLite kept legs in the order of their digests, which are random, so that each went into a
    page of its own. Now they are appended, and only an index of the digests is random."""
    op.execute("CREATE TABLE old_leg AS SELECT * FROM leg ORDER BY log_index")
    op.drop_table("leg")
    op.create_table(
        "leg",
        sa.Column("receipt_digest", sa.LargeBinary, primary_key=True),
        sa.Column("hold_id", sa.LargeBinary, nullable=False),
        sa.Column("node_id", sa.Text, nullable=False),
        sa.Column("client", sa.Text, nullable=False),
        *(
            sa.Column(name, sa.BigInteger, nullable=False)
            for name in (
                "charge", "fee", "pool", "node", "subsidy", "log_index", "captured_at",
                "refunded", "refunded_node",
            )
        ),
        sa.Column("output_tokens", sa.BigInteger),
        sa.Column("manifest_digest", sa.LargeBinary),
        sa.CheckConstraint("fee + pool + node = charge", name="split_is_exact"),
        sa.CheckConstraint("refunded BETWEEN 0 AND charge", name="refunds_within_charge"),
    )  # fmt: skip
    op.execute("INSERT INTO leg SELECT * FROM old_leg")
    op.drop_table("old_leg")
    op.create_index("leg_node", "leg", ["node_id", "log_index"])


def downgrade() -> None:
    raise NotImplementedError("books are not deleted by a migration")
