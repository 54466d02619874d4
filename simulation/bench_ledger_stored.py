"""``make bench-ledger`` on a filled database: bytes, fsck and proofs; and filling it."""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from dataclasses import replace

import click

from trueweight.ledger.fsck import check
from trueweight.ledger.prepare import prepare
from trueweight.ledger.schema import make_engine, normal_url
from trueweight.ledger.service import Ledger
from trueweight.protos import merkle
from trueweight.protos.errors import TrueweightError
from trueweight.protos.identity import KeyRing
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.runtime.clock import SystemClock
from trueweight.simulation.bench_ledger_load import (
    Pairs,
    drive,
    fresh_world,
    fund,
    make_ledger,
    submitter,
)


def stored_bytes(url: str) -> int:
    """Size of the database, log included."""
    engine = make_engine(normal_url(url))
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            pages, size = (
                connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
                for name in ("page_count", "page_size")
            )
            total = pages * size
        else:
            total = connection.exec_driver_sql(
                "SELECT pg_database_size(current_database())"
            ).scalar_one()
    engine.dispose()
    return int(total)


def fsck_seconds(url: str) -> tuple[float, int]:
    """Seconds of a whole check, and how many requests it covered."""
    engine = make_engine(normal_url(url))
    started = time.perf_counter()
    findings = check(engine, fresh_world().market_id)
    taken = time.perf_counter() - started
    engine.dispose()
    if not findings.clean:
        raise TrueweightError(f"fsck found: {findings.problems[:3]}")
    return taken, findings.counts["holds"]


async def proof_ms(url: str) -> dict[str, float]:
    """Latency of inclusion proofs over the whole log, each checked."""
    world = fresh_world()
    ledger = Ledger(world.market, world.signers["ledger"], url, SystemClock())
    await ledger.start()
    await asyncio.sleep(1.5)
    checkpoint = await ledger.checkpoint()
    taken = []
    for step in range(200):
        index = step * checkpoint.size // 200
        request = pb.InclusionProofRequest(index=index, tree_size=checkpoint.size)
        started = time.perf_counter()
        answer = await ledger.inclusion(request)
        taken.append((time.perf_counter() - started) * 1000)
        leaf = merkle.leaf_hash(answer.entry.body)
        path = list(answer.proof.path)
        merkle.verify_inclusion(leaf, index, checkpoint.size, path, checkpoint.root)
    await ledger.close()
    taken.sort()
    return {
        "proof_p50_ms": taken[100],
        "proof_p99_ms": taken[198],
        "proof_leaves": checkpoint.size,
    }


def fdatasync_ms(directory: str) -> float:
    """Median of 200 fdatasyncs of 4 KiB appends where the databases lie."""
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        taken = []
        for _ in range(200):
            file.write(b"x" * 4096)
            file.flush()
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            taken.append((time.perf_counter() - started) * 1000)
    return statistics.median(taken)


class _Trusting(KeyRing):
    """Takes every signature for good: what it lets through was signed by this very process."""

    def verify(self, operational_key_id: str, signature: bytes, message: bytes) -> str:
        return self.keys[operational_key_id][0]


async def fill(url: str, count: int) -> float:
    """Puts ``count`` requests through the real writer; seconds of it."""
    world = fresh_world()
    ledger = make_ledger(world, url)
    await ledger.start()
    await fund(ledger, world, 1000)
    ring = ledger.court.ring
    court = replace(ledger.court, ring=_Trusting(ring.keys, ring.sequences))
    router, step, taken = world.identity("router"), 20_000, 0.0
    for done in range(0, count, step):
        world.now = SystemClock().now_unix_ms()
        pairs = Pairs(world, min(step, count - done), 1000)
        checked = [
            [prepare(o, router, court) for o in ops] for ops in (pairs.holds, pairs.captures)
        ]
        started = time.perf_counter()
        await drive(submitter(ledger), *checked)
        taken += time.perf_counter() - started
        click.echo(f"  {done + len(pairs.holds):,} requests", err=True)
    await ledger.close()
    return taken
