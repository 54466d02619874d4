"""Operations that move money without evidence: deposits, holds, payouts, bonds, rewards, limits.

Each is a function of (book, prepared) that returns the amount moved, or raises a
TrueweightError, after which the book is rewound.
"""

from __future__ import annotations

from trueweight.ledger import budget
from trueweight.ledger.accounts import (
    FEE_ACCOUNT,
    NODE_LOCKED,
    POOL_ACCOUNT,
    TREASURY_ACCOUNT,
    clearing_of,
    external,
    kind_of,
    node_available,
    node_bond,
    owner_of,
    paid_out_of,
)
from trueweight.ledger.book import Book, state_name
from trueweight.ledger.values import (
    CAPTURED,
    EXPIRED,
    HOLD,
    OPEN,
    PAYOUT,
    VOIDED,
    WITHDRAWAL,
    Pending,
    Prepared,
    Terms,
)
from trueweight.protos.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    PermissionDenied,
)

MAX_HOLD_MS = 7 * 24 * 3600 * 1000
MAX_WITHDRAWAL_MS = 366 * 24 * 3600 * 1000
# Of one bond: a conviction voids them all, while everybody waits.
MAX_WITHDRAWALS = 64


def deposit(book: Book, op: Prepared) -> int:
    """external -> client, once per (rail, reference)."""
    body = op.body
    _rail_once(book, body.rail, body.reference)
    book.move(external(body.rail), body.account, body.amount_nano, "deposit")
    return int(body.amount_nano)


def bond_deposit(book: Book, op: Prepared) -> int:
    """external -> node bond, once per (rail, reference)."""
    body = op.body
    _rail_once(book, body.rail, body.reference)
    book.move(external(body.rail), node_bond(body.node_id), body.amount_nano, "bond-deposit")
    return int(body.amount_nano)


def hold(book: Book, op: Prepared) -> int:
    """client -> clearing, pending until captured, voided or expired."""
    body = op.body
    if not book.now < body.expires_at_unix_ms <= book.now + MAX_HOLD_MS:
        raise InvalidRequest("a hold expires in the future, within 7 days", hint="Check the clock.")
    key, period_no = body.api_key_id, 0
    if key:
        row = budget.take(book.spending_of(key), body.amount_nano, book.now)
        period_no = row.period_no if row.period_ms else 0
        book.put(book.spending, key, row)
    pending = Pending(
        op.id,
        HOLD,
        body.account,
        clearing_of(body.account),
        body.amount_nano,
        0,
        OPEN,
        body.expires_at_unix_ms,
        key,
        body.router_id or op.caller,
        period_no,
    )
    book.reserve(pending, "hold")
    return int(body.amount_nano)


def void_hold(book: Book, op: Prepared) -> int:
    """Gives the whole hold back."""
    pending = open_hold(book, op.body.hold_id)
    if pending.router_id != op.caller:
        raise PermissionDenied("the hold is another router's")
    if book.claims_of(pending.id):
        raise Conflict("a node has claimed from this hold", hint="Capture it with its bill.")
    book.resolve(pending, VOIDED, 0, "void")
    return pending.amount


def open_hold(book: Book, hold_id: bytes) -> Pending:
    """A hold that is still open and in time. Raises NotFound or Conflict."""
    pending = book.pending(hold_id)
    if pending is None or pending.kind != HOLD:
        raise NotFound("there is no such hold")
    if pending.state != OPEN:
        raise Conflict(f"the hold is already {state_name(pending.state)}")
    if pending.due_unix_ms <= book.now:
        raise Conflict("the hold has expired")
    return pending


def payout_start(book: Book, op: Prepared) -> int:
    """node available (or the named account) -> external, pending until the rail answers."""
    body = op.body
    pending = Pending(
        op.id,
        PAYOUT,
        paid_out_of(body.node_id, body.account),
        external(body.rail),
        body.amount_nano,
        0,
        OPEN,
        0,
        "",
        "",
    )
    book.reserve(pending, "payout")
    return int(body.amount_nano)


def bond_withdraw(book: Book, op: Prepared, terms: Terms) -> int:
    """node bond -> external, pending; may be paid from ``not_before`` on unless forfeited. The
    audits of what the node served until now must have time to come before that."""
    body = op.body
    earliest = book.now + terms.window_ms
    if not earliest <= body.not_before_unix_ms <= book.now + MAX_WITHDRAWAL_MS:
        raise InvalidRequest(
            f"not_before must lie {terms.window_ms} ms (the settlement window) to a year from now"
        )
    pending = Pending(
        op.id,
        WITHDRAWAL,
        node_bond(body.node_id),
        external("bond"),
        body.amount_nano,
        0,
        OPEN,
        body.not_before_unix_ms,
        "",
        "",
    )
    book.reserve(pending, "bond-withdrawal")
    if len(book.withdrawals_of(pending.debit)) > MAX_WITHDRAWALS:
        raise Conflict(
            f"at most {MAX_WITHDRAWALS} withdrawals of a bond may be open",
            hint="One must be settled before the next.",
        )
    return int(body.amount_nano)


