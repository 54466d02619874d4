"""Writing a finished book: few statements, each for many rows. History is only ever inserted."""

from __future__ import annotations

from trueweight.ledger.accounts import CURRENCY
from trueweight.ledger.audits import StepRow, VerdictRow
from trueweight.ledger.backend import Backend
from trueweight.ledger.book import Book
from trueweight.ledger.commitments import CommitmentRow
from trueweight.ledger.load import (
    ACCOUNT_COLUMNS,
    CLAIM_COLUMNS,
    LEG_COLUMNS,
    PENDING_COLUMNS,
    SPENDING_COLUMNS,
    Cache,
)
from trueweight.ledger.requests import RequestRow
from trueweight.ledger.values import OPEN, Claim, NodeRow, Restitution

_TRANSFER_COLUMNS = (
    "sequence", "operation_id", "ordinal", "debit", "credit", "amount", "phase", "pending_id",
    "reason", "created_at",
)  # fmt: skip


def save(backend: Backend, book: Book) -> None:
    """Every change of the book. Raises ConstraintViolated if the database refuses one."""
    _save_accounts(backend, book)
    backend.insert("transfer", _TRANSFER_COLUMNS, book.transfers)
    _save_pendings(backend, book)
    backend.insert(
        "operation", ("id", "body_hash", "amount", "log_index"), list(book.applied.values())
    )
    _save_legs(backend, book)
    _save_rare(backend, book)


def remember(cache: Cache, book: Book) -> None:
    """Brings the cache up to what was just judged."""
    cache.trim()
    cache.accounts.update((now.id, now) for _, now in book.changed_accounts())
    for pending in book.pendings.values():
        if pending.state == OPEN:
            cache.open_holds[pending.id] = pending
        else:
            cache.open_holds.pop(pending.id, None)
    if book.claims:
        cache.any_claims = True
    if book.restitutions:
        cache.note_restitutions(book.restitutions.values())
    old = book.snapshot
    cache.earnings.note((*old.legs.values(), *old.node_legs), book.legs)


def _save_accounts(backend: Backend, book: Book) -> None:
    new, changed = [], []
    for old, now in book.changed_accounts():
        if old is None:
            new.append((now.no, now.id, now.kind, CURRENCY, *now[3:]))
        else:
            # Deltas, not values: the database's own row is what the CHECK judges.
            changed.append(
                (now[3] - old[3], now[4] - old[4], now[5] - old[5], now[6] - old[6], now[0])
            )
    backend.insert("account", ACCOUNT_COLUMNS, new)
    backend.update("account", [f"+{name}" for name in ACCOUNT_COLUMNS[4:]], ("no",), changed)


def _save_pendings(backend: Backend, book: Book) -> None:
    known = book.snapshot.pendings
    new = [p for p in book.pendings.values() if p.id not in known]
    # Held and resolved in one group: both phases are transfers, the row goes in as it ended.
    backend.insert("pending", PENDING_COLUMNS, new)
    backend.update(
        "pending",
        ("state", "posted"),
        ("id",),
        [(p.state, p.posted, p.id) for p in book.pendings.values() if p.id in known],
    )


def _save_legs(backend: Backend, book: Book) -> None:
    known = {leg.receipt_digest for leg in book.snapshot.node_legs} | book.snapshot.legs.keys()
    backend.insert("leg", LEG_COLUMNS, [leg for d, leg in book.legs.items() if d not in known])
    backend.update(
        "leg",
        ("refunded", "refunded_node"),
        ("receipt_digest",),
        [(leg.refunded, leg.refunded_node, d) for d, leg in book.legs.items() if d in known],
    )


def _save_rare(backend: Backend, book: Book) -> None:
    claims: list[Claim] = []
    for hold_id, made in book.claims.items():
        claims += made[len(book.snapshot.claims.get(hold_id, ())) :]
    backend.insert("claim", CLAIM_COLUMNS, claims)
    backend.insert(
        "reference",
        ("kind", "key", "operation_id"),
        [(kind, key, operation) for (kind, key), operation in book.references.items()],
    )
    backend.upsert("spending", SPENDING_COLUMNS, 1, list(book.spending.values()))
    backend.upsert("node", NodeRow._fields, 1, list(book.nodes.values()))
    backend.upsert("restitution", Restitution._fields, 1, list(book.restitutions.values()))
    debts = [(*key, amount) for key, amount in book.summed_debts().items()]
    backend.insert("debt", ("operation_id", "creditor", "amount"), debts)
    backend.insert("evidence", ("digest", "log_index"), list(book.published.items()))
    backend.insert("verdict", VerdictRow._fields, list(book.verdicts.values()))
    backend.insert("audit_step", StepRow._fields, list(book.steps.values()))
    backend.insert("margin_commitment", CommitmentRow._fields, list(book.commitments.values()))
    known = book.snapshot.requests
    backend.insert(
        "audit_request", RequestRow._fields, [r for k, r in book.requests.items() if k not in known]
    )
    backend.update(
        "audit_request",
        ("verdict_index",),
        ("log_index",),
        [(r.verdict_index, r.log_index) for k, r in book.requests.items() if k in known],
    )
