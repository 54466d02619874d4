"""Recomputing everything: balances from transfers, the log from its leaves, one from the other.

Streams the whole database once in one read snapshot. Findings are sentences; none means that
every stored number follows from immutable history and that no leaf was changed, dropped,
added or moved. With a market key, the signatures of the checkpoints are checked as well: only
they tell a consistent forgery of the whole database from the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from trueweight.ledger import bundle
from trueweight.ledger.accounts import EXTERNAL
from trueweight.ledger.leaves import TRANSFER, encode_batches, encode_movement
from trueweight.ledger.tiles import Edge
from trueweight.ledger.values import (
    EXPIRE,
    OPEN,
    PENDING,
    POST,
    REASONS,
    SINGLE,
    VOID,
    transfer_id,
)
from trueweight.protos.checkpoint import log_origin, open_note
from trueweight.protos.envelope import digest_of
from trueweight.protos.errors import BadSignature, StorageError
from trueweight.protos.merkle import leaf_hash

MAX_FINDINGS = 100
_STEP = 2_000
_STATE_OF_PHASE = {POST: 2, VOID: 3, EXPIRE: 4}
Progress = Callable[[str, int, int], None]


@dataclass
class Findings:
    """What is wrong, bounded; and what was looked at."""

    problems: list[str] = field(default_factory=list)
    more: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, problem: str) -> None:
        """Notes a problem."""
        if len(self.problems) < MAX_FINDINGS:
            self.problems.append(problem)
        else:
            self.more += 1

    @property
    def clean(self) -> bool:
        return not self.problems


@dataclass
class _Fold:
    """Counters recomputed from transfers, by account number."""

    kinds: dict[int, int]
    counters: dict[int, list[int]] = field(default_factory=dict)
    open: dict[bytes, tuple[int, int, int]] = field(default_factory=dict)
    resolved: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    earned: dict[int, int] = field(default_factory=dict)


def check(
    engine: sa.Engine,
    market_id: str,
    ledger_keys: list[bytes] | None = None,
    progress: Progress = lambda *_: None,
) -> Findings:
    """All checks. ``ledger_keys`` are public keys that may have signed checkpoints; None skips
    their signatures."""
    findings = Findings()
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN")
        accounts = {r[0]: r for r in connection.execute(sa.text("SELECT * FROM account"))}
        fold = _Fold({no: row.kind for no, row in accounts.items()})
        names = {no: row.id for no, row in accounts.items()}
        _check_log(connection, findings, _transfers(connection, findings, fold, names), progress)
        _check_checkpoints(connection, findings, market_id, ledger_keys)
        _check_accounts(findings, fold, accounts)
        _check_pendings(connection, findings, fold, names)
        _check_legs(connection, findings, fold, names)
        _check_spending(connection, findings)
        _check_operations(connection, findings)
    return findings


def _transfers(
    connection: sa.Connection, findings: Findings, fold: _Fold, names: dict[int, str]
) -> Iterator[bytes]:
    """Folds the transfers one by one and yields the leaves that each operation must have."""
    rows = connection.execution_options(stream_results=True, yield_per=_STEP).execute(
        sa.text(
            "SELECT sequence, operation_id, ordinal, debit, credit, amount, phase, pending_id, "
            "reason, created_at FROM transfer ORDER BY sequence"
        )
    )
    expected = 1
    head: Any = None
    movements: list[bytes] = []
    for row in rows:
        if row[0] != expected:
            findings.add(f"transfers {expected} to {row[0] - 1} are missing")
        expected = row[0] + 1
        _apply(findings, fold, names, row)
        if head is not None and row[1] != head[1]:
            yield from encode_batches(bytes(head[1]), head[0], head[9], movements)
            head, movements = None, []
        head = head or row
        movements.append(
            encode_movement(
                names.get(row[3], "?"),
                names.get(row[4], "?"),
                row[5],
                row[6],
                bytes(row[7] or b""),
                REASONS[row[8] - 1],
            )
        )
        if row[2] != len(movements) - 1:
            findings.add(f"transfer {row[0]} is not in its place in its operation")
    if head is not None:
        yield from encode_batches(bytes(head[1]), head[0], head[9], movements)
    findings.counts["transfers"] = expected - 1


def _apply(findings: Findings, fold: _Fold, names: dict[int, str], row: Any) -> None:
    sequence, operation, ordinal, debit_no, credit_no, amount, phase, pending_id, reason, _ = row
    debit = fold.counters.setdefault(debit_no, [0, 0, 0, 0])
    credit = fold.counters.setdefault(credit_no, [0, 0, 0, 0])
    if phase == SINGLE:
        debit[1] += amount
        credit[3] += amount
        if REASONS[reason - 1] in ("earning", "subsidy"):
            fold.earned[credit_no] = fold.earned.get(credit_no, 0) + amount
    elif phase == PENDING:
        debit[0] += amount
        credit[2] += amount
        fold.open[transfer_id(bytes(operation), ordinal)] = (debit_no, credit_no, amount)
    else:
        first = fold.open.pop(bytes(pending_id or b""), None)
        if first is None or first[:2] != (debit_no, credit_no) or amount > first[2]:
            findings.add(f"transfer {sequence} resolves no open pending transfer")
            return
        debit[0] -= first[2]
        debit[1] += amount
        credit[2] -= first[2]
        credit[3] += amount
        fold.resolved[bytes(pending_id)] = (_STATE_OF_PHASE.get(phase, 0), amount)
    if debit[3] - debit[1] - debit[0] < 0 and fold.kinds.get(debit_no) != EXTERNAL:
        findings.add(f"transfer {sequence} overdraws {names.get(debit_no, debit_no)}")


def _check_log(
    connection: sa.Connection, findings: Findings, transfers: Iterator[bytes], progress: Progress
) -> None:
    """Indices, tiles, checkpointed roots, and each transfer leaf against its transfer."""
    total = int(
        connection.execute(sa.text("SELECT COALESCE(SUM(leaves), 0) FROM bundle")).scalar_one()
    )
    roots: dict[int, bytes] = {
        row[0]: row[1] for row in connection.execute(sa.text("SELECT size, root FROM checkpoint"))
    }
    tiles = _stream(connection, "SELECT level, number, hashes FROM tile ORDER BY level, number")
    stored = {(r[0], r[1]): bytes(r[2]) for r in tiles}
    evidence = _stream(connection, "SELECT log_index, digest FROM evidence ORDER BY log_index")
    sizes = sorted(roots)
    # A log may have been checkpointed before its first leaf.
    edge = _extend(findings, Edge(), [], stored, (sizes, roots))
    for row in _stream(
        connection, "SELECT first_index, leaves, kinds, body FROM bundle ORDER BY first_index"
    ):
        if row[0] != edge.size:
            findings.add(f"leaves {edge.size} to {row[0] - 1} are missing")
            return
        leaves = _leaves(findings, row)
        if leaves is None:
            return
        for place, (kind, body) in enumerate(leaves, row[0]):
            _check_leaf(findings, place, (kind, body), transfers, evidence)
        edge = _extend(findings, edge, [leaf_hash(b) for _, b in leaves], stored, (sizes, roots))
        progress("leaves", edge.size, total)
    for left in transfers:
        findings.add(f"transfers have no leaf ({len(left)} bytes)")
    for row in evidence:
        findings.add(f"evidence names leaf {row[0]}, which does not exist")
    for level, number in stored:
        findings.add(f"tile {level}/{number} covers leaves that do not exist")
    for size in sizes:
        findings.add(f"the checkpoint of size {size} is beyond the log")
    findings.counts["leaves"] = edge.size


def _leaves(findings: Findings, row: Any) -> list[tuple[str, bytes]] | None:
    try:
        leaves = list(bundle.unpack(row[1], bytes(row[3])))
    except StorageError:
        findings.add(f"the bundle at leaf {row[0]} is damaged")
        return None
    if bundle.mask_of(kind for kind, _ in leaves) != row[2]:
        findings.add(f"the bundle at leaf {row[0]} says it has other kinds of leaves")
    return leaves


def _check_leaf(
    findings: Findings,
    place: int,
    leaf: tuple[str, bytes],
    transfers: Iterator[bytes],
    evidence: Iterator[Any],
) -> None:
    kind, body = leaf
    if kind == TRANSFER:
        if next(transfers, b"") != body:
            findings.add(f"leaf {place} differs from the transfers it records")
        return
    row = next(evidence, None)
    try:
        digest = digest_of(body)
    except BadSignature:
        findings.add(f"leaf {place} is not the {kind} it says")
        return
    if row is None or (row[0], bytes(row[1])) != (place, digest):
        findings.add(f"leaf {place} is not found under its digest")


def _extend(
    findings: Findings,
    edge: Edge,
    hashes: list[bytes],
    stored: dict[tuple[int, int], bytes],
    checkpoints: tuple[list[int], dict[int, bytes]],
) -> Edge:
    sizes, roots = checkpoints
    done = 0
    while sizes and sizes[0] <= edge.size + len(hashes) - done:
        size = sizes.pop(0)
        step = hashes[done : done + size - edge.size]
        edge = _check_tiles(findings, edge, step, stored)
        done += len(step)
        if edge.root() != bytes(roots[size]):
            findings.add(f"the log's root at size {size} is not the one that was checkpointed")
    return _check_tiles(findings, edge, hashes[done:], stored)


def _check_tiles(
    findings: Findings, edge: Edge, hashes: list[bytes], stored: dict[tuple[int, int], bytes]
) -> Edge:
    edge, tiles = edge.extend(hashes)
    for tile in tiles:
        if stored.pop((tile.level, tile.number), None) != tile.hashes:
            findings.add(f"tile {tile.level}/{tile.number} does not hold its leaves' hashes")
    return edge


def _check_checkpoints(
    connection: sa.Connection,
    findings: Findings,
    market_id: str,
    ledger_keys: list[bytes] | None,
) -> None:
    rows = connection.execute(sa.text("SELECT size, root, note FROM checkpoint")).fetchall()
    findings.counts["checkpoints"] = len(rows)
    if ledger_keys is None:
        return
    for size, root, note in rows:
        for key in ledger_keys:
            try:
                state = open_note(note, log_origin(market_id), key)
            except BadSignature:
                continue
            if (state.size, state.root) != (size, bytes(root)):
                findings.add(f"the checkpoint of size {size} says something else than its row")
            break
        else:
            findings.add(f"the checkpoint of size {size} is not signed by the ledger")


def _check_accounts(findings: Findings, fold: _Fold, accounts: dict[int, Any]) -> None:
    findings.counts["accounts"] = len(accounts)
    sums = [0, 0, 0, 0]
    for no, row in accounts.items():
        stored = [row.debits_pending, row.debits_posted, row.credits_pending, row.credits_posted]
        folded = fold.counters.pop(no, [0, 0, 0, 0])
        if stored != folded:
            findings.add(f"{row.id} has counters {stored}, its transfers give {folded}")
        if row.kind != EXTERNAL and stored[3] - stored[1] - stored[0] < 0:
            findings.add(f"{row.id} is overdrawn")
        sums = [a + b for a, b in zip(sums, stored, strict=True)]
    if sums[0] != sums[2] or sums[1] != sums[3]:
        findings.add(f"debits and credits of all accounts differ: {sums}")
    for no in fold.counters:
        findings.add(f"transfers name account number {no}, which does not exist")


def _check_pendings(
    connection: sa.Connection, findings: Findings, fold: _Fold, names: dict[int, str]
) -> None:
    count = 0
    for row in _stream(connection, "SELECT id, debit, credit, amount, posted, state FROM pending"):
        count += 1
        id_, (debit, credit, amount, posted, state) = bytes(row[0]), row[1:]
        if state == OPEN:
            first = fold.open.pop(id_, None)
            seen = first and (names.get(first[0]), names.get(first[1]), first[2], 0)
            if seen != (debit, credit, amount, posted):
                findings.add(f"the open hold {id_.hex()} does not follow from its transfer")
        elif fold.resolved.pop(id_, None) != (state, posted):
            findings.add(f"the hold {id_.hex()} was not resolved as its row says")
    for id_ in [*fold.open, *fold.resolved]:
        findings.add(f"the pending transfer {id_.hex()} has no row")
    findings.counts["holds"] = count


def _check_legs(
    connection: sa.Connection, findings: Findings, fold: _Fold, names: dict[int, str]
) -> None:
    """Each receipt leaf has its leg; legs sum to what holds paid and nodes earned."""
    earned = {names[no]: amount for no, amount in fold.earned.items() if no in names}
    for node, amount in connection.execute(
        sa.text("SELECT node_id, SUM(node + subsidy) FROM leg GROUP BY node_id")
    ):
        if earned.pop(f"node-locked:{node}", 0) != int(amount):
            findings.add(f"the receipts of node {node} are not what it earned")
    for account, amount in earned.items():
        if amount:
            findings.add(f"{account} earned {amount} without receipts")
    wrong = sa.text(
        "SELECT COUNT(*) FROM (SELECT hold_id, SUM(charge) AS charged FROM leg GROUP BY hold_id) l "
        "LEFT JOIN pending p ON p.id = l.hold_id AND p.kind = 1 "
        "WHERE p.id IS NULL OR p.posted <> l.charged"
    )
    sums = sa.text(
        "SELECT (SELECT COALESCE(SUM(charge), 0) FROM leg), "
        "(SELECT COALESCE(SUM(posted), 0) FROM pending WHERE kind = 1)"
    )
    charged, posted = connection.execute(sums).one()
    if connection.execute(wrong).scalar_one() or charged != posted:
        findings.add("holds were captured for other sums than their receipts")
    lost = sa.text(
        "SELECT COUNT(*) FROM leg l LEFT JOIN evidence e ON e.digest = l.receipt_digest "
        "WHERE e.log_index IS NULL OR e.log_index <> l.log_index"
    )
    if connection.execute(lost).scalar_one():
        findings.add("settled receipts are not in the log where they should be")


def _check_spending(connection: sa.Connection, findings: Findings) -> None:
    rows = connection.execute(
        sa.text(
            "SELECT s.api_key_id, s.spent, COALESCE(SUM(CASE WHEN p.state = 1 THEN p.amount "
            "ELSE p.posted END), 0) FROM spending s LEFT JOIN pending p "
            "ON p.api_key_id = s.api_key_id GROUP BY s.api_key_id, s.spent"
        )
    )
    for key, spent, folded in rows:
        if spent != int(folded):
            findings.add(f"API key {key} has spent {folded}, its row says {spent}")


def _check_operations(connection: sa.Connection, findings: Findings) -> None:
    count = connection.execute(
        sa.text(
            "SELECT COUNT(*) FROM transfer t WHERE ordinal = 0 AND NOT EXISTS "
            "(SELECT 1 FROM operation o WHERE o.id = t.operation_id)"
        )
    ).scalar_one()
    if count:
        findings.add(f"{count} transfers belong to operations that were never applied")


def _stream(connection: sa.Connection, sql: str) -> Iterator[Any]:
    streaming = connection.execution_options(stream_results=True, yield_per=_STEP)
    return iter(streaming.execute(sa.text(sql)))
