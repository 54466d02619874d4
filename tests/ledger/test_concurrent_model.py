"""Concurrent callers, lost answers and take-overs against an independent model, on both databases.

Hypothesis sends batches of operations at once, some several times, to a writer and its standby, and
sometimes ends the writer meanwhile. What was applied has an order, that of its transfers: in this
order the model must allow each operation, and every refusal must be right at some moment of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass, field

import pytest
import sqlalchemy as sa
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from trueweight.ledger.reader import Reader
from trueweight.ledger.schema import make_engine, normal_url
from trueweight.ledger.service import Ledger
from trueweight.protos.envelope import digest_of
from trueweight.protos.errors import TrueweightError
from trueweight.protos.merkle import verify_consistency
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.runtime.clock import SystemClock
from trueweight.simulation.ledger_world import Leg, World

from .conftest import fsck
from .fold import ACCOUNTS, TRANSFERS, Fold

CLIENTS = ("a", "b")
LIMIT = 70_000  # of the one API key
SEEN = Counter()


@dataclass
class Money:
    """Plain numbers: what may happen next, and what it does."""

    have: Counter = field(default_factory=Counter)
    held: dict = field(default_factory=dict)  # hold id -> (client, amount, with the key)
    receipts: dict = field(default_factory=dict)  # digest -> (client, node, charge)
    refunded: frozenset = frozenset()
    paying: dict = field(default_factory=dict)  # payout id -> (node, amount)
    settled: frozenset = frozenset()  # payout ids
    spent: int = 0
    owed: int = 0
    # By node; of what it earned, some is locked, available, on its way, paid or taken back.
    earned: Counter = field(default_factory=Counter)
    locked: Counter = field(default_factory=Counter)
    available: Counter = field(default_factory=Counter)
    paid: Counter = field(default_factory=Counter)
    taken: Counter = field(default_factory=Counter)
    let_go: Counter = field(default_factory=Counter)
    market: int = 0  # fee and pool

    def judge(self, op):
        """The code with which this operation is refused now; empty if it is applied."""
        kind = op.WhichOneof("body")
        if kind == "hold":
            if op.hold.api_key_id and self.spent + op.hold.amount_nano > LIMIT:
                return "LIMIT_EXCEEDED"
            short = self.have[op.hold.account] < op.hold.amount_nano
            return "INSUFFICIENT_FUNDS" if short else ""
        if kind == "deposit":
            return ""
        if kind in ("void_hold", "capture"):
            found = self.held.get(
                op.void_hold.hold_id if kind == "void_hold" else op.capture.hold_id
            )
            if found is None:
                return "CONFLICT"
            return "INVALID_REQUEST" if kind == "capture" and charge_of(op) > found[1] else ""
        return self._judge_node_money(kind, op)

    def _judge_node_money(self, kind, op):
        if kind == "refund":
            digest = op.refund.receipt_digest
            if digest not in self.receipts:
                return "NOT_FOUND"
            return "CONFLICT" if digest in self.refunded else ""
        if kind == "release":
            node, amount = op.release.node_id, op.release.amount_nano
            return "CONFLICT" if amount > self.releasable(node) else ""
        if kind == "payout_start":
            node, amount = op.payout_start.node_id, op.payout_start.amount_nano
            return "INSUFFICIENT_FUNDS" if amount > self.available[node] else ""
        id_ = op.payout_settle.payout_id
        if id_ in self.paying:
            return ""
        return "CONFLICT" if id_ in self.settled else "NOT_FOUND"

    def releasable(self, node):
        """The window is over at once: all that refunds have left of what it earned."""
        left = self.earned[node] - self.taken[node] - self.let_go[node]
        assert left == self.locked[node]
        return left

    def do(self, op):
        """Applies an operation that is allowed."""
        kind = op.WhichOneof("body")
        if kind == "deposit":
            self.have[op.deposit.account] += op.deposit.amount_nano
        elif kind == "hold":
            amount, key = op.hold.amount_nano, op.hold.api_key_id
            self.have[op.hold.account] -= amount
            self.held[op.id] = (op.hold.account, amount, bool(key))
            self.spent += amount if key else 0
        elif kind in ("void_hold", "capture"):
            self._end_hold(kind, op)
        elif kind == "refund":
            self._refund(op.refund.receipt_digest)
        elif kind == "release":
            node, amount = op.release.node_id, op.release.amount_nano
            self.locked[node] -= amount
            self.available[node] += amount
            self.let_go[node] += amount
        elif kind == "payout_start":
            node, amount = op.payout_start.node_id, op.payout_start.amount_nano
            self.available[node] -= amount
            self.paying[op.id] = (node, amount)
        else:
            self.settled |= {op.payout_settle.payout_id}
            node, amount = self.paying.pop(op.payout_settle.payout_id)
            (self.paid if op.payout_settle.paid else self.available)[node] += amount

    def _end_hold(self, kind, op):
        charge = charge_of(op) if kind == "capture" else 0
        client, amount, key = self.held.pop(
            op.capture.hold_id if kind == "capture" else op.void_hold.hold_id
        )
        self.have[client] += amount - charge
        self.spent -= amount - charge if key else 0
        if kind == "capture":
            node, rest = NODES[op.id], rest_of(charge)
            self.receipts[digest_of(op.capture.receipts[0])] = (client, node, charge)
            self.earned[node] += rest
            self.locked[node] += rest
            self.market += charge - rest

    def _refund(self, digest):
        """An administrator's: out of locked earnings, fee and pool; what is missing is owed."""
        client, node, charge = self.receipts[digest]
        rest = rest_of(charge)
        from_node = min(rest, self.locked[node])
        self.refunded |= {digest}
        self.locked[node] -= from_node
        self.taken[node] += from_node
        self.market -= charge - rest
        self.have[client] += charge - rest + from_node
        self.owed += rest - from_node

    def copy(self):
        values = {k: v.copy() if hasattr(v, "copy") else v for k, v in vars(self).items()}
        return Money(**values)


