"""fsck against a tamperer who rewrites the Merkle tree: every changed log is found."""

from __future__ import annotations

import asyncio

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.ledger import bundle
from trueweight.ledger.fsck import check
from trueweight.ledger.fsck_references import facts_of_operations
from trueweight.ledger.schema import make_engine, normal_url
from trueweight.ledger.service import Ledger
from trueweight.ledger.tiles import WIDTH, Edge
from trueweight.ledger.values import Leaf
from trueweight.protos import merkle
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.runtime.clock import SystemClock
from trueweight.simulation.ledger_world import Leg, World

from .conftest import Bench, fsck
from .test_log import books_with_refunds, tamper

CREDIT = 10**9


class Tamperer:
    """Closed books whose leaves he may exchange for others, tree and unsigned roots included."""

    def __init__(self, url, world):
        self.url, self.world = url, world
        self.engine = make_engine(normal_url(url))
        # Triggers are dropped, or off in each of his sessions.
        tamper(url)
        with self.engine.connect() as connection:
            rows = connection.execute(
                sa.text("SELECT leaves, body FROM bundle ORDER BY first_index")
            ).fetchall()
        self.leaves = [leaf for count, body in rows for leaf in bundle.unpack(count, bytes(body))]

    def write(self, leaves):
        """Makes these the log."""
        hashes = [merkle.leaf_hash(body) for _, body in leaves]
        mask, body = bundle.pack([Leaf(kind, body, b"") for kind, body in leaves])
        _, tiles = Edge().extend(hashes)
        assert tiles, "the books have no full tile"
        statements = [
            ("DELETE FROM bundle", {}),
            ("DELETE FROM tile", {}),
            (
                "INSERT INTO bundle (first_index, leaves, kinds, merged_at, body) "
                "VALUES (0, :n, :kinds, 0, :body)",
                {"n": len(leaves), "kinds": mask, "body": body},
            ),
            *(
                (
                    "INSERT INTO tile (level, number, hashes) VALUES (:level, :number, :hashes)",
                    tile._asdict(),
                )
                for tile in tiles
            ),
        ]
        with self.engine.connect() as connection:
            sizes = connection.execute(sa.text("SELECT size FROM checkpoint")).scalars().all()
        for size in sizes:
            root = Edge().extend(hashes[:size])[0].root()
            statements.append(
                ("UPDATE checkpoint SET root = :r WHERE size = :s", {"r": root, "s": size})
            )
        tamper(self.url, *statements)

    def problems(self):
        return fsck(self.url, self.world).problems


@pytest.fixture(scope="module")
def tamperer(databases, migrated):
    async def fill():
        clock = SystemClock()
        world, url = World(now=clock.now_unix_ms()), databases.copy(migrated)
        ledger = Ledger(world.market, world.signers["ledger"], url, clock)
        await ledger.start()
        bench = Bench(world, clock, ledger, url)
        await bench.publish_nodes()
        await bench.must("admin", *(world.deposit("acme", CREDIT) for _ in range(WIDTH)))
        for node in world.node:
            hold = world.hold("acme", CREDIT)
            await bench.must("router", hold, world.capture(hold.id, Leg(node)))
        await bench.as_("verifier").publish(world.verdict(b"r" * 32, world.node[0].identity))
        await ledger.close()
        return Tamperer(url, world)

    made = asyncio.run(fill())
    # What he writes is consistent: nothing is wrong with the same leaves.
    made.write(made.leaves)
    assert made.problems() == []
    yield made
    made.engine.dispose()


def flipped(draw, leaves, at):
    kind, body = leaves[at]
    changed = bytearray(body)
    changed[draw(st.integers(0, len(body) - 1))] ^= draw(st.integers(1, 255))
    leaves[at] = (kind, bytes(changed))


def dropped(_, leaves, at):
    del leaves[at]


def swapped(draw, leaves, at):
    other = draw(st.integers(0, len(leaves) - 1).filter(lambda other: other != at))
    leaves[at], leaves[other] = leaves[other], leaves[at]


def inserted(draw, leaves, at):
    copied = st.sampled_from(leaves)
    invented = st.tuples(st.sampled_from(bundle.KINDS), st.binary(max_size=200))
    leaves.insert(at + draw(st.integers(0, 1)), draw(copied | invented))


def renamed(draw, leaves, at):
    """The kind of a leaf is not in its hash."""
    kind, body = leaves[at]
    leaves[at] = (draw(st.sampled_from(bundle.KINDS).filter(lambda other: other != kind)), body)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), change=st.sampled_from((flipped, dropped, swapped, inserted, renamed)))
def test_any_other_log_is_found_though_its_tree_is_consistent(tamperer, data, change):
    leaves = list(tamperer.leaves)
    # Half of the time near the end, where evidence is; before come deposits.
    places = st.integers(0, len(leaves) - 1) | st.integers(WIDTH, len(leaves) - 1)
    change(data.draw, leaves, data.draw(places))
    tamperer.write(leaves)
    assert tamperer.problems()


# -- what leaves say of unique facts --------------------------------------------------------------


class Sayer(Tamperer):
    """Books whose leaves of transfers say which unique facts their operations took, from some place
    on: an older ledger wrote those before. Nobody signs this log."""

    def say(self, since, until=2**62):
        with self.engine.connect() as connection:
            facts = facts_of_operations(connection)
        leaves = []
        for place, (kind, body) in enumerate(self.leaves):
            if kind == "transfer":
                batch = pb.TransferBatch.FromString(body)
                says = facts.get(batch.operation_id, b"") if since <= place < until else b""
                batch.facts_sha256 = says
                body = batch.SerializeToString()  # noqa: PLW2901
            leaves.append((kind, body))
        self.write(leaves)

    def problems(self):
        return check(self.engine, self.world.market_id).problems


@pytest.fixture(scope="module")
def refunded(databases, migrated):
    return books_with_refunds(databases.copy(migrated))[0]


@pytest.fixture
def sayer(databases, refunded):
    made = Sayer(databases.copy(refunded), World())
    yield made
    made.engine.dispose()


@pytest.mark.parametrize("since", [0, 150, 2**62])
def test_leaves_of_older_ledgers_do_not_say_which_facts_they_took(sayer, since):
    sayer.say(since)
    assert sayer.problems() == []


def test_whoever_said_facts_once_says_them_always(sayer):
    sayer.say(0, until=250)
    assert any("differs from the transfers" in problem for problem in sayer.problems())


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE reference SET key = key || 'x' WHERE kind = 'rail:card'",
        "UPDATE reference SET kind = 'rail:card' WHERE kind = 'rail:bank'",
        "UPDATE reference SET key = key || '00' WHERE kind = 'conviction'",
        "INSERT INTO reference SELECT key, 'conviction', operation_id FROM reference "
        "WHERE kind = 'rail:bank'",
        "UPDATE node SET released = released + 1 WHERE reinstated > 0 AND convicted = 0",
        "UPDATE node SET released = released - 1 WHERE reinstated > 0 AND convicted = 0",
    ],
)
def test_fsck_finds_with_what_leaves_say(sayer, change):
    sayer.say(0)
    tamper(sayer.url, (change, {}))
    assert sayer.problems()
