"""The working copy of one group of operations: values change by replacement, and can be undone.

``Book`` is local to ``core.run``; nothing outside sees it half done.
"""

from __future__ import annotations

from typing import Any

from trueweight.ledger import budget
from trueweight.ledger.accounts import EXTERNAL, Account, kind_of
from trueweight.ledger.audits import StepRow, VerdictRow
from trueweight.ledger.commitments import CommitmentRow
from trueweight.ledger.leaves import TRANSFER, encode_batches, encode_movement, facts_digest
from trueweight.ledger.requests import RequestRow
from trueweight.ledger.values import (
    CAPTURED,
    EXPIRED,
    OPEN,
    PENDING,
    POST,
    REASON_NO,
    SINGLE,
    VOIDED,
    WITHDRAWAL,
    Applied,
    Claim,
    Debt,
    Leaf,
    Leg,
    NodeRow,
    Pending,
    Restitution,
    Snapshot,
    Spending,
    TransferRow,
)
from trueweight.protos.errors import Conflict, InsufficientFunds, InvalidRequest
from trueweight.protos.money import MAX_NANO

_PHASE_OF_STATE = {CAPTURED: POST, VOIDED: 4, EXPIRED: 5}


class _Working:
    """An account's counters while a group is judged; ``before`` is the stored row, if any."""

    __slots__ = (
        "before", "credits_pending", "credits_posted", "debits_pending", "debits_posted", "id",
        "kind", "no",
    )  # fmt: skip

    def __init__(self, account: Account, before: Account | None) -> None:
        self.before = before
        (
            self.no, self.id, self.kind, self.debits_pending, self.debits_posted,
            self.credits_pending, self.credits_posted,
        ) = account  # fmt: skip

    @property
    def available(self) -> int:
        return self.credits_posted - self.debits_posted - self.debits_pending

    def frozen(self) -> Account:
        return Account(
            self.no,
            self.id,
            self.kind,
            self.debits_pending,
            self.debits_posted,
            self.credits_pending,
            self.credits_posted,
        )


# How far a book was at some moment: undo log, transfers, leaves, debts, accounts created.
Mark = tuple[int, int, int, int, int]


