"""What an API key may spend, in total and in each period. Pure arithmetic on its row.

Periods follow each other from 1970 on, by the ledger's clock, and are numbered for each key as they
come. A hold keeps the number of its period: what it gives back later counts there, so in the row as
long as that period runs, and nowhere when it is over, because then nobody asks any more.
"""

from __future__ import annotations

from trueweight.ledger.values import Pending, Spending
from trueweight.protos.errors import LimitExceeded

MIN_PERIOD_MS = 60_000
MAX_PERIOD_MS = 366 * 24 * 3600 * 1000


def take(row: Spending, amount: int, now_unix_ms: int) -> Spending:
    """The row after a hold. Raises LimitExceeded."""
    if row.limit and row.spent + amount > row.limit:
        raise LimitExceeded(
            f"the API key may spend {row.limit} nanocredits, {row.spent} are spent or held",
            hint="Raise its limit, or use another key.",
        )
    row = row._replace(spent=row.spent + amount)
    if not row.period_ms:
        return row
    # A clock that was set back does not start a period again.
    if _start(row.period_ms, now_unix_ms) > row.period_from_unix_ms:
        row = _next_period(row, now_unix_ms)
    if row.period_spent + amount > row.period_limit:
        raise LimitExceeded(
            f"the API key may spend {row.period_limit} nanocredits in {row.period_ms} ms, "
            f"{row.period_spent} are spent or held since {row.period_from_unix_ms}",
            hint="Wait for the next period, raise its limit, or use another key.",
        )
    return row._replace(period_spent=row.period_spent + amount)


def give_back(row: Spending, hold: Pending, posted: int) -> Spending:
    """The row when a hold ends with ``posted`` of it spent."""
    rest = hold.amount - posted
    row = row._replace(spent=row.spent - rest)
    if hold.period_no and hold.period_no == row.period_no:
        row = row._replace(period_spent=row.period_spent - rest)
    return row


def limited(row: Spending, limit: int, period_ms: int, now_unix_ms: int) -> Spending:
    """The row with another limit: in total, or in each period of this length. 0 removes it."""
    if not period_ms:
        return row._replace(limit=limit)
    length = period_ms if limit else 0
    if length != row.period_ms:
        row = _next_period(row._replace(period_ms=length), now_unix_ms)
    return row._replace(period_limit=limit)


def _next_period(row: Spending, now_unix_ms: int) -> Spending:
    return row._replace(
        period_no=row.period_no + 1,
        period_from_unix_ms=_start(row.period_ms, now_unix_ms),
        period_spent=0,
    )


def _start(period_ms: int, now_unix_ms: int) -> int:
    return now_unix_ms - now_unix_ms % period_ms if period_ms else 0
