# ruff: noqa: E501  (one statement per line reads as a table)
"""The public log: indices, proofs, checkpoints, following; and fsck finding every tampering."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.ledger import fsck as fsck_module
from trueweight.ledger.leaves import MAX_MOVEMENTS, encode_batches, encode_movement
from trueweight.ledger.schema import make_engine, normal_url
from trueweight.ledger.service import Ledger
from trueweight.ledger.tiles import Edge, TileReader
from trueweight.ledger.values import REASONS
from trueweight.protos import merkle
from trueweight.protos.checkpoint import log_origin, open_note
from trueweight.protos.envelope import digest_of, seal
from trueweight.protos.errors import InvalidRequest, NotFound
from trueweight.protos.identity import public_bytes
from trueweight.protos.v1 import audit_pb2
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.runtime.clock import SystemClock
from trueweight.simulation.ledger_world import Leg, World, make_signer

from .conftest import Bench, fsck

CREDIT = 10**9


async def some_traffic(bench, requests=3):
    world = bench.world
    await bench.publish_nodes()
    await bench.must("admin", world.deposit("acme", 10 * CREDIT))
    for number in range(requests):
        hold = world.hold("acme", CREDIT)
        await bench.must("router", hold)
        await bench.must("router", world.capture(hold.id, Leg(world.node[number % 3])))


async def checkpoint_of(bench, size=None):
    for _ in range(100):
        with contextlib.suppress(NotFound):
            found = await bench.as_("").checkpoint()
            if size is None or found.size >= size:
                return found
        await asyncio.sleep(0.05)
    pytest.fail("no checkpoint within 5 s")


async def test_publish_returns_its_index_at_once_and_is_idempotent(bench):
    envelope = bench.world.node[0].key_event
    started = asyncio.get_running_loop().time()
    index = await bench.as_("router").publish(envelope)
    assert asyncio.get_running_loop().time() - started < 0.5
    assert await bench.as_("router").publish(envelope) == index
    (other_id,) = await bench.do("router", bench.world.publish(envelope))
    assert (other_id.log_index, other_id.log_index_known) == (index, True)
    (entry,) = await bench.leaves("key-event")
    assert (entry.index, entry.body) == (index, envelope)


async def test_reading_pages_and_kinds(bench):
    await some_traffic(bench)
    everything = await bench.leaves()
    assert [e.index for e in everything] == list(range(len(everything)))
    reader = bench.as_("")
    place, seen = 0, []
    while True:
        page = await reader.read_log(place, 2, ("receipt", "bill"))
        seen += [(e.index, e.kind) for e in page.entries]
        place = page.next_index
        if place >= page.tree_size:
            break
    assert seen == [(e.index, e.kind) for e in everything if e.kind in ("receipt", "bill")]
    assert not (await reader.read_log(0, 10, ("nonsense",))).entries
    assert not (await reader.read_log(10**6, 10)).entries


async def test_following_gives_old_leaves_then_new_ones(bench):
    await some_traffic(bench, 1)
    seen = []

    async def follow():
        async for entry in bench.as_("").follow_log(0, ("receipt", "verdict")):
            seen.append(entry.kind)

    task = asyncio.create_task(follow())
    await asyncio.sleep(0.2)
    assert seen == ["receipt"]
    await bench.as_("verifier").publish(bench.world.verdict(b"r" * 32, "n"))
    for _ in range(40):
        if len(seen) == 2:
            break
        await asyncio.sleep(0.05)
    task.cancel()
    assert seen == ["receipt", "verdict"]


async def test_every_leaf_is_proven_and_old_roots_are_consistent_with_new(bench):
    await some_traffic(bench, 2)
    old = await checkpoint_of(bench)
    await some_traffic_again(bench)
    size = (await bench.as_("").read_log(0, 1)).tree_size
    new = await checkpoint_of(bench, size)
    origin = log_origin(bench.world.market_id)
    key = public_bytes(bench.world.signers["ledger"].key)
    state = open_note(new.note, origin, key)
    assert (state.size, state.root) == (new.size, new.root)
    proof = await bench.as_("").consistency(old.size, new.size)
    merkle.verify_consistency(old.size, old.root, new.size, new.root, list(proof.path))
    for entry in await bench.leaves():
        request = pb.InclusionProofRequest(index=entry.index, tree_size=new.size)
        answer = await bench.as_("").inclusion(request)
        leaf = merkle.leaf_hash(entry.body)
        merkle.verify_inclusion(leaf, entry.index, new.size, list(answer.proof.path), new.root)
        by_hash = await bench.as_("").inclusion(pb.InclusionProofRequest(leaf_hash=leaf))
        assert by_hash.entry == entry
        if entry.kind != "transfer":
            by = pb.InclusionProofRequest(message_digest=digest_of(entry.body))
            assert (await bench.as_("").inclusion(by)).entry == entry
    with pytest.raises(NotFound):
        await bench.as_("").inclusion(pb.InclusionProofRequest(message_digest=b"x" * 32))
    with pytest.raises(InvalidRequest):
        await bench.as_("").inclusion(pb.InclusionProofRequest(index=0, tree_size=10**6))


async def some_traffic_again(bench):
    hold = bench.world.hold("acme", CREDIT)
    await bench.must("router", hold)
    await bench.must("router", bench.world.capture(hold.id, Leg(bench.world.node[0])))


async def test_the_log_goes_on_after_a_restart(bench, start):
    await some_traffic(bench)
    await bench.ledger.close()
    size = (await checkpoint_after_close(bench)).size
    bench.ledger = await start(bench.world, bench.url)
    await some_traffic_again(bench)
    entries = await bench.leaves()
    assert [e.index for e in entries] == list(range(len(entries)))
    assert len(entries) > size


async def checkpoint_after_close(bench):
    from trueweight.ledger.reader import Reader

    reader = Reader(make_engine(normal_url(bench.url)))
    try:
        return reader.checkpoint()
    finally:
        reader.close()


HASHES = [merkle.leaf_hash(str(i).encode()) for i in range(70_000)]


@pytest.mark.parametrize("size", [0, 1, 2, 255, 256, 257, 511, 512, 1000, 65_535, 65_536, 66_000])
def test_tiles_give_the_rfc_root_and_every_proof(size):
    edge, tiles = Edge().extend(HASHES[:size])
    assert edge.root() == (merkle.root(HASHES[:size]) if size <= 1000 else reference_root(size))
    stored = {(t.level, t.number): t.hashes for t in tiles}
    reader = TileReader(
        lambda level, number: stored.get((level, number)),
        lambda first, count: HASHES[first : first + count],
    )
    assert reader.edge(size) == edge
    for index in {0, size // 3, size // 2, size - 1} - {-1} if size else ():
        path = merkle.inclusion_path(index, size, reader.fetch)
        merkle.verify_inclusion(HASHES[index], index, size, path, edge.root())


def reference_root(size):
    """RFC 6962 section 2.1, as written."""

    def mth(start, end):
        if end - start == 1:
            return HASHES[start]
        k = 1 << (end - start - 1).bit_length() - 1
        return merkle.node_hash(mth(start, start + k), mth(start + k, end))

    return mth(0, size)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 600), max_size=6))
def test_extending_in_any_steps_gives_the_same_tree(steps):
    edge, done = Edge(), 0
    for step in steps:
        edge, _ = edge.extend(HASHES[done : done + step])
        done += step
    assert edge == Edge().extend(HASHES[:done])[0]


NAMES = st.from_regex(r"(client|node-locked|fee):[a-z0-9._:-]{1,100}", fullmatch=True)


MOVEMENTS = st.builds(
    pb.Movement,
    debit_account=NAMES,
    credit_account=NAMES,
    amount_nano=st.integers(0, 2**63 - 1),
    phase=st.integers(1, 5),
    pending_id=st.binary(min_size=16, max_size=20) | st.just(b""),
    reason=st.sampled_from(REASONS),
)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(min_size=16, max_size=16),
    st.integers(1, 2**62),
    st.integers(1, 2**62),
    st.lists(MOVEMENTS, min_size=1, max_size=5),
    st.sampled_from((1, 100)),
)
def test_hand_written_leaves_are_what_protobuf_writes(operation, sequence, time, some, repeat):
    movements = some * repeat
    encoded = [
        encode_movement(
            m.debit_account, m.credit_account, m.amount_nano, m.phase, m.pending_id, m.reason
        )
        for m in movements
    ]
    leaves = encode_batches(operation, sequence, time, encoded)
    assert len(leaves) == -(-len(movements) // MAX_MOVEMENTS)
    for place, leaf in enumerate(leaves):
        start = place * MAX_MOVEMENTS
        batch = pb.TransferBatch(
            operation_id=operation,
            first_sequence=sequence + start,
            first_ordinal=start,
            currency="CREDIT",
            created_at_unix_ms=time,
            movements=movements[start : start + MAX_MOVEMENTS],
        )
        assert leaf == batch.SerializeToString()


# -- tampering --------------------------------------------------------------------------------

TAMPERINGS = {
    "a balance is raised": "UPDATE account SET credits_posted = credits_posted + 1 WHERE kind = 1",
    "a transfer's amount is changed": "UPDATE transfer SET amount = amount + 1 WHERE sequence = 4",
    "a transfer is dropped": "DELETE FROM transfer WHERE sequence = 3",
    "the last transfer is dropped": "DELETE FROM transfer WHERE sequence = (SELECT MAX(sequence) FROM transfer)",
    "a transfer goes to somebody else": "UPDATE transfer SET credit = (SELECT no FROM account WHERE kind = 5) WHERE sequence = 6",
    "a captured hold is called void": "UPDATE pending SET state = 3 WHERE state = 2",
    "a leg is dropped": "DELETE FROM leg",
    "a leg names another leaf": "UPDATE leg SET log_index = log_index + 1",
    "a transfer hides from a statement": "UPDATE transfer SET reason = 6 WHERE reason = 1",
    "a leg earned more": "UPDATE leg SET node = node + 1, charge = charge + 1",
    "leaves are removed at the end": "DELETE FROM bundle WHERE first_index = (SELECT MAX(first_index) FROM bundle)",
    "leaves are removed in the middle": "DELETE FROM bundle WHERE first_index = 3",
    "a leaf's index entry is dropped": "DELETE FROM evidence WHERE log_index = 1",
    "a checkpoint is for another size": "UPDATE checkpoint SET size = size + 100",
    "an operation is forgotten": "DELETE FROM operation",
    "an account has another currency": "UPDATE account SET currency = 'EURO' WHERE kind = 1",
    "a verdict says more": "UPDATE verdict SET sum_x_nano = sum_x_nano + 1",
    "a verdict is forgotten": "DELETE FROM verdict",
    "an epoch is forgotten": "DELETE FROM audit_step WHERE kind = 1",
    "a calibration is another's": "UPDATE audit_step SET verifier_id = 'other' WHERE kind = 2",
    "a request was for an appeal": "UPDATE audit_request SET for_appeal = 1",
    "a kinds mask hides a leaf": "UPDATE bundle SET kinds = 1 WHERE kinds <> 1",
}  # fmt: skip


def tamper(url, *statements):
    """Changes the database behind the ledger's back, triggers and checks out of the way."""
    engine = make_engine(normal_url(url))
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            names = connection.execute(
                sa.text("SELECT name FROM sqlite_master WHERE type='trigger'")
            )
            for (name,) in names.fetchall():
                connection.execute(sa.text(f"DROP TRIGGER {name}"))
        else:
            connection.execute(sa.text("SET session_replication_role = replica"))
        for statement, values in statements:
            changed = connection.execute(sa.text(statement), values)
            assert changed.rowcount > 0, "the tampering hit nothing"
    engine.dispose()


