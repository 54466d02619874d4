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

from trueweight.ledger.schema import make_engine, normal_url
from trueweight.ledger.service import Ledger
from trueweight.protos.errors import TrueweightError
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.runtime.clock import SystemClock
from trueweight.simulation.ledger_world import Leg, World

from .conftest import fsck

CLIENTS = ("a", "b")
LIMIT = 70_000  # of the one API key
SEEN = Counter()


@dataclass
class Money:
    """Plain numbers: what may happen next, and what it does."""

    have: Counter = field(default_factory=Counter)
    held: dict = field(default_factory=dict)  # hold id -> (client, amount, with the key)
    spent: int = 0
    earned: int = 0  # by all nodes, with fee and pool

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
        found = self.held.get(op.void_hold.hold_id if kind == "void_hold" else op.capture.hold_id)
        if found is None:
            return "CONFLICT"
        return "INVALID_REQUEST" if kind == "capture" and charge_of(op) > found[1] else ""

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
        else:
            charge = charge_of(op) if kind == "capture" else 0
            hold_id = op.capture.hold_id if charge else op.void_hold.hold_id or op.capture.hold_id
            client, amount, key = self.held.pop(hold_id)
            self.have[client] += amount - charge
            self.spent -= amount - charge if key else 0
            self.earned += charge

    def copy(self):
        return Money(Counter(self.have), dict(self.held), self.spent, self.earned)


CHARGES = {}


def charge_of(op):
    return CHARGES[op.id]


INTENTS = st.lists(
    st.tuples(
        st.sampled_from(["hold", "hold", "keyed", "void", "capture", "capture", "deposit"]),
        st.integers(0, 1),
        st.integers(15_000, 60_000),
        st.integers(0, 50),
        st.integers(1, 3),  # how many callers send it at once
    ),
    min_size=4,
    max_size=14,
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
        self.world, self.model = World(), Money()
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
        holds = sorted(self.model.held)
        for kind, client, amount, pick, copies in intents:
            if kind in ("void", "capture"):
                if not holds:
                    continue
                hold_id = holds[pick % len(holds)]
            if kind == "deposit":
                role, op = "admin", self.world.deposit(CLIENTS[client], amount)
            elif kind == "void":
                role, op = "router", self.world.void(hold_id)
            elif kind == "capture":
                leg = Leg(self.world.node[client], output=pick * 4, billed_output=pick * 4)
                role, op = "router", self.world.capture(hold_id, leg)
                CHARGES[op.id] = 100 * 100 + pick * 4 * 300
            else:
                key = "key" if kind == "keyed" else ""
                role = "router"
                op = self.world.hold(CLIENTS[client], amount, api_key=key)
            made.append([(role, op)] * copies)
        return made

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
            rows = connection.execute(
                sa.text(
                    "SELECT id, debits_pending, debits_posted, credits_pending, credits_posted "
                    "FROM account"
                )
            ).fetchall()
            spent = connection.execute(sa.text("SELECT spent FROM spending")).scalar()
        counters = {row[0]: row[1:] for row in rows}
        for client in CLIENTS:
            pending, debits, _, credits = counters.get(f"client:{client}", (0, 0, 0, 0))
            held = sum(h[1] for h in self.model.held.values() if h[0] == f"client:{client}")
            assert (credits - debits - pending, pending) == (
                self.model.have[f"client:{client}"],
                held,
            )
        assert (spent or 0) == self.model.spent <= LIMIT
        sums = [sum(c[i] for c in counters.values()) for i in range(4)]
        assert (sums[0], sums[1]) == (sums[2], sums[3])
        paid = [
            c[3] - c[1] for name, c in counters.items() if name.startswith(("node-", "fee", "p"))
        ]
        assert sum(paid) == self.model.earned

    def teardown(self):
        if not hasattr(self, "runner"):
            return
        for ledger in self.pair:
            self.runner.run(ledger.close())
        self.runner.close()
        self.engine.dispose()
        assert fsck(self.url, self.world).problems == []


INTERESTING = [
    ("hold", "applied"),
    ("hold", "INSUFFICIENT_FUNDS"),
    ("hold", "LIMIT_EXCEEDED"),
    ("capture", "applied"),
    ("capture", "CONFLICT"),
    ("void_hold", "applied"),
    ("void_hold", "CONFLICT"),
]


def agree(databases, migrated, until_seen, **size):
    made = type("OnBoth", (Concurrent,), {"make_url": lambda: databases.copy(migrated)})
    SEEN.clear()

    def missing():
        return [w for w in INTERESTING if not SEEN[*w, False] + SEEN[*w, True]]

    until_seen(made, missing, **size)


def test_concurrent_callers_and_take_overs_agree_with_an_independent_model(
    databases, migrated, until_seen
):
    agree(databases, migrated, until_seen, examples=6, steps=8)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_concurrent_runs_agree_with_an_independent_model(databases, migrated, until_seen):
    agree(databases, migrated, until_seen, examples=100, steps=20)
