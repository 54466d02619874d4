"""Which rows a group of operations may touch, and reading them into a Snapshot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trueweight.ledger.accounts import (
    EXTERNAL,
    FEE_ACCOUNT,
    POOL_ACCOUNT,
    TREASURY_ACCOUNT,
    Account,
    clearing_of,
    external,
    kind_of,
    node_available,
    node_bond,
    node_locked,
)
from trueweight.ledger.backend import Backend
from trueweight.ledger.book import Book
from trueweight.ledger.dockets import Dockets, read_cases
from trueweight.ledger.evidence import (
    CaptureFacts,
    ClaimFacts,
    ConvictFacts,
    PublishFacts,
    RefundFacts,
)
from trueweight.ledger.movements import settled_by
from trueweight.ledger.requests import NONE, RequestRow, held_since_unix_ms
from trueweight.ledger.values import (
    OPEN,
    WITHDRAWAL,
    Applied,
    Claim,
    Leg,
    LegTotal,
    NodeRow,
    Pending,
    Prepared,
    Snapshot,
    Spending,
    Terms,
    conviction_key,
)

_MARKET = (FEE_ACCOUNT, POOL_ACCOUNT, TREASURY_ACCOUNT)
_MAX_CACHED = 200_000

ACCOUNT_COLUMNS = (
    "no", "id", "kind", "currency", "debits_pending", "debits_posted", "credits_pending",
    "credits_posted",
)  # fmt: skip
PENDING_COLUMNS = (
    "id", "kind", "debit", "credit", "amount", "posted", "state", "due", "api_key_id", "router_id",
    "period_no",
)  # fmt: skip
LEG_COLUMNS = (
    "receipt_digest", "hold_id", "node_id", "client", "charge", "fee", "pool", "node", "subsidy",
    "log_index", "captured_at", "refunded", "refunded_node", "output_tokens", "manifest_digest",
)  # fmt: skip
CLAIM_COLUMNS = (
    "hold_id", "assignment_digest", "receipt_digest", "receipt", "node_id", "charge",
    "output_tokens", "manifest_digest",
)  # fmt: skip
_ACCOUNTS = (
    "SELECT no, id, kind, debits_pending, debits_posted, credits_pending, credits_posted "
    "FROM account"
)
_PENDINGS = f"SELECT {', '.join(PENDING_COLUMNS)} FROM pending"  # noqa: S608
_LEGS = f"SELECT {', '.join(LEG_COLUMNS)} FROM leg"  # noqa: S608
_CLAIMS = f"SELECT {', '.join(CLAIM_COLUMNS)} FROM claim"  # noqa: S608
SPENDING_COLUMNS = (
    "api_key_id", "limit_nano", "spent", "period_ms", "period_limit", "period_no", "period_from",
    "period_spent",
)  # fmt: skip
_SPENDING = (f"SELECT {', '.join(SPENDING_COLUMNS)} FROM spending", "api_key_id")  # noqa: S608
_NODES = (f"SELECT {', '.join(NodeRow._fields)} FROM node", "node_id")  # noqa: S608
_REQUESTS = f"SELECT {', '.join(RequestRow._fields)} FROM audit_request"  # noqa: S608
_EVIDENCE = ("SELECT digest, log_index FROM evidence", "digest")
K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True)
class Cache:
    """Rows that only this writer can change. Dropped whenever a commit is in doubt."""

    accounts: dict[str, Account] = field(default_factory=dict)
    open_holds: dict[bytes, Pending] = field(default_factory=dict)
    # False: no hold has ever been claimed from, so nobody need look (None: not known yet).
    any_claims: bool | None = None
    # Half-read histories of audits.
    dockets: Dockets = field(default_factory=dict)

    def trim(self) -> None:
        """Keeps the cache bounded: a full one starts anew. Before the newest group is put in, so
        that all of that one stays: it may not be in the database yet."""
        if len(self.accounts) > _MAX_CACHED:
            self.accounts.clear()
        if len(self.open_holds) > _MAX_CACHED:
            self.open_holds.clear()


@dataclass(slots=True)
class Needs:
    """Keys that a group may touch."""

    accounts: set[str] = field(default_factory=set)
    pendings: set[bytes] = field(default_factory=set)
    legs: set[bytes] = field(default_factory=set)
    claims: set[bytes] = field(default_factory=set)
    references: set[tuple[str, str]] = field(default_factory=set)
    spending: set[str] = field(default_factory=set)
    nodes: set[str] = field(default_factory=set)
    digests: set[bytes] = field(default_factory=set)
    # Receipts that an audit was asked for.
    audited: set[bytes] = field(default_factory=set)
    # (node, "<node>:<verifier>") of convictions: their references depend on the node's row.
    convictions: set[tuple[str, str]] = field(default_factory=set)


_NOTHING = Book(Snapshot())


@dataclass(frozen=True, slots=True)
class Numbers:
    """Where the books go on."""

    next_sequence: int
    next_index: int
    next_account: int


def load(
    backend: Backend,
    cache: Cache,
    operations: Sequence[Prepared],
    terms: Terms,
    numbers: Numbers,
    *,
    now_unix_ms: int,
    recent: Book | None = None,
) -> Snapshot:
    """Reads, in a few queries, all that the operations may touch. ``recent`` is the last group,
    whose transaction may still be in flight: what it wrote is taken from it, whether the
    database shows it already or not, and nothing else changes meanwhile."""
    last = recent or _NOTHING
    applied = _applied(backend, operations)
    _overlay(applied, last.applied, {op.id for op in operations})
    needs = _needs(op for op in operations if op.error is None and op.id not in applied)
    special = _special(backend, cache, operations[0], needs, terms=terms, now_unix_ms=now_unix_ms)
    pendings = _pendings(backend, cache, needs)
    _overlay(pendings, last.pendings, needs.pendings)
    for pending in pendings.values():
        needs.accounts.add(pending.debit)
        needs.accounts.add(pending.credit)
        if pending.api_key_id:
            needs.spending.add(pending.api_key_id)
    _add_settled(needs, operations)
    legs = {row[0]: Leg(*row) for row in backend.by_keys(_LEGS, "receipt_digest", needs.legs)}
    _overlay(legs, last.legs, needs.legs)
    needs.claims.update(leg.hold_id for leg in legs.values())
    for leg in legs.values():
        needs.accounts.update((leg.client, node_locked(leg.node_id), node_bond(leg.node_id)))
    claims = _claims(backend, needs.claims) if _any_claims(backend, cache) else {}
    _overlay(claims, last.claims, needs.claims)
    nodes = {k: NodeRow(*row) for k, row in _by_first(backend, _NODES, needs.nodes)}
    _overlay(nodes, last.nodes, needs.nodes)
    needs.references.update(
        ("conviction", conviction_key(nodes.get(node), key)) for node, key in needs.convictions
    )
    references = _references(backend, needs.references)
    _overlay(references, last.references, needs.references)
    spending = {k: Spending(*row) for k, row in _by_first(backend, _SPENDING, needs.spending)}
    _overlay(spending, last.spending, needs.spending)
    published = {k: row[1] for k, row in _by_first(backend, _EVIDENCE, needs.digests)}
    _overlay(published, last.published, needs.digests)
    return Snapshot(
        accounts=_accounts(backend, cache, needs.accounts),
        pendings=pendings,
        applied=applied,
        legs=legs,
        claims=claims,
        references=references,
        spending=spending,
        nodes=nodes,
        published=published,
        requests=_requests(backend, needs.audited, last),
        judges=_judges(backend, operations, published, last),
        next_sequence=numbers.next_sequence,
        next_index=numbers.next_index,
        next_account=numbers.next_account,
        now_unix_ms=now_unix_ms,
        **special,  # type: ignore[arg-type]
    )


def _by_first(
    backend: Backend, select: tuple[str, str], keys: set[Any]
) -> Iterable[tuple[Any, tuple[Any, ...]]]:
    return ((row[0], row) for row in backend.by_keys(*select, keys))


def _overlay(found: dict[K, V], newer: Mapping[K, V], wanted: set[K]) -> None:
    if newer:
        for key in wanted & newer.keys():
            found[key] = newer[key]


def _applied(backend: Backend, operations: Sequence[Prepared]) -> dict[bytes, Applied]:
    rows = backend.by_keys(
        "SELECT id, body_hash, amount, log_index FROM operation", "id", {op.id for op in operations}
    )
    return {row[0]: Applied(*row) for row in rows}


def _needs(operations: Iterable[Prepared]) -> Needs:
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
        needs.accounts.update(_MARKET)
        for leg in facts.legs:
            needs.accounts.add(node_locked(leg.node_id))
            needs.legs.add(leg.receipt_digest)
            needs.nodes.add(leg.node_id)
    elif isinstance(facts, ClaimFacts):
        needs.pendings.add(facts.hold_id)
        needs.claims.add(facts.hold_id)
        needs.legs.add(facts.receipt_digest)
    elif isinstance(facts, RefundFacts):
        needs.legs.add(facts.receipt_digest)
        needs.accounts.update(_MARKET)
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
        needs.accounts.update((node_available(body.node_id), external(body.rail)))
    elif kind == "bond_withdraw":
        needs.accounts.update((node_bond(body.node_id), external("bond")))
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
        needs.digests.add(op.facts.published.digest)
        needs.nodes.add(op.facts.node_id)
        needs.accounts.update((TREASURY_ACCOUNT, node_bond(op.facts.node_id)))
    elif kind == "release":
        needs.nodes.add(body.node_id)
        needs.accounts.update((node_locked(body.node_id), node_available(body.node_id)))


def _add_settled(needs: Needs, operations: Sequence[Prepared]) -> None:
    """References of settled payouts, on every rail of the group: the payout that one settles, and
    with it the rail, may itself be of this group."""
    settled = {op.body.reference for op in operations if op.kind == "payout_settle" and op.body}
    if settled - {""}:
        rails = [account for account in needs.accounts if kind_of(account) == EXTERNAL]
        needs.references.update((settled_by(rail), key) for rail in rails for key in settled)


def _add_publication(needs: Needs, facts: PublishFacts) -> None:
    needs.digests.add(facts.digest)
    if facts.conviction:
        node = facts.conviction.partition(":")[0]
        needs.nodes.add(node)
        needs.convictions.add((node, facts.conviction))
    if facts.verdict is not None:
        needs.audited.add(facts.verdict.receipt_digest)
    if facts.request is not None:
        needs.audited.add(facts.request.receipt_digest)
        needs.legs.add(facts.request.receipt_digest)


def _special(
    backend: Backend, cache: Cache, op: Prepared, needs: Needs, *, terms: Terms, now_unix_ms: int
) -> dict[str, object]:
    """What the operations that stand alone read besides their keys."""
    if op.error is not None:
        return {}
    if op.kind == "expire":
        return {"due_holds": _due_holds(backend, needs, now_unix_ms, op.body.limit)}
    if op.kind == "release":
        return {"leg_total": _leg_total(backend, op, terms, now_unix_ms)}
    if op.kind == "reinstate":
        return {"leg_total": _all_earned(backend, op.facts.node_id)}
    if isinstance(op.facts, ConvictFacts):
        return _conviction(backend, cache, op.facts, terms, needs)
    return {}


def _due_holds(backend: Backend, needs: Needs, now_unix_ms: int, limit: int) -> list[Pending]:
    due = [
        Pending(*row)
        for row in backend.query(
            f"{_PENDINGS} WHERE state = {OPEN} AND kind = 1 AND due <= ? ORDER BY due LIMIT ?",
            (now_unix_ms, limit),
        )
    ]
    needs.pendings.update(p.id for p in due)
    needs.claims.update(p.id for p in due)
    needs.accounts.update(_MARKET)
    for claims in _claims(backend, needs.claims).values():
        needs.accounts.update(node_locked(c.node_id) for c in claims)
        needs.nodes.update(c.node_id for c in claims)
    return due


def _leg_total(backend: Backend, op: Prepared, terms: Terms, now_unix_ms: int) -> LegTotal:
    node, below = op.body.node_id, op.body.below_log_index
    ((oldest,),) = backend.query(
        "SELECT MIN(receipt_index) FROM audit_request "
        "WHERE node_id = ? AND verdict_index < 0 AND for_appeal = 0 AND captured_at > ?",
        (node, held_since_unix_ms(now_unix_ms, terms.window_ms)),
    )
    waits_for = NONE if oldest is None or oldest >= below else int(oldest)
    rows = backend.query(
        "SELECT COALESCE(SUM(node + subsidy - refunded_node), 0) FROM leg "
        "WHERE node_id = ? AND log_index < ? AND captured_at <= ?",
        (node, below if waits_for == NONE else waits_for, now_unix_ms - terms.window_ms),
    )
    return LegTotal(int(rows[0][0]), waits_for)


def _all_earned(backend: Backend, node_id: str) -> LegTotal:
    rows = backend.query(
        "SELECT COALESCE(SUM(node + subsidy - refunded_node), 0) FROM leg WHERE node_id = ?",
        (node_id,),
    )
    return LegTotal(int(rows[0][0]))


def _conviction(
    backend: Backend, cache: Cache, facts: ConvictFacts, terms: Terms, needs: Needs
) -> dict[str, object]:
    node = facts.node_id
    rows = backend.query("SELECT reinstated FROM node WHERE node_id = ?", (node,))
    since = int(rows[0][0]) if rows else 0
    legs = [
        Leg(*row)
        for row in backend.query(
            f"{_LEGS} WHERE node_id = ? AND log_index >= ? ORDER BY log_index",
            (node, max(since, facts.change_point)),
        )
    ]
    withdrawals = [
        Pending(*row)
        for row in backend.query(
            f"{_PENDINGS} WHERE debit = ? AND state = {OPEN} AND kind = {WITHDRAWAL}",
            (node_bond(node),),
        )
    ]
    needs.nodes.add(node)
    needs.digests.add(facts.published.digest)
    needs.pendings.update(p.id for p in withdrawals)
    needs.convictions.update((node, f"{node}:{v}") for v in terms.verifiers)
    needs.accounts.update(
        (*_MARKET, node_locked(node), node_bond(node), f"verifier:{facts.verifier_id}")
    )
    needs.accounts.update(leg.client for leg in legs)
    cases = read_cases(backend, cache.dockets, terms.verifiers, (node, since))
    return {"node_legs": legs, "withdrawals": withdrawals, "cases": cases}


def _judges(
    backend: Backend, operations: Sequence[Prepared], published: Mapping[bytes, int], last: Book
) -> dict[int, str]:
    """Whose the verdicts are that are to be rewarded."""
    wanted = {
        published[op.body.verdict_digest]
        for op in operations
        if op.kind == "reward" and op.error is None and op.body.verdict_digest in published
    }
    rows = backend.by_keys("SELECT log_index, verifier_id FROM verdict", "log_index", wanted)
    found = {row[0]: row[1] for row in rows}
    return found | {i: v.verifier_id for i, v in last.verdicts.items() if i in wanted}


def _requests(
    backend: Backend, wanted: set[bytes], last: Book
) -> dict[tuple[str, bytes], RequestRow]:
    found = {}
    for row in backend.by_keys(_REQUESTS, "receipt_digest", wanted):
        made = RequestRow(*row)
        found[made.key] = made
    found.update((k, r) for k, r in last.requests.items() if r.receipt_digest in wanted)
    return found


def _pendings(backend: Backend, cache: Cache, needs: Needs) -> dict[bytes, Pending]:
    found = {id_: cache.open_holds[id_] for id_ in needs.pendings if id_ in cache.open_holds}
    missing = needs.pendings - found.keys()
    if missing:
        found.update({row[0]: Pending(*row) for row in backend.by_keys(_PENDINGS, "id", missing)})
    return found


def _accounts(backend: Backend, cache: Cache, wanted: set[str]) -> dict[str, Account]:
    found = {id_: cache.accounts[id_] for id_ in wanted if id_ in cache.accounts}
    missing = wanted - found.keys()
    if missing:
        found.update({row[1]: Account(*row) for row in backend.by_keys(_ACCOUNTS, "id", missing)})
    return found


def _claims(backend: Backend, wanted: set[bytes]) -> dict[bytes, tuple[Claim, ...]]:
    found: dict[bytes, tuple[Claim, ...]] = {}
    for row in backend.by_keys(_CLAIMS, "hold_id", wanted):
        made = Claim(*row)
        found[made.hold_id] = (*found.get(made.hold_id, ()), made)
    return found


def _any_claims(backend: Backend, cache: Cache) -> bool:
    if cache.any_claims is None:
        cache.any_claims = bool(backend.query("SELECT 1 FROM claim LIMIT 1"))
    return cache.any_claims


def _references(backend: Backend, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], bytes]:
    rows = backend.by_keys(
        "SELECT kind, key, operation_id FROM reference", "key", {key for _, key in wanted}
    )
    return {(row[0], row[1]): row[2] for row in rows if (row[0], row[1]) in wanted}