@pytest.fixture(scope="module")
def finished_books(databases, migrated):
    """Books with some history, closed."""

    async def fill():
        clock = SystemClock()
        world = World(now=clock.now_unix_ms())
        url = databases.copy(migrated)
        ledger = Ledger(world.market, world.signers["ledger"], url, clock)
        await ledger.start()
        bench = Bench(world, clock, ledger, url)
        await some_traffic(bench)
        await bench.as_("verifier").publish(world.verdict(b"r" * 32, world.node[0].identity))
        (receipt, *_) = await bench.leaves("receipt")
        who = {"market_id": world.market_id, "verifier_id": world.identity("verifier")}
        for message in (
            audit_pb2.AuditRequest(**who, receipt_digest=digest_of(receipt.body)),
            audit_pb2.EpochOpen(**who, epoch=1),
            audit_pb2.Calibration(**who, manifest_digest=b"m" * 32, version=1),
        ):
            await bench.as_("verifier").publish(seal(message, world.signers["verifier"]))
        await ledger.close()
        return url, world

    url, world = asyncio.run(fill())
    assert fsck(url, world).clean
    return url


@pytest.fixture
def closed_books(databases, finished_books):
    return databases.copy(finished_books)


@pytest.mark.parametrize("what", TAMPERINGS)
def test_fsck_finds_that(closed_books, world, what):
    tamper(closed_books, (TAMPERINGS[what], {}))
    assert not fsck(closed_books, world).clean


