"""A node that has served very much is released, convicted and reinstated, and nobody waits."""

from __future__ import annotations

import asyncio
import time

import pytest
import sqlalchemy as sa

from trueweight.ledger import earned, restitution
from trueweight.ledger.backend import open_backend
from trueweight.ledger.books import Books
from trueweight.ledger.core import MOST_IN_CALL, bounded
from trueweight.ledger.court import court_of, with_key_events
from trueweight.ledger.findings import Findings
from trueweight.ledger.fsck_restitution import check_restitutions
from trueweight.ledger.prepare import prepare
from trueweight.ledger.schema import make_engine, normal_url
from trueweight.ledger.values import Leaf
from trueweight.protos.envelope import digest_of
from trueweight.protos.errors import StorageError
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.simulation.ledger_guilt import convict_by, conviction_of, guilt_of
from trueweight.simulation.ledger_world import Leg, World

from .conftest import fsck

CREDIT = 10**9
CLIENTS = ("acme", "zeta", "mega")
SERVED = 11


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(restitution, "REFUNDED", 3)
    monkeypatch.setattr(restitution, "COUNTED", 4)
    monkeypatch.setattr(earned, "STEPS", (1, 4))


class Market:
    """Books without a writer around them: what is done by itself waits until it is told to."""

    def __init__(self, url):
        self.url, self.world = url, World(window_ms=20_000)
        leaves = [Leaf("key-event", n.key_event, b"") for n in self.world.node]
        self.court = with_key_events(court_of(self.world.market), leaves)
        self.books = None
        self.open()
        self.node = self.world.node[0].identity
        self.captures = []

    def open(self):
        if self.books is not None:
            self.books.close()
        backend = open_backend(normal_url(self.url))
        self.books = Books(backend, self.court.terms, self.world.signers["ledger"])
        self.books.open()

    def do(self, role, *operations):
        signer = self.world.signers.get(role)
        caller = signer.identity if signer else role
        call = [prepare(operation, caller, self.court) for operation in operations]
        return self.books.apply([call], self.world.now).outcomes[0]

    def must(self, role, *operations):
        outcomes = self.do(role, *operations)
        assert [o.error for o in outcomes if o.error] == []
        return outcomes

    def chore(self):
        return self.books.chore(self.world.new_id(), self.world.now)

    def finish(self):
        steps = 0
        while self.books.has_chores:
            self.chore()
            steps += 1
            assert steps < 100
        return steps

    def serve(self, count):
        """So many receipts of the node, of all clients in turn."""
        for at in range(count):
            hold = self.world.hold(CLIENTS[at % len(CLIENTS)], CREDIT)
            self.must("router", hold)
            leg = Leg(self.world.node[0], output=10 + at, billed_output=10 + at)
            self.captures.append(self.world.capture(hold.id, leg))
            self.must("router", self.captures[-1])

    def accuse(self):
        """The operation that convicts the node for all that it serves from now on."""
        guilt = guilt_of(self.world, self.world.node[0], "audited")
        self.must("verifier", guilt.calibration)
        self.must("router", *guilt.holds)
        self.must("router", *guilt.captures)
        self.must("verifier", *guilt.requests, *guilt.verdicts)
        digests = {digest_of(c.capture.receipts[0]) for c in guilt.captures}
        found = self.books._backend.query("SELECT receipt_digest, log_index FROM leg")
        indices = sorted(index for digest, index in found if bytes(digest) in digests)
        return convict_by(self.world, conviction_of(self.world, self.world.node[0], indices))

    def refund(self, capture):
        digest = digest_of(capture.capture.receipts[0])
        return pb.Operation(
            id=self.world.new_id(), refund=pb.Refund(receipt_digest=digest, reason="goodwill")
        )

    def available(self, account):
        sql = "SELECT credits_posted - debits_posted - debits_pending FROM account WHERE id = ?"
        rows = self.books._backend.query(sql, (account,))
        return int(rows[0][0]) if rows else 0

    def owed(self, client):
        rows = self.books._backend.query(
            "SELECT COALESCE(SUM(amount), 0) FROM debt WHERE creditor = ?", (f"client:{client}",)
        )
        return int(rows[0][0])

    def clients(self):
        return {c: (self.available(f"client:{c}"), self.owed(c)) for c in CLIENTS}

    def clean(self):
        assert fsck(self.url, self.world).problems == []


