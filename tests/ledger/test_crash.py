"""kill -9 at every kind of step, on both databases: nothing lost, nothing twice, fsck clean."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess

import psycopg
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from trueweight.ledger import schema
from trueweight.ledger import service as service_module
from trueweight.ledger.schema import is_current, make_engine, migrate, normal_url
from trueweight.protos.errors import StorageError, TrueweightError
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.simulation.ledger_crash import Crasher, Kill, Load, make_load, problems, run_load

from .conftest import Bench, fsck

CREDIT = 10**9
# How many kills of each kind on each database: in every run, and in ``make soak``.
KILLS = {
    "sqlite": {"process": 12, "take-over": 8},
    "postgresql": {"process": 6, "take-over": 6, "session": 6, "server": 2},
}
SOAK_KILLS = {
    "sqlite": {"process": 150, "take-over": 100},
    "postgresql": {"process": 80, "take-over": 80, "session": 60, "server": 20},
}


def balances(url):
    engine = make_engine(normal_url(url))
    with engine.connect() as connection:
        rows = connection.exec_driver_sql(
            "SELECT id, debits_pending, debits_posted, credits_pending, credits_posted FROM account"
        ).fetchall()
    engine.dispose()
    return {row[0]: tuple(row[1:]) for row in rows}


@pytest.fixture
def crasher(databases):
    made = Crasher()
    with databases.kept_alive():
        yield made
    made.close()


def script(kind, draw):
    """Victims of one round and the kills that they carry out, at steps that ``draw`` gives."""
    if kind == "process":
        return [[Kill(draw())]]
    if kind == "take-over":
        return [[Kill(draw())], [Kill(draw())]]
    # The database dies three times under one living process.
    return [[Kill(1 + draw() // 2, kind) for _ in range(3)]]


def steps_in_random_order(steps, seed):
    """Every boundary between two steps comes once before any comes again."""
    dice = random.Random(seed)
    while True:
        yield from dice.sample(range(1, steps + 1), steps)


def kill_many(crasher, databases, migrated, wanted, seed):
    undisturbed = databases.copy(migrated)
    (life,) = crasher.round(undisturbed, [])
    assert life["ended"], life
    outcome = balances(undisturbed), len(make_load().flat())
    steps = steps_in_random_order(life["steps"], seed)
    for kind, kills in wanted.items():
        left = kills
        while left > 0:
            left -= kill_until_done(
                (crasher, databases), databases.copy(migrated), kind, (steps, left), outcome
            )


def kill_until_done(tools, url, kind, kills, outcome):
    """Rounds on one database until a victim lives to the end; how many kills that took."""
    crasher, databases = tools
    (steps, left), (expected, operations) = kills, outcome
    killed, acknowledged = 0, set()
    while True:
        # Late steps come into reach as the earlier rounds leave less to do.
        plan = script(kind, lambda: next(steps)) if killed < left else [[]]
        lives = crasher.round(url, *plan)
        killed += sum(life["kills"] for life in lives)
        acknowledged |= {id_ for life in lives for id_ in life["acknowledged"]}
        databases.until_up()
        assert problems(url, acknowledged) == []
        if any(life["ended"] for life in lives):
            break
        assert all(life["died"] for life in lives), lives
    assert balances(url) == expected
    assert len(acknowledged) == operations
    return killed


def test_kill_9_of_writer_standby_and_database_at_step_boundaries(crasher, databases, migrated):
    kill_many(crasher, databases, migrated, KILLS[databases.kind], seed=1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [2])
def test_kill_9_hundreds_of_times_at_step_boundaries(crasher, databases, migrated, seed):
    kill_many(crasher, databases, migrated, SOAK_KILLS[databases.kind], seed)


async def until_applied(bench, caller, operation):
    for _ in range(600):
        with contextlib.suppress(TrueweightError):
            return (await bench.ledger.as_caller(caller).apply([operation]))[0]
        await asyncio.sleep(0.05)
    raise AssertionError("no recovery within 30 s")


async def test_killed_database_sessions_are_recovered_from_without_hands(bench, databases):
    """PostgreSQL: kill -9 of the writer's backend process restarts the whole server."""
    if databases.kind == "sqlite":
        pytest.skip("SQLite has no server to kill; the process itself is killed above")
    world = bench.world
    await bench.must("admin", world.deposit("acme", 1000 * CREDIT))
    holds = [world.hold("acme", CREDIT) for _ in range(60)]
    router = world.identity("router")
    tasks = [asyncio.create_task(until_applied(bench, router, hold)) for hold in holds]
    for _ in range(2):
        await asyncio.sleep(0.05)
        await asyncio.to_thread(kill_writer_session, bench.url)
        tasks.append(asyncio.create_task(until_applied(bench, router, world.hold("acme", CREDIT))))
    results = await asyncio.wait_for(asyncio.gather(*tasks), 60)
    assert all(r.status in (pb.Result.APPLIED, pb.Result.REPLAYED) for r in results)
    assert await bench.available("client:acme") == (1000 - 62) * CREDIT


