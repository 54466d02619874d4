# ruff: noqa: S608  (names of tables, from here)
"""The books against an independent model, in random order, on both databases.

The model (``plain_books``) knows only money: who has what, what is held, what each receipt earned.
It predicts the outcome of every operation; after each step every balance, the fold of the transfers
and the sums must agree. At the end of each run all that was ever applied is sent again, which must
change nothing, and fsck recomputes everything from the transfers.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
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

from trueweight.ledger import earned, restitution
from trueweight.ledger.backend import open_backend
from trueweight.ledger.books import Books
from trueweight.ledger.court import court_of, with_key_events
from trueweight.ledger.prepare import prepare
from trueweight.ledger.reader import Reader
from trueweight.ledger.schema import make_engine, normal_url
from trueweight.ledger.values import Leaf
from trueweight.protos.envelope import digest_of
from trueweight.protos.merkle import verify_consistency
from trueweight.protos.v1 import audit_pb2
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.simulation.ledger_guilt import convict_by, conviction_of, guilt_of
from trueweight.simulation.ledger_world import Leg, World

from .conftest import fsck
from .fold import ACCOUNTS, TRANSFERS, Fold
from .plain_books import DAY_MS, TREASURY, PlainBooks, Receipt, bond, free, locked

CLIENTS = ("a", "b")
WINDOW_MS = 20_000
AMOUNTS = st.integers(1, 120_000)
NODES, TOKENS = st.integers(0, 2), st.integers(0, 300)
CLIENT = st.sampled_from(CLIENTS)
# World's assignments: 30 s for the work, and half of what is left of the hold for the router.
CLAIMABLE_AFTER_MS = 45_000
# Everything an operation may change besides the transfers and the log, which only grow.
TABLES = (
    "account", "pending", "leg", "claim", "reference", "spending", "node", "debt", "evidence",
    "verdict", "audit_request", "audit_step", "margin_commitment", "restitution",
)  # fmt: skip
SEEN = Counter()

APPLIED = (
    "bond_deposit", "bond_withdraw", "capture", "claim", "convict", "deposit", "expire", "hold",
    "payout_settle", "payout_start", "publish", "refund", "reinstate", "release", "reward",
    "set_spending_limit", "void_hold",
)  # fmt: skip
INTERESTING = [
    *((kind, status) for kind in APPLIED for status in ("applied", "replayed", "ID_CONFLICT")),
    ("bond_withdraw", "INSUFFICIENT_FUNDS"),
    ("bond_withdraw", "INVALID_REQUEST"),
    ("capture", "CONFLICT"),
    ("capture", "INVALID_REQUEST"),
    ("claim", "CONFLICT"),
    ("claim", "INVALID_REQUEST"),
    ("convict", "CONFLICT"),
    ("hold", "INSUFFICIENT_FUNDS"),
    ("hold", "LIMIT_EXCEEDED"),
    ("payout_settle", "CONFLICT"),
    ("payout_start", "INSUFFICIENT_FUNDS"),
    ("refund", "CONFLICT"),
    ("reinstate", "CONFLICT"),
    ("release", "CONFLICT"),
    ("reward", "CONFLICT"),
    ("reward", "INVALID_REQUEST"),
    ("reward", "NOT_FOUND"),
    ("void_hold", "CONFLICT"),
    ("claimed", "captured"),
    ("claimed", "paid at expiry"),
    ("convicted", "has its bond back from a withdrawal"),
    ("convicted", "owes"),
    ("convicted", "a second time"),
    ("convicted", "refunds in steps"),
    ("release", "UNAVAILABLE"),
    ("reinstate", "UNAVAILABLE"),
    ("refunded by", "verdict"),
    ("refunded by", "missing"),
    ("refunded by", "admin"),
    ("refunded out of", "a bond"),
    ("refunded out of", "a bond that was being withdrawn"),
    ("refunded out of", "what was forfeited"),
    ("released", "not past an audit that is owed"),
    ("subsidy", "paid"),
    ("subsidy", "taken back"),
]


class Served(NamedTuple):
    """A leg that a node has done, with its evidence, before anybody billed or claimed it."""

    hold_id: bytes
    request_id: bytes
    leg: Leg
    pair: tuple
    claimable_at: int

    @property
    def digest(self):
        return digest_of(self.pair[1])


class Call(NamedTuple):
    """What was applied, and how it was answered."""

    role: str
    operations: tuple
    answers: list


def kind_of_chore(books):
    """True if the next one refunds."""
    return bool(books._cache.restitutions)


def receipt_of(leg):
    charge = leg.billed_input * 100 + leg.billed_output * 300
    return Receipt("", leg.node.identity, charge, leg.output, leg.subsidy)


class Machine(RuleBasedStateMachine):
    """One run on a fresh database."""

    make_url = None
    holds, receipts, payouts, served, verdicts = (
        Bundle("holds"),
        Bundle("receipts"),
        Bundle("payouts"),
        Bundle("served"),
        Bundle("verdicts"),
    )

    @initialize()
    def open(self):
        self.world, self.model = World(window_ms=WINDOW_MS), PlainBooks(WINDOW_MS)
        self.url = type(self).make_url()
        court = court_of(self.world.market)
        self.court = with_key_events(
            court, [Leaf("key-event", n.key_event, b"") for n in self.world.node]
        )
        self.done, self.roots, self.fold = [], [], Fold()
        self.accused, self.old_convictions = {}, {}  # node -> its conviction
        self.books = self._open_books()
        for client in CLIENTS:
            self.deposit(client, 10**6)

    def _open_books(self):
        books = Books(
            open_backend(normal_url(self.url)), self.court.terms, self.world.signers["ledger"]
        )
        books.open()
        return books

    def apply(self, role, *operations):
        """The status or the error's code of each."""
        answers = self.outcomes(role, *operations)
        results = [o.error.code if o.error else o.status for o in answers]
        SEEN.update((operations[0].WhichOneof("body"), result) for result in results)
        if set(results) == {"applied"}:
            self.done.append(Call(role, operations, answers))
        return results

    def outcomes(self, role, *operations):
        signer = self.world.signers.get(role)
        caller = signer.identity if signer else role
        call = [prepare(operation, caller, self.court) for operation in operations]
        for _ in range(1000):
            answers = self.books.apply([call], self.world.now).outcomes[0]
            while self.books.has_chores:
                SEEN["convicted", "refunds in steps"] += kind_of_chore(self.books)
                self.books.chore(self.world.new_id(), self.world.now)
            if [o.error.code for o in answers if o.error] != ["UNAVAILABLE"]:
                return answers
            SEEN[operations[0].WhichOneof("body"), "UNAVAILABLE"] += 1
        raise AssertionError("it is never added up")

    def rows(self, sql, *values):
        return self.books._backend.query(sql, values)

    def node(self, number):
        return self.world.node[number].identity

    def note_indices(self):
        """Where the log has the receipts that were settled just now."""
        indices = dict(self.rows("SELECT receipt_digest, log_index FROM leg"))
        for digest, receipt in self.model.receipts.items():
            receipt.index = indices[digest]

    # -- money of clients ------------------------------------------------------------------------

    @rule(client=CLIENT, amount=AMOUNTS)
    def deposit(self, client, amount):
        result = self.apply("admin", self.world.deposit(client, amount))
        assert result == [self.model.deposit(f"client:{client}", amount)]

    @rule(
        target=holds,
        client=CLIENT,
        amount=AMOUNTS,
        ttl=st.sampled_from([50, 10_000, 100_000]),
        keyed=st.booleans(),
    )
    def hold(self, client, amount, ttl, keyed=False):
        now = self.world.now
        operation = self.world.hold(client, amount, ttl_ms=ttl, api_key="key" if keyed else "")
        answer = self.model.hold(
            operation.id, f"client:{client}", amount, now + ttl, now, keyed=keyed
        )
        assert self.apply("router", operation) == [answer]
        return operation if answer == "applied" else multiple()

    @rule(most=st.sampled_from([0, 30_000, 100_000]), minutes=st.sampled_from([1, 1, 2]))
    def limit(self, most, minutes):
        result = self.apply("admin", self.world.limit("key", most, minutes * 60_000))
        assert result == [self.model.limit(most, minutes * 60_000, self.world.now)]

    @rule(target=holds, client=CLIENT, first=AMOUNTS, second=AMOUNTS)
    def use_up_a_budget(self, client, first, second):
        self.limit(100_000, 1)
        made = [self.hold(client, amount, 100_000, True) for amount in (first, second)]
        return multiple(*(hold for hold in made if isinstance(hold, pb.Operation)))

    @rule(client=CLIENT, beyond=st.integers(1, 1000))
    def overdraw(self, client, beyond):
        operation = self.world.hold(client, self.model.money[f"client:{client}"] + beyond)
        assert self.apply("router", operation) == ["INSUFFICIENT_FUNDS"]

    @rule(client=CLIENT, amount=st.integers(1, 1000))
    def hold_and_void(self, client, amount):
        held = self.hold(client, amount, 10_000)
        if isinstance(held, pb.Operation):
            self.void(held)

    @rule(client=CLIENT, first=AMOUNTS, second=AMOUNTS, part=st.sampled_from([0, 1]))
    def linked_holds(self, client, first, second, part):
        have = self.model.money[f"client:{client}"]
        # Also together a little more than there is, which each alone is not.
        first, second = (first, second) if part or have < 10 else (have - 5, 6)
        operations = [self.world.hold(client, first), self.world.hold(client, second)]
        operations[0].linked = True
        results = self.apply("router", *operations)
        if first + second > have:
            culprit = first <= have
            assert results[culprit] == "INSUFFICIENT_FUNDS" and results[not culprit] == "CONFLICT"
            return
        assert results == ["applied", "applied"]
        for operation, amount in zip(operations, (first, second), strict=True):
            due = self.world.now + 60_000
            self.model.hold(operation.id, f"client:{client}", amount, due, self.world.now)

    @rule(
        target=receipts,
        client=CLIENT,
        amount=st.integers(5_000, 120_000),
        node=NODES,
        tokens=TOKENS,
    )
    def hold_and_capture_linked(self, client, amount, node, tokens):
        hold = self.world.hold(client, amount)
        hold.linked = True
        leg = Leg(self.world.node[node], output=tokens, billed_output=tokens)
        capture = self.world.capture(hold.id, leg)
        results = self.apply("router", hold, capture)
        client, now = f"client:{client}", self.world.now
        if amount > self.model.money[client]:
            assert results == ["INSUFFICIENT_FUNDS", "CONFLICT"]
        elif receipt_of(leg).charge > amount:
            assert results == ["CONFLICT", "INVALID_REQUEST"]
        else:
            assert results == ["applied", "applied"]
            self.model.hold(hold.id, client, amount, now + 60_000, now)
            return self._captured(hold.id, [leg], capture, now)
        return multiple()

    # -- captures and claims ---------------------------------------------------------------------

    @rule(
        target=receipts,
        client=CLIENT,
        amount=st.integers(20_000, 120_000),
        node=NODES,
        tokens=TOKENS,
        twice=st.booleans(),
    )
    def whole_request(self, client, amount, node, tokens, twice):
        held = self.hold(client, amount, 10_000)
        return (
            self.capture(held, node, tokens, twice)
            if isinstance(held, pb.Operation)
            else multiple()
        )

    @rule(target=receipts, hold=holds, node=NODES, tokens=TOKENS, twice=st.booleans())
    def capture(self, hold, node, tokens, twice):
        legs = [Leg(self.world.node[node], output=tokens, billed_output=tokens)]
        if twice:
            legs.append(Leg(self.world.node[(node + 1) % 3], choice=1))
        return self._capture(hold.id, legs, self.world.capture(hold.id, *legs))

    @rule(
        target=receipts,
        client=CLIENT,
        node=NODES,
        first=st.integers(1, 100),
        second=st.integers(1, 200),
        part=st.sampled_from([1, 2]),
    )
    def continued_request(self, client, node, first, second, part):
        """A second node goes on where the first one stopped; the pool pays for reading again."""
        held = self.hold(client, 110_000, 10_000)
        if not isinstance(held, pb.Operation):
            return multiple()
        legs = [
            Leg(self.world.node[node], output=first, billed_output=first),
            Leg(
                self.world.node[(node + 1) % 3],
                leg=1,
                prefix=first,
                output=second,
                billed_input=0,
                billed_output=second,
            ),
        ]
        # At most what this bill brings to the pool, and what reading the prompt and prefix costs.
        most = min(sum(receipt_of(leg).pool for leg in legs), (100 + first) * 100)
        legs[1] = Leg(**{**vars(legs[1]), "subsidy": most // part})
        SEEN["subsidy", "paid"] += 1
        return self._capture(held.id, legs, self.world.capture(held.id, *legs))

    def _capture(self, hold_id, legs, operation):
        (result,) = self.apply("router", operation)
        if result != "applied":
            assert result == self.model.capture(
                hold_id, self._bill(legs, operation), self.world.now
            )
            return multiple()
        return self._captured(hold_id, legs, operation, self.world.now)

    def _bill(self, legs, operation):
        digests = map(digest_of, operation.capture.receipts)
        return dict(zip(digests, map(receipt_of, legs), strict=True))

    def _captured(self, hold_id, legs, operation, now):
        bill = self._bill(legs, operation)
        assert self.model.capture(hold_id, bill, now) == "applied"
        self.note_indices()
        return multiple(*bill)

    @rule(target=served, hold=holds, node=NODES, tokens=TOKENS)
    def serve(self, hold, node, tokens):
        leg = Leg(self.world.node[node], output=tokens, billed_output=tokens)
        request_id = self.world.new_id()
        pair = self.world.evidence(hold.id, leg, request_id)
        return Served(hold.id, request_id, leg, pair, self.world.now + CLAIMABLE_AFTER_MS)

    @rule(work=served)
    def claim(self, work):
        operation = self.world.claim(work.hold_id, work.pair)
        result = self.apply(work.leg.node.identity, operation)
        receipt = receipt_of(work.leg)
        now = self.world.now
        assert result == [
            self.model.claim(work.hold_id, work.digest, receipt, work.claimable_at, now)
        ]

    @rule(target=receipts, work=served)
    def capture_served(self, work):
        """A bill with this leg, which its node may have claimed."""
        held = self.model.open_hold(work.hold_id, self.world.now)
        claimed = held is not None and work.digest in held.claims
        operation = self.world.capture_served(
            work.hold_id, work.request_id, [work.leg], [work.pair]
        )
        made = self._capture(work.hold_id, [work.leg], operation)
        SEEN["claimed", "captured"] += claimed and work.digest in self.model.receipts
        return made

    @rule(
        target=served,
        client=CLIENT,
        node=NODES,
        tokens=st.sampled_from([0, 1, 50, 200, 233, 234, 300]),
        after=st.sampled_from(["expire", "capture", "void", "leave"]),
    )
    def withhold(self, client, node, tokens, after):
        """The router does not capture, and the node claims: nothing, or more than the hold, too."""
        held = self.hold(client, 80_000, 100_000)
        if not isinstance(held, pb.Operation):
            return multiple()
        work = self.serve(held, node, tokens)
        self.wait(CLAIMABLE_AFTER_MS - 1, False)
        self.claim(work)  # too early
        self.wait(1, False)
        self.claim(work)
        self.claim(work)
        if after == "expire":
            self.wait(60_000, True)
        elif after == "capture":
            self.capture_served(work)
        elif after == "void":
            self.void(held)
        return work

    @rule(hold=consumes(holds))
    def void(self, hold):
        result = self.apply("router", self.world.void(hold.id))
        assert result == [self.model.void(hold.id, self.world.now)]

    @rule(
        ms=st.sampled_from([1, 100, 20_000, 45_000, 45_000, DAY_MS + 60_000]), expire=st.booleans()
    )
    def wait(self, ms, expire):
        self.world.now += ms
        if not expire:
            return
        due = [h for h in self.model.held.values() if h.due <= self.world.now and h.claims]
        SEEN["claimed", "paid at expiry"] += len(due)
        assert self.apply("router", self.world.expire()) == [self.model.expire(self.world.now)]
        self.note_indices()

    # -- audits ----------------------------------------------------------------------------------

    @rule(digest=receipts)
    def ask(self, digest):
        assert self.apply("verifier", self.world.request(digest)) == [self.model.ask(digest)]

    @rule(target=verdicts, digest=receipts, twice=st.booleans())
    def ask_and_answer(self, digest, twice):
        """The verdict cites no calibration: it answers the request, and counts as zero."""
        self.ask(digest)
        node = self.model.receipts[digest].node
        verdict = self.world.verdict(digest, node, audit_pb2.Verdict.SCORED)
        for _ in range(1 + twice):
            result = self.apply("verifier", self.world.publish(verdict))
            assert result == [self.model.answer(digest, digest_of(verdict))]
        return digest_of(verdict)

    @rule(
        target=verdicts,
        digest=receipts,
        how=st.sampled_from(["verdict", "missing", "admin"]),
        asked=st.sampled_from([True, True, True, False]),
    )
    def refund(self, digest, how, asked):
        if how != "admin" and asked:
            self.ask(digest)
        receipt = self.model.receipts[digest]
        operation = self._refund_operation(digest, receipt.node, how)
        by = "admin" if how == "admin" else "verifier"
        in_bond, subsidy = self.model.money[bond(receipt.node)], receipt.subsidy
        leaving, forfeit = self.model.leaving(receipt.node), self.model.forfeited[receipt.node]
        verdict = digest_of(operation.refund.verdict) if how != "admin" else b""
        answer = self.model.refund(digest, how, verdict)
        assert self.apply(by, operation) == [answer]
        again = self._refund_operation(digest, receipt.node, how)
        if answer != "applied":
            assert self.apply(by, again) == [answer]
            return multiple()
        assert self.apply(by, again) == ["CONFLICT"]
        SEEN["refunded by", how] += 1
        SEEN["refunded out of", "a bond"] += in_bond > self.model.money[bond(receipt.node)]
        stays = leaving > self.model.leaving(receipt.node)
        SEEN["refunded out of", "a bond that was being withdrawn"] += stays
        left = forfeit - self.model.forfeited[receipt.node]
        SEEN["refunded out of", "what was forfeited"] += left > 0
        SEEN["subsidy", "taken back"] += receipt.taken_back > 0 and subsidy > 0
        return verdict or multiple()

    def _refund_operation(self, digest, node, how):
        if how == "admin":
            body = pb.Refund(receipt_digest=digest, reason="goodwill")
            return pb.Operation(id=self.world.new_id(), refund=body)
        missing, wrong = audit_pb2.Verdict.MISSING_TRANSCRIPT, audit_pb2.Verdict.REFUND
        return self.world.refund(digest, node, missing if how == "missing" else wrong)

    @rule(
        target=receipts,
        node=NODES,
        tokens=st.integers(100, 300),
        how=st.sampled_from(["verdict", "missing", "admin"]),
        leaving=st.booleans(),
    )
    def refund_what_was_released(self, node, tokens, how, leaving):
        """So that it comes out of the bond, or the treasury, or is owed."""
        self.deposit("a", 110_000)
        made = self.whole_request("a", 110_000, node, tokens, False)
        self.bond_deposit(node, 20_000)
        self.wait(WINDOW_MS, False)
        self.release(node, 0, 9)
        if leaving:
            self.bond_withdraw(node, 1, 60_000)
        for digest in made.values:
            self.refund(digest, how, True)
        return made

    @rule(node=NODES)
    def accuse(self, node):
        """Audits that convict, on legs that cost nothing; the conviction comes later."""
        signer = self.world.node[node]
        name = signer.identity
        # An audit that waits for its verdict would stop the line before these.
        if (
            name in self.accused
            or name in self.model.convicted
            or self.model.money["client:a"] < 10
            or self.model.waits_for_an_answer(name)
        ):
            return
        guilt = guilt_of(self.world, signer, "a")
        assert self.apply("verifier", guilt.calibration) == ["applied"]
        assert self.apply("router", *guilt.holds) == ["applied"] * 3
        assert self.apply("router", *guilt.captures) == ["applied"] * 3
        digests = [digest_of(c.capture.receipts[0]) for c in guilt.captures]
        assert self.apply("verifier", *guilt.requests) == ["applied"] * 3
        assert self.apply("verifier", *guilt.verdicts) == ["applied"] * 3
        indices = dict(self.rows("SELECT receipt_digest, log_index FROM leg"))
        self.accused[name] = conviction_of(
            self.world, signer, [indices[d] for d in digests], zeros=self.model.zeros(name)
        )

    @rule(node=NODES, ppm=st.integers(0, 100_000))
    def convict(self, node, ppm):
        name = self.node(node)
        if name not in self.accused:
            assert self.apply("verifier", self.world.convict(name, 0)) == ["CONFLICT"]
            # What convicted it before its reinstatement does not any more.
            if name in self.old_convictions:
                again = convict_by(self.world, self.old_convictions[name], ppm)
                assert self.apply("verifier", again) == ["CONFLICT"]
            return
        conviction = self.accused[name]
        in_withdrawal = sum(w.amount for w in self.model.waiting.values() if w.source == bond(name))
        is_new, owed = name not in self.model.convicted, sum(self.model.debts.values())
        result = self.apply("verifier", convict_by(self.world, conviction, ppm))
        verifier = self.world.identity("verifier")
        assert result == [self.model.convict(name, conviction.change_point_index, verifier, ppm)]
        SEEN["convicted", "has its bond back from a withdrawal"] += is_new and in_withdrawal > 0
        SEEN["convicted", "owes"] += owed < sum(self.model.debts.values())
        SEEN["convicted", "a second time"] += is_new and name in self.old_convictions

    @rule(
        node=NODES,
        tokens=st.integers(1, 300),
        part=st.sampled_from([None, 0, 2, 3]),
        twice=st.booleans(),
        bonded=st.booleans(),
    )
    def whole_conviction(self, node, tokens, part, twice, bonded):
        self.deposit(CLIENTS[1], 110_000)
        if bonded:
            self.bond_deposit(node, 50_000)
            self.bond_withdraw(node, 1, WINDOW_MS)
        self.accuse(node)
        self.whole_request(CLIENTS[1], 110_000, node, tokens, False)
        self.convict(node, 50_000)
        if part is not None:
            self.reinstate(node, part)
            self.convict(node, 50_000)
        if part is not None and twice:
            self.whole_conviction(node, tokens, part, False, bonded)

    @rule(node=NODES, part=st.sampled_from([0, 1, 2, 3]))
    def reinstate(self, node, part):
        name = self.node(node)
        pay_back = self.model.may_pay_back(name) * min(part, 2) // 2 + (part == 3)
        answer = self.model.reinstate(name, pay_back)
        result = self.apply("admin", self.world.reinstate(name, pay_back, "admin"))
        assert result == [answer]
        if answer == "applied":
            self.model.since[name] = self.done[-1].answers[0].log_index + 1
            self.old_convictions[name] = self.accused.pop(name)
            paid = [d for d, r in self.model.receipts.items() if r.node == name and r.charge]
            for digest in paid[:2]:
                self.refund(digest, "admin", False)

    @rule(
        verdict=verdicts,
        amount=st.integers(1, 3000),
        wrong=st.sampled_from(["", "", "", "unknown", "another's"]),
    )
    def reward(self, verdict, amount, wrong):
        verdict = b"?" * 32 if wrong == "unknown" else verdict
        by = "admin" if wrong == "another's" else "verifier"
        result = self.apply("admin", self.world.reward(verdict, amount, by))
        if wrong == "another's":
            assert result == ["INVALID_REQUEST"]
            return
        known = wrong != "unknown"
        verifier = self.world.identity("verifier")
        answer = self.model.reward(verdict, verifier, amount, known)
        assert result == [answer]
        if answer == "applied":
            assert self.apply("admin", self.world.reward(verdict, 1)) == ["CONFLICT"]

    @rule(
        target=receipts,
        node=NODES,
        tokens=TOKENS,
        answered=st.booleans(),
        wrong=st.sampled_from(["", "unknown", "another's"]),
    )
    def audit(self, node, tokens, answered, wrong):
        """Its earnings wait for the verdict, and the verifier is paid for it."""
        self.deposit("b", 110_000)
        made = self.whole_request("b", 110_000, node, tokens, False)
        self.wait(WINDOW_MS, False)
        for digest in made.values:
            self.ask(digest)
            self.release(node, 4, 9)
            if answered:
                verdict = self.ask_and_answer(digest, False)
                self.release(node, 0, 9)
                self.reward(verdict, 10, wrong)
                self.reward(verdict, 10, "")
        return made

    @rule(target=receipts, node=NODES, first=st.integers(1, 100), second=st.integers(1, 200))
    def refund_what_was_continued(self, node, first, second):
        self.deposit("a", 110_000)
        made = self.continued_request("a", node, first, second, 1)
        for digest in made.values:
            self.refund(digest, "verdict", True)
        return made

    # -- money of nodes --------------------------------------------------------------------------

    @rule(node=NODES, part=st.integers(0, 4), reach=st.integers(0, 9))
    def release(self, node, part, reach):
        name, now = self.node(node), self.world.now
        mine = [r.index for r in self.model.receipts.values() if r.node == name]
        below = 10**9 if reach > 3 or not mine else mine[reach % len(mine)]
        most = self.model.releasable(name, below, now)
        amount = [0, 1, most // 2, most, most + 1][part]
        in_the_way = self.model.waits_for_an_answer(name) and most < self.model.money[locked(name)]
        result = self.apply("verifier", self.world.release(name, amount, below))
        assert result == [self.model.release(name, amount, below, now)]
        SEEN["released", "not past an audit that is owed"] += in_the_way and result == ["CONFLICT"]

    @rule(target=payouts, node=NODES, tokens=TOKENS)
    def earn_and_pay(self, node, tokens):
        self.whole_request(CLIENTS[0], 100_000, node, tokens, False)
        self.wait(WINDOW_MS, False)
        self.release(node, 0, 9)
        return self.payout(node, 1)

    @rule(target=payouts, node=NODES, part=st.integers(0, 2))
    def payout(self, node, part):
        """A part of it, or one more than there is."""
        name = self.node(node)
        have = self.model.money[free(name)]
        operation = self.world.payout(name, max(1, have * part // 2 + (part == 2)))
        result = self.apply(name, operation)
        answer = self.model.payout(operation.id, name, operation.payout_start.amount_nano)
        assert result == [answer]
        return operation.id if answer == "applied" else multiple()

    @rule(id_=payouts, paid=st.booleans())
    def settle(self, id_, paid):
        result = self.apply("admin", self.world.settle(id_, paid=paid))
        assert result == [self.model.settle(id_, paid, self.world.now)]

    @rule(node=NODES, amount=AMOUNTS)
    def bond_deposit(self, node, amount):
        name = self.node(node)
        result = self.apply("operator", self.world.bond(name, amount))
        assert result == [self.model.deposit(bond(name), amount, "bank")]

    @rule(
        target=payouts,
        node=NODES,
        part=st.integers(0, 2),
        wait=st.sampled_from([WINDOW_MS - 1, WINDOW_MS, WINDOW_MS, 60_000]),
    )
    def bond_withdraw(self, node, part, wait):
        """A part of it, or one more than there is."""
        name, now = self.node(node), self.world.now
        amount = max(1, self.model.money[bond(name)] * part // 2 + (part == 2))
        operation = self.world.withdraw(name, amount, now + wait)
        answer = self.model.bond_withdraw(operation.id, name, amount, now + wait, now)
        assert self.apply(name, operation) == [answer]
        return operation.id if answer == "applied" else multiple()

    @rule(target=payouts, node=NODES, amount=AMOUNTS, paid=st.booleans())
    def bond_there_and_back(self, node, amount, paid):
        self.bond_deposit(node, amount)
        id_ = self.bond_withdraw(node, 1, WINDOW_MS)
        if isinstance(id_, bytes):
            self.settle(id_, True)  # too early
            self.wait(WINDOW_MS, False)
            self.settle(id_, paid)
        return id_

    # -- replays, checkpoints, restarts ----------------------------------------------------------

    def everything(self):
        """All that there is to change."""
        rows = {table: sorted(map(repr, self.rows(f"SELECT * FROM {table}"))) for table in TABLES}
        grown = [self.rows(f"SELECT COUNT(*) FROM {name}") for name in ("transfer", "operation")]
        return rows, grown, self.books.size

    @rule(which=st.integers(0, 10**6))
    def replay(self, which):
        before = self.everything()
        self._replay(self.done[which % len(self.done)])
        assert self.everything() == before

    def _replay(self, call):
        again = self.outcomes(call.role, *call.operations)
        assert [o.status for o in again] == ["replayed"] * len(again)
        first = [(o.amount, o.log_index) for o in call.answers]
        assert [(o.amount, o.log_index) for o in again] == first
        for operation in call.operations:
            SEEN[operation.WhichOneof("body"), "replayed"] += 1
            other = self.world.deposit("a", 1)
            other.id = operation.id
            (answer,) = self.outcomes("admin", other)
            SEEN[operation.WhichOneof("body"), answer.error.code] += 1
            assert answer.error.code == "ID_CONFLICT"

    @rule()
    def checkpoint(self):
        state = self.books.checkpoint(self.world.now)
        if state is not None and state.size:
            self.roots.append((state.size, state.root))

    @rule()
    def start_anew(self):
        self.books.close()
        self.books = self._open_books()

    # -- what must be true -----------------------------------------------------------------------

    @invariant()
    def balances_agree(self):
        if not hasattr(self, "model"):
            return
        accounts = self.rows(ACCOUNTS)
        available = {name: c[3] - c[1] - c[0] for _, name, _, *c in accounts}
        pending = {name: c[0] for _, name, _, *c in accounts}
        model = self.model
        assert {k: v for k, v in available.items() if v} == {
            k: v for k, v in model.money.items() if v
        }
        assert {k: v for k, v in pending.items() if v} == +model.pending()
        owed = dict(self.rows("SELECT creditor, SUM(amount) FROM debt GROUP BY creditor"))
        assert owed == +model.debts
        for node in (n.identity for n in self.world.node):
            mine = available.get(locked(node), 0) + available.get(free(node), 0)
            given = model.on_its_way(node) + model.paid[node] + model.taken[node]
            assert mine + given == model.earned[node]
            assert node in model.convicted or not model.stuck(node)
        assert available.get(TREASURY, 0) >= 0

    @invariant()
    def balances_are_the_fold_of_transfers(self):
        if not hasattr(self, "fold"):
            return
        self.fold.add(self.rows(TRANSFERS, self.fold.last))
        self.fold.check(self.rows(ACCOUNTS))

    def teardown(self):
        if not hasattr(self, "books"):
            return
        before = self.everything()
        for call in self.done:
            self._replay(call)
        assert self.everything() == before
        self.books.checkpoint(self.world.now)
        self.books.close()
        assert fsck(self.url, self.world).problems == []
        self._old_roots_are_consistent()

    def _old_roots_are_consistent(self):
        reader = Reader(make_engine(normal_url(self.url)))
        newest = reader.checkpoint()
        for size, root in self.roots:
            path = list(reader.consistency(size, newest.size).path)
            verify_consistency(size, root, newest.size, newest.root, path)
        reader.close()


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """What is done in many steps where a node has served very much."""
    monkeypatch.setattr(restitution, "REFUNDED", 2)
    monkeypatch.setattr(restitution, "COUNTED", 2)
    monkeypatch.setattr(earned, "STEPS", (1, 2))


def agree(databases, migrated, until_seen, **size):
    made = type("OnBoth", (Machine,), {"make_url": lambda: databases.copy(migrated)})
    SEEN.clear()
    until_seen(made, lambda: [what for what in INTERESTING if not SEEN[what]], **size)


def test_books_agree_with_an_independent_model(databases, migrated, until_seen):
    agree(databases, migrated, until_seen, examples=40, steps=50)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_runs_agree_with_an_independent_model(databases, migrated, until_seen):
    agree(databases, migrated, until_seen, examples=200, steps=60)
