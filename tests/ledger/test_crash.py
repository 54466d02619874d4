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

from trueweight.ledger import books, schema
from trueweight.ledger import service as service_module
from trueweight.ledger.archive import archive
from trueweight.ledger.backend import open_backend
from trueweight.ledger.reader import Reader
from trueweight.ledger.save import save
from trueweight.ledger.schema import is_current, make_engine, migrate, normal_url
from trueweight.protos.envelope import digest_of
from trueweight.protos.errors import StorageError, TrueweightError
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.simulation.ledger_crash import (
    Crasher,
    Kill,
    Load,
    make_load,
    make_race,
    problems,
    run_load,
)

from .conftest import Bench, fsck

CREDIT = 10**9
# Rounds over the boundaries that no kill has met yet.
ATTEMPTS = 6
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


@pytest.fixture(scope="module")
def crasher(databases):
    made = Crasher()
    with databases.kept_alive():
        yield made
    made.close()


class Places:
    """Boundaries of a load, each with how often an undisturbed life comes by it. A kill is planned
    at one of them, wherever in that life; all have their turn before any has its second."""

    def __init__(self, boundaries, seed):
        self.all, self.hit = dict(boundaries), {}
        self._dice, self._turn = random.Random(seed), []

    def draw(self, what):
        if not self._turn:
            self._turn = self._dice.sample(sorted(self.all), len(self.all))
        return self.kill_at(self._turn.pop(), what)

    def kill_at(self, name, what):
        # A database dies several times in one life, so each time soon.
        most = self.all[name] if what == "self" else 2
        return Kill(self._dice.randint(1, most), what, name)

    def note(self, lives):
        kills = [kill for life in lives for kill in life["kills"]]
        for _, what, name in kills:
            self.hit.setdefault(what, set()).add(name)
        return len(kills)

    def missing(self, what):
        return sorted(self.all.keys() - self.hit.get(what, set()))


def script(kind, places):
    """Victims of one round and the kills that they carry out."""
    if kind == "process":
        return [[places.draw("self")]]
    if kind == "take-over":
        return [[places.draw("self")], [places.draw("self")]]
    # The database dies three times under one living process.
    return [[places.draw(kind) for _ in range(3)]]


class Rounds:
    """Kills on one kind of database, and what must be true after each."""

    def __init__(self, crasher, databases, migrated, seed):
        self.crasher, self.databases, self.migrated = crasher, databases, migrated
        undisturbed = databases.copy(migrated)
        (life,) = crasher.round(undisturbed, [])
        assert life["ended"], life
        self.outcome = balances(undisturbed), len(make_load().flat())
        self.places = Places(life["boundaries"], seed)

    def kill_many(self, wanted):
        done = 0
        for kind, kills in wanted.items():
            left = kills
            while left > 0:
                made = self.until_done(lambda kind=kind: script(kind, self.places), left)
                left, done = left - made, done + made
        return done

    def kill_at_every_boundary(self, what):
        """Until no boundary is left out."""
        for attempt in range(ATTEMPTS):
            for name in self.places.missing(what):
                # The first time that it comes by is sure to come; then any other one, too.
                kill = self.places.kill_at(name, what) if attempt else Kill(1, what, name)
                self.until_done(lambda kill=kill: [[kill]], 1)
        assert self.places.missing(what) == []

    def until_done(self, plan, most):
        """Rounds on one database until a victim lives to the end; how many kills that took."""
        url = self.databases.copy(self.migrated)
        killed, acknowledged = 0, set()
        while True:
            lives = self.crasher.round(url, *(plan() if killed < most else [[]]))
            killed += self.places.note(lives)
            acknowledged |= {id_ for life in lives for id_ in life["acknowledged"]}
            self.databases.until_up()
            assert problems(url, acknowledged) == []
            if any(life["ended"] for life in lives):
                break
            assert all(life["died"] for life in lives), lives
        expected, operations = self.outcome
        assert balances(url) == expected
        assert len(acknowledged) == operations
        return killed


