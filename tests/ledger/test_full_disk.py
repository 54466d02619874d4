"""Real filesystems without room, under both databases: a clear error, nothing half done, and when
there is room again the ledger goes on without hands."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg
import pytest

from trueweight.ledger.archive import archive
from trueweight.ledger.schema import make_engine, normal_url
from trueweight.protos.errors import StorageError, TrueweightError, Unavailable
from trueweight.protos.v1 import ledger_pb2 as pb

from .conftest import Bench, fsck
from .test_archive import LONG_AFTER
from .test_crash import until_applied

CREDIT = 10**9
MIB = 1024 * 1024
LEFT = 96 * 1024


class Disk:
    """A small filesystem in memory, and a file that takes all of its room but a little."""

    def __init__(self, path):
        self.path, self._ballast = path, path / "ballast"

    def fill(self, left=LEFT):
        with self._ballast.open("wb") as file, contextlib.suppress(OSError):
            while free(self.path) > left:
                file.write(b"x" * min(MIB, max(4096, free(self.path) - left)))
                file.flush()

    def make_room(self):
        self._ballast.unlink()


def free(path):
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


@pytest.fixture
def disk():
    """Makes small filesystems; skips where that is not permitted."""
    mounted = []

    def make(mib, owner=None):
        path = Path(tempfile.mkdtemp(prefix="tw-disk-"))
        options = f"size={mib}m,mode=0755"
        tool = shutil.which("mount")
        if tool is None or os.geteuid() != 0:
            pytest.skip("a small filesystem is mounted only as root")
        done = subprocess.run(
            [tool, "-t", "tmpfs", "-o", options, "tmpfs", str(path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        mounted.append(path)
        if owner is not None:
            os.chown(path, pwd.getpwnam(owner).pw_uid, -1)
        return Disk(path)

    yield make
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=False)
        with contextlib.suppress(OSError):
            path.rmdir()


class Server:
    """A PostgreSQL of its own, started again whenever it ends, as a supervisor does."""

    def __init__(self, programs, user, data, home):
        self._programs, self._user, self._data, self._home = programs, user, data, home
        self._process = None
        self.url = f"postgresql://postgres@/postgres?host={home}"

    def make(self, wal):
        self._run("initdb", "-D", self._data, f"--waldir={wal}", "--wal-segsize=1", "--auth=trust",
                  "--username=postgres", "--no-sync", "--encoding=UTF8")  # fmt: skip

    def _run(self, name, *arguments):
        command = [str(self._programs / name), *map(str, arguments)]
        done = subprocess.run(
            command, user=self._user, cwd=self._home, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    def start(self):
        settings = (
            "listen_addresses=", f"unix_socket_directories={self._home}", "fsync=off",
            "min_wal_size=2MB", "max_wal_size=8MB", "shared_buffers=16MB", "autovacuum=off",
        )  # fmt: skip
        options = [part for setting in settings for part in ("-c", setting)]
        log = (self._home / "log").open("ab")
        self._process = subprocess.Popen(
            [str(self._programs / "postgres"), "-D", str(self._data), *options],
            user=self._user, cwd=self._home, stdout=log, stderr=log,
        )  # fmt: skip
        log.close()

    def until_up(self, tries=300):
        for _ in range(tries):
            if self._process is None or self._process.poll() is not None:
                self.start()
            with contextlib.suppress(psycopg.Error), psycopg.connect(self.url):
                return
            time.sleep(0.1)
        raise AssertionError(f"PostgreSQL does not come up: {self.said()[-2000:]}")

    def has_ended(self):
        return self._process.poll() is not None

    def said(self):
        return (self._home / "log").read_text(errors="replace")

    def stop(self):
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
            self._process.kill()
            self._process.wait()


@pytest.fixture
def server(databases, disk):
    """A PostgreSQL with its tables, or its log, on a small filesystem."""
    if databases.kind != "postgresql":
        pytest.skip("PostgreSQL's own part")
    programs = databases.tool("postgres").parent
    user = databases._process.system_user
    home = Path(tempfile.mkdtemp(prefix="tw-full-"))
    os.chown(home, pwd.getpwnam(user).pw_uid if user else os.getuid(), -1)
    made = []

    def make(what):
        small = disk(96 if what == "tables" else 24, user)
        data, wal = (small.path / "data", home / "wal")
        if what == "log":
            data, wal = home / "data", small.path / "wal"
        server = Server(programs, user, data, home)
        made.append(server)
        server.make(wal)
        server.until_up()
        return server, small

    yield make
    for each in made:
        each.stop()
    shutil.rmtree(home, ignore_errors=True)


async def run_full(bench, small, least):
    """Deposits until the disk is full: operations that were answered, and the first error."""
    world, done = bench.world, []
    await bench.must("admin", world.deposit("acme", CREDIT))
    small.fill()
    for _ in range(2000):
        operations = [world.deposit(f"client{len(done)}-{i}", CREDIT) for i in range(100)]
        try:
            await bench.must("admin", *operations)
        except TrueweightError as error:
            assert len(done) >= least
            return done, operations, error
        done += operations
    raise AssertionError("the disk is never full")


async def goes_on(bench, done, failed):
    """With room again: what was answered is there, what was not is applied once."""
    admin = bench.world.identity("admin")
    await until_applied(bench, admin, failed[0])
    await bench.must("admin", *failed)
    for operation in (*done[-200:], *failed):
        (result,) = await bench.do("admin", operation)
        assert result.status == pb.Result.REPLAYED
    held = await bench.as_("admin").balances(["external:card"])
    assert int(held[0].debits_posted_nano) == CREDIT * (len(done) + len(failed) + 1)


async def test_sqlite_on_a_full_disk_is_clear_whole_and_temporary(  # noqa: PLR0917
    databases, migrated, disk, world, clock, start
):
    if databases.kind != "sqlite":
        pytest.skip("SQLite's own part")
    small = disk(48)
    path = small.path / "books.db"
    shutil.copy(databases.copy(migrated).removeprefix("sqlite:///"), path)
    url = f"sqlite:///{path}"
    bench = Bench(world, clock, await start(world, url), url)
    done, failed, error = await run_full(bench, small, 0)
    assert isinstance(error, StorageError) and "Is the disk full?" in error.hint, error
    assert fsck(url, world).problems == []
    with pytest.raises(TrueweightError):
        await bench.do("admin", *failed)
    small.make_room()
    await goes_on(bench, done, failed)
    await bench.ledger.close()
    assert fsck(url, world).problems == []


async def test_postgresql_without_room_for_tables_is_clear_whole_and_temporary(
    server, world, clock, start
):
    postgres, small = server("tables")
    bench = Bench(world, clock, await start(world, postgres.url), postgres.url)
    done, failed, error = await run_full(bench, small, 0)
    assert isinstance(error, StorageError), error
    assert "No space left" in error.message and "Is the disk full?" in error.hint
    assert (await asyncio.to_thread(fsck, postgres.url, world)).problems == []
    with pytest.raises(TrueweightError):
        await bench.do("admin", *failed)
    small.make_room()
    await goes_on(bench, done, failed)
    assert not postgres.has_ended()
    await bench.ledger.close()
    assert fsck(postgres.url, world).problems == []


async def test_postgresql_without_room_for_its_log_loses_nothing_and_goes_on(
    server, world, clock, start
):
    """It ends itself rather than going on without its log, and is started again and again."""
    postgres, small = server("log")
    bench = Bench(world, clock, await start(world, postgres.url), postgres.url)
    done, failed, error = await run_full(bench, small, 100)
    assert isinstance(error, Unavailable | StorageError) and error.retryable, error
    assert "No space left" in postgres.said()
    with pytest.raises(TrueweightError):
        await bench.do("admin", *failed)
    small.make_room()
    await asyncio.to_thread(postgres.until_up)
    await goes_on(bench, done, failed)
    await bench.ledger.close()
    assert fsck(postgres.url, world).problems == []


async def test_a_full_disk_under_the_archive_moves_nothing(bench, disk, tmp_path):
    world = bench.world
    await bench.must("admin", world.deposit("acme", 1000 * CREDIT))
    for _ in range(8):
        await bench.must("router", *(world.hold("acme", 1) for _ in range(60)))
    await asyncio.sleep(1.2)  # a checkpoint
    small = disk(4)
    small.fill(left=16 * 1024)
    engine = make_engine(normal_url(bench.url))
    with pytest.raises(StorageError, match=r"Is the disk full\? Nothing was moved"):
        await asyncio.to_thread(archive, engine, small.path / "archive", LONG_AFTER)
    assert bench.fsck().problems == []
    small.make_room()
    bench.archived = tmp_path / "archive"
    done = await asyncio.to_thread(archive, engine, small.path / "archive", LONG_AFTER)
    assert done.leaves > 0
    shutil.copytree(small.path / "archive", bench.archived)
    engine.dispose()
