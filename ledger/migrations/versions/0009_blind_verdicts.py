"""What verifiers commit to before they publish a verdict; and of each verdict whether it is its
verifier's first on the receipt, and since which leaf its signer was bound to it.

Revision ID: 0009
"""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op

from trueweight.ledger import bundle
from trueweight.ledger.blind_fold import BlindFold
from trueweight.protos.envelope import parse_envelope
from trueweight.protos.v1.audit_pb2 import MarginCommitment, Verdict

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    _let_verdicts_change()
    table = op.create_table(
        "margin_commitment",
        sa.Column("log_index", BIG, primary_key=True, autoincrement=False),
        sa.Column("verifier_id", sa.Text, nullable=False),
        sa.Column("receipt_digest", sa.LargeBinary, nullable=False),
        sa.Column("merged_at", sa.BigInteger, nullable=False),
        sa.Column("commitment", sa.LargeBinary, nullable=False),
    )
    for name, type_, default in (("is_first", sa.SmallInteger, "1"), ("bound_since", BIG, "0")):
        column = sa.Column(name, type_, nullable=False, server_default=sa.text(default))
        op.add_column("verdict", column)
    _fill(table)
    key = ["receipt_digest", "verifier_id"]
    op.create_index("margin_commitment_once", "margin_commitment", key, unique=True)
    first = sa.text("is_first = 1")
    op.create_index(
        "verdict_first", "verdict", key, unique=True, sqlite_where=first, postgresql_where=first
    )
    for name in ("margin_commitment", "verdict"):
        _forbid_changes(name)


def _fill(table: sa.Table) -> None:
    """Commitments and verdicts that were logged before."""
    connection = op.get_bind()
    fold = BlindFold(connection)
    commitments, verdicts = [], []
    for index, merged_at, kind, leaf in _leaves(connection):
        payload = parse_envelope(leaf).payload
        if kind == "margin-commitment":
            row = fold.commitment(MarginCommitment.FromString(payload), index, merged_at)
            if row is not None:
                commitments.append(row._asdict())
        else:
            verdict = fold.verdict(Verdict.FromString(payload), index)
            verdicts.append({"i": index, "f": verdict.is_first, "b": verdict.bound_since})
    if commitments:
        op.bulk_insert(table, commitments)
    if verdicts:
        change = "UPDATE verdict SET is_first = :f, bound_since = :b WHERE log_index = :i"
        connection.execute(sa.text(change), verdicts)


def _leaves(connection: sa.Connection) -> Iterator[tuple[int, int, str, bytes]]:
    kinds = ("margin-commitment", "verdict")
    rows = connection.execute(
        sa.text(
            "SELECT first_index, leaves, merged_at, body FROM bundle "
            "WHERE kinds > 7 AND (kinds & :mask) <> 0 ORDER BY first_index"
        ),
        {"mask": bundle.mask_of(kinds)},
    )
    for first, count, merged_at, body in rows.fetchall():
        for index, (kind, leaf) in enumerate(bundle.unpack(count, bytes(body)), first):
            if kind in kinds:
                yield index, merged_at, kind, leaf


def _let_verdicts_change() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for event in ("update", "delete"):
            op.execute(f"DROP TRIGGER verdict_no_{event}")
    else:
        op.execute("DROP TRIGGER verdict_history ON verdict")


def _forbid_changes(table: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        for event in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{event.lower()} BEFORE {event} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} rows are history'); END"
            )
    else:
        op.execute(
            f"CREATE TRIGGER {table}_history BEFORE UPDATE OR DELETE ON {table} "
            "FOR EACH ROW EXECUTE FUNCTION trueweight_history()"
        )


def downgrade() -> None:
    raise NotImplementedError("books are not deleted by a migration")
