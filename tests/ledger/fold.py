"""Balances folded from the ledger's immutable transfers, and what must hold of them after any step.

Not the fold of ``ledger fsck``: this one goes on as transfers come, and says what each client paid
and got back.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from trueweight.ledger.values import REASONS
from trueweight.protos.v1 import ledger_pb2 as pb

TRANSFERS = (
    "SELECT sequence, operation_id, debit, credit, amount, phase, pending_id, reason "
    "FROM transfer WHERE sequence > ? ORDER BY sequence"
)
ACCOUNTS = (
    "SELECT no, id, currency, debits_pending, debits_posted, credits_pending, credits_posted "
    "FROM account"
)


class Fold:
    """Give it every transfer once, in order, then the accounts as they are stored."""

    def __init__(self):
        self.last = 0  # sequence
        self.counters = defaultdict(lambda: [0, 0, 0, 0])  # by account number
        self.open = {}  # pending id -> (debit, credit, amount)
        self.resolved = set()
        self.captured, self.refunded = Counter(), Counter()  # by number of the client's account

    def add(self, transfers):
        for sequence, operation_id, debit, credit, amount, phase, pending_id, reason in transfers:
            assert sequence == self.last + 1, "a transfer is missing"
            self.last = sequence
            name = REASONS[reason - 1]
            if phase == pb.TransferRecord.PENDING:
                self.open[bytes(operation_id)] = (debit, credit, amount)
                self._count(0, debit, credit, amount)
                continue
            if phase != pb.TransferRecord.SINGLE:
                self._resolve(bytes(pending_id), debit, credit, amount)
            if name in ("capture", "claim"):
                self.captured[debit] += amount
            if name in ("refund", "debt"):
                self.refunded[credit] += amount
            self._count(1, debit, credit, amount)

    def _resolve(self, pending_id, debit, credit, amount):
        assert pending_id not in self.resolved, "a second resolution"
        self.resolved.add(pending_id)
        *held_between, held = self.open.pop(pending_id)
        assert held_between == [debit, credit] and amount <= held, "captured more than was held"
        self._count(0, debit, credit, -held)

    def _count(self, phase, debit, credit, amount):
        self.counters[debit][phase] += amount
        self.counters[credit][2 + phase] += amount

    def check(self, accounts):
        """The accounts are what their transfers give, balanced, covered, and no client got more
        back than it paid."""
        currencies = defaultdict(lambda: [0, 0, 0, 0])
        for no, name, currency, *stored in accounts:
            assert stored == self.counters[no], f"{name} is not the fold of its transfers"
            currencies[currency] = [
                a + b for a, b in zip(currencies[currency], stored, strict=True)
            ]
            debits_pending, debits, _, credits = stored
            if not name.startswith("external:"):
                assert credits - debits - debits_pending >= 0, f"{name} is overdrawn"
            if name.startswith("client:"):
                assert self.refunded[no] <= self.captured[no], f"{name} got more than it paid"
        for debits_pending, debits, credits_pending, credits in currencies.values():
            assert (debits_pending, debits) == (credits_pending, credits)
