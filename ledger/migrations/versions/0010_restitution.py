"""Refunds of a conviction that are under way, and open bond withdrawals by their account.

Revision ID: 0010
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
NUMBERS = ("first_index", "end_index", "next_index", "is_counting", "budget", "total", "seen")


def upgrade() -> None:
    op.create_table(
        "restitution",
        # The conviction's operation.
        sa.Column("operation_id", sa.LargeBinary, primary_key=True),
        sa.Column("node_id", sa.Text, nullable=False),
        *(sa.Column(name, BIG, nullable=False) for name in NUMBERS),
        sa.CheckConstraint("seen BETWEEN 0 AND total AND budget >= 0", name="refunds_within_total"),
        sa.CheckConstraint(
            "next_index BETWEEN first_index AND end_index", name="next_within_receipts"
        ),
    )
    # A conviction voids them: it must not look through all holds for them.
    open_ = sa.text("kind = 3 AND state = 1")
    op.create_index(
        "pending_withdrawal", "pending", ["debit"], sqlite_where=open_, postgresql_where=open_
    )


def downgrade() -> None:
    raise NotImplementedError("books are not deleted by a migration")
