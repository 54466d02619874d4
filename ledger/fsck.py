"""Recomputing everything: balances from transfers, the log from its leaves, one from the other.

Each half streams the database once, in one read snapshot; large books are checked by two processes
at once. Findings are sentences; none means that every stored number follows from immutable history
and that no leaf was changed, dropped, added or moved. With a market key, the signatures of the
checkpoints are checked as well: only they tell a consistent forgery of the whole database from the
truth.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor

import sqlalchemy as sa

from trueweight.ledger.findings import Findings, Progress
from trueweight.ledger.fsck_books import check_books
from trueweight.ledger.fsck_log import check_log
from trueweight.ledger.schema import make_engine
from trueweight.protos.errors import StorageError

# Starting a process takes about a second.
_WORTH_A_PROCESS = 200_000


def check(
    engine: sa.Engine,
    market_id: str,
    ledger_keys: list[bytes] | None = None,
    progress: Progress = lambda *_: None,
) -> Findings:
    """All checks. ``ledger_keys`` are public keys that may have signed checkpoints; None skips
    their signatures."""
    findings = Findings()
    with engine.connect() as connection:
        transfers = connection.execute(sa.text("SELECT MAX(sequence) FROM transfer")).scalar() or 0
    if transfers < _WORTH_A_PROCESS:
        findings.include(check_books(engine))
        findings.include(check_log(engine, market_id, ledger_keys, progress))
        return findings
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        books = other.submit(_check_books, engine.url)
        log = check_log(engine, market_id, ledger_keys, progress)
        try:
            findings.include(books.result())
        except BrokenExecutor:
            raise StorageError("the process that checks the balances was killed") from None
    findings.include(log)
    return findings


def _check_books(url: sa.URL) -> Findings:
    engine = make_engine(url)
    try:
        return check_books(engine)
    finally:
        engine.dispose()
