# ruff: noqa: E501  (rules read better on one line)
"""The books against an independent model, in random order, on both databases.

The model knows only money: who has what, what is held, what each receipt moved. It predicts the
outcome of every operation; after each step balances, holds and replays must agree, and at the end
of each run fsck recomputes everything from the transfers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from trueweight.ledger.backend import open_backend
from trueweight.ledger.books import Books
from trueweight.ledger.court import court_of, with_key_events
from trueweight.ledger.prepare import prepare
from trueweight.ledger.schema import normal_url
from trueweight.ledger.values import Leaf
from trueweight.protos.envelope import digest_of
from trueweight.protos.merkle import verify_consistency
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.simulation.ledger_guilt import convict_by, conviction_of, guilt_of
from trueweight.simulation.ledger_world import Leg, World

from .conftest import fsck

CLIENTS = ("a", "b")
AMOUNTS = st.integers(1, 120_000)
SEEN = Counter()


@dataclass
class Model:
    """Plain numbers, no accounts, no transfers."""

    have: dict = field(default_factory=lambda: defaultdict(int))  # available, by client
    locked: dict = field(default_factory=lambda: defaultdict(int))  # by node
    released: dict = field(default_factory=lambda: defaultdict(int))
    paid: int = 0
    paying: int = 0
    fee: int = 0
    pool: int = 0
    deposited: int = 0
    held: dict = field(default_factory=dict)  # hold id -> (client, amount, due)
    legs: dict = field(default_factory=dict)  # receipt digest -> (client, node, charge, split)
    payouts: dict = field(default_factory=dict)  # id -> (node, amount)
    earned: int = 0
    taken: int = 0  # from nodes: refunds and forfeits
    treasury: int = 0
    reward: int = 0
    accused: dict = field(default_factory=dict)  # node -> (legs until then, its conviction)
    convicted: set = field(default_factory=set)
    refunded: set = field(default_factory=set)  # receipt digests
    # Audits without margins, in the order in which they were asked for, by node.
    zeros: dict = field(default_factory=lambda: defaultdict(list))
    budget: tuple = (0, 0)  # most in a period, its length
    era: int = 0  # how often the length was changed
    keyed: dict = field(default_factory=dict)  # hold id -> [what it counts, when: era and period]

    def period(self, now):
        return (self.era, now // self.budget[1]) if self.budget[1] else None

    def fits(self, amount, now):
        used = sum(counts for counts, when in self.keyed.values() if when == self.period(now))
        return not self.budget[1] or used + amount <= self.budget[0]


def split_of(charge):
    """The market's terms of ``World``, written down again: 5 % fee, 2 % pool, rounded down."""
    fee, pool = charge * 5 // 100, charge * 2 // 100
    return fee, pool, charge - fee - pool


INTERESTING = [
    ("capture", "applied"),
    ("capture", "INVALID_REQUEST"),
    ("void_hold", "applied"),
    ("refund", "applied"),
    ("release", "applied"),
    ("payout_start", "applied"),
    ("payout_settle", "applied"),
    ("hold", "applied"),
    ("hold", "INSUFFICIENT_FUNDS"),
    ("hold", "LIMIT_EXCEEDED"),
    ("set_spending_limit", "applied"),
    ("deposit", "replayed"),
    ("deposit", "ID_CONFLICT"),
    ("convict", "applied"),
    ("convict", "CONFLICT"),
]


