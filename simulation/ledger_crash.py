"""Kills a ledger with -9 at a chosen step, again and again, and checks what is left.

``Crasher`` is a process that imports everything once and forks a victim for each round. The
victim runs a real ledger on a real database under a deterministic load, sends all operations
again (as clients do after a lost answer), and dies with SIGKILL before or after a given step of
its database work. What it acknowledged before it died must never be lost, and nothing may happen
twice: ``fsck`` and the balances at the end tell.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trueweight.ledger import service as service_module
from trueweight.ledger.backend import Backend, open_backend
from trueweight.ledger.fsck import check
from trueweight.ledger.schema import make_engine, normal_url
from trueweight.ledger.service import Ledger
from trueweight.protos.envelope import digest_of
from trueweight.protos.errors import TrueweightError
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.runtime.clock import SystemClock
from trueweight.simulation.ledger_world import START_UNIX_MS, Leg, World

REQUESTS = 40
CREDIT = 10**9
_STEPS = ("begin", "query", "by_keys", "insert", "update", "upsert", "commit")


class _Clock(SystemClock):
    """Real waiting, fixed wall time: every run makes the same operations."""

    def now_unix_ms(self) -> int:
        return START_UNIX_MS


class _Fatal:
    """A backend that kills the process before or after its n-th step."""

    def __init__(self, inner: Backend, at: list[int]) -> None:
        self._inner, self._at = inner, at

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if name not in _STEPS:
            return method

        def stepped(*arguments: Any) -> Any:
            self._step()
            result = method(*arguments)
            self._step()
            return result

        return stepped

    def _step(self) -> None:
        self._at[0] -= 1
        if self._at[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Load:
    """The operations of a run, in waves; those of one wave are sent concurrently."""

    world: World
    waves: list[list[tuple[str, pb.Operation]]]

    def flat(self) -> list[tuple[str, pb.Operation]]:
        return [each for wave in self.waves for each in wave]


def make_load() -> Load:
    """Deposits, holds, captures, voids, refunds and a conviction: the same every time."""
    world = World()
    router, admin, verifier = (world.identity(r) for r in ("router", "admin", "verifier"))
    first = [(router, world.publish(n.key_event)) for n in world.node]
    first += [(admin, world.deposit(f"c{i}", 20 * CREDIT)) for i in range(4)]
    first += [(admin, world.bond(n.identity, CREDIT)) for n in world.node]
    holds = [world.hold(f"c{i % 4}", CREDIT) for i in range(REQUESTS)]
    captures = [world.capture(h.id, Leg(world.node[i % 3])) for i, h in enumerate(holds)]
    ends = [
        (router, world.void(h.id) if i % 5 == 4 else c)
        for i, (h, c) in enumerate(zip(holds, captures, strict=True))
    ]
    refunds = [
        (
            verifier,
            world.refund(digest_of(captures[i].capture.receipts[0]), world.node[i % 3].identity),
        )
        for i in (0, 7)
    ]
    waves = [first, [(router, h) for h in holds], ends, refunds]
    waves.append([(verifier, world.convict(world.node[2].identity, 0))])
    return Load(world, waves)


async def run_load(load: Load, url: str, acknowledge: Callable[[bytes], None]) -> None:
    """Sends everything, each wave concurrently, and tells what was acknowledged."""
    ledger = Ledger(load.world.market, load.world.signers["ledger"], url, _Clock())
    await ledger.start()

    async def send(caller: str, operation: pb.Operation) -> None:
        (result,) = await ledger.as_caller(caller).apply([operation])
        if result.status == pb.Result.REFUSED:
            raise TrueweightError(f"{result.code}: {result.message}")
        acknowledge(operation.id)

    for wave in load.waves:
        await asyncio.gather(*(send(*each) for each in wave))
    await ledger.close()


def _victim(url: str, kill_at: int, out: int) -> None:
    countdown = [kill_at]
    # The service opens its backend by this name; the victim's is wrapped.
    vars(service_module)["open_backend"] = lambda url_: _Fatal(open_backend(url_), countdown)
    asyncio.run(run_load(make_load(), url, lambda id_: _write(out, f"{id_.hex()}\n")))
    _write(out, "end\n")


def _write(out: int, text: str) -> None:
    os.write(out, text.encode())


def serve() -> None:
    """Reads {"url", "kill_at"} lines; answers {"killed", "acknowledged", "ended"} lines."""
    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                _victim(order["url"], order["kill_at"], writing)
            finally:
                os._exit(1 if sys.exc_info()[0] else 0)
        os.close(writing)
        with os.fdopen(reading) as answers:
            lines = answers.read().split()
        _, status = os.waitpid(child, 0)
        print(  # noqa: T201
            json.dumps(
                {
                    "killed": os.WIFSIGNALED(status),
                    "status": status,
                    "acknowledged": [text for text in lines if text != "end"],
                    "ended": "end" in lines,
                }
            ),
            flush=True,
        )


class Crasher:
    """Starts the forking process; ``round`` kills one victim."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trueweight.simulation.ledger_crash"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def round(self, url: str, kill_at: int) -> dict[str, Any]:
        """One victim's life. ``kill_at`` 0: it may live."""
        if self._process.stdin is None or self._process.stdout is None:
            raise TrueweightError("the crasher has no pipes")
        self._process.stdin.write(json.dumps({"url": url, "kill_at": kill_at}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise TrueweightError("the crasher is gone")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(10)


def problems(url: str, acknowledged: set[str]) -> list[str]:
    """What is wrong with the books after a kill: fsck's findings and lost acknowledgements."""
    load = make_load()
    engine = make_engine(normal_url(url))
    try:
        found = check(engine, load.world.market_id).problems
        with engine.connect() as connection:
            known = {
                bytes(row[0]).hex()
                for row in connection.exec_driver_sql("SELECT id FROM operation")
            }
    finally:
        engine.dispose()
    return found + [f"operation {id_} was acknowledged and is lost" for id_ in acknowledged - known]


if __name__ == "__main__":
    serve()
