"""Whoever reads while history goes into the archive sees all of it, in one place or the other."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from trueweight.ledger import archive as archiving
from trueweight.ledger import fsck as fsck_module
from trueweight.ledger import reports
from trueweight.ledger.archive import archive
from trueweight.ledger.archived import Archive
from trueweight.ledger.reader import Reader
from trueweight.ledger.schema import make_engine, normal_url
from trueweight.protos.errors import StorageError, Unavailable
from trueweight.protos.v1 import ledger_pb2 as pb

from .conftest import fsck
from .test_archive import LONG_AFTER, all_leaves, busy, requests, run, settled

assert busy  # a fixture


@contextlib.contextmanager
def archived_after(monkeypatch, owner, name, bench, directory):
    """Archives everything right after the first call of a function has come back."""
    real, done = getattr(owner, name), []

    def call(*arguments, **named):
        found = real(*arguments, **named)
        if not done:
            done.append(True)
            assert run(bench, directory).leaves
        return found

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        yield
    assert done


@pytest.fixture
async def signed(busy, start, tmp_path):
    """Books that may be archived, served with the directory into which they will be."""
    directory = tmp_path / "archive"
    directory.mkdir()
    await settled(busy, start, directory)
    return busy


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "archive"


@pytest.mark.parametrize("place", ["size", "_archive_for"])
async def test_the_log_has_no_gap_where_it_is_archived_meanwhile(
    signed, directory, monkeypatch, place
):
    before = await all_leaves(signed)
    with archived_after(monkeypatch, Reader, place, signed, directory):
        assert (await all_leaves(signed))[: len(before)] == before


@pytest.mark.parametrize("place", ["_newest_sequence", "_archive_for"])
@pytest.mark.parametrize("account", ["client:acme", "clearing:acme", ""])
async def test_a_statement_is_whole_where_it_is_archived_meanwhile(
    signed, directory, monkeypatch, place, account
):
    def read():
        reader = Reader(make_engine(normal_url(signed.url)), directory)
        found, after = [], 0
        while (page := reader.transfers(account, after, 50)).more:
            found += page.transfers
            after = page.next_sequence
        reader.close()
        return [*found, *page.transfers]

    before = await asyncio.to_thread(read)
    assert before
    if place == "_newest_sequence" and account != "clearing:acme":
        place = "_archive_for"  # only busy accounts ask for it
    with archived_after(monkeypatch, Reader, place, signed, directory):
        assert await asyncio.to_thread(read) == before


async def test_a_leaf_is_proved_where_it_is_archived_meanwhile(signed, directory, monkeypatch):
    leaf = (await all_leaves(signed))[5]
    with archived_after(monkeypatch, Reader, "_checkpoint_for", signed, directory):
        found = await signed.as_("").inclusion(pb.InclusionProofRequest(index=5))
        assert found.entry.body == leaf.body


@pytest.mark.parametrize("place", ["check_books", "open_engine"])
async def test_fsck_finds_nothing_where_it_is_archived_meanwhile(
    signed, directory, monkeypatch, place
):
    owner = fsck_module if place == "check_books" else reports
    with archived_after(monkeypatch, owner, place, signed, directory):
        found = await asyncio.to_thread(
            reports.fsck, signed.url, None, show_progress=False, archive=directory
        )
        assert found.problems == []


async def test_a_missing_part_of_the_archive_is_an_error_and_no_gap(signed, start, directory):
    bench = signed
    run(bench, directory)
    (file,) = directory.iterdir()
    file.rename(directory / "hidden")
    await settled(bench, start, directory)
    with pytest.raises(StorageError, match="lacks leaves"):
        await bench.as_("").read_log(0)
    with pytest.raises(StorageError, match="lacks leaves"):
        await bench.as_("admin").transfers("client:acme")
    (directory / "hidden").rename(file)
    assert (await bench.as_("").read_log(0)).entries


async def test_readers_see_everything_while_runs_follow_each_other(signed, directory, monkeypatch):
    monkeypatch.setattr(archiving, "BATCH", 5)
    bench, stop, problems, rounds = signed, threading.Event(), [], []
    leaves = await all_leaves(bench)
    statement = await asyncio.to_thread(
        reports.statement, bench.url, "clearing:acme", 10_000, directory
    )

    def read():
        reader = Reader(make_engine(normal_url(bench.url)), directory)
        while not stop.is_set():
            found, place = [], 0
            while place < len(leaves):
                page = reader.read_log(place, 200, ())
                found += page.entries
                place = page.next_index
            if found[: len(leaves)] != leaves:
                problems.append("the log")
            rows = reports.statement(bench.url, "clearing:acme", 10_000, directory)
            if rows[: len(statement)] != statement:
                problems.append("a statement")
            if fsck(bench.url, bench.world, directory).problems:
                problems.append("fsck")
            rounds.append(1)
        reader.close()

    thread = threading.Thread(target=read)
    thread.start()
    bench.archived = directory
    engine = make_engine(normal_url(bench.url))
    try:
        for _ in range(4):
            before = len(rounds)
            await requests(bench, 8)
            await asyncio.sleep(1.2)  # a checkpoint
            await asyncio.to_thread(archive, engine, directory, LONG_AFTER)
            for _ in range(1200):
                if len(rounds) > before or problems:
                    break
                await asyncio.sleep(0.05)
    finally:
        stop.set()
        await asyncio.to_thread(thread.join)
        engine.dispose()
    assert not problems and len(rounds) >= 4


async def test_a_second_run_at_the_same_time_is_refused_and_leaves_no_file(
    busy, start, directory, monkeypatch
):
    """Files of two runs that overlap would make the whole directory unreadable."""
    busy.advance(1000)
    between = busy.clock.now_unix_ms()
    await requests(busy, 40)
    await settled(busy, start)
    real, refused = archiving._sync, []

    def sync(path):
        if not refused:
            refused.append(True)
            with pytest.raises(Unavailable):
                run(busy, directory)
        real(path)

    monkeypatch.setattr(archiving, "_sync", sync)
    assert run(busy, directory, between).leaves
    assert refused
    assert run(busy, directory).leaves
    assert len(Archive(directory, busy.world.market_id).parts) == 2
