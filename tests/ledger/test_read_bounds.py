"""Reads that take too long end, and give their threads back."""

from __future__ import annotations

import asyncio
import time

import pytest
import sqlalchemy as sa

from trueweight.ledger import deadline
from trueweight.ledger import service as service_module
from trueweight.ledger.archived import Part, _query
from trueweight.protos.errors import DeadlineExceeded, StorageError

CREDIT = 10**9
# Some hours of work for the database.
SLOW = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
    "SELECT COUNT(*) FROM n WHERE i < 0",
    "postgresql": "SELECT pg_sleep(10000)",
}


@pytest.fixture
def slow(bench):
    return sa.text(SLOW[bench.ledger._engine.dialect.name])


async def test_attack_slow_reads_do_not_keep_the_threads(bench, slow, monkeypatch):
    await bench.must("admin", bench.world.deposit("acme", CREDIT))
    reader = bench.ledger._reader
    monkeypatch.setattr(service_module, "_READ_TIMEOUT_S", 0.3)

    def read():
        return reader._rows(slow, {})

    def prove():
        return reader._with_tiles(lambda: reader._rows(slow, {}))

    # More than there are threads: the last ones are not even begun.
    reads = [bench.ledger._read(work) for work in (read, read, prove, prove) * 2]
    found = await asyncio.gather(*reads, return_exceptions=True)
    assert {type(error) for error in found} == {DeadlineExceeded}
    monkeypatch.undo()
    began = time.monotonic()
    assert await bench.available("client:acme") == CREDIT
    assert (await bench.as_("").read_log(0)).tree_size
    assert time.monotonic() - began < 5
    # Connections came back as they were.
    assert await asyncio.to_thread(_timeouts, bench.ledger._engine) <= {None, "0"}


def _timeouts(engine):
    if engine.dialect.name == "sqlite":
        return {None}
    with engine.connect() as one, engine.connect() as other:
        return {c.exec_driver_sql("SHOW statement_timeout").scalar() for c in (one, other)}


async def test_a_read_without_a_deadline_takes_as_long_as_it_takes(bench):
    reader = bench.ledger._reader
    assert deadline.left_s() is None
    with deadline.ends_by(time.monotonic() - 1):
        with pytest.raises(DeadlineExceeded):
            reader.size()
        with deadline.ends_by(time.monotonic() + 60):
            assert reader.size() == 0
        with pytest.raises(DeadlineExceeded):
            reader.size()
    assert reader.size() == 0
    with deadline.ends_by(time.monotonic() + 60), pytest.raises(StorageError):
        reader._rows(sa.text("SELECT nothing FROM nowhere"), {})


async def test_a_question_of_many_statements_sets_one_timeout_and_ends_in_time(bench, slow):
    await bench.must("admin", bench.world.deposit("acme", CREDIT))
    reader, sent = bench.ledger._reader, []
    listen = (
        bench.ledger._engine,
        "before_cursor_execute",
        lambda _, __, sql, *___: sent.append(sql),
    )
    sa.event.listen(*listen)
    with deadline.ends_by(time.monotonic() + 60):
        assert len(reader.transfers("fee:market", 0, 10).transfers) == 0
        assert len(reader.transfers("client:acme", 0, 10).transfers) == 1
    sa.event.remove(*listen)
    asked = [sql for sql in sent if sql.startswith("SELECT")]
    assert len(asked) == 2 + 3
    timeouts = [sql for sql in sent if "statement_timeout" in sql]
    assert len(timeouts) == (0 if bench.ledger._engine.dialect.name == "sqlite" else 2)
    # A later statement of a question that has run for a while has no more time than is left.
    began = time.monotonic()
    with deadline.ends_by(began + 1.2), pytest.raises(DeadlineExceeded), reader._moment():
        reader.size()
        time.sleep(0.7)  # noqa: ASYNC251
        reader._rows(slow, {})
    assert time.monotonic() - began < 5


async def test_attack_a_slow_read_of_the_archive_ends_too(tmp_path):
    part = Part(tmp_path / "x.archive", "m", 0, 1, 0, 1)
    part.path.touch()
    with deadline.ends_by(time.monotonic() + 0.2), pytest.raises(DeadlineExceeded):
        _query(part, SLOW["sqlite"], ())
