"""Recomputing everything: balances from transfers, the log from its leaves, one from the other.

Each half streams the database once, in one read snapshot; large books are checked by two processes
at once. Findings are sentences; none means that every stored number follows from immutable history
and that no leaf was changed, dropped, added or moved. With a market key, the signatures of the
checkpoints are checked as well: only they tell a consistent forgery of the whole database from the
truth.

Rows may hold anything: what a check cannot work with is a finding too, never an error.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from ctypes import c_longlong
from typing import Any

import sqlalchemy as sa

from trueweight.ledger.archived import Archive, archive_at
from trueweight.ledger.findings import Findings, Progress, to_the_end
from trueweight.ledger.fsck_books import check_books
from trueweight.ledger.fsck_log import check_log
from trueweight.ledger.schema import make_engine
from trueweight.protos.errors import StorageError

# Starting a process takes about a second.
_WORTH_A_PROCESS = 200_000
# How often the other process is asked how far it is.
_LOOK_S = 0.5


@contextmanager
def _rarely_collecting() -> Iterator[None]:
    """Rows are many and form no cycles: looking for them all the time takes a quarter as long as
    the checks."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@_rarely_collecting()
def check(
    engine: sa.Engine,
    market_id: str,
    ledger_keys: list[bytes] | None = None,
    progress: Progress = lambda *_: None,
    archive: Archive | None = None,
) -> Findings:
    """All checks. ``ledger_keys`` are public keys that may have signed checkpoints; None skips
    their signatures. What was archived is checked as if it had never left."""
    findings = Findings()
    transfers = 0
    with to_the_end(findings, "the books"), engine.connect() as connection:
        archive_at(connection, archive)
        transfers = connection.execute(sa.text("SELECT MAX(sequence) FROM transfer")).scalar() or 0
    if not findings.clean:
        return findings
    if transfers < _WORTH_A_PROCESS:
        findings.include(check_books(engine, archive, progress))
        findings.include(check_log(engine, market_id, ledger_keys, progress, archive))
        return findings
    context = multiprocessing.get_context("spawn")
    folded = context.RawValue(c_longlong, 0)
    with ProcessPoolExecutor(1, context, _share, (folded,)) as other:
        books = other.submit(_check_books, engine.url, archive)
        log = check_log(engine, market_id, ledger_keys, progress, archive)
        while not wait([books], _LOOK_S).done:
            progress("transfers", folded.value, transfers)
        findings.include(_result(books))
    findings.include(log)
    return findings


def _result(books: Future[Findings]) -> Findings:
    try:
        return books.result()
    except BrokenExecutor:
        raise StorageError("the process that checks the balances was killed") from None


# In the other process: how many transfers it has folded, as the first one sees it.
_folded: Any = None


def _share(folded: Any) -> None:
    global _folded  # noqa: PLW0603
    _folded = folded


@_rarely_collecting()
def _check_books(url: sa.URL, archive: Archive | None) -> Findings:
    engine = make_engine(url)

    def note(_: str, done: int, __: int) -> None:
        _folded.value = done

    try:
        return check_books(engine, archive, note)
    finally:
        engine.dispose()
