"""What the ledger remembers of nodes, recomputed from the leaves in their order, in the log's half
of ``fsck``: releases, convictions, reinstatements, and what nodes are owed."""

from __future__ import annotations

from collections import defaultdict

import sqlalchemy as sa

from trueweight.ledger.accounts import node_locked, owner_of
from trueweight.ledger.findings import Findings
from trueweight.ledger.values import NodeRow, conviction_key
from trueweight.protos.envelope import parse_payload
from trueweight.protos.v1 import ledger_pb2 as pb
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
        # Since the newest reinstatement: something was forfeited; keys of published convictions.
        self.has_forfeited = False
        self.convictions: set[str] = set()


class Nodes:
    """Rows of ``node`` and references of convictions against leaves."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self._nodes: defaultdict[str, _Folded] = defaultdict(_Folded)
        self._convictions: set[str] = set()

    def transfers(self, leaf: bytes) -> None:
        """A leaf of transfers. Nearly none is about these, and most need no parsing to tell."""
        if b"release" not in leaf and b"forfeit" not in leaf and b"reinstate" not in leaf:
            return
        for movement in pb.TransferBatch.FromString(leaf).movements:
            if movement.reason == "release":
                self._nodes[owner_of(movement.debit_account)].released += movement.amount_nano
            elif movement.reason == "forfeit":
                self._nodes[owner_of(movement.debit_account)].has_forfeited = True
            elif movement.reason == "reinstate":
                # A statement that was sent twice is in the log once.
                self._nodes[owner_of(movement.credit_account)].has_forfeited = False

    def statement(self, place: int, kind: str, envelope: Envelope) -> None:
        """A leaf that convicts or reinstates. Raises BadSignature if it is none."""
        if kind == CONVICTION:
            said = parse_payload(envelope, Conviction)
            node = self._nodes[said.node_id]
            row = NodeRow(said.node_id, reinstated=node.reinstated)
            key = conviction_key(row, f"{said.node_id}:{said.verifier_id}")
            node.convictions.add(key)
            self._convictions.add(key)
        else:
            node = self._nodes[parse_payload(envelope, Reinstatement).node_id]
            node.reinstated, node.released_before = place + 1, node.released
            node.has_forfeited, node.convictions = False, set()

    def finish(self, findings: Findings) -> None:
        """After the last leaf."""
        rows = self._connection.execute(
            sa.text("SELECT node_id, released, convicted, reinstated FROM node")
        )
        stored = {row[0]: NodeRow(*row) for row in rows}
        references = self._references()
        for key in self._convictions ^ references.keys():
            findings.add(f"the reference of the conviction {key} is not what the log has")
        for node_id in stored.keys() | self._nodes.keys():
            row, node = stored.get(node_id, NodeRow(node_id)), self._nodes[node_id]
            if row.reinstated != node.reinstated:
                findings.add(f"node {node_id} was not reinstated where its row says")
            least, most = self._released(node_id, node)
            if not least <= row.released <= most:
                findings.add(
                    f"node {node_id} has released between {least} and {most}, "
                    f"its row says {row.released}"
                )
            # Who publishes a conviction does not convict yet where it takes several; who convicts
            # publishes it by the same operation, or before.
            applied = node.has_forfeited or any(references.get(k) for k in node.convictions)
            if row.convicted not in (0, 1) or (row.convicted and not node.convictions):
                findings.add(f"node {node_id} is convicted, and no conviction in the log says so")
            elif applied and not row.convicted and not self._was_repeated(row):
                findings.add(f"node {node_id} was convicted, and its row does not say so")

    def _references(self) -> dict[str, bool]:
        """Keys of convictions, and whether the operation that took one convicted; publishing alone
        answers with a leaf."""
        rows = self._connection.execute(
            sa.text(
                "SELECT r.key, o.log_index FROM reference r "
                "LEFT JOIN operation o ON o.id = r.operation_id WHERE r.kind = 'conviction'"
            )
        )
        return {key: index == -1 for key, index in rows}

    def _released(self, node_id: str, node: _Folded) -> tuple[int, int]:
        """The least and the most that a row may say. They differ only for a node that was
        reinstated: then what it had earned counted as released, less refunds of which it is not
        known whether they came before."""
        if not node.reinstated:
            return node.released, node.released
        sums = self._connection.execute(
            sa.text(
                "SELECT COALESCE(SUM(CASE WHEN log_index < :place "
                "THEN node + subsidy - refunded_node ELSE 0 END), 0), "
                "COALESCE(SUM(node + subsidy), 0) FROM leg WHERE node_id = :node"
            ),
            {"node": node_id, "place": node.reinstated - 1},
        ).one()
        earned, most = (int(amount) for amount in sums)
        since = node.released - node.released_before
        return max(node.released_before, earned) + since, most

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


class Rewards:
    """Digests that verifiers were rewarded for: each must be in the log."""

    def __init__(self, connection: sa.Connection) -> None:
        rows = connection.execute(sa.text("SELECT key FROM reference WHERE kind = 'reward'"))
        keys = (str(row[0]).rpartition(":")[2] for row in rows)
        self._missing = {_digest(key) for key in keys}

    def leaf(self, digest: bytes) -> None:
        """A leaf's digest."""
        self._missing.discard(digest)

    def finish(self, findings: Findings) -> None:
        """After the last leaf."""
        for digest in self._missing:
            findings.add(f"the reward for {digest.hex()} is for nothing in the log")


def _digest(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return text.encode()
