"""What the ledger remembers of nodes, recomputed from the leaves in their order, in the log's half
of ``fsck``: releases, convictions, reinstatements, and what nodes are owed."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import sqlalchemy as sa

from trueweight.ledger.accounts import node_locked, owner_of
from trueweight.ledger.findings import Findings, exact
from trueweight.ledger.fsck_restitution import Convicted
from trueweight.ledger.leaves import parse_batch
from trueweight.ledger.values import NodeRow, conviction_key
from trueweight.protos.envelope import parse_payload
from trueweight.protos.v1.audit_pb2 import Conviction
from trueweight.protos.v1.envelope_pb2 import Envelope
from trueweight.protos.v1.market_pb2 import Bill, Reinstatement

CONVICTION, REINSTATEMENT = "conviction", "reinstatement"


class _Folded:
    """One node, as far as the leaves were read."""

    def __init__(self) -> None:
        # In all, and when the newest reinstatement came.
        self.released = self.released_before = 0
        self.reinstated = 0
        # By a ledger that counts as released what was not locked any more.
        self.is_exact = False
        # Since the newest reinstatement: something was forfeited; keys of published convictions;
        # from which receipts on they refund.
        self.has_forfeited = False
        self.convictions: set[str] = set()
        self.since: set[int] = set()


class _Statement(NamedTuple):
    """A leaf that convicts."""

    place: int
    node_id: str
    key: str


class _Reference(NamedTuple):
    """Who took the reference of a conviction, and what that operation answered."""

    operation: bytes
    amount: int
    log_index: int

    @property
    def convicted(self) -> bool:
        """True for an operation that convicts; publishing alone answers with a leaf."""
        return self.log_index == -1


class Nodes:
    """Rows of ``node`` and references of convictions against leaves."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self._nodes: defaultdict[str, _Folded] = defaultdict(_Folded)
        # By key: the leaf that says it first, and the operation that forfeited right behind it.
        self._convictions: dict[str, int] = {}
        self._taken_by: dict[str, bytes] = {}
        self._newest: _Statement | None = None
        # Operations that forfeited.
        self.convicted: dict[bytes, Convicted] = {}

    def transfers(self, place: int, leaf: bytes) -> None:
        """A leaf of transfers. Nearly none is about these, and most need no parsing to tell. Raises
        BadSignature."""
        if b"release" not in leaf and b"forfeit" not in leaf and b"reinstate" not in leaf:
            return
        batch = parse_batch(leaf)
        for movement in batch.movements:
            if movement.reason == "release":
                self._nodes[owner_of(movement.debit_account)].released += movement.amount_nano
            elif movement.reason == "forfeit":
                self._forfeited(place, batch.operation_id, owner_of(movement.debit_account))
            elif movement.reason == "reinstate":
                # A statement that was sent twice is in the log once.
                self._nodes[owner_of(movement.credit_account)].has_forfeited = False

    def _forfeited(self, place: int, operation: bytes, node_id: str) -> None:
        node, begins, newest = self._nodes[node_id], {place}, self._newest
        node.has_forfeited = True
        if newest is not None and (newest.place, newest.node_id) == (place - 1, node_id):
            begins.add(newest.place)
            self._taken_by.setdefault(newest.key, operation)
        known = Convicted(node_id, frozenset(begins), frozenset(node.since))
        self.convicted.setdefault(operation, known)

    def statement(self, place: int, kind: str, envelope: Envelope, *, is_new: bool) -> None:
        """A leaf that convicts or reinstates. ``is_new``: not of an older ledger, as far as the log
        can tell. Raises BadSignature if it is none."""
        if kind == CONVICTION:
            said = parse_payload(envelope, Conviction)
            node = self._nodes[said.node_id]
            row = NodeRow(said.node_id, reinstated=node.reinstated)
            key = conviction_key(row, f"{said.node_id}:{said.verifier_id}")
            node.convictions.add(key)
            node.since.add(max(node.reinstated, said.change_point_index))
            self._convictions.setdefault(key, place)
            self._newest = _Statement(place, said.node_id, key)
        else:
            node = self._nodes[parse_payload(envelope, Reinstatement).node_id]
            node.reinstated, node.released_before = place + 1, node.released
            node.is_exact = is_new
            node.has_forfeited, node.convictions, node.since = False, set(), set()

    def finish(self, findings: Findings) -> None:
        """After the last leaf."""
        rows = self._connection.execute(
            sa.text("SELECT node_id, released, convicted, reinstated FROM node")
        )
        stored = {row[0]: NodeRow(*row) for row in rows}
        references = self._references()
        self._check_references(findings, references)
        for node_id in stored.keys() | self._nodes.keys():
            row, node = stored.get(node_id, NodeRow(node_id)), self._nodes[node_id]
            if row.reinstated != node.reinstated:
                findings.add(f"node {node_id} was not reinstated where its row says")
            least, most = self._released(row, node)
            if not least <= row.released <= most:
                findings.add(
                    f"node {node_id} has released between {least} and {most}, "
                    f"its row says {row.released}"
                )
            # Who publishes a conviction does not convict yet where it takes several; who convicts
            # publishes it by the same operation, or before.
            taken = (references[key] for key in node.convictions & references.keys())
            applied = node.has_forfeited or any(reference.convicted for reference in taken)
            if row.convicted not in (0, 1) or (row.convicted and not node.convictions):
                findings.add(f"node {node_id} is convicted, and no conviction in the log says so")
            elif applied and not row.convicted and not self._was_repeated(row):
                findings.add(f"node {node_id} was convicted, and its row does not say so")

    def _references(self) -> dict[str, _Reference]:
        """By key. (That their operations were applied, the books' half finds.)"""
        rows = self._connection.execute(
            sa.text(
                "SELECT r.key, r.operation_id, o.amount, o.log_index FROM reference r "
                "JOIN operation o ON o.id = r.operation_id WHERE r.kind = 'conviction'"
            )
        )
        return {key: _Reference(bytes(id_), *answer) for key, id_, *answer in rows}

    def _check_references(self, findings: Findings, stored: dict[str, _Reference]) -> None:
        """Whoever logged a conviction first took its reference."""
        for key in self._convictions.keys() ^ stored.keys():
            findings.add(f"the reference of the conviction {key} is not what the log has")
        for key in self._convictions.keys() & stored.keys():
            reference, took = stored[key], self._taken_by.get(key)
            if not reference.convicted:
                is_right = reference.log_index == self._convictions[key]
            elif took is None:
                # It found nothing to forfeit.
                is_right = reference.amount == 0
            else:
                is_right = reference.operation == took
            if not is_right:
                findings.add(f"the reference of the conviction {key} is another operation's")

    def _released(self, row: NodeRow, node: _Folded) -> tuple[int, int]:
        """The least and the most that a row may say. They differ only for a node that was
        reinstated: then what it had earned counted as released, less refunds of which it is not
        known whether they came before. Of one that is free again it follows from what it has
        locked, unless an older ledger reinstated it. (That, too, the books' half looks at.)"""
        if not node.reinstated:
            return node.released, node.released
        sums = self._connection.execute(
            sa.text(
                "SELECT COALESCE(SUM(CASE WHEN log_index < :place "
                "THEN node + subsidy - refunded_node ELSE 0 END), 0), "
                "COALESCE(SUM(node + subsidy), 0), COALESCE(SUM(refunded_node), 0), "
                "(SELECT COALESCE(SUM(credits_posted - debits_posted - debits_pending), 0) "
                "FROM account WHERE id = :locked) FROM leg WHERE node_id = :node"
            ),
            {
                "node": row.node_id,
                "place": node.reinstated - 1,
                "locked": node_locked(row.node_id),
            },
        ).one()
        least, earned, taken_back, locked = (exact(amount) for amount in sums)
        if node.is_exact and not row.convicted:
            left = earned - taken_back - locked
            return left, left
        return least + node.released - node.released_before, earned

    def _was_repeated(self, row: NodeRow) -> bool:
        """True if the statement that reinstated the node did so once more, which adds no leaf."""
        times = self._connection.execute(
            sa.text("SELECT COUNT(*) FROM operation WHERE log_index = :place"),
            {"place": row.reinstated - 1},
        ).scalar_one()
        return row.reinstated > 0 and int(times) > 1


class NodeDebts:
    """Subsidies that the pool could not pay, against their bills. Bills have long promised no more
    than they bring to the pool, so that there are none but in old books."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        rows = connection.execute(
            sa.text(
                "SELECT operation_id, creditor, amount FROM debt "
                "WHERE creditor LIKE 'node-locked:%'"
            )
        )
        self._owed = {(bytes(row[0]), str(row[1])): int(row[2]) for row in rows}

    def bill(self, bill: Bill) -> None:
        """A leaf that is a bill."""
        if not self._owed:
            return
        unpaid: defaultdict[str, int] = defaultdict(int)
        for leg in bill.legs:
            paid = self._connection.execute(
                sa.text("SELECT subsidy FROM leg WHERE receipt_digest = :digest"),
                {"digest": leg.receipt_digest},
            ).scalar()
            unpaid[node_locked(leg.node_id)] += leg.pool_subsidy_nano - int(paid or 0)
        for creditor, amount in unpaid.items():
            if self._owed.get((bill.bill_id, creditor)) == amount:
                del self._owed[bill.bill_id, creditor]

    def finish(self, findings: Findings) -> None:
        """After the last leaf."""
        for _, creditor in self._owed:
            findings.add(f"what is owed to {creditor} is not what its bill left unpaid")