def kill_writer_session(url):
    for _ in range(200):
        with (
            contextlib.suppress(psycopg.Error),
            psycopg.connect(url, autocommit=True) as connection,
        ):
            name = url.rpartition("?")[0].rpartition("/")[2]
            rows = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'trueweight-ledger' "
                "AND datname = %s",
                (name,),
            ).fetchall()
            if rows:
                os.kill(rows[0][0], signal.SIGKILL)
                return
        import time

        time.sleep(0.05)
    raise AssertionError("the writer's session never came back")


async def test_a_full_disk_is_a_clear_error_without_half_state(bench, monkeypatch):
    world = bench.world
    await bench.must("admin", world.deposit("acme", 10 * CREDIT))
    from trueweight.ledger import books

    real, left = books.save, [2]

    def failing(backend, book):
        if left[0]:
            left[0] -= 1
            real(backend, book)
            raise StorageError("the database failed: database or disk is full")
        real(backend, book)

    monkeypatch.setattr(books, "save", failing)
    hold = world.hold("acme", CREDIT)
    with pytest.raises(StorageError, match="disk is full"):
        await bench.do("router", hold)
    result = await until_applied(bench, world.identity("router"), hold)
    assert result.status == pb.Result.APPLIED
    assert await bench.available("client:acme") == 9 * CREDIT


@pytest.mark.parametrize("moment", ["writing", "commit"])
async def test_disk_full_as_a_postgresql_trigger_simulates_it_is_clear_whole_and_temporary(
    bench, databases, moment
):
    """The refusal is simulated: a trigger raises what PostgreSQL raises when it cannot extend a
    file, behind the first rows of a group or at its commit. What follows is the real thing. (When
    the log itself does not fit, PostgreSQL dies and restarts: the kills above.)"""
    if databases.kind == "sqlite":
        pytest.skip("SQLite is really full below")
    world = bench.world
    await bench.must("admin", world.deposit("acme", 10 * CREDIT))
    kind, when = ("CONSTRAINT", "DEFERRABLE INITIALLY DEFERRED") if moment == "commit" else ("", "")
    with psycopg.connect(bench.url, autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "RAISE EXCEPTION 'could not extend file: No space left on device' "
            "USING ERRCODE = 'disk_full'; END $$"
        )
        connection.execute(
            f"CREATE {kind} TRIGGER full_disk AFTER INSERT ON operation {when} "
            "FOR EACH ROW EXECUTE FUNCTION full_disk()"
        )
    hold, router = world.hold("acme", CREDIT), world.identity("router")
    with pytest.raises(StorageError, match=r"No space left.*Is the disk full\? Nothing was half"):
        await bench.do("router", hold)
    assert fsck(bench.url, world).clean
    assert await bench.available("client:acme") == 10 * CREDIT
    for _ in range(3):
        with pytest.raises(TrueweightError):
            await bench.do("router", hold)
    with psycopg.connect(bench.url, autocommit=True) as connection:
        connection.execute("DROP TRIGGER full_disk ON operation")  # somebody made room
    assert (await until_applied(bench, router, hold)).status == pb.Result.APPLIED
    assert await bench.available("client:acme") == 9 * CREDIT


