"""What API keys have spent, and the periods of their budgets, in the books' half of ``fsck``."""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sa

from trueweight.ledger.budget import MAX_PERIOD_MS, MIN_PERIOD_MS
from trueweight.ledger.findings import Findings, exact
from trueweight.ledger.movements import MAX_HOLD_MS


class _Row(NamedTuple):
    """A row of ``spending`` (all but its limit, which is in no leaf)."""

    api_key_id: str
    spent: int
    period_ms: int
    period_limit: int
    period_no: int
    period_from: int
    period_spent: int


_COLUMNS = ", ".join(f"s.{name}" for name in _Row._fields)
# With what the holds of each key come to: in all, and in its period; the newest period of any, and
# when the last of its period is due.
_SPENT = f"""
SELECT {_COLUMNS},
  COALESCE(SUM(CASE WHEN p.state = 1 THEN p.amount ELSE p.posted END), 0),
  COALESCE(SUM(CASE WHEN p.period_no = 0 OR p.period_no <> s.period_no THEN 0
    WHEN p.state = 1 THEN p.amount ELSE p.posted END), 0),
  COALESCE(MAX(p.period_no), 0),
  COALESCE(MAX(CASE WHEN p.period_no > 0 AND p.period_no = s.period_no THEN p.due END), 0)
FROM spending s LEFT JOIN pending p ON p.api_key_id = s.api_key_id GROUP BY {_COLUMNS}
"""  # noqa: S608


def check_spending(connection: sa.Connection, findings: Findings) -> None:
    """Both sums of every key follow from its holds, and its period is one that there can be."""
    for found in connection.execute(sa.text(_SPENT)):
        row = _Row(*found[:-4])
        spent, in_period, newest, due = (exact(value) for value in found[-4:])
        if (row.spent, row.period_spent) != (spent, in_period):
            findings.add(
                f"API key {row.api_key_id} has spent {spent}, {in_period} of it in its period; "
                f"its row says {row.spent} and {row.period_spent}"
            )
        # Whoever takes a hold after a period has ended begins the next one.
        is_over = row.period_ms > 0 and due >= row.period_from + row.period_ms + MAX_HOLD_MS
        if not _is_period(row) or newest > row.period_no or is_over:
            findings.add(f"the period of API key {row.api_key_id} is none of its budget")
    unknown = connection.execute(
        sa.text(
            "SELECT DISTINCT api_key_id FROM pending WHERE api_key_id <> '' "
            "EXCEPT SELECT api_key_id FROM spending"
        )
    )
    for (key,) in unknown:
        findings.add(f"what API key {key} has spent is forgotten")


def _is_period(row: _Row) -> bool:
    """True if the row's period starts where one of its length does. A key that has no budget, or
    none any more, has no period, though its number may say how many it has had."""
    if row.period_ms == 0:
        rest = (row.period_limit, row.period_from, row.period_spent)
        return rest == (0, 0, 0) and row.period_no >= 0
    starts = row.period_from >= 0 and row.period_from % row.period_ms == 0
    is_long = MIN_PERIOD_MS <= row.period_ms <= MAX_PERIOD_MS
    return is_long and row.period_limit > 0 and row.period_no > 0 and starts
