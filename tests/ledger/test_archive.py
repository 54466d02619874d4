"""Archived history is out of the database and still in every proof, statement and check."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest
import sqlalchemy as sa

from trueweight.ledger import archive as archiving
from trueweight.ledger import reports, statements
from trueweight.ledger.archive import archive
from trueweight.ledger.archived import TRANSFER_COLUMNS, Archive, transfers_sql
from trueweight.ledger.fsck import check
from trueweight.ledger.schema import make_engine, normal_url
from trueweight.protos.checkpoint import log_origin, open_note
from trueweight.protos.errors import InvalidRequest, NotFound, StorageError
from trueweight.protos.identity import public_bytes
from trueweight.protos.merkle import leaf_hash, verify_consistency, verify_inclusion
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.simulation.ledger_world import Leg

CREDIT = 10**9
LONG_AFTER = 2**62


@pytest.fixture
async def busy(bench):
    """Books with some thousand leaves in many bundles, some of rare kinds among them."""
    world = bench.world
    await bench.must("admin", world.deposit("acme", 1000 * CREDIT))
    await bench.must("admin", world.deposit("zeta", 1000 * CREDIT))
    for node in world.node:
        await bench.as_("router").publish(node.key_event)
    await requests(bench, 40)
    return bench


async def requests(bench, count):
    world = bench.world
    for at in range(count):
        holds = [world.hold(name, CREDIT) for name in ("acme", "zeta")]
        await bench.must("router", *holds)
        ends = [world.capture(h.id, Leg(world.node[at % 3])) for h in holds]
        await bench.must("router", *ends)


def with_engine(url, use):
    engine = make_engine(normal_url(url))
    try:
        return use(engine)
    finally:
        engine.dispose()


def run(bench, directory, older_than=LONG_AFTER):
    bench.archived = directory  # for the fixture's own fsck at the end
    return with_engine(bench.url, lambda engine: archive(engine, directory, older_than))


def fsck(bench, directory):
    def use(engine):
        signer = bench.world.signers["ledger"]
        keys = [public_bytes(signer.key)]
        moved = Archive(directory, bench.world.market_id)
        return check(engine, bench.world.market_id, keys, archive=moved)

    return with_engine(bench.url, use)


def rows(bench, table):
    counted = sa.text(f"SELECT COUNT(*) FROM {table}")  # noqa: S608

    def use(engine):
        with engine.connect() as connection:
            return connection.execute(counted).scalar()

    return with_engine(bench.url, use)


async def settled(bench, start, directory=None):
    """A restarted ledger, so that everything is under a checkpoint."""
    await bench.ledger.close()
    bench.ledger = await start(bench.world, bench.url, archive=directory)


async def all_leaves(bench, *kinds):
    found, place = [], 0
    while True:
        page = await bench.as_("").read_log(place, 1000, kinds)
        found += page.entries
        place = page.next_index
        if place >= page.tree_size:
            return found


async def test_archived_history_leaves_the_database_and_stays_in_every_proof(busy, start, tmp_path):
    bench, directory = busy, tmp_path / "archive"
    await settled(bench, start)
    before = await all_leaves(bench)
    balances = reports.balances(bench.url, [])
    statement = reports.statement(bench.url, "client:acme", 10_000)
    transfers = rows(bench, "transfer")
    done = run(bench, directory)
    assert done.leaves > 200
    assert rows(bench, "transfer") == transfers - done.transfers < transfers / 2
    # The ledger goes on while and after history leaves.
    await requests(bench, 10)
    await settled(bench, start, directory)
    assert (await all_leaves(bench))[: len(before)] == before
    assert fsck(bench, directory).problems == []
    after = reports.statement(bench.url, "client:acme", 10_000, directory)
    assert after[: len(statement)] == statement
    assert {b["account"] for b in reports.balances(bench.url, [])} == {
        b["account"] for b in balances
    }
    await proves(bench, before[3])
    out = tmp_path / "all.csv"
    assert reports.export(bench.url, "csv", out, directory) == sum(
        len(pb.TransferBatch.FromString(leaf.body).movements)
        for leaf in await all_leaves(bench, "transfer")
    )


async def proves(bench, leaf):
    """Inclusion of an archived leaf and consistency with a tree of that time, both verified."""
    signer = bench.world.signers["ledger"]
    port = bench.as_("")
    found = await port.inclusion(pb.InclusionProofRequest(index=leaf.index))
    assert found.entry.body == leaf.body
    origin = log_origin(bench.world.market_id)
    state = open_note(found.checkpoint.note, origin, public_bytes(signer.key))
    path = list(found.proof.path)
    verify_inclusion(leaf_hash(leaf.body), leaf.index, state.size, path, state.root)
    old = bench.ledger._reader.checkpoint
    first = next(c for c in (old(size) for size in sizes(bench)) if c.size)
    proof = await port.consistency(first.size, state.size)
    verify_consistency(first.size, first.root, state.size, state.root, list(proof.path))


def sizes(bench):
    def use(engine):
        with engine.connect() as connection:
            return [
                r[0] for r in connection.execute(sa.text("SELECT size FROM checkpoint ORDER BY 1"))
            ]

    return with_engine(bench.url, use)


def test_archived_statements_are_read_by_index(tmp_path):
    with closing(sqlite3.connect(tmp_path / "a.archive")) as file:
        file.execute("CREATE TABLE bundle (first_index INTEGER PRIMARY KEY)")
        others = ", ".join(TRANSFER_COLUMNS[1:])
        file.execute(f"CREATE TABLE transfer (sequence INTEGER PRIMARY KEY, {others})")
        archiving.add_indexes(file)
        sql, sides = transfers_sql(of_one_account=True)
        rows = file.execute(f"EXPLAIN QUERY PLAN {sql}", (7, 0, 9, 5) * sides + (5,)).fetchall()
    plan = "\n".join(row[3] for row in rows)
    for side in ("debit", "credit"):
        assert f"INDEX transfer_{side} ({side}=? AND rowid>? AND rowid<?)" in plan
    assert "SCAN transfer" not in plan


async def test_archived_statements_of_every_account_are_those_of_before(
    busy, start, tmp_path, monkeypatch
):
    bench, directory = busy, tmp_path / "archive"
    await settled(bench, start)
    accounts = [b["account"] for b in reports.balances(bench.url, [])]
    before = {a: reports.statement(bench.url, a, 10_000) for a in accounts}
    run(bench, directory)
    assert rows(bench, "transfer") < len(before["clearing:acme"])
    for span in (50_000, 7):
        monkeypatch.setattr(statements, "MAX_SPAN", span)
        for account in accounts:
            assert reports.statement(bench.url, account, 10_000, directory) == before[account]
    # As earlier versions wrote it.
    (file,) = directory.iterdir()
    file.chmod(0o600)
    with closing(sqlite3.connect(file)) as part:
        for side in ("debit", "credit"):
            part.execute(f"DROP INDEX transfer_{side}")
        part.commit()
    for account in ("client:acme", "clearing:acme", "fee:market"):
        assert reports.statement(bench.url, account, 10_000, directory) == before[account]


async def test_without_the_archive_nothing_is_silently_left_out(busy, start, tmp_path):
    bench = busy
    await settled(bench, start)
    run(bench, tmp_path / "archive")
    port = bench.as_("admin")
    with pytest.raises(NotFound, match="archived"):
        await port.read_log(0)
    with pytest.raises(NotFound, match="archived"):
        await port.inclusion(pb.InclusionProofRequest(index=5))
    with pytest.raises(NotFound, match="archived"):
        await port.transfers("client:acme")
    with pytest.raises(InvalidRequest, match="archive"):
        bench.fsck()
    # What the ledger and its verifiers need stays.
    assert len(await all_leaves(bench, "key-event")) == 3
    await requests(bench, 2)


async def test_replays_and_refusals_are_as_before_after_archiving(busy, start, tmp_path):
    bench, world = busy, busy.world
    hold = world.hold("acme", CREDIT)
    capture = world.capture(hold.id, Leg(world.node[0]))
    deposit = world.deposit("acme", CREDIT, "invoice-1")
    await bench.must("router", hold, capture)
    await bench.must("admin", deposit)
    await requests(bench, 60)
    await settled(bench, start)
    run(bench, tmp_path / "archive")
    for role, operation in (("router", hold), ("router", capture), ("admin", deposit)):
        (result,) = await bench.do(role, operation)
        assert result.status == pb.Result.REPLAYED
    (twice,) = await bench.do("admin", world.deposit("acme", CREDIT, "invoice-1"))
    assert twice.code == "CONFLICT"


@pytest.mark.parametrize("step", ["_mark", "_finish"])
async def test_a_run_that_is_killed_is_run_again(busy, start, tmp_path, monkeypatch, step):
    bench, directory = busy, tmp_path / "archive"
    await settled(bench, start)
    before = await all_leaves(bench)
    with monkeypatch.context() as patch:
        patch.setattr(archiving, "BATCH", 7)
        real, calls = getattr(archiving, step), []

        def dying(*arguments):
            calls.append(arguments)
            if step == "_finish" and len(calls) == 2:
                with arguments[0].begin() as connection:
                    connection.execute(sa.text("DELETE FROM transfer WHERE sequence <= 5"))
                raise KeyboardInterrupt
            if step != "_finish":
                raise KeyboardInterrupt
            real(*arguments)

        patch.setattr(archiving, step, dying)
        with pytest.raises(KeyboardInterrupt):
            run(bench, directory)
    assert fsck(bench, directory).problems == []
    run(bench, directory)
    assert rows(bench, "bundle") < len(before) / 2
    assert fsck(bench, directory).problems == []
    await requests(bench, 40)
    await settled(bench, start)
    assert run(bench, directory).leaves > 0
    assert len(Archive(directory, bench.world.market_id).parts) == 2
    assert fsck(bench, directory).problems == []


async def test_attack_a_changed_archive_is_found(busy, start, tmp_path):
    bench, directory = busy, tmp_path / "archive"
    await settled(bench, start)
    run(bench, directory)
    (file,) = directory.iterdir()
    file.chmod(0o600)
    data = bytearray(file.read_bytes())
    place = data.rindex(b"client:acme")
    data[place + 7 : place + 11] = b"evil"
    file.write_bytes(data)
    assert fsck(bench, directory).problems
    file.rename(directory / "hidden")
    with pytest.raises(StorageError, match="lacks leaves"):
        fsck(bench, directory)
    data[place + 7 : place + 11] = b"acme"
    file.write_bytes(data)
    with pytest.raises(StorageError, match="another market"):
        Archive(directory, "m" * 32)
    assert fsck(bench, directory).problems == []


async def test_young_or_unsigned_history_stays(busy, tmp_path):
    bench = busy
    assert run(bench, tmp_path / "a", older_than=0).leaves == 0
    assert fsck(bench, tmp_path / "a").problems == []
