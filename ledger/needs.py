"""Which rows a group of operations may touch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from trueweight.ledger.accounts import (
    EXTERNAL,
    FEE_ACCOUNT,
    POOL_ACCOUNT,
    TREASURY_ACCOUNT,
    clearing_of,
    external,
    kind_of,
    node_available,
    node_bond,
    node_locked,
    paid_out_of,
)
from trueweight.ledger.evidence import CaptureFacts, ClaimFacts, PublishFacts, RefundFacts
from trueweight.ledger.movements import debt_key, paid_to, settled_by
from trueweight.ledger.values import Prepared

MARKET_ACCOUNTS = (FEE_ACCOUNT, POOL_ACCOUNT, TREASURY_ACCOUNT)


@dataclass(slots=True)
class Needs:
    """Keys that a group may touch."""

    accounts: set[str] = field(default_factory=set)
    pendings: set[bytes] = field(default_factory=set)
    legs: set[bytes] = field(default_factory=set)
    # Receipts that are to be refunded.
    refunds: set[bytes] = field(default_factory=set)
    claims: set[bytes] = field(default_factory=set)
    references: set[tuple[str, str]] = field(default_factory=set)
    # Debts that are to be paid: operation and creditor.
    debts: set[tuple[bytes, str]] = field(default_factory=set)
    spending: set[str] = field(default_factory=set)
    nodes: set[str] = field(default_factory=set)
    digests: set[bytes] = field(default_factory=set)
    # Receipts that an audit was asked for.
    audited: set[bytes] = field(default_factory=set)
    # Receipts that a verdict is about, or a commitment to one.
    judged: set[bytes] = field(default_factory=set)
    # Bonds whose open withdrawals matter.
    bonds: set[str] = field(default_factory=set)
    # (node, "<node>:<verifier>") of convictions: their references depend on the node's row.
    convictions: set[tuple[str, str]] = field(default_factory=set)


def needs_of(operations: Iterable[Prepared]) -> Needs:
    """What is known from the operations alone; what rows are found may need more."""
    needs = Needs()
    for op in operations:
        _add_needs(needs, op)
    return needs


def _add_needs(needs: Needs, op: Prepared) -> None:
    body, facts = op.body, op.facts
    if op.kind == "hold":
        needs.accounts.update((body.account, clearing_of(body.account)))
        if body.api_key_id:
            needs.spending.add(body.api_key_id)
    elif isinstance(facts, CaptureFacts):
        needs.pendings.add(facts.hold_id)
        needs.claims.add(facts.hold_id)
        needs.accounts.update(MARKET_ACCOUNTS)
        for leg in facts.legs:
            needs.accounts.add(node_locked(leg.node_id))
            needs.legs.add(leg.receipt_digest)
            needs.nodes.add(leg.node_id)
    elif isinstance(facts, ClaimFacts):
        needs.pendings.add(facts.hold_id)
        needs.claims.add(facts.hold_id)
        needs.legs.add(facts.receipt_digest)
    elif isinstance(facts, RefundFacts):
        needs.refunds.add(facts.receipt_digest)
        needs.references.add(("refund", facts.receipt_digest.hex()))
        needs.legs.add(facts.receipt_digest)
        needs.accounts.update(MARKET_ACCOUNTS)
        if facts.verdict is not None:
            _add_publication(needs, facts.verdict)
    else:
        _add_rare_needs(needs, op)


def _add_rare_needs(needs: Needs, op: Prepared) -> None:
    body, kind = op.body, op.kind
    if kind in ("deposit", "bond_deposit"):
        target = body.account if kind == "deposit" else node_bond(body.node_id)
        needs.accounts.update((external(body.rail), target))
        needs.references.add((f"rail:{body.rail}", body.reference))
    elif kind == "void_hold":
        needs.pendings.add(body.hold_id)
        needs.claims.add(body.hold_id)
    elif kind == "payout_start":
        source = paid_out_of(body.node_id, body.account)
        needs.accounts.update((source, external(body.rail)))
    elif kind == "pay_debt":
        needs.debts.add((body.operation_id, body.creditor))
        needs.accounts.update((TREASURY_ACCOUNT, FEE_ACCOUNT, paid_to(body.creditor)))
        needs.references.add(("debt", debt_key(body.operation_id, body.creditor)))
    elif kind == "bond_withdraw":
        needs.accounts.update((node_bond(body.node_id), external("bond")))
        needs.bonds.add(node_bond(body.node_id))
    elif kind == "payout_settle":
        needs.pendings.add(body.payout_id)
    elif kind == "reward":
        needs.accounts.update((POOL_ACCOUNT, f"verifier:{body.verifier_id}"))
        needs.digests.add(body.verdict_digest)
        needs.references.add(("reward", f"{body.verifier_id}:{body.verdict_digest.hex()}"))
    elif kind == "set_spending_limit":
        needs.spending.add(body.api_key_id)
    elif kind == "publish":
        _add_publication(needs, op.facts)
    elif kind == "reinstate":
        node = op.facts.node_id
        needs.digests.add(op.facts.published.digest)
        needs.nodes.add(node)
        needs.accounts.update((TREASURY_ACCOUNT, node_bond(node), node_locked(node)))
    elif kind == "release":
        needs.nodes.add(body.node_id)
        needs.accounts.update((node_locked(body.node_id), node_available(body.node_id)))


def add_settled(needs: Needs, operations: Sequence[Prepared]) -> None:
    """References of settled payouts, on every rail of the group: the payout that one settles, and
    with it the rail, may itself be of this group."""
    settled = {op.body.reference for op in operations if op.kind == "payout_settle" and op.body}
    if settled - {""}:
        rails = [account for account in needs.accounts if kind_of(account) == EXTERNAL]
        needs.references.update((settled_by(rail), key) for rail in rails for key in settled)


def _add_publication(needs: Needs, facts: PublishFacts) -> None:
    needs.digests.add(facts.digest)
    if facts.conviction:
        node = facts.conviction.rpartition(":")[0]
        needs.nodes.add(node)
        needs.convictions.add((node, facts.conviction))
    if facts.verdict is not None:
        needs.audited.add(facts.verdict.receipt_digest)
        needs.judged.add(facts.verdict.receipt_digest)
        needs.legs.add(facts.verdict.receipt_digest)
    if facts.commitment is not None:
        needs.judged.add(facts.commitment.receipt_digest)
    if facts.request is not None:
        needs.audited.add(facts.request.receipt_digest)
        needs.legs.add(facts.request.receipt_digest)
