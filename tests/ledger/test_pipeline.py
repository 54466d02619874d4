"""Groups judged while the one before is in flight come to exactly what one after another does."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from trueweight.ledger.backend import ConstraintViolated, open_backend
from trueweight.ledger.books import Books
from trueweight.ledger.court import court_of, with_key_events
from trueweight.ledger.pipeline import Call, Hooks, Pipeline
from trueweight.ledger.prepare import prepare
from trueweight.ledger.schema import normal_url
from trueweight.ledger.values import Leaf
from trueweight.protos.envelope import digest_of, parse_envelope, parse_payload
from trueweight.protos.errors import TrueweightError, Unavailable
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1.market_pb2 import Receipt
from trueweight.simulation.ledger_world import Leg, World

from .conftest import fsck

CREDIT = 10**9


class Lazy:
    """A commit that happens only when somebody waits for it: as late as possible."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work, self._error, self._done = work, None, False

    def exception(self):
        if not self._done:
            self._done = True
            try:
                self._work()
            except TrueweightError as error:
                self._error = error
        return self._error

    def result(self):
        if self.exception() is not None:
            raise self._error

    def done(self):
        return self._done

    def add_done_callback(self, _):
        pass


class LazyExecutor:
    def submit(self, work, *args):
        return Lazy(lambda: work(*args))


class Side:
    """Books of one kind of writer and the answers that have left it."""

    def __init__(self, url, world, court):
        terms, signer = court.terms, world.signers["ledger"]
        backend, reader = (open_backend(normal_url(url)) for _ in range(2))
        assert backend.acquire()
        self.books = Books(backend, terms, signer, reader)
        self.books.open()
        self.answers = {}
        hooks = Hooks(
            open_backend=lambda: backend,
            now_unix_ms=lambda: world.now,
            monotonic_ms=lambda: 0.0,
            expire=lambda: None,
            new_id=lambda: None,
            deliver=self._deliver,
            committed=lambda *_: None,
            became_writer=lambda: None,
            stands_by=lambda: None,
            revocations=lambda: 0,
        )
        self.pipeline = Pipeline(self.books, hooks, LazyExecutor(), lambda: None)

    def _deliver(self, answers):
        for call, answer in answers:
            said = answer
            if not isinstance(answer, TrueweightError):
                said = [
                    (o.status, o.amount, o.log_index, o.error and (o.error.code, o.error.message))
                    for o in answer
                ]
            assert call.answer not in self.answers, "answered twice"
            self.answers[call.answer] = said


def traffic(world, dice, steps):
    """Groups whose operations lean on the groups right before them."""
    operation = world.new_id
    holds, captures, seen = [], [], []
    yield [("admin", world.deposit(c, 20 * CREDIT)) for c in ("a", "b")] + [
        ("router", world.publish(node.key_event)) for node in world.node
    ]
    limits = {"key": 0, "hourly": 3_600_000}
    bodies = [
        pb.SetSpendingLimit(api_key_id=key, limit_nano=6 * CREDIT, period_ms=ms)
        for key, ms in limits.items()
    ]
    yield [("admin", pb.Operation(id=operation(), set_spending_limit=body)) for body in bodies]
    for _ in range(steps):
        group = []
        for _ in range(dice.randint(1, 8)):
            kind = dice.random()
            if kind < 0.4 or not holds:
                key = dice.choice(("", *limits))
                made = world.hold(dice.choice("ab"), dice.randint(1, 3) * CREDIT, api_key=key)
                holds.append(made.id)
                group.append(("router", made))
            elif kind < 0.65:
                made = world.capture(dice.choice(holds[-4:]), Leg(dice.choice(world.node)))
                captures.append(made)
                group.append(("router", made))
            elif kind < 0.75:
                group.append(("router", world.void(dice.choice(holds[-4:]))))
            elif kind < 0.85 and seen:
                group.append(dice.choice(seen[-6:]))  # a retry
            elif kind < 0.9 and seen:
                _, before = dice.choice(seen[-6:])
                other = world.hold("a", CREDIT)
                other.id = before.id
                group.append(("router", other))
            elif captures:
                (body,) = dice.choice(captures[-3:]).capture.receipts
                receipt = digest_of(body)
                node = parse_payload(parse_envelope(body), Receipt).node_id
                group.append(("verifier", world.request(receipt)))
                group.append(("verifier", world.refund(receipt, node)))
        if dice.random() < 0.1:
            group.append(("admin", pb.Operation(id=operation(), expire=pb.Expire(limit=10))))
        seen += group
        yield group


@pytest.fixture
def setting(databases, migrated):
    world = World()
    events = [Leaf("key-event", node.key_event, b"") for node in world.node]
    court = with_key_events(court_of(world.market), events)
    urls = [databases.copy(migrated) for _ in range(2)]
    sides = [Side(url, world, court) for url in urls]
    yield world, court, urls, sides
    for side in sides:
        side.books.close()


def run(setting, seed, steps):
    world, court, urls, (serial, overlapped) = setting
    for number, group in enumerate(traffic(world, random.Random(seed), steps)):
        prepared = [prepare(op, world.identity(who), court) for who, op in group]
        cut = len(prepared) // 2
        parts = [part for part in (prepared[:cut], prepared[cut:]) if part]
        calls = [Call(part, (number, i)) for i, part in enumerate(parts)]
        done = serial.books.apply([call.operations for call in calls], world.now)
        serial._deliver(list(zip(calls, done.outcomes, strict=True)))
        overlapped.pipeline.submit(calls)
    overlapped.pipeline.land()
    assert overlapped.answers == serial.answers
    statuses = {o[0] for answer in serial.answers.values() for o in answer}
    assert statuses == {"applied", "replayed", "refused"}
    for url in urls:
        assert fsck(url, world).clean


@pytest.mark.parametrize("seed", [1, 2])
def test_overlapped_groups_come_to_the_same_as_one_after_another(setting, seed):
    run(setting, seed, 40)


def test_what_stands_on_a_refused_group_is_judged_again(setting, monkeypatch):
    overlapped = setting[3][1]
    real, countdown = overlapped.books.commit, [0]

    def refusing(judged):
        countdown[0] += 1
        if countdown[0] % 5 == 0:
            raise ConstraintViolated("the database refused")
        return real(judged)

    monkeypatch.setattr(overlapped.books, "commit", refusing)
    run(setting, 3, 40)
    assert countdown[0] > 20


def test_no_answer_leaves_before_its_commit_and_a_lost_database_fails_both(setting, monkeypatch):
    world, court, _, (_, side) = setting
    router, admin = world.identity("router"), world.identity("admin")
    side.pipeline.submit([Call([prepare(world.deposit("a", CREDIT), admin, court)], 0)])
    assert side.answers == {}
    hold = prepare(world.hold("a", CREDIT), router, court)
    side.pipeline.submit([Call([hold], 1)])
    assert set(side.answers) == {0}

    def lost(_):
        raise Unavailable("the database is not reachable")

    monkeypatch.setattr(side.books, "commit", lost)
    with pytest.raises(Unavailable):
        side.pipeline.submit([Call([hold], 2), Call([hold], 3)])
        side.pipeline.land()
    assert set(side.answers) >= {0}
    side.pipeline.abandon()