def test_two_processes_find_what_one_finds(closed_books, world, monkeypatch):
    tamper(closed_books, (TAMPERINGS["a balance is raised"], {}))
    tamper(closed_books, (TAMPERINGS["a kinds mask hides a leaf"], {}))
    one = fsck(closed_books, world)
    monkeypatch.setattr(fsck_module, "_WORTH_A_PROCESS", 1)
    two = fsck(closed_books, world)
    assert (one.problems, one.counts) == (two.problems, two.counts) and len(one.problems) > 1


def test_fsck_finds_any_changed_leaf_even_with_tiles_and_roots_recomputed(closed_books, world):
    engine = make_engine(normal_url(closed_books))
    with engine.connect() as connection:
        row = connection.execute(
            sa.text("SELECT first_index, leaves, body FROM bundle WHERE kinds & 2 <> 0 LIMIT 1")
        ).one()
    engine.dispose()
    body = bytearray(row.body)
    body[-3] ^= 1
    change = ("UPDATE bundle SET body = :b WHERE first_index = :i", {"b": bytes(body), "i": row[0]})
    tamper(closed_books, change)
    assert not fsck(closed_books, world).clean


def test_fsck_finds_a_consistent_forgery_by_the_checkpoints_signature(closed_books, world):
    forged = World()
    forged.signers = {**world.signers, "ledger": make_signer("mallory", world.market_id)}
    forged.market = type(world.market)(
        world.market_id,
        world.market.descriptor,
        world.market.ring.with_key(
            forged.signers["ledger"].identity,
            public_bytes(forged.signers["ledger"].key),
            1,
        ),
    )
    found = fsck(closed_books, forged)
    assert any("not signed by the ledger" in p for p in found.problems)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE account SET debits_posted = credits_posted + 1 WHERE kind = 1",
        "UPDATE account SET credits_pending = -1 WHERE kind = 1",
        "UPDATE transfer SET amount = 1 WHERE sequence = 1",
        "DELETE FROM transfer WHERE sequence = 1",
        "UPDATE pending SET state = 3 WHERE state = 2",
        "DELETE FROM pending WHERE state = 2",
        "UPDATE bundle SET leaves = 0 WHERE first_index = 0",
        "DELETE FROM operation",
        "INSERT INTO transfer SELECT sequence + 1000, operation_id, ordinal + 9, debit, credit, "
        "amount, phase, pending_id, reason, created_at FROM transfer WHERE phase = 3",
    ],
)
def test_the_database_itself_forbids(closed_books, statement):
    engine = make_engine(normal_url(closed_books))
    with pytest.raises(sa.exc.DBAPIError), engine.begin() as connection:
        connection.execute(sa.text(statement))
    engine.dispose()
