"""The state machine: a group of operations against a snapshot gives results and changes.

``run`` is pure. Operations are taken in order; a chain of linked ones is applied as a whole or
not at all; a refused one leaves no trace, so that it may be tried again under the same id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from trueweight.ledger import movements, reinstatement, restitution, settlement
from trueweight.ledger.book import Book
from trueweight.ledger.values import Applied, Prepared, Snapshot, Terms
from trueweight.protos.errors import (
    Conflict,
    IdConflict,
    InvalidRequest,
    OverCapacity,
    TrueweightError,
)

# These read a part of the books that is not known from their ids: each is a group of its own.
ALONE = frozenset({"convict", "release", "expire", "reinstate", restitution.KIND})
# A conviction reads up to 20,000 rows of a node's history for each verifier: what it takes of the
# writer's queue, in operations. And how many of a kind one call, which is never split, may ask for:
# each of the others costs a dozen statements.
CONVICTION_WEIGHT = 512
MOST_IN_CALL = {"convict": 8, "release": 256, "reinstate": 64}
NO_INDEX = -1


class Outcome(NamedTuple):
    """What became of one operation."""

    status: str  # "applied", "replayed", "refused"
    amount: int = 0
    log_index: int = NO_INDEX
    error: TrueweightError | None = None


def run(
    group: Sequence[Sequence[Prepared]], snapshot: Snapshot, terms: Terms
) -> tuple[list[Outcome], Book]:
    """Outcomes of all operations of these chains, in order, and the book with every change."""
    book = Book(snapshot)
    outcomes: list[Outcome] = []
    for chain in group:
        outcomes.extend(_run_chain(book, chain, terms))
    return outcomes, book


def stands_alone(chain: Sequence[Prepared]) -> bool:
    """True if a chain is a group of its own. One that was refused already reads nothing."""
    return len(chain) == 1 and chain[0].kind in ALONE and chain[0].error is None


def bounded(operations: Sequence[Prepared]) -> list[Prepared]:
    """The operations of a call; those beyond ``MOST_IN_CALL`` of their kind are refused."""
    left, found = dict(MOST_IN_CALL), []
    for operation in operations:
        if operation.kind in left and operation.error is None:
            left[operation.kind] -= 1
            if left[operation.kind] < 0:
                error = OverCapacity(
                    f"a call asks for at most {MOST_IN_CALL[operation.kind]} of this kind "
                    f"({operation.kind})",
                    hint="Send it again.",
                )
                operation = operation._replace(error=error)  # noqa: PLW2901
        found.append(operation)
    return found


def weight_of(operations: Sequence[Prepared]) -> int:
    """What a call takes of the queue."""
    return len(operations) + sum(map(is_heavy, operations)) * (CONVICTION_WEIGHT - 1)


def is_heavy(operation: Prepared) -> bool:
    """True if it reads a node's history."""
    return operation.kind == "convict" and operation.error is None


def chains(operations: Sequence[Prepared]) -> list[list[Prepared]]:
    """Splits operations into chains; an unlinked one is a chain of its own."""
    found: list[list[Prepared]] = []
    current: list[Prepared] = []
    for operation in operations:
        current.append(operation)
        if not operation.linked:
            found.append(current)
            current = []
    if current:
        found.append(current)
    return found


def _run_chain(book: Book, chain: Sequence[Prepared], terms: Terms) -> list[Outcome]:
    mark = book.mark()
    outcomes: list[Outcome] = []
    for operation in chain:
        try:
            if operation is chain[-1] and operation.linked:
                raise InvalidRequest("the chain has no end", hint="The last is not linked.")
            outcomes.append(_run_one(book, operation, len(chain) > 1, terms))
        except TrueweightError as error:
            book.rewind(mark)
            return _refused_chain(chain, operation, error)
    return outcomes


def _refused_chain(
    chain: Sequence[Prepared], culprit: Prepared, error: TrueweightError
) -> list[Outcome]:
    other = Conflict("another operation of the chain was refused", hint="None was applied.")
    return [
        Outcome("refused", error=error if operation is culprit else other) for operation in chain
    ]


def _run_one(book: Book, operation: Prepared, in_chain: bool, terms: Terms) -> Outcome:
    before = book.applied.get(operation.id) or book.snapshot.applied.get(operation.id)
    if before is not None and operation.body_hash:
        if before.body_hash != operation.body_hash:
            raise IdConflict(
                "the id was used before with another body", hint="Every operation needs its own."
            )
        return Outcome("replayed", before.amount, before.log_index)
    if operation.error is not None:
        raise operation.error
    if in_chain and operation.kind in ALONE:
        raise InvalidRequest(f"{operation.kind} cannot be linked")
    book.start(operation.id)
    amount, index = _HANDLERS[operation.kind](book, operation, terms)
    book.finish()
    applied = Applied(operation.id, operation.body_hash, amount, index)
    book.put(book.applied, operation.id, applied)
    return Outcome("applied", amount, index)


Handler = Callable[[Book, Prepared, Terms], tuple[int, int]]


def _moves(function: Callable[[Book, Prepared], int]) -> Handler:
    return lambda book, operation, _: (function(book, operation), NO_INDEX)


def _settles(function: Callable[[Book, Prepared, Terms], int]) -> Handler:
    return lambda book, operation, terms: (function(book, operation, terms), NO_INDEX)


def _publish(book: Book, operation: Prepared, _: Terms) -> tuple[int, int]:
    return 0, settlement.publish_evidence(book, operation.facts)


_HANDLERS: dict[str, Handler] = {
    "deposit": _moves(movements.deposit),
    "bond_deposit": _moves(movements.bond_deposit),
    "hold": _moves(movements.hold),
    "void_hold": _moves(movements.void_hold),
    "payout_start": _moves(movements.payout_start),
    "payout_settle": _moves(movements.payout_settle),
    "pay_debt": _moves(movements.pay_debt),
    "bond_withdraw": _settles(movements.bond_withdraw),
    "reward": _moves(movements.reward),
    "set_spending_limit": _moves(movements.set_spending_limit),
    "capture": _settles(settlement.capture),
    "claim": _settles(settlement.claim),
    "expire": _settles(settlement.expire),
    "refund": _settles(settlement.refund),
    "convict": _settles(settlement.convict),
    "release": _settles(settlement.release),
    "reinstate": reinstatement.reinstate,
    restitution.KIND: _settles(restitution.step),
    "publish": _publish,
}
