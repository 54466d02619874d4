"""Audits that hold a release, without those for appeals, which hold nothing.

Revision ID: 0011
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("audit_request_open", "audit_request")
    holds = sa.text("verdict_index < 0 AND for_appeal = 0")
    op.create_index(
        "audit_request_open",
        "audit_request",
        ["node_id", "captured_at", "receipt_index"],
        sqlite_where=holds,
        postgresql_where=holds,
    )


def downgrade() -> None:
    raise NotImplementedError("books are not deleted by a migration")
