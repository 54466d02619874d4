"""The working copy of one group of operations: values change by replacement, and can be undone.

``Book`` is local to ``core.run``; nothing outside sees it half done.
"""

from __future__ import annotations

from typing import Any

from trueweight.ledger.accounts import EXTERNAL, Account, kind_of
from trueweight.ledger.leaves import transfer_leaf
from trueweight.ledger.values import (
    CAPTURED,
    EXPIRED,
    OPEN,
    PENDING,
    POST,
    REASON_NO,
    SINGLE,
    VOIDED,
    Applied,
    Claim,
    Debt,
    Leaf,
    Leg,
    NodeRow,
    Pending,
    Snapshot,
    Spending,
    Transfer,
)
from trueweight.protos.errors import Conflict, InsufficientFunds, InvalidRequest
from trueweight.protos.money import MAX_NANO

_PHASE_OF_STATE = {CAPTURED: POST, VOIDED: 4, EXPIRED: 5}


class Book:
    """Accounts, pending transfers and the rest, with an undo log back to a mark."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.now = snapshot.now_unix_ms
        self.accounts: dict[str, Account] = {}
        self.pendings: dict[bytes, Pending] = {}
        self.applied: dict[bytes, Applied] = {}
        self.legs: dict[bytes, Leg] = {}
        self.claims: dict[bytes, tuple[Claim, ...]] = {}
        self.references: dict[tuple[str, str], bytes] = {}
        self.spending: dict[str, Spending] = {}
        self.nodes: dict[str, NodeRow] = {}
        self.published: dict[bytes, int] = {}
        self.transfers: list[Transfer] = []
        self.leaves: list[Leaf] = []
        self.debts: list[Debt] = []
        self._next_account = snapshot.next_account
        self._undo: list[tuple[dict[Any, Any], Any, Any]] = []
        self._operation = b""
        self._ordinal = 0

    # -- undo ---------------------------------------------------------------------------------

    def mark(self) -> tuple[int, int, int, int, int]:
        """A point to come back to."""
        return (
            len(self._undo),
            len(self.transfers),
            len(self.leaves),
            len(self.debts),
            self._next_account,
        )

    def rewind(self, mark: tuple[int, int, int, int, int]) -> None:
        """Undoes everything since the mark."""
        undo, transfers, leaves, debts, self._next_account = mark
        while len(self._undo) > undo:
            table, key, old = self._undo.pop()
            if old is None:
                del table[key]
            else:
                table[key] = old
        del self.transfers[transfers:]
        del self.leaves[leaves:]
        del self.debts[debts:]

    def put(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        """Replaces a value, remembering the old one."""
        self._undo.append((table, key, table.get(key)))
        table[key] = value

    def start(self, operation_id: bytes) -> None:
        """Transfers made from here on belong to this operation."""
        self._operation, self._ordinal = operation_id, 0

    @property
    def operation_id(self) -> bytes:
        return self._operation

    # -- reading ------------------------------------------------------------------------------

    def account(self, account_id: str) -> Account:
        """The account; a new one with zero counters if it does not exist yet."""
        found = self.accounts.get(account_id) or self.snapshot.accounts.get(account_id)
        if found is None:
            found = Account(self._next_account, account_id, kind_of(account_id))
            self._next_account += 1
            self.put(self.accounts, account_id, found)
        return found

    def known_account(self, account_id: str) -> Account | None:
        """The account if it exists."""
        return self.accounts.get(account_id) or self.snapshot.accounts.get(account_id)

    def pending(self, pending_id: bytes) -> Pending | None:
        return self.pendings.get(pending_id) or self.snapshot.pendings.get(pending_id)

    def leg(self, receipt_digest: bytes) -> Leg | None:
        return self.legs.get(receipt_digest) or self.snapshot.legs.get(receipt_digest)

    def claims_of(self, hold_id: bytes) -> tuple[Claim, ...]:
        return self.claims.get(hold_id) or tuple(self.snapshot.claims.get(hold_id, ()))

    def node(self, node_id: str) -> NodeRow:
        return self.nodes.get(node_id) or self.snapshot.nodes.get(node_id) or NodeRow(node_id)

    def reference(self, kind: str, key: str) -> bytes | None:
        found = self.references.get((kind, key))
        return found if found is not None else self.snapshot.references.get((kind, key))

    def claim_reference(self, kind: str, key: str, complaint: str) -> None:
        """Takes a unique reference, or Conflict if it was taken before."""
        if self.reference(kind, key) is not None:
            raise Conflict(complaint)
        self.put(self.references, (kind, key), self._operation)

    # -- moving money -------------------------------------------------------------------------

    def available(self, account_id: str) -> int:
        """Available balance; 0 for an account that does not exist."""
        found = self.known_account(account_id)
        return found.available if found else 0

    def move(self, debit_id: str, credit_id: str, amount: int, reason: str) -> None:
        """A single transfer. Nothing happens for 0. Raises InsufficientFunds."""
        if amount == 0:
            return
        debit, credit = self.account(debit_id), self.account(credit_id)
        _check_debit(debit, amount)
        self._store(
            _with(debit, debits_posted=amount),
            _with(credit, credits_posted=amount),
        )
        self._record((debit, credit), amount, SINGLE, b"", reason)

    def reserve(self, pending: Pending, reason: str) -> None:
        """The first phase. Raises InsufficientFunds."""
        debit, credit = self.account(pending.debit), self.account(pending.credit)
        _check_debit(debit, pending.amount)
        self._store(
            _with(debit, debits_pending=pending.amount),
            _with(credit, credits_pending=pending.amount),
        )
        self.put(self.pendings, pending.id, pending)
        self._record((debit, credit), pending.amount, PENDING, b"", reason)

    def resolve(self, pending: Pending, state: int, posted: int, reason: str) -> None:
        """The second phase, exactly once: posts ``posted`` and gives the rest back."""
        if pending.state != OPEN:
            raise Conflict(f"it is already {state_name(pending.state)}")
        if not 0 <= posted <= pending.amount:
            raise InvalidRequest("more than what was held cannot be posted")
        debit, credit = self.account(pending.debit), self.account(pending.credit)
        self._store(
            _with(debit, debits_pending=-pending.amount, debits_posted=posted),
            _with(credit, credits_pending=-pending.amount, credits_posted=posted),
        )
        self.put(self.pendings, pending.id, pending._replace(state=state, posted=posted))
        self._record((debit, credit), posted, _PHASE_OF_STATE[state], pending.id, reason)
        self.spend(pending.api_key_id, posted - pending.amount)

    def spend(self, api_key_id: str, amount: int) -> None:
        """Counts against an API key's limit; a negative amount gives back."""
        if not api_key_id or amount == 0:
            return
        row = self.spending_of(api_key_id)
        self.put(self.spending, api_key_id, row._replace(spent=row.spent + amount))

    def spending_of(self, api_key_id: str) -> Spending:
        return (
            self.spending.get(api_key_id)
            or self.snapshot.spending.get(api_key_id)
            or Spending(api_key_id, 0, 0)
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

    def _store(self, debit: Account, credit: Account) -> None:
        if debit.no == credit.no:
            raise InvalidRequest("an account cannot pay itself")
        self.put(self.accounts, debit.id, debit)
        self.put(self.accounts, credit.id, credit)

    def _record(
        self,
        sides: tuple[Account, Account],
        amount: int,
        phase: int,
        pending_id: bytes,
        reason: str,
    ) -> None:
        transfer = Transfer(
            self.snapshot.next_sequence + len(self.transfers),
            self._operation,
            self._ordinal,
            sides[0],
            sides[1],
            amount,
            phase,
            pending_id,
            REASON_NO[reason],
            self.now,
        )
        self._ordinal += 1
        self.transfers.append(transfer)
        self.leaves.append(transfer_leaf(transfer))


def state_name(state: int) -> str:
    """For people: "captured"."""
    return {OPEN: "open", CAPTURED: "captured", VOIDED: "voided", EXPIRED: "expired"}[state]


def _check_debit(debit: Account, amount: int) -> None:
    if debit.kind != EXTERNAL and debit.available < amount:
        raise InsufficientFunds(
            f"{debit.id} has {debit.available} nanocredits available, {amount} are needed",
            hint="Deposit more, or ask for less.",
        )


def _with(
    account: Account,
    *,
    debits_pending: int = 0,
    debits_posted: int = 0,
    credits_pending: int = 0,
    credits_posted: int = 0,
) -> Account:
    """The account with these amounts added to its counters."""
    no, id_, kind, dp, dx, cp, cx = account
    dp, dx, cp, cx = (
        dp + debits_pending,
        dx + debits_posted,
        cp + credits_pending,
        cx + credits_posted,
    )
    if dp > MAX_NANO or dx > MAX_NANO or cp > MAX_NANO or cx > MAX_NANO:
        raise InvalidRequest("the amount exceeds what an account can count")
    return Account(no, id_, kind, dp, dx, cp, cx)
