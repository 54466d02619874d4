"""What is kept beside a leaf of evidence. Pure: functions of the book and what was checked before.

Of what a verifier says more than once about a receipt the first counts: request, commitment and
verdict.
"""

from __future__ import annotations

from trueweight.ledger.audits import VerdictRow
from trueweight.ledger.book import Book
from trueweight.ledger.commitments import CommitmentRow
from trueweight.ledger.evidence import PublishFacts
from trueweight.ledger.requests import NONE, RequestRow
from trueweight.protos.blind_verdicts import bound_since


def keep(book: Book, facts: PublishFacts, index: int) -> None:
    """Keeps what the evidence says, which has just become the leaf at this index."""
    if facts.verdict is not None:
        _keep_verdict(book, facts.verdict, facts.opening, index)
    if facts.request is not None:
        _keep_request(book, facts.request, index)
    if facts.commitment is not None:
        _keep_commitment(book, facts.commitment, index)
    if facts.step is not None:
        book.put(book.steps, index, facts.step._replace(log_index=index))


def _keep_verdict(book: Book, verdict: VerdictRow, opening: bytes, index: int) -> None:
    key = verdict.key
    leg, commitment = book.leg(verdict.receipt_digest), book.commitment(key)
    bound = bound_since(
        opening,
        index,
        commitment.committed if commitment else None,
        leg.captured_at_unix_ms if leg else None,
    )
    is_first = not book.has_judged(key)
    row = verdict._replace(log_index=index, is_first=int(is_first), bound_since=bound)
    book.put(book.verdicts, index, row)
    if is_first:
        book.put(book.judged, key, index)
    request = book.request(key)
    if request is not None and request.verdict_index == NONE:
        book.put(book.requests, key, request._replace(verdict_index=index))


def _keep_request(book: Book, asked: RequestRow, index: int) -> None:
    if book.request(asked.key) is not None:
        return
    leg = book.leg(asked.receipt_digest)
    row = asked._replace(log_index=index)
    if leg is not None:
        row = row._replace(
            node_id=leg.node_id, receipt_index=leg.log_index, captured_at=leg.captured_at_unix_ms
        )
    book.put(book.requests, asked.key, row)


def _keep_commitment(book: Book, commitment: CommitmentRow, index: int) -> None:
    if book.commitment(commitment.key) is None:
        row = commitment._replace(log_index=index, merged_at=book.now)
        book.put(book.commitments, commitment.key, row)
