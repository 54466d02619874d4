"""History that was copied into an archive may leave the database.

Revision ID: 0002
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Bundles of other kinds stay: key events, verdicts and the like are looked up for ever.
FREQUENT_MASK = 7
ARCHIVED = {
    "transfer": "OLD.sequence <= ({mark})",
    "bundle": f"OLD.first_index < ({{mark}}) AND OLD.kinds <= {FREQUENT_MASK}",
}
MARKS = {"transfer": "archived_sequence", "bundle": "archived_below"}


def _mark(table: str) -> str:
    value = f"SELECT CAST(value AS BIGINT) FROM meta WHERE key = '{MARKS[table]}'"  # noqa: S608
    return f"COALESCE(({value}), 0)"


def upgrade() -> None:
    for table, archived in ARCHIVED.items():
        condition = archived.format(mark=_mark(table))
        if op.get_bind().dialect.name == "sqlite":
            op.execute(f"DROP TRIGGER {table}_no_delete")
            op.execute(
                f"CREATE TRIGGER {table}_no_delete BEFORE DELETE ON {table} "
                f"WHEN NOT ({condition}) "
                f"BEGIN SELECT RAISE(ABORT, '{table} rows are history'); END"
            )
        else:
            op.execute(
                f"CREATE FUNCTION trueweight_archived_{table}() RETURNS trigger LANGUAGE plpgsql "
                f"AS $$ BEGIN IF {condition} THEN RETURN OLD; END IF; "
                "RAISE EXCEPTION '% rows are history', TG_TABLE_NAME "
                "USING ERRCODE = 'integrity_constraint_violation'; END $$"
            )
            op.execute(f"DROP TRIGGER {table}_history ON {table}")
            op.execute(
                f"CREATE TRIGGER {table}_history BEFORE UPDATE ON {table} "
                "FOR EACH ROW EXECUTE FUNCTION trueweight_history()"
            )
            op.execute(
                f"CREATE TRIGGER {table}_archive BEFORE DELETE ON {table} "
                f"FOR EACH ROW EXECUTE FUNCTION trueweight_archived_{table}()"
            )


def downgrade() -> None:
    raise NotImplementedError("books are not deleted by a migration")
