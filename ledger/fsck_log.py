"""The log's half of ``fsck``: every leaf, tile and checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import sqlalchemy as sa

from trueweight.ledger import bundle
from trueweight.ledger.archived import Archive, archive_at, bundles_of
from trueweight.ledger.audits import STEP_KINDS, StepRow, step_row
from trueweight.ledger.findings import (
    Findings,
    Progress,
    count,
    kept_rows,
    snapshot,
    stream,
    to_the_end,
)
from trueweight.ledger.fsck_claims import Claims, Tokens
from trueweight.ledger.fsck_nodes import CONVICTION, REINSTATEMENT, NodeDebts, Nodes
from trueweight.ledger.fsck_references import Rewards
from trueweight.ledger.fsck_restitution import check_spans
from trueweight.ledger.fsck_verdicts import KINDS as VERDICT_KINDS
from trueweight.ledger.fsck_verdicts import VERDICT, Verdicts
from trueweight.ledger.leaves import TRANSFER, is_of, says_facts
from trueweight.ledger.requests import request_row
from trueweight.ledger.tiles import Edge
from trueweight.protos.checkpoint import log_origin, open_note
from trueweight.protos.envelope import (
    message_class,
    message_digest,
    parse_envelope,
    parse_payload,
    payload_type,
)
from trueweight.protos.errors import BadSignature, StorageError
from trueweight.protos.merkle import leaf_hash
from trueweight.protos.v1.audit_pb2 import AuditRequest
from trueweight.protos.v1.envelope_pb2 import Envelope
from trueweight.protos.v1.market_pb2 import Bill, Receipt

RECEIPT, BILL, REQUEST = "receipt", "bill", "audit-request"
_TYPES = {kind: payload_type(message_class(kind)) for kind in bundle.KINDS if kind != TRANSFER}


def check_log(
    engine: sa.Engine,
    market_id: str,
    ledger_keys: list[bytes] | None,
    progress: Progress,
    archive: Archive | None = None,
) -> Findings:
    """All that the log says, against what is stored beside it."""
    findings = Findings()
    with to_the_end(findings, "the log and what is kept of it"), snapshot(engine) as connection:
        archive = archive_at(connection, archive)
        _check_origin(connection, findings, market_id, archive)
        kept = _Kept(connection, findings, market_id)
        _check_log(connection, findings, kept, progress, archive)
        _check_checkpoints(connection, findings, market_id, ledger_keys)
    return findings


def _check_origin(
    connection: sa.Connection, findings: Findings, market_id: str, archive: Archive | None
) -> None:
    """The books say whose they are, as soon as there is anything in them, and how much of them is
    in an archive."""
    meta = {row[0]: row[1] for row in connection.execute(sa.text("SELECT key, value FROM meta"))}
    leaves = connection.execute(sa.text("SELECT MAX(first_index) FROM bundle")).scalar()
    if meta.get("market") != market_id and ("market" in meta or leaves is not None):
        findings.add(f"the books do not say that they are those of market {market_id}")
    archived = archive.sequence if archive is not None else 0
    if int(meta.get("archived_sequence", 0)) != archived:
        findings.add("the books do not say which transfers are in the archive")


def _check_log(
    connection: sa.Connection,
    findings: Findings,
    kept: _Kept,
    progress: Progress,
    archive: Archive | None,
) -> None:
    """Indices, tiles, checkpointed roots, and each leaf against what is kept beside it."""
    total = int(
        connection.execute(sa.text("SELECT COALESCE(SUM(leaves), 0) FROM bundle")).scalar_one()
    )
    roots = _Roots(stream(connection, "SELECT size, root FROM checkpoint ORDER BY size"))
    tiles = stream(connection, "SELECT level, number, hashes FROM tile ORDER BY level, number")
    stored = {(r[0], r[1]): bytes(r[2]) for r in tiles}
    # A log may have been checkpointed before its first leaf.
    edge = _extend(findings, Edge(), [], stored, roots)
    for row in bundles_of(connection, archive):
        if row[0] != edge.size:
            findings.add(f"leaves {edge.size} to {row[0] - 1} are missing")
            return
        leaves = _leaves(findings, row)
        if leaves is None:
            return
        kept.merged_at = row[3]
        for place, (kind, body) in enumerate(leaves, row[0]):
            kept.check(place, kind, body)
        edge = _extend(findings, edge, [leaf_hash(b) for _, b in leaves], stored, roots)
        progress("leaves", edge.size, total)
    kept.finish()
    for level, number in stored:
        findings.add(f"tile {level}/{number} covers leaves that do not exist")
    while (beyond := roots.take()) is not None:
        findings.add(f"the checkpoint of size {beyond[0]} is beyond the log")
    findings.counts["leaves"] = edge.size


def _leaves(findings: Findings, row: Any) -> list[tuple[str, bytes]] | None:
    try:
        leaves = list(bundle.unpack(row[1], bytes(row[4])))
    except StorageError:
        findings.add(f"the bundle at leaf {row[0]} is damaged")
        return None
    if bundle.mask_of(kind for kind, _ in leaves) != row[2]:
        findings.add(f"the bundle at leaf {row[0]} says it has other kinds of leaves")
    return leaves


class _LegRow(NamedTuple):
    """What is kept of a receipt."""

    log_index: int
    receipt_digest: bytes
    captured_at: int
    output_tokens: int | None
    hold_id: bytes
    node_id: str
    charge: int
    fee: int
    pool: int
    node: int
    subsidy: int


class _Kept:
    """What is kept of the leaves beside them, in their order."""

    def __init__(self, connection: sa.Connection, findings: Findings, market_id: str) -> None:
        self._connection, self._findings, self._market_id = connection, findings, market_id
        # When the leaves that are checked were merged.
        self.merged_at = 0
        # Leaves of transfers say which unique facts they took, from some place on.
        self._say_facts = False
        self._legs = kept_rows(connection, "leg", _LegRow._fields)
        self._evidence = stream(
            connection, "SELECT log_index, digest FROM evidence ORDER BY log_index"
        )
        self._next_evidence = next(self._evidence, None)
        # Leg of the newest receipt, and of all before the next leaf of transfers.
        self._leg: _LegRow | None = None
        # Whether that receipt is found in ``evidence``, as in older books.
        self._is_indexed = False
        self._captured: list[_LegRow] = []
        self._steps = kept_rows(connection, "audit_step", StepRow._fields)
        self._requests, self._verdicts = _Requests(connection), Verdicts(connection)
        self._nodes, self._debts = Nodes(connection), NodeDebts(connection)
        self._rewards, self._claims = Rewards(connection), Claims(connection)
        self._tokens = Tokens(connection)

    def check(self, place: int, kind: str, body: bytes) -> None:
        """One leaf."""
        try:
            if kind == TRANSFER:
                self._take_transfers(place, body)
                return
            envelope = parse_envelope(body)
            if envelope.payload_type != _TYPES[kind]:
                raise BadSignature("the evidence is of another type")
            digest = message_digest(envelope.payload_type, envelope.payload)
            self._find(place, kind, digest)
            if kind == RECEIPT:
                self._check_receipt(place, envelope)
            else:
                self._compare(place, kind, envelope, digest, body)
        except BadSignature:
            self._findings.add(f"leaf {place} is not the {kind} it says")

    def _take_transfers(self, place: int, body: bytes) -> None:
        """(That they are the stored transfers, the books' half finds.)"""
        self._say_facts = self._say_facts or says_facts(body)
        self._nodes.transfers(place, body)
        if self._captured:
            if not all(is_of(body, leg.captured_at) for leg in self._captured):
                self._findings.add(f"receipts before leaf {place} were captured at another time")
            self._captured.clear()

    def _find(self, place: int, kind: str, digest: bytes) -> None:
        """Receipts are found in what they moved; older books have them in both."""
        found = True
        if kind == RECEIPT:
            row = next(self._legs, None)
            self._leg = _LegRow(*row) if row is not None else None
            if self._leg is None or self._leg[:2] != (place, digest):
                found = False
            else:
                self._captured.append(self._leg)
        row = self._next_evidence
        self._is_indexed = row is not None and row[0] == place
        if kind != RECEIPT or self._is_indexed:
            found = found and row is not None and (row[0], bytes(row[1])) == (place, digest)
            self._next_evidence = next(self._evidence, None)
        if not found:
            self._findings.add(f"leaf {place} is not found under its digest")

    def _compare(
        self, place: int, kind: str, envelope: Envelope, digest: bytes, body: bytes
    ) -> None:
        if kind == BILL:
            bill = parse_payload(envelope, Bill)
            self._check_bill(place, bill)
            self._debts.bill(bill)
            self._claims.bill(self._findings, bill)
        elif kind in VERDICT_KINDS:
            who = self._verdicts.check(self._findings, kind, (place, self.merged_at), envelope)
            if kind == VERDICT:
                self._rewards.verdict(who, digest)
        elif kind == REQUEST:
            self._requests.check(self._findings, place, envelope)
        elif kind in STEP_KINDS:
            step = step_row(parse_payload(envelope, message_class(kind)), digest, body)
            self._check_step(place, kind, step)
        elif kind in (CONVICTION, REINSTATEMENT):
            self._nodes.statement(place, kind, envelope, is_new=self._say_facts)

    def _check_receipt(self, place: int, envelope: Envelope) -> None:
        said, leg = parse_payload(envelope, Receipt), self._leg
        if leg is None:
            return
        # Legs of older books do not say how many tokens.
        if leg.node_id != said.node_id or leg.output_tokens not in (None, said.output_tokens):
            self._findings.add(f"what is kept of the receipt in leaf {place} is not what it says")
        if leg.output_tokens is None:
            digest, is_indexed = leg.receipt_digest, self._is_indexed
            self._tokens.unknown(self._findings, place, digest, is_indexed=is_indexed)
        elif self._tokens.since is None:
            self._tokens.since = leg.captured_at

    def _check_bill(self, place: int, bill: Bill) -> None:
        """The receipts of a capture are the leaves before its bill, in its order. The pool may have
        paid a part of a subsidy."""
        if bill.market_id != self._market_id:
            self._findings.add(f"the bill in leaf {place} is another market's")
        legs = self._captured
        said = [
            _LegRow(
                leg.log_index,
                billed.receipt_digest,
                leg.captured_at,
                leg.output_tokens,
                bill.hold_id,
                billed.node_id,
                billed.client_charge_nano,
                billed.fee_nano,
                billed.pool_nano,
                billed.node_nano,
                min(leg.subsidy, billed.pool_subsidy_nano),
            )
            for leg, billed in zip(legs, bill.legs, strict=False)
        ]
        if legs != said or len(legs) != len(bill.legs):
            self._findings.add(f"the receipts before leaf {place} are not kept as it bills them")

    def _check_step(self, place: int, kind: str, said: StepRow | None) -> None:
        stored = next(self._steps, None)
        if said is None or stored != said._replace(log_index=place):
            self._findings.add(f"the {kind} in leaf {place} is not what is kept of it")

    def finish(self) -> None:
        """After the last leaf."""
        findings = self._findings
        for row in self._steps:
            findings.add(f"what is kept of leaf {row[0]} is in no leaf")
        self._requests.finish(findings)
        self._verdicts.finish(findings)
        if self._next_evidence is not None:
            findings.add(f"evidence names leaf {self._next_evidence[0]}, which does not exist")
        for row in (*self._evidence, *self._legs):
            findings.add(f"evidence names leaf {row[0]}, which does not exist")
        for part in (self._nodes, self._debts, self._rewards, self._tokens):
            part.finish(findings)
        check_spans(self._connection, findings, self._nodes.convicted)
        _check_holds(self._connection, findings)


def _check_holds(connection: sa.Connection, findings: Findings) -> None:
    """Every hold paid what its receipts charge, and its client is theirs."""
    wrong = (
        "SELECT COUNT(*) FROM (SELECT hold_id, SUM(charge) AS charged, MIN(client) AS one, "
        "MAX(client) AS other FROM leg GROUP BY hold_id) l "
        "LEFT JOIN pending p ON p.id = l.hold_id AND p.kind = 1 "
        "WHERE p.id IS NULL OR p.posted <> l.charged OR p.debit <> l.one OR p.debit <> l.other"
    )
    sums = sa.text(
        "SELECT (SELECT COALESCE(SUM(charge), 0) FROM leg), "
        "(SELECT COALESCE(SUM(posted), 0) FROM pending WHERE kind = 1)"
    )
    charged, posted = connection.execute(sums).one()
    if count(connection, wrong) or charged != posted:
        findings.add("holds were captured for other sums or clients than their receipts")


class _Requests:
    """The rows of audit requests against their leaves; the first of a verifier for a receipt."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self._rows = stream(
            connection,
            "SELECT log_index, verifier_id, receipt_digest, for_appeal FROM audit_request "
            "ORDER BY log_index",
        )
        self._seen: set[tuple[str, bytes]] = set()

    def check(self, findings: Findings, place: int, envelope: Envelope) -> None:
        """One leaf. Raises BadSignature if it is no audit request."""
        said = request_row(parse_payload(envelope, AuditRequest))
        if said.key in self._seen:
            return
        self._seen.add(said.key)
        row = next(self._rows, None)
        stored = (*row[:2], bytes(row[2]), row[3]) if row else ()
        if stored != (place, *said.key, said.for_appeal):
            findings.add(f"the audit request in leaf {place} is not what is kept of it")

    def finish(self, findings: Findings) -> None:
        """After the last leaf."""
        for row in self._rows:
            findings.add(f"the audit request of leaf {row[0]} is in no leaf")
        wrong = sa.text(
            "SELECT COUNT(*) FROM audit_request r "
            "LEFT JOIN leg l ON l.receipt_digest = r.receipt_digest AND l.log_index < r.log_index "
            "WHERE NOT COALESCE(r.node_id = COALESCE(l.node_id, '') "
            "AND r.receipt_index = COALESCE(l.log_index, -1) "
            "AND r.captured_at = COALESCE(l.captured_at, 0) "
            "AND r.verdict_index = COALESCE((SELECT MIN(v.log_index) FROM verdict v "
            "WHERE v.receipt_digest = r.receipt_digest AND v.verifier_id = r.verifier_id "
            "AND v.log_index > r.log_index), -1), FALSE)"
        )
        if self._connection.execute(wrong).scalar_one():
            findings.add("audit requests do not say what became of them")


class _Roots:
    """Checkpointed roots in the order of their sizes, one at a time: there is one for each second
    in which the log grew."""

    def __init__(self, rows: Iterator[Any]) -> None:
        self._rows = rows
        self._next = next(rows, None)

    def take(self, most: int | None = None) -> tuple[int, bytes] | None:
        """The next, unless it is of more leaves."""
        row = self._next
        if row is None or (most is not None and row[0] > most):
            return None
        self._next = next(self._rows, None)
        return int(row[0]), bytes(row[1])


def _extend(
    findings: Findings,
    edge: Edge,
    hashes: list[bytes],
    stored: dict[tuple[int, int], bytes],
    roots: _Roots,
) -> Edge:
    done = 0
    while (checkpoint := roots.take(edge.size + len(hashes) - done)) is not None:
        size, root = checkpoint
        step = hashes[done : done + size - edge.size]
        edge = _check_tiles(findings, edge, step, stored)
        done += len(step)
        if edge.root() != root:
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
    count, origin = 0, log_origin(market_id)
    for row in stream(connection, "SELECT size, root, issued_at, note FROM checkpoint"):
        count += 1
        if ledger_keys is not None:
            _check_note(findings, row, origin, ledger_keys)
        elif row[3].partition("\n")[0] != origin:
            findings.add(f"the checkpoint of size {row[0]} is of another market's log")
    findings.counts["checkpoints"] = count


def _check_note(findings: Findings, row: Any, origin: str, ledger_keys: list[bytes]) -> None:
    size, root, issued_at, note = row
    for key in ledger_keys:
        try:
            state = open_note(note, origin, key)
        except BadSignature:
            continue
        if (state.size, state.root, state.issued_at_unix_ms) != (size, bytes(root), issued_at):
            findings.add(f"the checkpoint of size {size} says something else than its row")
        return
    findings.add(f"the checkpoint of size {size} is not signed by the ledger")
