"""What the captures of a node have earned up to a place in the log, remembered and moved on.

A node may have millions of captures, and nobody should wait until they are read. So the writer
keeps the sum up to some place, and each call moves it so many captures at most; whoever asks for
more is refused by name, and the writer goes on by itself between its groups until it is there.

Captures count in the order of the log: one does not go before those in front of it, also where a
clock that was set back says that it is older.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from trueweight.ledger.backend import Backend
from trueweight.ledger.values import Leg

# Captures that are looked at, one attempt after the other: most releases need few. A group looks at
# more than the first step only once: whoever asks for sums that lie far apart would keep everybody
# waiting.
STEPS = (256, 10_000)
MAX_NODES = 10_000
_NET = "node + subsidy - refunded_node"
ENDLESS = 2**63 - 1


class Key(NamedTuple):
    """Whose captures. ``is_settled``: only those out of their window, else whatever there is."""

    node_id: str
    is_settled: bool = True


class Goal(NamedTuple):
    """All captures below a log index that came until then."""

    below: int = ENDLESS
    until_unix_ms: int = ENDLESS


@dataclass(slots=True)
class Sum:
    """Earnings, less refunds, of the captures below a log index."""

    below: int = 0
    amount: int = 0


@dataclass(slots=True)
class Earnings:
    """Sums that were asked for lately, and those that are on their way to what was asked."""

    sums: dict[Key, Sum] = field(default_factory=dict)
    behind: dict[Key, Goal] = field(default_factory=dict)
    may_look_at_many: bool = True

    def start_group(self) -> None:
        """A new group may look at many captures once."""
        self.may_look_at_many = True

    def read(self, backend: Backend, key: Key, goal: Goal) -> int | None:
        """What was earned; None: ask again. Nothing may be in flight."""
        known = self.sums.pop(key, None) or Sum()
        while len(self.sums) >= MAX_NODES:
            oldest = next(iter(self.sums))
            del self.sums[oldest]
            self.behind.pop(oldest, None)
        self.sums[key] = known
        self.behind[key] = goal
        return known.amount if self.go_on(backend, key) else None

    def go_on(self, backend: Backend, key: Key | None = None) -> bool:
        """Moves a sum (any that is behind) towards its goal; True when it is there."""
        key = key or next(iter(self.behind))
        known, goal = self.sums[key], self.behind[key]
        for most in STEPS if self.may_look_at_many else STEPS[:1]:
            self.may_look_at_many = self.may_look_at_many and most == STEPS[0]
            move = _back if goal.below < known.below else _forth
            if move(backend, key.node_id, known, goal, most):
                del self.behind[key]
                return True
        return False

    def note(self, before: Iterable[Leg], after: dict[bytes, Leg]) -> None:
        """Captures that were counted have been refunded."""
        if not self.sums:
            return
        for old in before:
            new = after.get(old.receipt_digest, old)
            for is_settled in (True, False):
                known = self.sums.get(Key(old.node_id, is_settled))
                if known is not None and old.log_index < known.below:
                    known.amount += old.refunded_node - new.refunded_node


def _back(backend: Backend, node_id: str, known: Sum, goal: Goal, most: int) -> bool:
    ((count, first, amount),) = backend.query(
        f"SELECT COUNT(*), MIN(log_index), COALESCE(SUM({_NET}), 0) FROM (SELECT * FROM leg "  # noqa: S608
        "WHERE node_id = ? AND log_index >= ? AND log_index < ? ORDER BY log_index DESC LIMIT ?) l",
        (node_id, goal.below, known.below, most),
    )
    known.amount -= int(amount)
    known.below = int(first) if count == most else goal.below
    return bool(count < most)


def _forth(backend: Backend, node_id: str, known: Sum, goal: Goal, most: int) -> bool:
    ((count, last, amount, young),) = backend.query(
        f"SELECT COUNT(*), MAX(log_index), COALESCE(SUM({_NET}), 0), "  # noqa: S608
        "MIN(CASE WHEN captured_at > ? THEN log_index END) FROM (SELECT * FROM leg "
        "WHERE node_id = ? AND log_index >= ? AND log_index < ? ORDER BY log_index LIMIT ?) l",
        (goal.until_unix_ms, node_id, known.below, goal.below, most),
    )
    if young is not None:
        ((amount,),) = backend.query(
            f"SELECT COALESCE(SUM({_NET}), 0) FROM leg "  # noqa: S608
            "WHERE node_id = ? AND log_index >= ? AND log_index < ?",
            (node_id, known.below, young),
        )
    known.amount += int(amount)
    if young is not None:
        known.below = int(young)
    elif count:
        known.below = int(last) + 1
    return young is not None or bool(count < most)
