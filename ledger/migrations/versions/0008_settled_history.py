"""What was settled, claimed and logged is history too: legs are the only place where receipts are
found by their digests, and say what may be refunded and released.

Revision ID: 0008
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

NEVER_CHANGED = ("evidence", "claim")
NEVER_DELETED = ("leg", "account", *NEVER_CHANGED)
# What an account is. Naming the columns keeps the trigger away from updates of its counters, which
# every operation makes.
IDENTITY = ("no", "id", "kind", "currency")
# All of a leg but what refunds mark.
SETTLED = (
    "receipt_digest", "hold_id", "node_id", "client", "charge", "fee", "pool", "node", "subsidy",
    "log_index", "captured_at", "output_tokens", "manifest_digest",
)  # fmt: skip
REFUNDS = ("refunded", "refunded_node")


def upgrade() -> None:
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    differs = "IS NOT" if is_sqlite else "IS DISTINCT FROM"
    settled = [f"NEW.{column} {differs} OLD.{column}" for column in SETTLED]
    shrunk = [f"NEW.{column} < OLD.{column}" for column in REFUNDS]
    changed = " OR ".join([*settled, *shrunk])
    forbid = _forbid_on_sqlite if is_sqlite else _forbid_on_postgresql
    for table in NEVER_DELETED:
        forbid(table, "no_delete", "DELETE")
    for table in NEVER_CHANGED:
        forbid(table, "no_update", "UPDATE")
    forbid("account", "identity", f"UPDATE OF {', '.join(IDENTITY)}")
    forbid("leg", "refunds_grow", "UPDATE", changed)


def _forbid_on_sqlite(table: str, name: str, event: str, condition: str = "TRUE") -> None:
    op.execute(
        f"CREATE TRIGGER {table}_{name} BEFORE {event} ON {table} WHEN {condition} "
        f"BEGIN SELECT RAISE(ABORT, '{table} rows are history'); END"
    )


def _forbid_on_postgresql(table: str, name: str, event: str, condition: str = "TRUE") -> None:
    op.execute(
        f"CREATE TRIGGER {table}_{name} BEFORE {event} ON {table} "
        f"FOR EACH ROW WHEN ({condition}) EXECUTE FUNCTION trueweight_history()"
    )


def downgrade() -> None:
    raise NotImplementedError("books are not deleted by a migration")
