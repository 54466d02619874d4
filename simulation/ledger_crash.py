"""Kills with -9 at chosen steps of a ledger's database work, and checks what is left.

``Crasher`` is a process that imports everything once and forks victims for each round. A victim
runs a real ledger on a real database under a deterministic load, and sends every operation until
it is answered, as clients do after a lost answer. Before or after a given step of its database
work it kills itself, its PostgreSQL session (the server then recovers from its log), or the whole
PostgreSQL. Of two victims on one database the second is the standby. What any of them acknowledged
must never be lost, and nothing may happen twice: ``fsck`` and the balances at the end tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trueweight.ledger import service as service_module
from trueweight.ledger.backend import Backend, open_backend
from trueweight.ledger.fsck import check
from trueweight.ledger.schema import make_engine, normal_url
from trueweight.ledger.service import Ledger
from trueweight.protos.envelope import digest_of
from trueweight.protos.errors import TrueweightError, Unavailable
from trueweight.protos.ids import ID_BYTES
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.runtime.clock import SystemClock
from trueweight.simulation.ledger_guilt import convict_by, conviction_of, guilt_of
from trueweight.simulation.ledger_world import START_UNIX_MS, Leg, World

REQUESTS = 40
CREDIT = 10**9
_TRIES, _RETRY_S = 3_000, 0.02
# So that the first victim is the writer.
_STANDBY_AFTER_S = 0.15
_STEPS = ("begin", "query", "by_keys", "insert", "update", "upsert", "commit")


class _Clock(SystemClock):
    """Real waiting, fixed wall time: every run makes the same operations."""

    def now_unix_ms(self) -> int:
        return START_UNIX_MS


class Kill(NamedTuple):
    """Before or after which step from now, counted in boundaries, and what dies then: "self", the
    "session" at PostgreSQL, or the whole "server". Step 0 never comes."""

    step: int
    what: str = "self"


class _Fatal:
    """A backend that carries out the next kill before or after the step that is its turn."""

    def __init__(self, inner: Backend, kills: _Kills) -> None:
        self._inner, self._kills = inner, kills

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if name not in _STEPS:
            return method

        def stepped(*arguments: Any) -> Any:
            self._kills.step(self._inner)
            result = method(*arguments)
            self._kills.step(self._inner)
            return result

        return stepped


class _Kills:
    """The kills of one victim, in order. One that strikes the database leaves the victim alive, and
    the next is counted from there."""

    def __init__(self, kills: Sequence[Kill], tell: Callable[[str], None]) -> None:
        self._left, self._tell = list(kills), tell
        self._countdown = self._left[0].step if self._left else 0
        self.steps = 0

    def step(self, backend: Backend) -> None:
        """One boundary between two steps."""
        self.steps += 1
        self._countdown -= 1
        if self._countdown != 0:
            return
        kill = self._left.pop(0)
        self._countdown = self._left[0].step if self._left else 0
        self._tell("kill")
        if kill.what == "self":
            os.kill(os.getpid(), signal.SIGKILL)
        _kill_postgresql(backend, whole=kill.what == "server")


def _kill_postgresql(backend: Backend, *, whole: bool) -> None:
    connection = vars(backend)["_connection"]
    session = connection.info.backend_pid
    victim = _parent_of(session) if whole else session
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    # The statement that follows must meet a dead session, not one that is about to die.
    for _ in range(1_000):
        if not _is_alive(session):
            return
        time.sleep(0.002)


def _parent_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
        return int(file.read().rpartition(")")[2].split()[1])


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@dataclass(frozen=True)
class Load:
    """The operations of a run, in waves; those of one wave are sent concurrently."""

    world: World
    waves: list[list[tuple[str, pb.Operation]]]

    def flat(self) -> list[tuple[str, pb.Operation]]:
        return [each for wave in self.waves for each in wave]


def make_load() -> Load:
    """Deposits, holds, captures, voids, refunds and a conviction: the same every time."""
    # Two verifiers: what a conviction says of log indices is not the same in every run.
    world = World(verifiers=2)
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
    judged = {i: digest_of(captures[i].capture.receipts[0]) for i in (0, 7)}
    asked = [(verifier, world.request(digest)) for digest in judged.values()]
    refunds = [
        (verifier, world.refund(digest, world.node[i % 3].identity)) for i, digest in judged.items()
    ]
    waves = [first, [(router, h) for h in holds], ends, asked, refunds]
    return Load(world, [*waves, *_conviction(world)])


def _conviction(world: World) -> list[list[tuple[str, pb.Operation]]]:
    cheat = world.node[2]
    router, verifier = world.identity("router"), world.identity("verifier")
    guilt = guilt_of(world, cheat, "c0")
    convict = convict_by(world, conviction_of(world, cheat, [1, 2, 3]))
    return [
        [(verifier, guilt.calibration)],
        [(router, hold) for hold in guilt.holds],
        [(router, capture) for capture in guilt.captures],
        [(verifier, request) for request in guilt.requests],
        [(verifier, verdict) for verdict in guilt.verdicts],
        [(verifier, convict)],
    ]


async def run_load(
    load: Load, url: str, acknowledge: Callable[[bytes], None], *, standby: bool = False
) -> None:
    """Sends everything, each wave concurrently and each operation until it is answered, and tells
    what was acknowledged."""
    ledger = Ledger(load.world.market, load.world.signers["ledger"], url, _Clock())
    await _start(ledger, standby)

    async def send(caller: str, operation: pb.Operation) -> None:
        result = await _until_answered(ledger, caller, operation)
        if result.status == pb.Result.REFUSED:
            raise TrueweightError(f"{result.code}: {result.message}")
        acknowledge(operation.id)

    for wave in load.waves:
        await asyncio.gather(*(send(*each) for each in wave))
    await ledger.close()


async def _start(ledger: Ledger, standby: bool) -> None:
    """A process that finds its database recovering is started again by its supervisor."""
    for _ in range(_TRIES):
        try:
            await ledger.start(0 if standby else 10_000)
            return
        except TrueweightError as error:
            if not error.retryable:
                raise
            await asyncio.sleep(_RETRY_S)
    raise Unavailable("the database never came back")


async def _until_answered(ledger: Ledger, caller: str, operation: pb.Operation) -> pb.Result:
    for _ in range(_TRIES):
        try:
            return (await ledger.as_caller(caller).apply([operation]))[0]
        except TrueweightError as error:
            if not error.retryable:
                raise
        await asyncio.sleep(_RETRY_S)
    raise Unavailable("nobody answered for a minute")


def _victim(url: str, kills: Sequence[Kill], out: int, *, standby: bool) -> None:
    counted = _Kills(kills, lambda text: _write(out, f"{text}\n"))
    # The service opens its backend by this name; the victim's is wrapped.
    vars(service_module)["open_backend"] = lambda url_: _Fatal(open_backend(url_), counted)
    acknowledge = lambda id_: _write(out, f"{id_.hex()}\n")  # noqa: E731
    asyncio.run(run_load(make_load(), url, acknowledge, standby=standby))
    _write(out, f"end\n{counted.steps} steps\n")


def _write(out: int, text: str) -> None:
    os.write(out, text.encode())


def serve() -> None:
    """Reads {"url", "victims": [[[step, what], ...], ...]} lines; answers a list with one
    {"died", "kills", "acknowledged", "ended", "steps"} for each victim."""
    for line in sys.stdin:
        order = json.loads(line)
        started: list[tuple[int, int]] = []
        for kills in order["victims"]:
            started.append(_fork(order["url"], [Kill(*k) for k in kills], standby=bool(started)))
        answers = [_life_of(*each) for each in started]
        print(json.dumps(answers), flush=True)  # noqa: T201


def _fork(url: str, kills: Sequence[Kill], *, standby: bool) -> tuple[int, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            if standby:
                time.sleep(_STANDBY_AFTER_S)
            _victim(url, kills, writing, standby=standby)
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    os.close(writing)
    return child, reading


def _life_of(child: int, reading: int) -> dict[str, Any]:
    with os.fdopen(reading) as answers:
        lines = answers.read().splitlines()
    _, status = os.waitpid(child, 0)
    steps = [int(line.split()[0]) for line in lines if line.endswith(" steps")]
    return {
        "died": os.WIFSIGNALED(status),
        "status": status,
        "kills": lines.count("kill"),
        "acknowledged": [line for line in lines if len(line) == 2 * ID_BYTES],
        "ended": "end" in lines,
        "steps": steps[0] if steps else 0,
    }


class Crasher:
    """Starts the forking process; ``round`` kills one victim."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trueweight.simulation.ledger_crash"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def round(self, url: str, *victims: Sequence[Kill]) -> list[dict[str, Any]]:
        """The lives of some victims on one database, all but the first as standbys."""
        if self._process.stdin is None or self._process.stdout is None:
            raise TrueweightError("the crasher has no pipes")
        order = {"url": url, "victims": victims}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise TrueweightError("the crasher is gone")
        answers: list[dict[str, Any]] = json.loads(line)
        return answers

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