def test_kill_9_of_writer_standby_and_database_at_step_boundaries(
    crasher, databases, migrated, record_property
):
    """Twenty kills at as many boundaries, or nearly: a second victim may have its own before it
    came by the place that was its turn."""
    rounds = Rounds(crasher, databases, migrated, seed=1)
    done = rounds.kill_many(KILLS[databases.kind])
    places = {name for hit in rounds.places.hit.values() for name in hit}
    record_property("boundaries", f"{len(places)} of {len(rounds.places.all)}")
    assert done >= sum(KILLS[databases.kind].values())
    assert len(places) >= 0.8 * sum(KILLS[databases.kind].values())


@pytest.mark.soak
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("seed", [2])
def test_kill_9_hundreds_of_times_and_at_every_step_boundary(crasher, databases, migrated, seed):
    rounds = Rounds(crasher, databases, migrated, seed)
    done = rounds.kill_many(SOAK_KILLS[databases.kind])
    assert done >= sum(SOAK_KILLS[databases.kind].values()) >= 200
    rounds.kill_at_every_boundary("self")
    if databases.kind == "postgresql":
        rounds.kill_at_every_boundary("server")


def test_the_load_has_every_step_that_changes_the_books(crasher, databases, migrated):
    """What no kill can meet would not be tested: every table that is written, but for full tiles
    (256 leaves) and epochs, has its boundaries."""
    (life,) = crasher.round(databases.copy(migrated), [])
    tables = {name.split(",")[0] for name in life["boundaries"]}
    for step in (
        "begin", "commit", "insert account", "update account", "insert transfer", "insert pending",
        "update pending", "insert operation", "insert leg", "update leg", "insert claim",
        "insert reference", "upsert spending", "upsert node", "insert evidence", "insert verdict",
        "insert audit_request", "update audit_request", "insert margin_commitment",
        "insert bundle", "insert checkpoint",
    ):  # fmt: skip
        assert step in tables, step
    assert {name.split(", ")[1] for name in life["boundaries"]} == {"before", "after"}


# Of a time limit on a machine that others use too: what counts is what the ledger needs.
TRIES = 3
TAKE_OVER_S = 5


@pytest.mark.parametrize("at", ["insert transfer, before", "commit, before", "commit, after"])
def test_a_standby_takes_over_within_5_seconds_of_kill_9(crasher, databases, migrated, at):
    """Writer and standby are processes of their own; the writer dies under load. The time is from
    its death until the standby has answered."""
    needed = []
    for number in range(1, TRIES + 1):
        url = databases.copy(migrated)
        killed, standby = crasher.round(url, [Kill(number, "self", at)], [], gate=True)
        assert killed["died"] and [place for _, _, place in killed["kills"]] == [at]
        assert standby["ended"], standby
        acknowledged = standby["acknowledged"].keys()
        assert killed["acknowledged"].keys() <= acknowledged
        assert len(acknowledged) == len(make_load().flat())
        assert problems(url, acknowledged) == []
        needed.append(min(standby["acknowledged"].values()) - killed["kills"][0][0])
        assert needed[-1] > 0, "the standby wrote beside a living writer"
        if needed[-1] < TAKE_OVER_S:
            return
    pytest.fail(f"the standby needed {needed} s")