CHARGES, NODES = {}, {}  # by the capture's id


def charge_of(op):
    return CHARGES[op.id]


def rest_of(charge):
    """The market's terms, written down again: 5 % fee, 2 % pool, rounded down."""
    return charge - charge * 5 // 100 - charge * 2 // 100


KINDS = ["hold", "hold", "keyed", "void", "capture", "capture", "capture", "deposit"]
KINDS += ["refund", "refund", "release", "release", "payout", "paid", "failed"]
INTENTS = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.integers(0, 1),
        st.integers(15_000, 60_000),
        st.integers(0, 50),
        st.integers(1, 3),  # how many callers send it at once
    ),
    min_size=6,
    max_size=16,
)


class Clock(SystemClock):
    """Real waiting, a wall clock that stands still."""

    def __init__(self, world):
        self._world = world

    def now_unix_ms(self):
        return self._world.now


class Concurrent(RuleBasedStateMachine):
    """One run on a fresh database, with a writer and a standby."""

    make_url = None

    @initialize()
    def open(self):
        self.world, self.model = World(window_ms=0), Money()
        self.fold, self.roots = Fold(), {}
        self.url = type(self).make_url()
        self.runner = asyncio.Runner()
        self.engine = make_engine(normal_url(self.url))
        self.pair = []
        for _ in range(2):
            self.pair.append(self.runner.run(self.start()))
        admin = [self.world.publish(n.key_event) for n in self.world.node]
        limit = pb.SetSpendingLimit(api_key_id="key", limit_nano=LIMIT)
        admin.append(pb.Operation(id=self.world.new_id(), set_spending_limit=limit))
        deposits = [self.world.deposit(client, 120_000) for client in CLIENTS]
        self.send([[("admin", op)] for op in [*admin, *deposits]])
        for deposit in deposits:
            self.model.do(deposit)

    async def start(self):
        ledger = Ledger(
            self.world.market, self.world.signers["ledger"], self.url, Clock(self.world)
        )
        await ledger.start(0 if self.pair else 10_000)
        return ledger

    # -- what is done --------------------------------------------------------------------------

    @rule(intents=INTENTS)
    def at_once(self, intents):
        self.check(self.operations(intents), take_over=False)

    @rule(intents=INTENTS)
    def at_once_while_the_standby_takes_over(self, intents):
        self.check(self.operations(intents), take_over=True)

    def operations(self, intents):
        """(role, operation) for each caller; several callers may have the same operation."""
        made = []
        # Also what this very batch captures and pays out may be refunded and settled in it.
        self.receipts, self.payouts = list(self.model.receipts), sorted(self.model.paying)
        for kind, which, amount, pick, copies in intents:
            op = self.client_operation(kind, which, amount, pick)
            role = "admin" if kind == "deposit" else "router"
            if op is None:
                role, op = "admin", self.node_operation(kind, which, pick)
            if op is not None:
                made.append([(role, op)] * copies)
        return made

    def client_operation(self, kind, which, amount, pick):
        holds, world, client = sorted(self.model.held), self.world, CLIENTS[which]
        if kind == "deposit":
            return world.deposit(client, amount)
        if kind in ("hold", "keyed"):
            return world.hold(client, amount, api_key="key" if kind == "keyed" else "")
        if kind == "void" and holds:
            return world.void(holds[pick % len(holds)])
        if kind == "capture" and holds:
            leg = Leg(world.node[which], output=pick * 4, billed_output=pick * 4)
            op = world.capture(holds[pick % len(holds)], leg)
            CHARGES[op.id], NODES[op.id] = 100 * 100 + pick * 4 * 300, leg.node.identity
            self.receipts.append(digest_of(op.capture.receipts[0]))
            return op
        return None

    def node_operation(self, kind, which, pick):
        node, world = self.world.node[which].identity, self.world
        if kind == "refund" and self.receipts:
            digest = self.receipts[pick % len(self.receipts)]
            body = pb.Refund(receipt_digest=digest, reason="goodwill")
            return pb.Operation(id=world.new_id(), refund=body)
        if kind == "release":
            # Two thirds: of two at once one is too much.
            most = self.model.releasable(node)
            return world.release(node, max(1, most * 2 // 3 + pick % 2))
        if kind == "payout":
            op = world.payout(node, max(1, self.model.available[node] * 2 // 3))
            self.payouts.append(op.id)
            return op
        if kind in ("paid", "failed") and self.payouts:
            return world.settle(self.payouts[pick % len(self.payouts)], paid=kind == "paid")
        return None

    def send(self, groups, take_over=False):
        """Everything at once; the results in the shape of ``groups``."""

        async def one(role, op):
            caller = self.world.identity(role)
            for _ in range(1500):
                for ledger in self.pair:
                    with contextlib.suppress(TrueweightError):
                        return (await ledger.as_caller(caller).apply([op]))[0]
                await asyncio.sleep(0.01)
            raise AssertionError("nobody writes after 15 s")

        async def everything():
            sent = [asyncio.gather(*(one(*each) for each in group)) for group in groups]
            if take_over:
                await asyncio.sleep(0)
                await self.pair.pop(0).close()
            results = await asyncio.gather(*sent)
            if take_over:
                self.pair.append(await self.start())
            return results

        return self.runner.run(everything())

    def check(self, groups, take_over):
        results = self.send(groups, take_over)
        applied = self.applied_in_order([group[0][1] for group in groups])
        moments = [self.model.copy()]
        for op in applied:
            assert self.model.judge(op) == "", "the model forbids what was applied"
            self.model.do(op)
            moments.append(self.model.copy())
        ids = {op.id for op in applied}
        for group, answers in zip(groups, results, strict=True):
            op = group[0][1]
            status = Counter(r.status for r in answers)
            first, again = status[pb.Result.APPLIED], status[pb.Result.REPLAYED]
            assert first + again == 0 or op.id in ids
            # With a take-over the one answer that said "applied" may be the one that was lost.
            assert first == (1 if op.id in ids else 0) or (take_over and not first and again)
            moved = {(r.amount_nano, r.log_index) for r in answers if not r.code}
            assert len(moved) <= 1, "a replay is answered as the first time"
            for answer in answers:
                code = answer.code or "applied"
                SEEN[op.WhichOneof("body"), code, take_over] += 1
                if answer.code:
                    assert any(m.judge(op) == answer.code for m in moments), answer

    def applied_in_order(self, operations):
        by_id = {op.id: op for op in operations}
        statement = sa.text(
            "SELECT operation_id FROM transfer WHERE operation_id IN :ids AND ordinal = 0 "
            "ORDER BY sequence"
        ).bindparams(sa.bindparam("ids", expanding=True))
        with self.engine.connect() as connection:
            rows = connection.execute(statement, {"ids": list(by_id)}).fetchall()
        return [by_id[bytes(row[0])] for row in rows]

    # -- what must be true -----------------------------------------------------------------------

    @invariant()
    def balances_agree(self):
        if not hasattr(self, "engine"):
            return
        with self.engine.connect() as connection:
            query = connection.exec_driver_sql
            accounts = query(ACCOUNTS).fetchall()
            spent = query("SELECT spent FROM spending").scalar()
            owed = query("SELECT COALESCE(SUM(amount), 0) FROM debt").scalar()
            transfers = query(TRANSFERS.replace("?", str(self.fold.last))).fetchall()
            roots = query("SELECT size, root FROM checkpoint WHERE size > 0").fetchall()
        self.fold.add(transfers)
        self.fold.check(accounts)
        counters = {name: c for _, name, _, *c in accounts}
        self.clients_agree(counters)
        assert (spent or 0) == self.model.spent <= LIMIT
        assert owed == self.model.owed
        self.nodes_agree(counters)
        for size, root in roots:
            assert self.roots.setdefault(size, bytes(root)) == bytes(root)

    def clients_agree(self, counters):
        for client in CLIENTS:
            pending, debits, _, credits = counters.get(f"client:{client}", (0, 0, 0, 0))
            held = sum(h[1] for h in self.model.held.values() if h[0] == f"client:{client}")
            assert (credits - debits - pending, pending) == (
                self.model.have[f"client:{client}"],
                held,
            )

    def nodes_agree(self, counters):
        """locked + available + on its way + paid + taken back = earned, for each node."""
        model = self.model

        def available(name):
            pending, debits, _, credits = counters.get(name, (0, 0, 0, 0))
            return credits - debits - pending

        for node in (n.identity for n in self.world.node):
            on_its_way = sum(amount for who, amount in model.paying.values() if who == node)
            locked, free = available(f"node-locked:{node}"), available(f"node-available:{node}")
            pending = counters.get(f"node-available:{node}", (0, 0, 0, 0))[0]
            assert (locked, free, pending) == (
                model.locked[node],
                model.available[node],
                on_its_way,
            )
            given = on_its_way + model.paid[node] + model.taken[node]
            assert locked + free + given == model.earned[node]
        assert available("fee:market") + available("pool:market") == model.market
        assert counters.get("external:bank", (0, 0, 0, 0))[3] == sum(model.paid.values())

    def teardown(self):
        if not hasattr(self, "runner"):
            return
        for ledger in self.pair:
            self.runner.run(ledger.close())
        self.runner.close()
        self.engine.dispose()
        assert fsck(self.url, self.world).problems == []
        self.old_roots_are_consistent()

    def old_roots_are_consistent(self):
        """Every checkpoint that any of the writers ever signed, with the newest of all."""
        reader = Reader(make_engine(normal_url(self.url)))
        newest = reader.checkpoint()
        SEEN["old root"] += len(self.roots) - (newest.size in self.roots)
        for size, root in self.roots.items():
            path = list(reader.consistency(size, newest.size).path)
            verify_consistency(size, root, newest.size, newest.root, path)
        reader.close()


INTERESTING = [
    ("hold", "applied"),
    ("hold", "INSUFFICIENT_FUNDS"),
    ("hold", "LIMIT_EXCEEDED"),
    ("capture", "applied"),
    ("capture", "CONFLICT"),
    ("void_hold", "applied"),
    ("void_hold", "CONFLICT"),
    ("refund", "applied"),
    ("refund", "CONFLICT"),
    ("refund", "NOT_FOUND"),
    ("release", "applied"),
    ("release", "CONFLICT"),
    ("payout_start", "applied"),
    ("payout_start", "INSUFFICIENT_FUNDS"),
    ("payout_settle", "applied"),
    ("payout_settle", "CONFLICT"),
]


def agree(databases, migrated, until_seen, **size):
    made = type("OnBoth", (Concurrent,), {"make_url": lambda: databases.copy(migrated)})
    SEEN.clear()

    def missing():
        missing = [w for w in INTERESTING if not SEEN[*w, False] + SEEN[*w, True]]
        return missing + ["old root"] * (not SEEN["old root"])

    until_seen(made, missing, **size)


def test_concurrent_callers_and_take_overs_agree_with_an_independent_model(
    databases, migrated, until_seen
):
    agree(databases, migrated, until_seen, examples=12, steps=10)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_concurrent_runs_agree_with_an_independent_model(databases, migrated, until_seen):
    agree(databases, migrated, until_seen, examples=100, steps=20)