def make_market(url, bond=5_000):
    made = Market(url)
    for client in (*CLIENTS, "audited"):
        made.must("admin", made.world.deposit(client, 100 * CREDIT))
    made.must("admin", made.world.bond(made.node, bond))
    return made


@pytest.fixture
def market(database):
    made = make_market(database)
    yield made
    made.finish()
    made.books.checkpoint(made.world.now)
    made.books.close()
    made.clean()


@pytest.fixture
def at_once(databases, migrated, monkeypatch):
    """What the clients have and are owed if the same conviction pays them in one transaction."""

    def run(bond=5_000):
        with monkeypatch.context() as large:
            large.setattr(restitution, "REFUNDED", 10_000)
            other = make_market(databases.copy(migrated), bond)
            convict = other.accuse()
            other.serve(SERVED)
            other.must("verifier", convict)
            assert not other.books.has_chores
            other.books.close()
            other.clean()
            other.open()
            found = other.clients()
            other.books.close()
        return found

    return run


def convicted(market):
    convict = market.accuse()
    market.serve(SERVED)
    (outcome,) = market.must("verifier", convict)
    assert outcome.amount > 0
    return convict


@pytest.mark.parametrize("bond", [5_000, CREDIT], ids=["something is owed", "all is paid"])
def test_clients_get_the_same_in_steps_as_at_once(database, at_once, bond):
    market = make_market(database, bond)
    convict = convicted(market)
    market.clean()
    steps = 0
    while market.books.has_chores:
        market.chore()
        market.clean()
        steps += 1
    # Charges are added up before they are paid back.
    assert steps == -(-(SERVED + 3) // 4) + -(-(SERVED + 3) // 3)
    assert market.clients() == at_once(bond)
    assert market.available(restitution.set_aside(market.node)) == 0
    (again,) = market.do("verifier", convict)
    assert again.status == "replayed"
    assert sum(owed for _, owed in market.clients().values()) > 0 or bond == CREDIT
    market.books.close()
    market.clean()


def test_nothing_else_takes_what_is_set_aside_or_refunds_the_same_receipts(market):
    market.serve(2)
    before = list(market.captures)
    convict = market.accuse()
    market.serve(SERVED)
    after = market.captures[len(before) :]
    market.must("verifier", convict)
    for _ in range(100):
        if not market.books.has_chores:
            break
        for capture in after:
            (refused,) = market.do("admin", market.refund(capture))
            assert refused.error.code == "CONFLICT", refused
        (refused,) = market.do("admin", market.world.reinstate(market.node, by="admin"))
        assert refused.error.code == "UNAVAILABLE"
        # What came before the change point is refunded as ever, and finds the treasury empty.
        if before:
            market.must("admin", market.refund(before.pop()))
        market.chore()
    for capture in after:
        (refused,) = market.do("admin", market.refund(capture))
        assert refused.error.code == "CONFLICT"
    got = {c: (have + owed) for c, (have, owed) in market.clients().items()}
    assert got == dict.fromkeys(CLIENTS, 100 * CREDIT)
    market.must("admin", market.world.reinstate(market.node, by="admin"))


def test_what_comes_after_the_conviction_is_given_back_as_it_comes(market):
    holds = [market.world.hold(client, CREDIT) for client in CLIENTS]
    market.must("router", *holds)
    convicted(market)
    market.chore()
    ends = [market.world.capture(h.id, Leg(market.world.node[0], billed_output=9)) for h in holds]
    market.must("router", *ends)
    assert market.available(f"node-locked:{market.node}") == 0
    market.finish()
    market.clean()


@pytest.mark.parametrize("moment", ["before the commit", "after the commit"])
def test_every_step_happens_once_whoever_dies_in_between(database, at_once, moment, monkeypatch):
    market = make_market(database)
    convicted(market)
    while market.books.has_chores:
        backend, failed = market.books._backend, []
        commit = backend.commit

        def fail(commit=commit, failed=failed):
            if moment == "after the commit":
                commit()
            failed.append(1)
            raise StorageError("the process died")

        monkeypatch.setattr(backend, "commit", fail)
        with pytest.raises(StorageError):
            market.chore()
        assert failed
        market.open()  # another writer takes over
        market.clean()
        if moment == "before the commit":
            market.chore()
    assert market.clients() == at_once()
    market.books.close()


def test_a_step_that_the_books_refuse_does_not_keep_the_writer_busy(market, monkeypatch):
    convicted(market)
    market.chore()

    def refuse(*_):
        raise StorageError("a bug")

    with monkeypatch.context() as broken:
        broken.setattr(restitution, "_victims", refuse)
        while market.books.has_chores:
            market.chore()
    assert market.available(restitution.set_aside(market.node)) > 0
    market.open()  # after a restart it is tried again
    assert market.finish() > 0
    assert market.available(restitution.set_aside(market.node)) == 0


def test_releases_add_up_a_long_history_in_steps_and_remember_it(market, monkeypatch):
    market.serve(SERVED)
    market.world.now += market.world.window_ms
    locked = market.available(f"node-locked:{market.node}")
    ask = market.world.release(market.node)
    codes = []
    for _ in range(20):
        (outcome,) = market.do("verifier", ask)
        codes.append(outcome.error.code if outcome.error else "")
        if not outcome.error:
            break
    assert codes == ["UNAVAILABLE", "UNAVAILABLE", ""] and outcome.amount == locked
    # Now only what came since is read, and a refund of what was counted is not paid out twice.
    market.serve(4)
    market.must("admin", market.refund(market.captures[0]))
    market.world.now += market.world.window_ms
    read = []
    query = market.books._backend.query

    def note(sql, values=()):
        rows = query(sql, values)
        if " leg " in sql:
            read.append(values)
        return rows

    monkeypatch.setattr(market.books._backend, "query", note)
    market.must("verifier", market.world.release(market.node))
    assert len(read) <= 3
    monkeypatch.setattr(earned, "STEPS", (1000,))
    goal = earned.Goal(until_unix_ms=market.world.now - market.world.window_ms)
    total = earned.Earnings().read(market.books._backend, earned.Key(market.node), goal)
    assert market.books._backend.query("SELECT released FROM node") == [(total,)]


def test_attack_releases_of_one_call_that_lie_far_apart_keep_everybody_waiting(market, monkeypatch):
    """Each would read as many captures as one may, forth and back again."""
    market.serve(SERVED)
    market.world.now += market.world.window_ms
    looked = []
    query = market.books._backend.query

    def note(sql, values=()):
        if " leg " in sql and "LIMIT" in sql:
            looked.append(values[-1])
        return query(sql, values)

    monkeypatch.setattr(market.books._backend, "query", note)
    ends = [10**9 if at % 2 else 0 for at in range(300)]
    calls = [market.world.release(market.node, 0, below) for below in ends]
    signer = market.world.signers["verifier"].identity
    call = bounded([prepare(operation, signer, market.court) for operation in calls])
    outcomes = market.books.apply([call], market.world.now).outcomes[0]
    codes = [o.error.code if o.error else "" for o in outcomes]
    most = MOST_IN_CALL["release"]
    assert set(codes[most:]) == {"OVER_CAPACITY"}
    assert "UNAVAILABLE" in codes[:most]
    assert looked.count(earned.STEPS[-1]) == 1
    market.finish()
    market.must("verifier", market.world.release(market.node))
    assert market.available(f"node-locked:{market.node}") == 0


def test_sums_go_back_before_an_audit_that_is_owed_and_forth_again(market):
    market.serve(SERVED)
    indices = [r[0] for r in market.books._backend.query("SELECT log_index FROM leg ORDER BY 1")]
    market.world.now += market.world.window_ms

    def most(below):
        fresh, goal = earned.Earnings(), earned.Goal(below, market.world.now)
        while (amount := fresh.read(market.books._backend, earned.Key(market.node), goal)) is None:
            pass
        return amount

    known = earned.Earnings()
    for below in (10**9, indices[3], indices[8], indices[0], 0, 2**63 - 1, indices[5] + 1):
        goal = earned.Goal(below, market.world.now)
        for _ in range(20):
            found = known.read(market.books._backend, earned.Key(market.node), goal)
            if found is not None:
                break
        assert found == most(below)
        assert not known.behind


def test_a_capture_waits_for_those_before_it_where_a_clock_was_set_back(market):
    """The order of the log counts: whoever sets the clock back hastens nothing."""
    market.world.now += 5_000
    market.serve(1)
    first = market.available(f"node-locked:{market.node}")
    market.world.now -= 5_000
    market.serve(1)
    market.world.now += market.world.window_ms
    assert market.must("verifier", market.world.release(market.node))[0].amount == 0
    market.world.now += 5_000
    (outcome,) = market.must("verifier", market.world.release(market.node))
    assert outcome.amount == first + 93 * (100 * 100 + 10 * 300) // 100


def test_attack_forgotten_sums_are_bounded(market, monkeypatch):
    monkeypatch.setattr(earned, "MAX_NODES", 2)
    for node in market.world.node:
        market.do("verifier", market.world.release(node.identity))
    assert len(market.books._cache.earnings.sums) == 2
    assert market.books._cache.earnings.behind.keys() <= market.books._cache.earnings.sums.keys()


async def test_a_running_ledger_refunds_by_itself_and_serves_meanwhile(bench):
    world = bench.world
    await bench.publish_nodes()
    node = world.node[0]
    await bench.must("admin", *(world.deposit(c, 100 * CREDIT) for c in CLIENTS))
    await bench.must("admin", world.bond(node.identity, CREDIT))
    convict = await bench.proven_guilty(node)
    holds = [world.hold(CLIENTS[at % 3], CREDIT) for at in range(60)]
    await bench.must("router", *holds)
    await bench.must("router", *(world.capture(h.id, Leg(node)) for h in holds))
    (result,) = await bench.must("verifier", convict)
    assert result.amount_nano > CREDIT
    for _ in range(600):
        (hold,) = await bench.must("router", world.hold("acme", 1))
        assert hold.amount_nano == 1
        if not await asyncio.to_thread(open_rows, bench.url):
            break
    else:
        raise AssertionError("the clients are never refunded")
    for client in CLIENTS[1:]:
        assert await bench.available(f"client:{client}") == 100 * CREDIT
    assert await bench.available(f"treasury:{node.identity}") == 0


async def test_a_running_ledger_adds_up_what_somebody_asked_for(bench):
    world = bench.world
    await bench.publish_nodes()
    await bench.must("admin", world.deposit("acme", 100 * CREDIT))
    holds = [world.hold("acme", CREDIT) for _ in range(40)]
    await bench.must("router", *holds)
    await bench.must("router", *(world.capture(h.id, Leg(world.node[0])) for h in holds))
    bench.advance(world.window_ms + 1)
    release = world.release(world.node[0].identity)
    (result,) = await bench.do("verifier", release)
    assert result.code == "UNAVAILABLE"
    until = time.monotonic() + 10
    while (await bench.do("verifier", release))[0].code == "UNAVAILABLE":
        assert time.monotonic() < until
        await asyncio.sleep(0.05)
    assert await bench.available(f"node-locked:{world.node[0].identity}") == 0


def open_rows(url):
    engine = make_engine(normal_url(url))
    sql = "SELECT COUNT(*) FROM restitution WHERE is_counting = 1 OR next_index < end_index"
    with engine.connect() as connection:
        found = connection.execute(sa.text(sql)).scalar()
    engine.dispose()
    return found


def test_fsck_finds_refunds_that_do_not_add_up(market):
    convicted(market)
    while market.books._cache.restitutions[market.node].is_counting:
        market.chore()
    market.chore()
    for change in ("budget = budget + 1", "next_index = end_index"):
        engine = make_engine(normal_url(market.url))
        with engine.connect() as connection, connection.begin() as change_it:
            connection.execute(sa.text(f"UPDATE restitution SET {change}"))  # noqa: S608
            findings = Findings()
            check_restitutions(connection, findings)
            assert findings.problems
            change_it.rollback()
        engine.dispose()