@pytest.mark.parametrize(
    ("at", "step"),
    [
        ("insert pending, after", 1),
        ("commit, before", 2),
        ("commit, after", 1),
        ("commit, after", 2),
    ],
)
def test_exactly_half_of_64_callers_succeed_also_when_the_writer_is_killed(
    crasher, databases, migrated, at, step
):
    """All 64 have their holds under way at the writer when it dies by kill -9, some perhaps
    committed and none of those answered; they send them again to the standby."""
    url = databases.copy(migrated)
    kills = [Kill(step, "self", at)]
    killed, standby = crasher.round(url, kills, [], load="race", gate=True)
    assert standby["ended"], standby
    assert killed["died"], killed
    load = make_race()
    holds = {operation.id.hex() for _, operation in load.waves[1]}
    first, answered = set(killed["acknowledged"]), set(standby["acknowledged"])
    assert len(holds & answered) == 32
    assert first <= answered
    assert problems(url, first | answered) == []
    pending, debits, _, credits = balances(url)["client:acme"]
    assert (pending, credits - debits - pending) == (32 * CREDIT, 0)


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
    left = [2]

    def failing(backend, book):
        if left[0]:
            left[0] -= 1
            save(backend, book)
            raise StorageError("the database failed: database or disk is full")
        save(backend, book)

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
    full = [True]

    def opening(url):
        backend = open_backend(url)
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
    for database in (url, restored):
        asyncio.run(run_load(load, database, lambda _: None))
        assert problems(database, set()) == []
    assert balances(restored) == balances(url)


# From which schema, and whether its books were archived before they were migrated (0002 made that
# possible).
OLD_BOOKS = [
    ("0001", False), ("0006", False), ("0008", False), ("0002", True), ("0006", True),
]  # fmt: skip


@pytest.mark.parametrize(("revision", "archived"), OLD_BOOKS)
def test_old_books_are_migrated_with_all_they_say(
    databases, migrated, tmp_path, revision, archived
):
    """Books of early schemas get the tables of later ones, filled from their log."""
    load, url = make_load(), databases.copy(migrated)
    admin = load.world.identity("admin")
    # So that there is a full tile, before which all may be archived.
    load.waves.append([(admin, load.world.deposit("c0", CREDIT)) for _ in range(200)])
    asyncio.run(run_load(load, url, lambda _: None))
    old, directory = books_of(revision, url, databases), None
    source, target = make_engine(normal_url(url)), make_engine(normal_url(old))
    if archived:
        directory = tmp_path / "archive"
        assert archive(target, directory, 2**62).leaves > 100
    assert not is_current(target)
    migrate(target)
    migrate(target)
    assert is_current(target)
    for table in ("verdict", "audit_request", "audit_step", "margin_commitment"):
        rows = sa.text(f"SELECT * FROM {table} ORDER BY log_index")  # noqa: S608
        with source.connect() as one, target.connect() as other:
            found = one.execute(rows).fetchall()
            assert other.execute(rows).fetchall() == found
            assert found or table == "audit_step"
    assert fsck(old, load.world, directory).problems == []
    are_found(target, directory)
    source.dispose()
    target.dispose()
    asyncio.run(run_load(load, old, lambda _: None))
    assert balances(old) == balances(url)
    assert fsck(old, load.world, directory).problems == []


def books_of(revision, url, databases):
    """The same books as a ledger of that schema would have written them."""
    old = databases.copy()
    source, target = make_engine(normal_url(url)), make_engine(normal_url(old))
    upgrade(target, revision)
    tables = sa.MetaData()
    tables.reflect(target)
    with source.connect() as reading, target.begin() as writing:
        for table in tables.sorted_tables:
            if table.name != "alembic_version":
                rows = [dict(r._mapping) for r in reading.execute(sa.select(table))]
                if rows:
                    writing.execute(table.insert(), rows)
        if revision < "0007":
            # Until then receipts were kept as all other evidence was, too.
            writing.execute(
                sa.text("INSERT INTO evidence SELECT receipt_digest, log_index FROM leg")
            )
    source.dispose()
    target.dispose()
    return old


def are_found(engine, directory):
    """Every receipt, by its digest."""
    reader = Reader(engine, directory)
    with engine.connect() as connection:
        legs = connection.execute(sa.text("SELECT receipt_digest, log_index FROM leg")).fetchall()
    assert len(legs) > 30
    for digest, index in legs:
        found = reader.inclusion(pb.InclusionProofRequest(message_digest=bytes(digest))).entry
        assert (found.index, found.kind) == (index, "receipt")
        assert digest_of(found.body) == bytes(digest)


def upgrade(engine, revision):
    config = Config()
    config.set_main_option("script_location", str(schema._MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
