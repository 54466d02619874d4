"""Operations that follow from evidence: capture, claim, expiry, refund, conviction, release.

Each is a function of (book, prepared, terms) that returns the amount moved, or raises.
"""

from __future__ import annotations

from collections.abc import Iterable

from trueweight.ledger import audits, movements, publication, restitution
from trueweight.ledger.accounts import (
    FEE_ACCOUNT,
    POOL_ACCOUNT,
    TREASURY_ACCOUNT,
    clearing_of,
    node_available,
    node_bond,
    node_locked,
)
from trueweight.ledger.book import Book
from trueweight.ledger.evidence import (
    MAX_EVIDENCE_BYTES,
    MAX_LEGS,
    CaptureFacts,
    ClaimFacts,
    ConvictFacts,
    PublishFacts,
    RefundFacts,
)
from trueweight.ledger.requests import NONE
from trueweight.ledger.values import (
    CAPTURED,
    EXPIRED,
    OPEN,
    VOIDED,
    Claim,
    Leaf,
    Leg,
    LegTotal,
    Pending,
    Prepared,
    Terms,
    conviction_key,
)
from trueweight.protos.errors import (
    Conflict,
    IdConflict,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from trueweight.protos.money import split_charge

PPM = 1_000_000


def capture(book: Book, op: Prepared, terms: Terms) -> int:
    """Posts the hold by the bill, splits it and keeps what each receipt moved."""
    facts: CaptureFacts = op.facts
    pending = movements.open_hold(book, facts.hold_id)
    if pending.router_id != facts.router_id:
        raise PermissionDenied("the hold is another router's")
    if facts.charge > pending.amount:
        raise InvalidRequest("the bill is higher than its hold")
    claims = book.claims_of(pending.id)
    if claims and not {c.assignment_digest for c in claims} <= {
        leg.assignment_digest for leg in facts.legs
    }:
        raise Conflict("a node has claimed a leg that the bill leaves out")
    indices, fee, pool = [], 0, 0
    for leg in facts.legs:
        if book.leg(leg.receipt_digest) is not None:
            raise Conflict("a receipt of the bill was settled before")
        indices.append(book.append(Leaf("receipt", leg.receipt, b"")))
        fee += leg.fee
        pool += leg.pool
    book.append(Leaf("bill", facts.bill, facts.bill_digest))
    book.resolve(pending, CAPTURED, facts.charge, "capture")
    clearing = pending.credit
    book.move(clearing, FEE_ACCOUNT, fee, "fee")
    # Before the subsidies: they are at most what this bill itself brings to the pool.
    book.move(clearing, POOL_ACCOUNT, pool, "pool")
    for leg, index in zip(facts.legs, indices, strict=True):
        locked = node_locked(leg.node_id)
        book.move(clearing, locked, leg.node, "earning")
        subsidy = _pay_up_to(book, POOL_ACCOUNT, locked, leg.subsidy, "subsidy")
        book.owe(locked, leg.subsidy - subsidy)
        _keep_leg(
            book,
            Leg(
                leg.receipt_digest,
                pending.id,
                leg.node_id,
                pending.debit,
                leg.charge,
                leg.fee,
                leg.pool,
                leg.node,
                subsidy,
                index,
                book.now,
                output_tokens=leg.output_tokens,
                manifest_digest=leg.manifest_digest,
            ),
        )
    return facts.charge


def claim(book: Book, op: Prepared, _: Terms) -> int:
    """Keeps a node's claim. It is paid when the hold expires; a capture that bills the leg
    replaces it, and a bill that leaves it out is refused."""
    facts: ClaimFacts = op.facts
    pending = movements.open_hold(book, facts.hold_id)
    if pending.router_id != facts.router_id:
        # Every node knows the ids of holds that it works for, and may tell another router.
        raise PermissionDenied("the assignment is not by the router that has the hold")
    if book.now < facts.not_before_unix_ms:
        # A node that lost the leg, or never did it, could stop the router's bill or void.
        raise Conflict(
            "the router still has time to settle",
            hint="Claim half a minute after the assignment's deadline.",
        )
    claims = book.claims_of(pending.id)
    if any(c.assignment_digest == facts.assignment_digest for c in claims):
        raise Conflict("the leg was claimed before")
    if sum(c.charge for c in claims) + facts.charge > pending.amount:
        raise InvalidRequest("the claims are higher than the hold")
    size = sum(len(c.receipt) for c in claims) + len(facts.receipt)
    if len(claims) >= MAX_LEGS or size > MAX_EVIDENCE_BYTES:
        # Whoever looks at the hold reads them all, and its bill must carry them all.
        raise Conflict("more was claimed from this hold than one bill can carry")
    if book.leg(facts.receipt_digest) is not None:
        raise Conflict("the receipt was settled before")
    made = Claim(
        pending.id,
        facts.assignment_digest,
        facts.receipt_digest,
        facts.receipt,
        facts.node_id,
        facts.charge,
        facts.output_tokens,
        facts.manifest_digest,
    )
    book.put(book.claims, pending.id, (*claims, made))
    return facts.charge


def expire(book: Book, op: Prepared, terms: Terms) -> int:
    """Ends every due hold of the snapshot: what nodes claimed is paid, the rest goes back."""
    released = 0
    for found in book.snapshot.due_holds[: op.body.limit]:
        pending = book.pending(found.id) or found
        if pending.state != OPEN or pending.due_unix_ms > book.now:
            continue
        claims = book.claims_of(pending.id)
        if claims:
            _pay_claims(book, pending, claims, terms)
        else:
            movements.expired(book, pending)
        released += pending.amount - sum(c.charge for c in claims)
    return released


def _pay_claims(book: Book, pending: Pending, claims: Iterable[Claim], terms: Terms) -> None:
    claims = tuple(claims)
    indices = [book.append(Leaf("receipt", c.receipt, b"")) for c in claims]
    book.resolve(pending, EXPIRED, sum(c.charge for c in claims), "claim")
    for made, index in zip(claims, indices, strict=True):
        split = split_charge(made.charge, terms.fee_ppm, terms.pool_ppm)
        book.move(pending.credit, node_locked(made.node_id), split.node_nano, "earning")
        book.move(pending.credit, FEE_ACCOUNT, split.fee_nano, "fee")
        book.move(pending.credit, POOL_ACCOUNT, split.pool_nano, "pool")
        _keep_leg(
            book,
            Leg(
                made.receipt_digest,
                pending.id,
                made.node_id,
                pending.debit,
                made.charge,
                split.fee_nano,
                split.pool_nano,
                split.node_nano,
                0,
                index,
                book.now,
                output_tokens=made.output_tokens,
                manifest_digest=made.manifest_digest,
            ),
        )


def refund(book: Book, op: Prepared, terms: Terms) -> int:
    """Undoes one leg's charge: node locked, then bond, then treasury; fee and pool go back. A bond
    that its node is withdrawing is still there: as many withdrawals end as it takes.

    A verifier must have asked for the audit in the log first. Where it takes several to convict,
    one alone does not touch the bond.

    If the router cannot show the transcript, the market pays for its router: a node that did its
    work keeps what it earned, or routers and clients could drain nodes together. Only what a node
    claimed by itself is its own to prove."""
    facts: RefundFacts = op.facts
    leg = book.leg(facts.receipt_digest)
    if leg is None:
        raise NotFound("no capture with this receipt")
    if facts.node_id not in ("", leg.node_id):
        raise InvalidRequest("the verdict names another node than the receipt")
    if leg.refunded or leg.refunded_node:
        raise Conflict("the leg was refunded before")
    book.claim_reference("refund", leg.receipt_digest.hex(), "the receipt was refunded before")
    convicted = book.restitution(leg.node_id)
    if convicted is not None and convicted.covers(leg):
        raise Conflict("the leg is being refunded because its node was convicted")
    if facts.verdict is not None:
        _publish_asked_for(book, facts.verdict, facts.receipt_digest)
    claimed = any(c.receipt_digest == leg.receipt_digest for c in book.claims_of(leg.hold_id))
    from_market = facts.by_router and not claimed
    unpaid, taken_back, locked = leg.node, 0, node_locked(leg.node_id)
    if from_market:
        unpaid -= _pay_up_to(book, FEE_ACCOUNT, leg.client, unpaid, "refund")
    else:
        unpaid -= _pay_from_forfeit(book, leg)
        taken_back = _pay_up_to(book, locked, leg.client, unpaid, "refund")
        unpaid -= taken_back
        if facts.verdict is None or terms.convictions_needed == 1:
            movements.free_bond(book, node_bond(leg.node_id), unpaid)
            unpaid -= _pay_up_to(book, node_bond(leg.node_id), leg.client, unpaid, "refund")
    unpaid += leg.fee - _pay_up_to(book, FEE_ACCOUNT, leg.client, leg.fee, "refund")
    unpaid += leg.pool - _pay_up_to(book, POOL_ACCOUNT, leg.client, leg.pool, "refund")
    unpaid = _make_up(book, leg.client, unpaid)
    if not from_market:
        taken_back += _pay_up_to(book, locked, POOL_ACCOUNT, leg.subsidy, "refund")
    paid = leg.charge - unpaid
    # Marked with the whole charge: what could not be paid is owed, and is not claimed again. Of the
    # node's part only what came out of its locked earnings is not there to be released any more.
    book.put(
        book.legs,
        leg.receipt_digest,
        leg._replace(refunded=leg.charge, refunded_node=taken_back),
    )
    return paid


def _pay_from_forfeit(book: Book, leg: Leg) -> int:
    """What a conviction took and did not give to the clients pays first for receipts from before
    the reinstatement: their node has lost what it earned by them, and must not lose it twice."""
    row = book.node(leg.node_id)
    if leg.log_index >= row.reinstated:
        return 0
    paid = _pay_up_to(
        book, TREASURY_ACCOUNT, leg.client, min(leg.node, max(0, row.forfeited)), "refund"
    )
    book.put(book.nodes, row.node_id, row._replace(forfeited=row.forfeited - paid))
    return paid


def _publish_asked_for(book: Book, verdict: PublishFacts, receipt_digest: bytes) -> None:
    index = publish_evidence(book, verdict)
    request = book.request((verdict.signer, receipt_digest))
    if request is None or request.log_index >= index:
        raise Conflict(
            "the verifier did not ask for this audit in the log before its verdict",
            hint="Publish an AuditRequest for the receipt first.",
        )


def convict(book: Book, op: Prepared, terms: Terms) -> int:
    """Forfeits locked and bond into the treasury, pays the challenger and the clients from it."""
    facts: ConvictFacts = op.facts
    row = book.node(facts.node_id)
    if row.convicted:
        raise Conflict("the node was convicted before")
    publish_evidence(book, facts.published)
    _check_judges(book, facts, terms)
    for pending in book.withdrawals_of(node_bond(facts.node_id)):
        book.resolve(pending, VOIDED, 0, "bond-withdrawal")
    forfeited = 0
    for source in (node_locked(facts.node_id), node_bond(facts.node_id)):
        amount = book.available(source)
        book.move(source, TREASURY_ACCOUNT, amount, "forfeit")
        forfeited += amount
    taken = row._replace(convicted=1, forfeited=row.forfeited + forfeited)
    book.put(book.nodes, facts.node_id, taken)
    reward = forfeited * op.body.reward_ppm // PPM
    book.move(TREASURY_ACCOUNT, f"verifier:{facts.verifier_id}", reward, "challenger")
    first_index = max(row.reinstated, facts.change_point)
    restitution.begin(book, facts.node_id, first_index, forfeited - reward)
    return forfeited


def _check_judges(book: Book, facts: ConvictFacts, terms: Terms) -> None:
    """Raises unless so many verifiers as it takes have published a conviction which their own
    logged verdicts carry, and the one at hand is one of these: Conflict or InvalidRequest if it
    does not follow, Unavailable if the verdicts are not all added up yet."""
    row = book.node(facts.node_id)
    cases = {
        verifier: case
        for verifier, case in book.snapshot.cases.items()
        if book.reference("conviction", conviction_key(row, f"{facts.node_id}:{verifier}"))
        is not None
    }
    mine = cases.get(facts.verifier_id) or audits.Case()
    audits.check_statement(facts.statement, mine)
    judges = sum(case.is_carried for case in cases.values())
    if judges >= terms.convictions_needed:
        return
    for case in cases.values():
        audits.check_added_up(case)
    raise Conflict(
        f"{judges} of {terms.convictions_needed} verifiers have convicted this node",
        hint="The others publish their convictions first.",
    )


def release(book: Book, op: Prepared, _: Terms) -> int:
    """locked -> available, up to what the counted captures earned and was not released yet. None
    counts from the oldest receipt on whose audit was asked for and not answered."""
    body = op.body
    row = book.node(body.node_id)
    if row.convicted:
        raise Conflict("a convicted node's earnings are not released")
    earned, waits_for, is_known = book.snapshot.leg_total or LegTotal(0)
    if not is_known:
        raise still_counting()
    locked = node_locked(body.node_id)
    most = max(0, min(earned - row.released, book.available(locked)))
    amount = body.amount_nano or most
    if amount > most:
        waits = "" if waits_for == NONE else f": the audit of receipt leaf {waits_for} is asked for"
        raise Conflict(
            f"only {most} nanocredits may be released now{waits}",
            hint="Wait for the settlement window and the audits that are owed.",
        )
    book.move(locked, node_available(body.node_id), amount, "release")
    book.put(book.nodes, body.node_id, row._replace(released=row.released + amount))
    return int(amount)


def still_counting() -> Unavailable:
    """The refusal of whoever wants to know what a node with a long history has earned."""
    return Unavailable(
        "what the node has earned is still being added up", hint="Ask again in a second."
    )


def publish_evidence(book: Book, facts: PublishFacts) -> int:
    """The index of the evidence in the log; appended unless it is there already."""
    known = book.published_at(facts.digest)
    if known is not None:
        return known
    if facts.conviction:
        row = book.node(facts.conviction.rpartition(":")[0])
        key = ("conviction", conviction_key(row, facts.conviction))
        if book.reference(*key) is None:
            book.take_reference(*key)
    index = book.append(Leaf(facts.kind, facts.envelope, facts.digest))
    publication.keep(book, facts, index)
    return index


def _keep_leg(book: Book, leg: Leg) -> None:
    if book.leg(leg.receipt_digest) is not None:
        raise IdConflict("two legs carry the same receipt")
    book.put(book.legs, leg.receipt_digest, leg)
    if book.node(leg.node_id).convicted:
        _undo(book, leg)


def _undo(book: Book, leg: Leg) -> None:
    """Gives back what was just captured for a node that is convicted: its conviction has refunded
    everything up to then, and work that was under way is worth no more than that."""
    # The subsidy first: it may have taken all that the bill brought to the pool. Another leg's may
    # have taken more than that; the market makes up for it, or the bill's honest legs stay unpaid.
    book.move(node_locked(leg.node_id), POOL_ACCOUNT, leg.subsidy, "refund")
    book.move(node_locked(leg.node_id), leg.client, leg.node, "refund")
    book.move(FEE_ACCOUNT, leg.client, leg.fee, "refund")
    missing = leg.pool - _pay_up_to(book, POOL_ACCOUNT, leg.client, leg.pool, "refund")
    _make_up(book, leg.client, missing)
    undone = leg._replace(refunded=leg.charge, refunded_node=leg.node + leg.subsidy)
    book.put(book.legs, leg.receipt_digest, undone)


def _make_up(book: Book, client: str, missing: int) -> int:
    """The treasury pays what a refund lacks; what it lacks itself is owed, and returned."""
    missing -= _pay_up_to(book, TREASURY_ACCOUNT, client, missing, "refund")
    book.owe(client, missing)
    return missing


def _pay_up_to(book: Book, source: str, target: str, amount: int, reason: str) -> int:
    if not amount:
        return 0
    paid = min(amount, max(0, book.available(source)))
    book.move(source, target, paid, reason)
    return paid


__all__ = [
    "capture",
    "claim",
    "clearing_of",
    "convict",
    "expire",
    "publish_evidence",
    "refund",
    "release",
    "still_counting",
]