class Machine(RuleBasedStateMachine):
    """One run on a fresh database."""

    make_url = None
    holds, receipts, payouts, done = (
        Bundle("holds"),
        Bundle("receipts"),
        Bundle("payouts"),
        Bundle("done"),
    )

    @initialize()
    def open(self):
        self.world, self.model = World(window_ms=0), Model()
        self.url = type(self).make_url()
        court = court_of(self.world.market)
        self.court = with_key_events(
            court, [Leaf("key-event", n.key_event, b"") for n in self.world.node]
        )
        self.books = Books(
            open_backend(normal_url(self.url)), self.court.terms, self.world.signers["ledger"]
        )
        self.books.open()
        self.roots = []
        for client in CLIENTS:
            assert self.apply("admin", self.world.deposit(client, 10**6)) == ["applied"]
            self.model.have[client] = 10**6
            self.model.deposited += 10**6

    def apply(self, role, *operations):
        results = self.outcomes(role, *operations)
        SEEN.update((operations[0].WhichOneof("body"), result) for result in results)
        return results

    def outcomes(self, role, *operations):
        signer = self.world.signers.get(role)
        caller = signer.identity if signer else role
        call = [prepare(operation, caller, self.court) for operation in operations]
        outcomes = self.books.apply([call], self.world.now).outcomes[0]
        return [o.error.code if o.error else o.status for o in outcomes]

    @rule(target=done, client=st.sampled_from(CLIENTS), amount=AMOUNTS)
    def deposit(self, client, amount):
        operation = self.world.deposit(client, amount)
        assert self.apply("admin", operation) == ["applied"]
        self.model.have[client] += amount
        self.model.deposited += amount
        return ("admin", operation)

    @rule(
        target=holds,
        client=st.sampled_from(CLIENTS),
        amount=AMOUNTS,
        ttl=st.sampled_from([50, 10_000, 100_000]),
        keyed=st.booleans(),
    )
    def hold(self, client, amount, ttl, keyed=False):
        operation = self.world.hold(client, amount, ttl_ms=ttl, api_key="key" if keyed else "")
        answer = "applied"
        if keyed and not self.model.fits(amount, self.world.now):
            answer = "LIMIT_EXCEEDED"
        elif amount > self.model.have[client]:
            answer = "INSUFFICIENT_FUNDS"
        assert self.apply("router", operation) == [answer]
        if answer != "applied":
            return multiple()
        if keyed:
            self.model.keyed[operation.id] = [amount, self.model.period(self.world.now)]
        self.model.have[client] -= amount
        self.model.held[operation.id] = (client, amount, self.world.now + ttl)
        return operation

    @rule(most=st.sampled_from([0, 30_000, 100_000]), minutes=st.sampled_from([1, 1, 2]))
    def limit(self, most, minutes):
        body = pb.SetSpendingLimit(api_key_id="key", limit_nano=most, period_ms=minutes * 60_000)
        operation = pb.Operation(id=self.world.new_id(), set_spending_limit=body)
        assert self.apply("admin", operation) == ["applied"]
        length = minutes * 60_000 if most else 0
        self.model.era += length != self.model.budget[1]
        self.model.budget = (most, length)

    @rule(target=holds, client=st.sampled_from(CLIENTS), first=AMOUNTS, second=AMOUNTS)
    def use_up_a_budget(self, client, first, second):
        self.limit(100_000, 1)
        made = [self.hold(client, amount, 100_000, True) for amount in (first, second)]
        return multiple(*(hold for hold in made if isinstance(hold, pb.Operation)))

    @rule(client=st.sampled_from(CLIENTS), beyond=st.integers(1, 1000))
    def overdraw(self, client, beyond):
        operation = self.world.hold(client, self.model.have[client] + beyond)
        assert self.apply("router", operation) == ["INSUFFICIENT_FUNDS"]

    @rule(client=st.sampled_from(CLIENTS), amount=st.integers(1, 1000))
    def hold_and_void(self, client, amount):
        held = self.hold(client, amount, 10_000)
        if isinstance(held, pb.Operation):
            self.void(held)

    @rule(client=st.sampled_from(CLIENTS), first=AMOUNTS, second=AMOUNTS)
    def linked_holds(self, client, first, second):
        operations = [self.world.hold(client, first), self.world.hold(client, second)]
        operations[0].linked = True
        results = self.apply("router", *operations)
        if first + second <= self.model.have[client]:
            assert results == ["applied", "applied"]
            self.model.have[client] -= first + second
            due = self.world.now + 60_000
            self.model.held[operations[0].id] = (client, first, due)
            self.model.held[operations[1].id] = (client, second, due)
        else:
            assert "applied" not in results

    @rule(
        target=receipts,
        client=st.sampled_from(CLIENTS),
        amount=st.integers(20_000, 120_000),
        node=st.integers(0, 2),
        tokens=st.integers(0, 300),
        twice=st.booleans(),
    )
    def whole_request(self, client, amount, node, tokens, twice):
        held = self.hold(client, amount, 10_000)
        return (
            self.capture(held, node, tokens, twice)
            if isinstance(held, pb.Operation)
            else multiple()
        )

    @rule(
        target=receipts,
        hold=holds,
        node=st.integers(0, 2),
        tokens=st.integers(0, 300),
        twice=st.booleans(),
    )
    def capture(self, hold, node, tokens, twice):
        legs = [Leg(self.world.node[node], output=tokens, billed_output=tokens)]
        if twice:
            legs.append(Leg(self.world.node[(node + 1) % 3], choice=1))
        operation = self.world.capture(hold.id, *legs)
        charges = [100 * 100 + leg.billed_output * 300 for leg in legs]
        (result,) = self.apply("router", operation)
        held = self.model.held.get(hold.id)
        if held is None or held[2] <= self.world.now:
            assert result == "CONFLICT"
            return multiple()
        client, amount, _ = held
        if sum(charges) > amount:
            assert result == "INVALID_REQUEST"
            return multiple()
        assert result == "applied"
        del self.model.held[hold.id]
        self.model.have[client] += amount - sum(charges)
        if hold.id in self.model.keyed:
            self.model.keyed[hold.id][0] = sum(charges)
        made = []
        for leg, charge, receipt in zip(legs, charges, operation.capture.receipts, strict=True):
            fee, pool, rest = split_of(charge)
            digest = digest_of(receipt)
            self.model.legs[digest] = (client, leg.node.identity, charge)
            made.append(digest)
            if leg.node.identity in self.model.convicted:
                self.model.have[client] += charge  # given back at once
                self.model.refunded.add(digest)
                continue
            self.model.fee += fee
            self.model.pool += pool
            self.model.locked[leg.node.identity] += rest
            self.model.earned += rest
        return multiple(*made)

    @rule(hold=consumes(holds))
    def void(self, hold):
        (result,) = self.apply("router", self.world.void(hold.id))
        held = self.model.held.get(hold.id)
        if held is None or held[2] <= self.world.now:
            assert result == "CONFLICT"
            return
        assert result == "applied"
        client, amount, _ = self.model.held.pop(hold.id)
        self.model.have[client] += amount
        self.model.keyed.pop(hold.id, None)

    @rule(ms=st.sampled_from([1, 100, 20_000, 45_000]))
    def wait_and_expire(self, ms):
        self.world.now += ms
        operation = pb.Operation(id=self.world.new_id(), expire=pb.Expire(limit=1000))
        assert self.apply("router", operation) == ["applied"]
        due = [id_ for id_, (_, _, at) in self.model.held.items() if at <= self.world.now]
        for id_ in due:
            client, amount, _ = self.model.held.pop(id_)
            self.model.have[client] += amount
            self.model.keyed.pop(id_, None)

    @rule(digest=consumes(receipts))
    def refund(self, digest):
        client, node, charge = self.model.legs[digest]
        fee, pool, rest = split_of(charge)
        assert self.apply("verifier", self.world.request(digest)) in (["applied"], ["replayed"])
        ((index, tokens),) = self.books._backend.query(
            "SELECT log_index, output_tokens FROM leg WHERE receipt_digest = ?", (digest,)
        )
        (result,) = self.apply("verifier", self.world.refund(digest, node))
        if digest in self.model.refunded and charge:
            assert result == "CONFLICT"
            return
        assert result == "applied"
        # The verdict cites no calibration, so it refunds, but counts as zero.
        if tokens:
            self.model.zeros[node].append((index, tokens))
        self.model.refunded.add(digest)
        # Locked earnings first, then the treasury; bonds are empty here, what is missing is owed.
        from_node = min(rest, self.model.locked[node])
        from_fee, from_pool = min(fee, self.model.fee), min(pool, self.model.pool)
        self.model.locked[node] -= from_node
        self.model.fee -= from_fee
        self.model.pool -= from_pool
        from_treasury = min(self.model.treasury, charge - from_node - from_fee - from_pool)
        self.model.treasury -= from_treasury
        self.model.taken += from_node
        self.model.have[client] += from_node + from_fee + from_pool + from_treasury
        assert self.apply("verifier", self.world.refund(digest, node)) == (
            ["CONFLICT"] if charge else ["applied"]
        )

    @rule(node=st.integers(0, 2))
    def accuse(self, node):
        """Audits that convict, on legs that cost nothing; the conviction comes later."""
        signer = self.world.node[node]
        if signer.identity in self.model.accused or self.model.have["a"] < 10:
            return
        guilt = guilt_of(self.world, signer, "a")
        assert self.apply("verifier", guilt.calibration) == ["applied"]
        assert self.apply("router", *guilt.holds) == ["applied"] * 3
        assert self.apply("router", *guilt.captures) == ["applied"] * 3
        digests = [digest_of(c.capture.receipts[0]) for c in guilt.captures]
        assert self.apply("verifier", *guilt.requests) == ["applied"] * 3
        assert self.apply("verifier", *guilt.verdicts) == ["applied"] * 3
        rows = dict(self.books._backend.query("SELECT receipt_digest, log_index FROM leg"))
        indices, zeros = [rows[digest] for digest in digests], self.model.zeros[signer.identity]
        conviction = conviction_of(self.world, signer, indices, zeros=zeros)
        # After a few audits at zero the change point may lie before the guilty ones.
        until = sum(rows[leg] < conviction.change_point_index for leg in self.model.legs)
        self.model.accused[signer.identity] = (until, conviction)

    @rule(node=st.integers(0, 2), ppm=st.integers(0, 100_000))
    def convict(self, node, ppm):
        name = self.world.node[node].identity
        if name not in self.model.accused:
            assert self.apply("verifier", self.world.convict(name, 0)) == ["CONFLICT"]
            return
        until, conviction = self.model.accused[name]
        (result,) = self.apply("verifier", convict_by(self.world, conviction, ppm))
        if name in self.model.convicted:
            assert result == "CONFLICT"
            return
        assert result == "applied"
        self.model.convicted.add(name)
        forfeited = self.model.locked.pop(name, 0)
        reward = forfeited * ppm // 1_000_000
        legs = [
            (digest, client, charge)
            for digest, (client, by, charge) in list(self.model.legs.items())[until:]
            if by == name and charge and digest not in self.model.refunded
        ]
        total = sum(charge for _, _, charge in legs)
        pay, seen = min(forfeited - reward, total), 0
        for digest, client, charge in legs:
            before = pay * seen // total
            seen += charge
            self.model.have[client] += pay * seen // total - before
            self.model.refunded.add(digest)
        self.model.taken += forfeited
        self.model.reward += reward
        self.model.treasury += forfeited - reward - pay

    @rule(node=st.integers(0, 2), tokens=st.integers(1, 300))
    def whole_conviction(self, node, tokens):
        self.accuse(node)
        self.whole_request(CLIENTS[1], 110_000, node, tokens, False)
        self.convict(node, 50_000)

    @rule(node=st.integers(0, 2), part=st.integers(0, 3))
    def release(self, node, part):
        name = self.world.node[node].identity
        locked = self.model.locked[name]
        amount = locked * part // 2 + (part == 0)  # 1, half, all, too much
        operation = pb.Operation(
            id=self.world.new_id(),
            release=pb.Release(node_id=name, amount_nano=amount, below_log_index=10**9),
        )
        (result,) = self.apply("verifier", operation)
        if result == "applied":
            assert amount <= locked
            amount = amount or locked
            self.model.locked[name] -= amount
            self.model.released[name] += amount
        else:
            assert result == "CONFLICT"

    @rule(target=payouts, node=st.integers(0, 2), tokens=st.integers(0, 300))
    def earn_and_pay(self, node, tokens):
        self.whole_request(CLIENTS[0], 100_000, node, tokens, False)
        self.release(node, 2)
        return self.payout(node, 1)

    @rule(target=payouts, node=st.integers(0, 2), part=st.integers(0, 2))
    def payout(self, node, part):
        name = self.world.node[node].identity
        amount = self.model.released[name] * part // 2 + 1 - (part == 1)
        amount = max(1, amount)
        operation = pb.Operation(
            id=self.world.new_id(),
            payout_start=pb.PayoutStart(node_id=name, amount_nano=amount, rail="bank"),
        )
        fits = amount <= self.model.released[name]
        assert self.apply("admin", operation) == ["applied" if fits else "INSUFFICIENT_FUNDS"]
        if not fits:
            return multiple()
        self.model.released[name] -= amount
        self.model.paying += amount
        self.model.payouts[operation.id] = (name, amount)
        return operation.id

    @rule(id_=payouts, paid=st.booleans())
    def settle(self, id_, paid):
        body = pb.PayoutSettle(payout_id=id_, paid=paid)
        (result,) = self.apply("admin", pb.Operation(id=self.world.new_id(), payout_settle=body))
        if id_ not in self.model.payouts:
            assert result == "CONFLICT"
            return
        assert result == "applied"
        name, amount = self.model.payouts.pop(id_)
        self.model.paying -= amount
        if paid:
            self.model.paid += amount
        else:
            self.model.released[name] += amount

    @rule(done_before=done)
    def replay(self, done_before):
        role, operation = done_before
        assert self.apply(role, operation) == ["replayed"]
        other = pb.Operation()
        other.CopyFrom(operation)
        other.deposit.amount_nano += 1
        assert self.apply(role, other) == ["ID_CONFLICT"]

    @rule()
    def checkpoint(self):
        state = self.books.checkpoint(self.world.now)
        if state is not None and state.size:
            self.roots.append((state.size, state.root))

    @rule()
    def start_anew(self):
        self.books.close()
        self.books = Books(
            open_backend(normal_url(self.url)), self.court.terms, self.world.signers["ledger"]
        )
        self.books.open()

    @invariant()
    def balances_agree(self):
        if not hasattr(self, "model"):
            return
        rows = self.books._backend.query(
            "SELECT id, credits_posted - debits_posted - debits_pending, debits_pending FROM account"
        )
        available = {row[0]: row[1] for row in rows}
        model = self.model
        for client in CLIENTS:
            assert available.get(f"client:{client}", 0) == model.have[client]
        for node in self.world.node:
            assert available.get(f"node-locked:{node.identity}", 0) == model.locked[node.identity]
            assert (
                available.get(f"node-available:{node.identity}", 0) == model.released[node.identity]
            )
        assert available.get("fee:market", 0) == model.fee
        assert available.get("pool:market", 0) == model.pool
        held = sum(amount for _, amount, _ in model.held.values())
        assert sum(row[2] for row in rows if row[0].startswith("client:")) == held
        assert available.get("treasury:market", 0) == model.treasury
        assert available.get(f"verifier:{self.world.identity('verifier')}", 0) == model.reward
        mine = sum(model.locked.values()) + sum(model.released.values())
        assert mine + model.paying + model.paid + model.taken == model.earned
        ((refunded, captured),) = self.books._backend.query(
            "SELECT COALESCE(SUM(refunded), 0), COALESCE(SUM(charge), 0) FROM leg"
        )
        assert refunded <= captured
        inside = sum(value for name, value in available.items() if not name.startswith("external:"))
        assert inside + held + model.paying + model.paid == model.deposited

    def teardown(self):
        if not hasattr(self, "books"):
            return
        self.books.checkpoint(self.world.now)
        self.books.close()
        assert fsck(self.url, self.world).problems == []
        self._old_roots_are_consistent()

    def _old_roots_are_consistent(self):
        from trueweight.ledger.reader import Reader
        from trueweight.ledger.schema import make_engine

        reader = Reader(make_engine(normal_url(self.url)))
        newest = reader.checkpoint()
        for size, root in self.roots:
            path = list(reader.consistency(size, newest.size).path)
            verify_consistency(size, root, newest.size, newest.root, path)
        reader.close()


def test_books_agree_with_an_independent_model(databases, migrated, until_seen):
    made = type("OnBoth", (Machine,), {"make_url": lambda: databases.copy(migrated)})
    SEEN.clear()

    def missing():
        return [what for what in INTERESTING if not SEEN[what]]

    until_seen(made, missing, examples=12, steps=50)
