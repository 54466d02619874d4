"""The load of ``make bench-ledger``: holds and captures, made and signed before the clock runs.

In process with the evidence checked before (the *books*) or by the ledger (the *whole*), and over
gRPC to a server of its own.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from trueweight.ledger.prepare import prepare
from trueweight.ledger.service import Ledger
from trueweight.ledger.servicer import LedgerServer
from trueweight.ledger.values import Prepared
from trueweight.protos.errors import TrueweightError
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.keys import create_keys
from trueweight.runtime.ledger_port import GrpcLedger
from trueweight.runtime.rpc import AccessTokens, Authenticator
from trueweight.runtime.tls import ensure_certificate
from trueweight.simulation.ledger_world import Leg, World

_HOLD_NANO = 1_000_000
_WORKERS, _MICRO_BATCH = 16, 64
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
            world.hold(f"c{i % clients}", _HOLD_NANO, ttl_ms=3_600_000) for i in range(count)
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
    first = Pairs(world, _MICRO_BATCH, clients)
    for operations in (first.holds, first.captures):
        await router.apply(operations)


async def drive(apply: Apply, holds: Sequence[Any], captures: Sequence[Any]) -> float:
    """Pairs per second of 16 callers with micro-batches of 64."""
    places = iter(range(0, len(holds), _MICRO_BATCH))

    async def worker() -> None:
        for start in places:
            for operations in (holds, captures):
                for result in await apply(operations[start : start + _MICRO_BATCH]):
                    if getattr(result, "error", None) or getattr(result, "code", ""):
                        raise TrueweightError(f"an operation was refused: {result}")

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(_WORKERS)))
    return len(holds) / (time.perf_counter() - started)


def _cpu_s() -> float:
    """CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and its living descendants."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0  # it has just ended
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(_tree_cpu_s(int(child)) for child in children)


class _CpuMeter:
    """CPU per pair: of this process, of those that check evidence, and of the database server."""

    def __init__(self, server_pid: int = 0) -> None:
        self._server_pid = server_pid
        self._start = self._now()

    def _now(self) -> tuple[float, float, float]:
        own = _cpu_s()
        tree = sum(_tree_cpu_s(child) for child in _children_of_threads())
        return own, tree, _tree_cpu_s(self._server_pid) if self._server_pid else 0.0

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
    meter = _CpuMeter(server_pid)
    figures = {"books_pairs_per_s": await drive(submitter(ledger), *checked)}
    figures |= meter.per_pair("books", count)
    grown = (await ledger.read_log(0, 1, ())).tree_size - size
    figures["leaves_per_pair"] = grown / count
    figures["books_leaves_per_s"] = figures["books_pairs_per_s"] * grown / count
    pairs = Pairs(world, count, clients)
    meter = _CpuMeter(server_pid)
    whole = ledger.as_caller(router).apply
    figures["whole_pairs_per_s"] = await drive(whole, pairs.holds, pairs.captures)
    figures |= meter.per_pair("whole", count)
    figures["whole_leaves_per_s"] = figures["whole_pairs_per_s"] * grown / count
    rate = figures["whole_pairs_per_s"] / 4
    pairs = Pairs(world, max(400, int(rate * 3)), clients)
    figures |= await _latency(whole, pairs, rate)
    await ledger.close()
    return figures


def submitter(ledger: Ledger) -> Apply:
    """The way into the writer for operations that were checked elsewhere."""

    async def apply(operations: Sequence[Prepared]) -> Sequence[Any]:
        return await ledger.apply_prepared(operations)

    return apply


async def _latency(apply: Apply, pairs: Pairs, rate: float) -> dict[str, float]:
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
    before = _cpu_s()
    sys.stdout.write(json.dumps({"endpoint": server.endpoint, "pem": pem}) + "\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    sys.stdout.write(json.dumps({"cpu_s": _cpu_s() - before}) + "\n")
    await server.stop()
    await ledger.close()


async def measure_grpc(url: str, count: int) -> dict[str, float]:
    """The same load through GrpcLedger, which joins single calls into micro-batches."""
    world = fresh_world()
    keys = Path(tempfile.mkdtemp()) / "keys"
    create_keys(keys, world.market_id, SystemClock())
    child = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-m", "trueweight.simulation.bench_ledger", "--serve", url, str(keys)],
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
