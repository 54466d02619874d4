"""Taking a conviction back: the node may earn again, and gets back what is still there."""

from __future__ import annotations

from trueweight.ledger.accounts import TREASURY_ACCOUNT, node_bond, node_locked
from trueweight.ledger.book import Book
from trueweight.ledger.evidence import ReinstateFacts
from trueweight.ledger.settlement import publish_evidence, still_counting
from trueweight.ledger.values import LegTotal, Prepared, Terms
from trueweight.protos.errors import Conflict, Unavailable


def reinstate(book: Book, op: Prepared, __: Terms) -> tuple[int, int]:
    """Amount paid back, and the leaf from which on evidence counts again.

    What was paid to clients and to the challenger stays theirs. Earlier captures count as released,
    but for what is locked of them: what they earned was forfeited or paid out, and must neither let
    later ones go before their window is over nor keep them after it."""
    facts: ReinstateFacts = op.facts
    row = book.node(facts.node_id)
    if not row.convicted:
        raise Conflict("the node is not convicted")
    if book.restitution(facts.node_id) is not None:
        raise Unavailable(
            "the clients of the node are still being refunded", hint="Ask again in a minute."
        )
    if book.published_at(facts.published.digest) is not None:
        # It would take back evidence only up to where it was logged then.
        raise Conflict("this statement was used before", hint="The market signs a new one.")
    most = min(row.forfeited, max(0, book.available(TREASURY_ACCOUNT)))
    if facts.pay_back > most:
        raise Conflict(
            f"at most {most} nanocredits may be paid back",
            hint="What convictions took from the node, as far as the treasury still has it.",
        )
    earned, _, is_known = book.snapshot.leg_total or LegTotal(0)
    if not is_known:
        raise still_counting()
    index = publish_evidence(book, facts.published)
    book.move(TREASURY_ACCOUNT, node_bond(facts.node_id), facts.pay_back, "reinstate")
    cleared = row._replace(
        convicted=0,
        reinstated=index + 1,
        released=earned - book.available(node_locked(facts.node_id)),
        forfeited=row.forfeited - facts.pay_back,
    )
    book.put(book.nodes, facts.node_id, cleared)
    return facts.pay_back, index
