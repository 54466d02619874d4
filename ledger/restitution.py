"""What a conviction gives back to the clients, pro rata of what they paid since the change point.

A node may have served millions of requests by then, and nobody should wait while all of them are
marked. So where there are many the money is set aside in an account of its own, and the ledger
itself refunds the receipts bit by bit, between other groups: first it adds up their charges,
because a share depends on the sum, then it pays in the order of the log. How far it is stands in a
row that changes in the same transaction as the money, so that every step happens once, whoever dies
in between. The receipts are the same from the conviction on: nobody else may refund them, and what
comes later is given back as it is captured.
"""

from __future__ import annotations

from collections.abc import Sequence

from trueweight.ledger.accounts import TREASURY_ACCOUNT
from trueweight.ledger.book import Book
from trueweight.ledger.values import Leg, Prepared, Restitution, Terms
from trueweight.protos.errors import NotFound

# Receipts that one transaction refunds, and whose charges one transaction adds up.
REFUNDED = 128
COUNTED = 10_000
KIND = "restitute"
# Of the ledger's own operations: nobody can send one.
_BODY_HASH = b"restitution"


def set_aside(node_id: str) -> str:
    """The account out of which the clients of a convicted node are paid, until all are."""
    return f"treasury:{node_id}"


def step_of(node_id: str, operation_id: bytes, caller: str) -> Prepared:
    """The operation that takes one more step."""
    return Prepared(operation_id, _BODY_HASH, False, KIND, caller, None, node_id)


def begin(book: Book, node_id: str, first_index: int, budget: int) -> None:
    """Pays the clients out of the treasury, or sets the money aside if that takes long."""
    legs = book.snapshot.node_legs
    whole = Restitution(
        book.operation_id, node_id, first_index, book.snapshot.next_index, first_index, 0, budget
    )
    if len(legs) <= REFUNDED:
        victims = _victims(legs)
        total = sum(leg.charge for leg in victims)
        _pay(book, whole._replace(total=total), victims, TREASURY_ACCOUNT)
        return
    book.move(TREASURY_ACCOUNT, set_aside(node_id), budget, "treasury")
    book.put(book.restitutions, node_id, whole._replace(is_counting=1))


def step(book: Book, op: Prepared, _: Terms) -> int:
    """One more step; what it paid."""
    known = book.restitution(op.facts)
    if known is None:
        raise NotFound("no clients of this node wait for refunds")
    if known.is_counting:
        _count(book, known)
        return 0
    legs = book.snapshot.node_legs[:REFUNDED]
    is_last = len(book.snapshot.node_legs) <= REFUNDED
    victims = _victims(legs)
    paid = _pay(book, known, victims, set_aside(known.node_id))
    done = known._replace(
        next_index=known.end_index if is_last else legs[-1].log_index + 1,
        seen=known.seen + sum(leg.charge for leg in victims),
    )
    book.put(book.restitutions, known.node_id, done)
    return paid


def _count(book: Book, known: Restitution) -> None:
    charges, next_index = book.snapshot.charges
    counted = known._replace(total=known.total + charges, next_index=next_index)
    if next_index >= known.end_index:
        counted = counted._replace(is_counting=0, next_index=known.first_index)
        # More than all of them paid is the market's at once.
        too_much = counted.budget - counted.pay
        book.move(set_aside(known.node_id), TREASURY_ACCOUNT, too_much, "treasury")
    book.put(book.restitutions, known.node_id, counted)


def _victims(legs: Sequence[Leg]) -> list[Leg]:
    return [leg for leg in legs if leg.charge and not leg.refunded]


def _pay(book: Book, known: Restitution, victims: Sequence[Leg], source: str) -> int:
    """Refunds receipts that follow on those that were; what was paid."""
    owed_by_client: dict[str, int] = {}
    paid_by_client: dict[str, int] = {}
    seen = known.seen
    for leg in victims:
        # Shares by cumulative rounding: they differ by at most one and sum to ``pay`` exactly.
        before = known.pay * seen // known.total
        seen += leg.charge
        share = known.pay * seen // known.total - before
        paid_by_client[leg.client] = paid_by_client.get(leg.client, 0) + share
        owed_by_client[leg.client] = owed_by_client.get(leg.client, 0) + leg.charge - share
        book.put(
            book.legs,
            leg.receipt_digest,
            leg._replace(refunded=leg.charge, refunded_node=leg.node + leg.subsidy),
        )
    for client, amount in paid_by_client.items():
        book.move(source, client, amount, "refund")
        book.owe(client, owed_by_client[client])
    return sum(paid_by_client.values())