class Book:
    """Accounts, pending transfers and the rest, with an undo log back to a mark.

    Counters are changed in place; they are undone by taking the transfers back.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.now = snapshot.now_unix_ms
        self._next_sequence = snapshot.next_sequence
        self.pendings: dict[bytes, Pending] = {}
        self.applied: dict[bytes, Applied] = {}
        self.legs: dict[bytes, Leg] = {}
        self.claims: dict[bytes, tuple[Claim, ...]] = {}
        self.references: dict[tuple[str, str], bytes] = {}
        self.spending: dict[str, Spending] = {}
        self.nodes: dict[str, NodeRow] = {}
        self.restitutions: dict[str, Restitution] = {}
        self.published: dict[bytes, int] = {}
        self.verdicts: dict[int, VerdictRow] = {}
        self.steps: dict[int, StepRow] = {}
        self.requests: dict[tuple[str, bytes], RequestRow] = {}
        self.commitments: dict[tuple[str, bytes], CommitmentRow] = {}
        # First verdicts, by verifier and receipt.
        self.judged: dict[tuple[str, bytes], int] = {}
        self.transfers: list[TransferRow] = []
        self.leaves: list[Leaf] = []
        self.debts: list[Debt] = []
        self._working: dict[str, _Working] = {}
        self._by_no: dict[int, _Working] = {}
        self._created: list[_Working] = []
        self._changed: list[tuple[Account | None, Account]] | None = None
        self._undo: list[tuple[dict[Any, Any], Any, Any]] = []
        self._operation = b""
        self._movements: list[bytes] = []
        self._facts: list[tuple[str, str]] = []

    # -- undo ---------------------------------------------------------------------------------

    def mark(self) -> Mark:
        """A point to come back to."""
        return (
            len(self._undo),
            len(self.transfers),
            len(self.leaves),
            len(self.debts),
            len(self._created),
        )

    def rewind(self, mark: Mark) -> None:
        """Undoes everything since the mark."""
        undo, transfers, leaves, debts, created = mark
        # First the money: what a second phase gave back is known from its pending transfer.
        while len(self.transfers) > transfers:
            self._take_back(self.transfers.pop())
        while len(self._undo) > undo:
            table, key, old = self._undo.pop()
            if old is None:
                del table[key]
            else:
                table[key] = old
        while len(self._created) > created:
            gone = self._created.pop()
            del self._working[gone.id], self._by_no[gone.no]
        del self.leaves[leaves:]
        del self.debts[debts:]
        self._movements = []

    def put(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        """Replaces a value, remembering the old one."""
        self._undo.append((table, key, table.get(key)))
        table[key] = value

    def start(self, operation_id: bytes) -> None:
        """Transfers made from here on belong to this operation."""
        self._operation = operation_id
        self._movements = []
        self._facts = []

    def finish(self) -> None:
        """Puts the operation's transfers into the log."""
        movements = self._movements
        if movements:
            first = self._next_sequence + len(self.transfers) - len(movements)
            facts = facts_digest(self._facts)
            for body in encode_batches(self._operation, first, self.now, movements, facts):
                self.leaves.append(Leaf(TRANSFER, body, b""))

    @property
    def operation_id(self) -> bytes:
        return self._operation

    # -- reading ------------------------------------------------------------------------------

    def pending(self, pending_id: bytes) -> Pending | None:
        return self.pendings.get(pending_id) or self.snapshot.pendings.get(pending_id)

    def leg(self, receipt_digest: bytes) -> Leg | None:
        return self.legs.get(receipt_digest) or self.snapshot.legs.get(receipt_digest)

    def claims_of(self, hold_id: bytes) -> tuple[Claim, ...]:
        return self.claims.get(hold_id) or tuple(self.snapshot.claims.get(hold_id, ()))

    def node(self, node_id: str) -> NodeRow:
        return self.nodes.get(node_id) or self.snapshot.nodes.get(node_id) or NodeRow(node_id)

    def restitution(self, node_id: str) -> Restitution | None:
        """The refunds that a node's conviction still owes to its clients."""
        known = self.restitutions.get(node_id) or self.snapshot.restitutions.get(node_id)
        return known if known is not None and known.is_open else None

    def withdrawals_of(self, bond: str) -> list[Pending]:
        """Those of a bond that are open."""
        known = {pending.id: pending for pending in self.snapshot.withdrawals.get(bond, ())}
        for pending in self.pendings.values():
            if pending.kind == WITHDRAWAL and pending.debit == bond:
                known[pending.id] = pending
        return [pending for pending in known.values() if pending.state == OPEN]

    def request(self, key: tuple[str, bytes]) -> RequestRow | None:
        return self.requests.get(key) or self.snapshot.requests.get(key)

    def commitment(self, key: tuple[str, bytes]) -> CommitmentRow | None:
        return self.commitments.get(key) or self.snapshot.commitments.get(key)

    def has_judged(self, key: tuple[str, bytes]) -> bool:
        return key in self.judged or key in self.snapshot.judged

    def reference(self, kind: str, key: str) -> bytes | None:
        found = self.references.get((kind, key))
        return found if found is not None else self.snapshot.references.get((kind, key))

    def claim_reference(self, kind: str, key: str, complaint: str) -> None:
        """Takes a unique reference, or Conflict if it was taken before."""
        if self.reference(kind, key) is not None:
            raise Conflict(complaint)
        self.take_reference(kind, key)

    def take_reference(self, kind: str, key: str) -> None:
        """Takes a reference that is free."""
        self.put(self.references, (kind, key), self._operation)
        self._facts.append((kind, key))

    # -- moving money -------------------------------------------------------------------------

    def available(self, account_id: str) -> int:
        """Available balance; 0 for an account that does not exist."""
        found = self._working.get(account_id) or self.snapshot.accounts.get(account_id)
        return found.available if found else 0

    def changed_accounts(self) -> list[tuple[Account | None, Account]]:
        """(stored row or None if new, row as it is now) of every account that was moved. Asked
        for when everything is judged, and the same from then on."""
        if self._changed is None:
            rows = ((working.before, working.frozen()) for working in self._working.values())
            self._changed = [(before, now) for before, now in rows if before != now]
        return self._changed

    @property
    def created_accounts(self) -> int:
        """How many accounts are new."""
        return len(self._created)

    def move(self, debit_id: str, credit_id: str, amount: int, reason: str) -> None:
        """A single transfer. Nothing happens for 0. Raises InsufficientFunds."""
        if amount == 0:
            return
        debit, credit = self._sides(debit_id, credit_id, amount)
        debits, credits = debit.debits_posted + amount, credit.credits_posted + amount
        if debits > MAX_NANO or credits > MAX_NANO:
            raise _too_much()
        debit.debits_posted, credit.credits_posted = debits, credits
        self._record((debit, credit), amount, SINGLE, b"", reason)

    def owe(self, creditor: str, amount: int) -> None:
        """Notes what should have been moved and could not be. Nothing happens for 0."""
        if amount > 0:
            self.debts.append(Debt(self._operation, creditor, amount))

    def summed_debts(self) -> dict[tuple[bytes, str], int]:
        """What is owed since this book, by operation and creditor."""
        total: dict[tuple[bytes, str], int] = {}
        for debt in self.debts:
            key = (debt.operation_id, debt.creditor)
            total[key] = total.get(key, 0) + debt.amount
        return total

    def reserve(self, pending: Pending, reason: str) -> None:
        """The first phase. Raises InsufficientFunds."""
        debit, credit = self._sides(pending.debit, pending.credit, pending.amount)
        debits = debit.debits_pending + pending.amount
        credits = credit.credits_pending + pending.amount
        if debits > MAX_NANO or credits > MAX_NANO:
            raise _too_much()
        debit.debits_pending, credit.credits_pending = debits, credits
        self.put(self.pendings, pending.id, pending)
        self._record((debit, credit), pending.amount, PENDING, b"", reason)

    def resolve(self, pending: Pending, state: int, posted: int, reason: str) -> None:
        """The second phase, exactly once: posts ``posted`` and gives the rest back."""
        if pending.state != OPEN:
            raise Conflict(f"it is already {state_name(pending.state)}")
        if not 0 <= posted <= pending.amount:
            raise InvalidRequest("more than what was held cannot be posted")
        debit, credit = self._sides(pending.debit, pending.credit, 0)
        debits, credits = debit.debits_posted + posted, credit.credits_posted + posted
        if debits > MAX_NANO or credits > MAX_NANO:
            raise _too_much()
        debit.debits_posted, credit.credits_posted = debits, credits
        debit.debits_pending -= pending.amount
        credit.credits_pending -= pending.amount
        resolved = Pending(*pending[:5], posted, state, *pending[7:])
        self.put(self.pendings, pending.id, resolved)
        self._record((debit, credit), posted, _PHASE_OF_STATE[state], pending.id, reason)
        if pending.api_key_id and posted < pending.amount:
            row = self.spending_of(pending.api_key_id)
            self.put(self.spending, row.api_key_id, budget.give_back(row, pending, posted))

    def spending_of(self, api_key_id: str) -> Spending:
        return (
            self.spending.get(api_key_id)
            or self.snapshot.spending.get(api_key_id)
            or Spending(api_key_id)
        )

    # -- the log ------------------------------------------------------------------------------

    def append(self, leaf: Leaf) -> int:
        """Adds a leaf; its index in the log."""
        index = self.snapshot.next_index + len(self.leaves)
        self.leaves.append(leaf)
        if leaf.digest:
            self.put(self.published, leaf.digest, index)
        return index

    def published_at(self, digest: bytes) -> int | None:
        found = self.published.get(digest)
        return found if found is not None else self.snapshot.published.get(digest)

    # -- inside -------------------------------------------------------------------------------

    def _sides(self, debit_id: str, credit_id: str, amount: int) -> tuple[_Working, _Working]:
        """Both accounts, the amount being available."""
        debit = self._working.get(debit_id) or self._open(debit_id)
        available = debit.credits_posted - debit.debits_posted - debit.debits_pending
        if available < amount and debit.kind != EXTERNAL:
            raise InsufficientFunds(
                f"{debit.id} has {available} nanocredits available, {amount} are needed",
                hint="Deposit more, or ask for less.",
            )
        credit = self._working.get(credit_id) or self._open(credit_id)
        if debit is credit:
            raise InvalidRequest("an account cannot pay itself")
        return debit, credit

    def _open(self, account_id: str) -> _Working:
        stored = self.snapshot.accounts.get(account_id)
        if stored is not None:
            working = _Working(stored, stored)
        else:
            number = self.snapshot.next_account + len(self._created)
            working = _Working(Account(number, account_id, kind_of(account_id)), None)
            self._created.append(working)
        self._working[account_id] = self._by_no[working.no] = working
        return working

    def _record(
        self,
        sides: tuple[_Working, _Working],
        amount: int,
        phase: int,
        pending_id: bytes,
        reason: str,
    ) -> None:
        debit, credit = sides
        transfers, movements = self.transfers, self._movements
        transfers.append(
            (
                self._next_sequence + len(transfers),
                self._operation,
                len(movements),
                debit.no,
                credit.no,
                amount,
                phase,
                pending_id or None,
                REASON_NO[reason],
                self.now,
            )
        )
        movements.append(encode_movement(debit.id, credit.id, amount, phase, pending_id, reason))

    def _take_back(self, transfer: TransferRow) -> None:
        _, _, _, debit_no, credit_no, amount, phase, pending_id, _, _ = transfer
        debit, credit = self._by_no[debit_no], self._by_no[credit_no]
        if phase == PENDING:
            debit.debits_pending -= amount
            credit.credits_pending -= amount
            return
        debit.debits_posted -= amount
        credit.credits_posted -= amount
        first = self.pending(pending_id) if pending_id else None
        if first is not None:
            debit.debits_pending += first.amount
            credit.credits_pending += first.amount


def state_name(state: int) -> str:
    """For people: "captured"."""
    return {OPEN: "open", CAPTURED: "captured", VOIDED: "voided", EXPIRED: "expired"}[state]


def _too_much() -> InvalidRequest:
    return InvalidRequest("the amount exceeds what an account can count")