async def test_a_really_full_sqlite_file_is_a_clear_error_and_recovers(  # noqa: PLR0917
    databases, migrated, world, clock, start, monkeypatch
):
    if databases.kind != "sqlite":
        pytest.skip("PostgreSQL has no page limit to set")
    real, full = service_module.open_backend, [True]

    def opening(url):
        backend = real(url)
        if full[0]:
            pages = backend.query("PRAGMA page_count")[0][0]
            backend.query(f"PRAGMA max_page_count = {pages + 1}")
        return backend

    monkeypatch.setattr(service_module, "open_backend", opening)
    url = databases.copy(migrated)
    bench = Bench(world, clock, await start(world, url), url)
    operations = [world.deposit(f"client{i}", CREDIT) for i in range(300)]
    with pytest.raises(StorageError, match="full"):
        await bench.do("admin", *operations)
    assert fsck(url, world).clean
    full[0] = False  # somebody made room
    admin = world.identity("admin")
    assert (await until_applied(bench, admin, operations[0])).status == pb.Result.APPLIED
    await bench.must("admin", *operations)
    await bench.ledger.close()
    assert fsck(url, world).clean


def backup(databases, url, tmp_path):
    """What docs/ledger.md tells operators to do; the URL of the restored books."""
    if databases.kind == "sqlite":
        engine = make_engine(normal_url(url))
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f"VACUUM INTO '{tmp_path}/restored.db'")
        engine.dispose()
        return f"sqlite:///{tmp_path}/restored.db"
    restored = databases.copy()
    dump = tmp_path / "books.dump"
    for tool, *arguments in (
        ("pg_dump", "--format=custom", f"--file={dump}", url),
        ("pg_restore", "--exit-on-error", f"--dbname={restored}", dump),
    ):
        subprocess.run([databases.tool(tool), *arguments], check=True, timeout=60)
    return restored


def test_a_backup_restores_and_clients_replay_what_it_lacks(databases, migrated, tmp_path):
    load, url = make_load(), databases.copy(migrated)
    half = Load(load.world, load.waves[:2])
    asyncio.run(run_load(half, url, lambda _: None))
    restored = backup(databases, url, tmp_path)
    assert problems(restored, set()) == []
    assert balances(restored) == balances(url)
    for books in (url, restored):
        asyncio.run(run_load(load, books, lambda _: None))
        assert problems(books, set()) == []
    assert balances(restored) == balances(url)


def test_old_books_are_migrated_with_all_they_say(databases, migrated):
    """Books of the first schema get the tables of later ones, filled from their log."""
    load, url, old = make_load(), databases.copy(migrated), databases.copy()
    asyncio.run(run_load(load, url, lambda _: None))
    source, target = make_engine(normal_url(url)), make_engine(normal_url(old))
    upgrade(target, "0001")
    tables = sa.MetaData()
    tables.reflect(target)
    with source.connect() as reading, target.begin() as writing:
        for table in tables.sorted_tables:
            if table.name != "alembic_version":
                rows = [dict(r._mapping) for r in reading.execute(sa.select(table))]
                if rows:
                    writing.execute(table.insert(), rows)
    assert not is_current(target)
    migrate(target)
    migrate(target)
    assert is_current(target)
    verdicts = sa.text("SELECT * FROM verdict ORDER BY log_index")
    with source.connect() as one, target.connect() as other:
        found = one.execute(verdicts).fetchall()
        assert found and other.execute(verdicts).fetchall() == found
    source.dispose()
    target.dispose()
    assert problems(old, set()) == []
    asyncio.run(run_load(load, old, lambda _: None))
    assert balances(old) == balances(url)


def upgrade(engine, revision):
    config = Config()
    config.set_main_option("script_location", str(schema._MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
