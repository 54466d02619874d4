"""Budgets of API keys for a period.

Revision ID: 0004
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_OF_A_KEY = ("period_ms", "period_limit", "period_no", "period_from", "period_spent")


def upgrade() -> None:
    for table, names in (("pending", ("period_no",)), ("spending", _OF_A_KEY)):
        for name in names:
            # With its CHECK in one statement, because SQLite cannot add one afterwards.
            op.execute(
                f"ALTER TABLE {table} ADD COLUMN {name} BIGINT NOT NULL DEFAULT 0 "
                f"CHECK ({name} >= 0)"
            )


def downgrade() -> None:
    raise NotImplementedError("books are not deleted by a migration")