def free_bond(book: Book, bond: str, amount: int) -> None:
    """Ends withdrawals of a bond, the last due first, until so much of it is available."""
    if book.available(bond) >= amount:
        return
    open_ = book.withdrawals_of(bond)
    for pending in sorted(open_, key=lambda p: (p.due_unix_ms, p.id), reverse=True):
        book.resolve(pending, VOIDED, 0, "bond-withdrawal")
        if book.available(bond) >= amount:
            return


def payout_settle(book: Book, op: Prepared) -> int:
    """Posts or voids a payout or a bond withdrawal. What the rail calls it settles only one."""
    body = op.body
    pending = book.pending(body.payout_id)
    if pending is None or pending.kind not in (PAYOUT, WITHDRAWAL):
        raise NotFound("there is no such payout")
    if body.paid and pending.kind == WITHDRAWAL and pending.due_unix_ms > book.now:
        raise Conflict("the bond may not be paid out yet")
    state, posted = (CAPTURED, pending.amount) if body.paid else (VOIDED, 0)
    book.resolve(pending, state, posted, "payout" if pending.kind == PAYOUT else "bond-withdrawal")
    if body.reference:
        book.claim_reference(
            settled_by(pending.credit),
            body.reference,
            "this reference of the rail settled another payout",
        )
    return posted


def settled_by(external_account: str) -> str:
    """The kind of references under which a rail's answers to payouts are kept. Not that of its
    deposits: a rail may count both ways on its own."""
    return f"payout:{owner_of(external_account)}"


def pay_debt(book: Book, op: Prepared) -> int:
    """treasury, or fee if that has too little -> creditor; all of it, once."""
    body = op.body
    amount = book.snapshot.debts.get((body.operation_id, body.creditor))
    if amount is None:
        raise NotFound("nothing is owed by this operation to this account")
    key = debt_key(body.operation_id, body.creditor)
    book.claim_reference("debt", key, "the debt was paid before")
    has_enough = book.available(TREASURY_ACCOUNT) >= amount
    book.move(
        TREASURY_ACCOUNT if has_enough else FEE_ACCOUNT, paid_to(body.creditor), amount, "debt"
    )
    return amount


def debt_key(operation_id: bytes, creditor: str) -> str:
    """The reference that paying a debt takes."""
    return f"{operation_id.hex()}:{creditor}"


def paid_to(creditor: str) -> str:
    """Where a debt is paid. Locked earnings are those that receipts have earned, and no others."""
    owed_to_node = kind_of(creditor) == NODE_LOCKED
    return node_available(owner_of(creditor)) if owed_to_node else creditor


def reward(book: Book, op: Prepared) -> int:
    """verification pool -> verifier, once per verdict and verifier."""
    body = op.body
    index = book.published_at(body.verdict_digest)
    if index is None:
        raise NotFound("the verdict is not in the log", hint="Publish it first.")
    fresh = book.verdicts.get(index)
    verdict = fresh or book.snapshot.rewardable.get(index)
    if verdict is None or verdict.verifier_id != body.verifier_id:
        raise InvalidRequest("that is no verdict of this verifier")
    asked = book.request(verdict.key)
    if asked is None or not asked.is_answered_by(index):
        raise Conflict(
            "the verdict answers no audit of a settled receipt that its verifier asked for in the "
            "log before",
            hint="Verdicts that nobody asked for, second ones and appeals are not rewarded.",
        )
    book.claim_reference(
        "reward", f"{body.verifier_id}:{body.verdict_digest.hex()}", "the verdict was rewarded"
    )
    book.move(POOL_ACCOUNT, f"verifier:{body.verifier_id}", body.amount_nano, "reward")
    return int(body.amount_nano)


def set_spending_limit(book: Book, op: Prepared) -> int:
    """0 removes the limit; what was spent in total stays known."""
    body = op.body
    row = book.spending_of(body.api_key_id)
    row = budget.limited(row, body.limit_nano, body.period_ms, book.now)
    book.put(book.spending, body.api_key_id, row)
    return int(body.limit_nano)


def expired(book: Book, pending: Pending) -> None:
    """The end of a hold that nobody captured and nobody claimed from."""
    book.resolve(pending, EXPIRED, 0, "expire")


def _rail_once(book: Book, rail: str, reference: str) -> None:
    book.claim_reference(
        f"rail:{rail}", reference, "this reference of the rail was deposited before"
    )
