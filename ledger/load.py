"""Reading the rows that a group of operations may touch into a Snapshot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trueweight.ledger import restitution
from trueweight.ledger.accounts import (
    TREASURY_ACCOUNT,
    Account,
    node_bond,
    node_locked,
)
from trueweight.ledger.audits import VerdictRow
from trueweight.ledger.backend import Backend
from trueweight.ledger.book import Book
from trueweight.ledger.commitments import CommitmentRow
from trueweight.ledger.dockets import FIRST_VERDICTS, Dockets, read_cases
from trueweight.ledger.earned import ENDLESS, Earnings, Goal, Key
from trueweight.ledger.evidence import (
    CaptureFacts,
    ConvictFacts,
)
from trueweight.ledger.needs import MARKET_ACCOUNTS, Needs, add_settled, needs_of
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
    Restitution,
    Snapshot,
    Spending,
    Terms,
    conviction_key,
)

_MAX_CACHED = 200_000
# Unanswered audits among which a release looks for the oldest: they come in the order of the log,
# unless a clock was set back.
_MAX_OPEN = 1000
# Claims that one expiry pays, while everybody waits (but always those of one hold).
MAX_CLAIMS_PAID = 512

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
_COMMITMENTS = f"SELECT {', '.join(CommitmentRow._fields)} FROM margin_commitment"  # noqa: S608
_RESTITUTIONS = f"SELECT {', '.join(Restitution._fields)} FROM restitution"  # noqa: S608
# Answered by their own index, which has no holds.
_WITHDRAWN = (
    f"SELECT {', '.join(PENDING_COLUMNS)} FROM (SELECT * FROM pending "  # noqa: S608
    f"WHERE kind = {WITHDRAWAL} AND state = {OPEN}) p"
)
_VERDICTS = f"SELECT {', '.join(VerdictRow._fields)} FROM verdict"  # noqa: S608
_EVIDENCE = ("SELECT digest, log_index FROM evidence", "digest")
K = TypeVar("K")
V = TypeVar("V")
R = TypeVar("R", RequestRow, CommitmentRow)


@dataclass(slots=True)
class Cache:
    """Rows that only this writer can change. Dropped whenever a commit is in doubt."""

    accounts: dict[str, Account] = field(default_factory=dict)
    open_holds: dict[bytes, Pending] = field(default_factory=dict)
    # False: no hold has ever been claimed from, so nobody need look (None: not known yet).
    any_claims: bool | None = None
    # Half-read histories of audits.
    dockets: Dockets = field(default_factory=dict)
    earnings: Earnings = field(default_factory=Earnings)
    # By node: refunds of convictions that are under way (None: not known yet).
    restitutions: dict[str, Restitution] | None = None

    def note_restitutions(self, changed: Iterable[Restitution]) -> None:
        """Those that are through need not be remembered."""
        known = self.restitutions or {}
        self.restitutions = known | {r.node_id: r for r in changed}
        self.restitutions = {k: r for k, r in self.restitutions.items() if r.is_open}

    def trim(self) -> None:
        """Keeps the cache bounded: a full one starts anew. Before the newest group is put in, so
        that all of that one stays: it may not be in the database yet."""
        if len(self.accounts) > _MAX_CACHED:
            self.accounts.clear()
        if len(self.open_holds) > _MAX_CACHED:
            self.open_holds.clear()


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
    needs = needs_of(op for op in operations if op.error is None and op.id not in applied)
    first, special = operations[0], {}
    if first.error is None and first.id not in applied:
        special = _special(backend, cache, first, needs, terms=terms, now_unix_ms=now_unix_ms)
    pendings = _pendings(backend, cache, needs, last)
    add_settled(needs, operations)
    legs = _legs(backend, needs, last)
    if needs.refunds:
        needs.nodes.update(leg.node_id for leg in legs.values())
        needs.bonds |= _liable_bonds(needs, operations, legs)
    withdrawals = _withdrawals(backend, needs, last)
    pendings.update((p.id, p) for of_bond in withdrawals.values() for p in of_bond)
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
    rewardable = _rewardable(backend, operations, published, last)
    needs.audited.update(verdict.receipt_digest for verdict in rewardable.values())
    return Snapshot(
        accounts=_accounts(backend, cache, needs.accounts),
        pendings=pendings,
        applied=applied,
        legs=legs,
        claims=claims,
        references=references,
        spending=spending,
        nodes=nodes,
        restitutions=open_restitutions(backend, cache),
        withdrawals=withdrawals,
        published=published,
        requests=_requests(backend, needs.audited, last),
        commitments=_commitments(backend, needs.judged, last),
        judged=_judged(backend, needs.judged, last),
        rewardable=rewardable,
        debts=_debts(backend, needs.debts, last),
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


def _special(
    backend: Backend, cache: Cache, op: Prepared, needs: Needs, *, terms: Terms, now_unix_ms: int
) -> dict[str, object]:
    """What the operations that stand alone read besides their keys."""
    if op.kind == "expire":
        return {"due_holds": _due_holds(backend, cache, needs, now_unix_ms, op.body.limit)}
    if op.kind == "release":
        return {"leg_total": _leg_total(backend, cache, op, terms, now_unix_ms)}
    if op.kind == "reinstate":
        return {"leg_total": _all_earned(backend, cache, op.facts.node_id)}
    if op.kind == restitution.KIND:
        return _restitution(backend, cache, op.facts, needs)
    if isinstance(op.facts, ConvictFacts):
        return _conviction(backend, cache, op.facts, terms, needs)
    return {}


def _withdrawals(backend: Backend, needs: Needs, last: Book) -> dict[str, list[Pending]]:
    """Open withdrawals by bond; what ending them touches is needed too."""
    bonds = needs.bonds
    if not bonds:
        return {}
    found = {row[0]: Pending(*row) for row in backend.by_keys(_WITHDRAWN, "debit", bonds)}
    found |= {p.id: p for p in last.pendings.values() if p.kind == WITHDRAWAL and p.debit in bonds}
    needs.accounts |= bonds
    by_bond: dict[str, list[Pending]] = {}
    for pending in found.values():
        if pending.state == OPEN:
            needs.accounts.add(pending.credit)
            by_bond.setdefault(pending.debit, []).append(pending)
    return by_bond


def _liable_bonds(
    needs: Needs, operations: Sequence[Prepared], legs: Mapping[bytes, Leg]
) -> set[str]:
    """Of the nodes whose receipts are refunded: they may be settled by this very group."""
    liable = {legs[digest].node_id for digest in needs.refunds if digest in legs}
    for op in operations:
        if isinstance(op.facts, CaptureFacts) and op.error is None:
            liable |= {leg.node_id for leg in op.facts.legs if leg.receipt_digest in needs.refunds}
    return {node_bond(node) for node in liable}


def _due_holds(
    backend: Backend, cache: Cache, needs: Needs, now_unix_ms: int, limit: int
) -> list[Pending]:
    due = [
        Pending(*row)
        for row in backend.query(
            f"{_PENDINGS} WHERE state = {OPEN} AND kind = 1 AND due <= ? ORDER BY due LIMIT ?",
            (now_unix_ms, limit),
        )
    ]
    if _any_claims(backend, cache):
        due = due[: _payable(backend, [p.id for p in due])]
    needs.pendings.update(p.id for p in due)
    needs.claims.update(p.id for p in due)
    needs.accounts.update(MARKET_ACCOUNTS)
    for claims in _claims(backend, needs.claims).values():
        needs.accounts.update(node_locked(c.node_id) for c in claims)
        needs.nodes.update(c.node_id for c in claims)
    return due


def _payable(backend: Backend, hold_ids: Sequence[bytes]) -> int:
    """How many of these holds may end together, by what was claimed from them."""
    claimed = Counter(
        row[0] for row in backend.by_keys("SELECT hold_id FROM claim", "hold_id", hold_ids)
    )
    claims = 0
    for place, hold_id in enumerate(hold_ids):
        claims += claimed[hold_id]
        if place and claims > MAX_CLAIMS_PAID:
            return place
    return len(hold_ids)


def _leg_total(
    backend: Backend, cache: Cache, op: Prepared, terms: Terms, now_unix_ms: int
) -> LegTotal:
    node, below = op.body.node_id, op.body.below_log_index
    ((oldest,),) = backend.query(
        "SELECT MIN(receipt_index) FROM (SELECT receipt_index FROM audit_request "
        "WHERE node_id = ? AND verdict_index < 0 AND for_appeal = 0 AND captured_at > ? "
        "ORDER BY captured_at LIMIT ?) r",
        (node, held_since_unix_ms(now_unix_ms, terms.window_ms), _MAX_OPEN),
    )
    waits_for = NONE if oldest is None or oldest >= below else int(oldest)
    goal = Goal(below if waits_for == NONE else waits_for, now_unix_ms - terms.window_ms)
    earned = cache.earnings.read(backend, Key(node), goal)
    return LegTotal(earned or 0, waits_for, earned is not None)


def _all_earned(backend: Backend, cache: Cache, node_id: str) -> LegTotal:
    earned = cache.earnings.read(backend, Key(node_id, is_settled=False), Goal())
    return LegTotal(earned or 0, is_known=earned is not None)


def open_restitutions(backend: Backend, cache: Cache) -> Mapping[str, Restitution]:
    """By node; there are few of them, and hardly ever any."""
    if cache.restitutions is None:
        found = [Restitution(*row) for row in backend.query(_RESTITUTIONS)]
        cache.restitutions = {r.node_id: r for r in found if r.is_open}
    return cache.restitutions


def _restitution(backend: Backend, cache: Cache, node_id: str, needs: Needs) -> dict[str, object]:
    known = open_restitutions(backend, cache).get(node_id)
    if known is None:
        return {}
    needs.accounts.update((TREASURY_ACCOUNT, restitution.set_aside(node_id)))
    span = (node_id, known.next_index, known.end_index)
    if not known.is_counting:
        return {"node_legs": _node_legs(backend, span, needs)}
    ((count, last, charges),) = backend.query(
        "SELECT COUNT(*), MAX(log_index), COALESCE(SUM(CASE WHEN refunded = 0 THEN charge ELSE 0 "
        "END), 0) FROM (SELECT log_index, charge, refunded FROM leg WHERE node_id = ? "
        "AND log_index >= ? AND log_index < ? ORDER BY log_index LIMIT ?) l",
        (*span, restitution.COUNTED),
    )
    end = known.end_index if count < restitution.COUNTED else int(last) + 1
    return {"charges": (int(charges), end)}


def _node_legs(backend: Backend, span: tuple[str, int, int], needs: Needs) -> list[Leg]:
    """As many of a node's receipts in [first, end) as one transaction refunds, and one more if
    there are more."""
    rows = backend.query(
        f"{_LEGS} WHERE node_id = ? AND log_index >= ? AND log_index < ? "
        "ORDER BY log_index LIMIT ?",
        (*span, restitution.REFUNDED + 1),
    )
    legs = [Leg(*row) for row in rows]
    needs.accounts.update(leg.client for leg in legs)
    return legs


def _conviction(
    backend: Backend, cache: Cache, facts: ConvictFacts, terms: Terms, needs: Needs
) -> dict[str, object]:
    node = facts.node_id
    rows = backend.query("SELECT reinstated FROM node WHERE node_id = ?", (node,))
    since = int(rows[0][0]) if rows else 0
    legs = _node_legs(backend, (node, max(since, facts.change_point), ENDLESS), needs)
    needs.bonds.add(node_bond(node))
    needs.nodes.add(node)
    needs.digests.add(facts.published.digest)
    needs.convictions.update((node, f"{node}:{v}") for v in terms.verifiers)
    needs.accounts.update(
        (
            *MARKET_ACCOUNTS,
            node_locked(node),
            node_bond(node),
            restitution.set_aside(node),
            f"verifier:{facts.verifier_id}",
        )
    )
    cases = read_cases(backend, cache.dockets, terms.verifiers, (node, since))
    return {"node_legs": legs, "cases": cases}


def _debts(
    backend: Backend, wanted: set[tuple[bytes, str]], last: Book
) -> dict[tuple[bytes, str], int]:
    rows = backend.by_keys(
        "SELECT operation_id, creditor, amount FROM debt",
        "operation_id",
        {id_ for id_, _ in wanted},
    )
    found = {(row[0], row[1]): row[2] for row in rows}
    found.update(last.summed_debts())
    return {key: found[key] for key in wanted & found.keys()}


def _rewardable(
    backend: Backend, operations: Sequence[Prepared], published: Mapping[bytes, int], last: Book
) -> dict[int, VerdictRow]:
    """Verdicts that are to be rewarded, by log index."""
    wanted = {
        published[op.body.verdict_digest]
        for op in operations
        if op.kind == "reward" and op.error is None and op.body.verdict_digest in published
    }
    rows = backend.by_keys(_VERDICTS, "log_index", wanted)
    found = {row[0]: VerdictRow(*row) for row in rows}
    return found | {index: v for index, v in last.verdicts.items() if index in wanted}


def _about_receipts(
    rows: Iterable[R], wanted: set[bytes], last: Mapping[tuple[str, bytes], R]
) -> dict[tuple[str, bytes], R]:
    """By verifier and receipt: what was read, and what the group before has."""
    found = {row.key: row for row in rows}
    found.update((k, row) for k, row in last.items() if row.receipt_digest in wanted)
    return found


def _requests(
    backend: Backend, wanted: set[bytes], last: Book
) -> dict[tuple[str, bytes], RequestRow]:
    rows = backend.by_keys(_REQUESTS, "receipt_digest", wanted)
    return _about_receipts((RequestRow(*row) for row in rows), wanted, last.requests)


def _commitments(
    backend: Backend, wanted: set[bytes], last: Book
) -> dict[tuple[str, bytes], CommitmentRow]:
    rows = backend.by_keys(_COMMITMENTS, "receipt_digest", wanted)
    return _about_receipts((CommitmentRow(*row) for row in rows), wanted, last.commitments)


def _judged(backend: Backend, wanted: set[bytes], last: Book) -> set[tuple[str, bytes]]:
    rows = backend.by_keys(FIRST_VERDICTS, "receipt_digest", wanted)
    found = {(verifier_id, digest) for digest, verifier_id, _ in rows}
    return found | {key for key in last.judged if key[1] in wanted}


def _pendings(backend: Backend, cache: Cache, needs: Needs, last: Book) -> dict[bytes, Pending]:
    """Pending transfers; what they touch is needed too."""
    found = {id_: cache.open_holds[id_] for id_ in needs.pendings if id_ in cache.open_holds}
    missing = needs.pendings - found.keys()
    if missing:
        found.update({row[0]: Pending(*row) for row in backend.by_keys(_PENDINGS, "id", missing)})
    _overlay(found, last.pendings, needs.pendings)
    for pending in found.values():
        needs.accounts.add(pending.debit)
        needs.accounts.add(pending.credit)
        if pending.api_key_id:
            needs.spending.add(pending.api_key_id)
    return found


def _legs(backend: Backend, needs: Needs, last: Book) -> dict[bytes, Leg]:
    """Settled receipts; what undoing them touches is needed too."""
    found = {row[0]: Leg(*row) for row in backend.by_keys(_LEGS, "receipt_digest", needs.legs)}
    _overlay(found, last.legs, needs.legs)
    needs.claims.update(leg.hold_id for leg in found.values())
    for leg in found.values():
        needs.accounts.update((leg.client, node_locked(leg.node_id), node_bond(leg.node_id)))
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
