"""Kills with -9 at chosen steps of a ledger's database work, and checks what is left.

``Crasher`` is a process that imports everything once and forks victims for each round. A victim
runs a real ledger on a real database under a deterministic load, and sends every operation until
it is answered, as clients do after a lost answer. Before or after a given step of its database
work it kills itself, its PostgreSQL session (the server then recovers from its log), or the whole
PostgreSQL. Of two victims on one database the second is the standby. What any of them acknowledged
must never be lost, and nothing may happen twice: ``fsck`` and the balances at the end tell.

A boundary is before or after a step, by what the step does: "insert leg, before". The load has as
many as it has such steps; ``boundaries`` of an undisturbed life counts them, so that every one of
them can be the place of a kill.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
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


# Steps that do nothing without rows or keys, their last argument.
_BULK = frozenset({"by_keys", "insert", "update", "upsert"})
_TABLE = re.compile(r"\b(?:FROM|INTO|UPDATE)\s+(\w+)")


class _Clock(SystemClock):
    """Real waiting, wall time by hand: every run makes the same operations at the same times."""

    def __init__(self) -> None:
        self.offset_ms = 0

    def now_unix_ms(self) -> int:
        return START_UNIX_MS + self.offset_ms


class Kill(NamedTuple):
    """At which boundary from now on, and what dies then: "self", the "session" at PostgreSQL, or
    the whole "server". With ``at`` only boundaries of that name count. Step 0 never comes."""

    step: int
    what: str = "self"
    at: str = ""


class _Fatal:
    """A backend that carries out the next kill before or after the step that is its turn."""

    def __init__(self, inner: Backend, kills: _Kills) -> None:
        self._inner, self._kills = inner, kills

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if name not in _STEPS:
            return method

        def stepped(*arguments: Any) -> Any:
            if name in _BULK and not arguments[-1]:
                return method(*arguments)
            what = _name_of(name, arguments)
            self._kills.step(self._inner, f"{what}, before")
            result = method(*arguments)
            self._kills.step(self._inner, f"{what}, after")
            return result

        return stepped


def _name_of(verb: str, arguments: Sequence[Any]) -> str:
    """What a step does: "insert leg", "query pending", "commit"."""
    if verb in ("insert", "update", "upsert"):
        return f"{verb} {arguments[0]}"
    if verb in ("query", "by_keys"):
        found = _TABLE.search(arguments[0])
        return f"{verb} {found[1] if found else 'nothing'}"
    return verb


class _Kills:
    """The kills of one victim, in order. One that strikes the database leaves the victim alive, and
    the next is counted from there."""

    def __init__(
        self, kills: Sequence[Kill], tell: Callable[[str], None], *, armed: bool = True
    ) -> None:
        self._left, self._tell = list(kills), tell
        self._countdown = self._left[0].step if self._left else 0
        # Until then nothing counts.
        self.armed = armed
        self.boundaries: Counter[str] = Counter()

    def step(self, backend: Backend, boundary: str) -> None:
        """One boundary between two steps."""
        self.boundaries[boundary] += 1
        if not self.armed or not self._left or self._left[0].at not in ("", boundary):
            return
        self._countdown -= 1
        if self._countdown != 0:
            return
        kill = self._left.pop(0)
        self._countdown = self._left[0].step if self._left else 0
        self._tell(f"kill {time.monotonic()} {kill.what} {boundary}")
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
    # When each wave is sent, since the start; waves behind the last one have its time.
    times_ms: list[int] = field(default_factory=lambda: [0])
    # Codes with which an operation may be refused.
    refusals: frozenset[str] = frozenset()

    def flat(self) -> list[tuple[str, pb.Operation]]:
        return [each for wave in self.waves for each in wave]

    def time_ms(self, wave: int) -> int:
        """When this wave is sent, since the start."""
        return self.times_ms[min(wave, len(self.times_ms) - 1)]


def make_load() -> Load:
    """Every operation that there is (but for reinstatements): the same every time."""
    world = World(verifiers=2)
    router, admin, verifier = (world.identity(r) for r in ("router", "admin", "verifier"))
    first = [(router, world.publish(n.key_event)) for n in world.node]
    first += [(admin, world.deposit(f"c{i}", 20 * CREDIT)) for i in range(4)]
    first += [(admin, world.bond(n.identity, CREDIT)) for n in world.node]
    first += [(admin, world.limit("key", 100 * CREDIT))]
    holds = [
        world.hold(f"c{i % 4}", CREDIT, api_key="key" if i % 8 == 0 else "")
        for i in range(REQUESTS)
    ]
    captures = [world.capture(h.id, Leg(world.node[i % 3])) for i, h in enumerate(holds)]
    ends = [
        (router, world.void(h.id) if i % 5 == 4 else c)
        for i, (h, c) in enumerate(zip(holds, captures, strict=True))
    ]
    judged = {i: digest_of(captures[i].capture.receipts[0]) for i in (0, 7)}
    asked = [(verifier, world.request(digest)) for digest in judged.values()]
    refunds = [world.refund(digest, world.node[i % 3].identity) for i, digest in judged.items()]
    rewards = [(admin, world.reward(digest_of(r.refund.verdict), 10)) for r in refunds]
    waves = [first, [(router, h) for h in holds], ends, asked, [(verifier, r) for r in refunds]]
    waves.append(rewards)
    waves += _conviction(world, sum(_leaves(op) for wave in waves for _, op in wave))
    later, times_ms = _later(world)
    return Load(world, [*waves, *later], [0] * len(waves) + times_ms)


def _later(world: World) -> tuple[list[list[tuple[str, pb.Operation]]], list[int]]:
    """What takes time: a claim paid at expiry, a hold that nobody ends, released earnings that are
    paid out, a bond that is withdrawn. With the time of each wave."""
    router, admin = world.identity("router"), world.identity("admin")
    one, other = world.node[0], world.node[1]
    kept, left = world.hold("c0", CREDIT), world.hold("c1", CREDIT)
    claim = world.claim(kept.id, world.evidence(kept.id, Leg(one), world.new_id()))
    paid, failed = world.payout(one.identity, 1_000), world.payout(other.identity, 2_000)
    over = START_UNIX_MS + 2 * world.window_ms
    withdrawal = world.withdraw(other.identity, CREDIT // 2, over)
    waves = [
        (0, [(router, kept), (router, left)]),
        (50_000, [(one.identity, claim)]),
        (world.window_ms, [(router, world.expire())]),
        (world.window_ms, [(admin, world.release(n.identity, 5_000)) for n in (one, other)]),
        (world.window_ms, [(admin, paid), (admin, failed), (other.identity, withdrawal)]),
        (world.window_ms, [(admin, world.settle(f.id, paid=f is paid)) for f in (paid, failed)]),
        (2 * world.window_ms, [(admin, world.settle(withdrawal.id))]),
    ]
    return [wave for _, wave in waves], [at for at, _ in waves]


def make_race() -> Load:
    """64 holds on a balance for exactly half of them."""
    world = World()
    router, admin = world.identity("router"), world.identity("admin")
    holds = [(router, world.hold("acme", CREDIT)) for _ in range(64)]
    deposit = world.deposit("acme", 32 * CREDIT)
    return Load(world, [[(admin, deposit)], holds], refusals=frozenset({"INSUFFICIENT_FUNDS"}))


_LOADS: dict[str, Callable[[], Load]] = {"life": make_load, "race": make_race}


def _conviction(world: World, leaves_before: int) -> list[list[tuple[str, pb.Operation]]]:
    """The conviction says where in the log its receipts are. So captures and requests come one by
    one: what is sent together is applied in any order."""
    cheat = world.node[2]
    router, verifier = world.identity("router"), world.identity("verifier")
    guilt = guilt_of(world, cheat, "c0")
    first = leaves_before + 1 + len(guilt.holds)
    receipts = [first + 3 * number for number in range(len(guilt.captures))]
    convict = convict_by(world, conviction_of(world, cheat, receipts))
    return [
        [(verifier, guilt.calibration)],
        [(router, hold) for hold in guilt.holds],
        *([(router, capture)] for capture in guilt.captures),
        *([(verifier, request)] for request in guilt.requests),
        [(verifier, commitment) for commitment in guilt.commitments],
        [(verifier, verdict) for verdict in guilt.verdicts],
        [(verifier, convict)],
    ]


def _leaves(operation: pb.Operation) -> int:
    """How many it makes: one for its transfers or its evidence, but for these."""
    if operation.HasField("capture"):
        return 2 + len(operation.capture.receipts)
    if operation.HasField("refund"):
        return 2
    return 0 if operation.HasField("set_spending_limit") else 1


async def run_load(
    load: Load,
    url: str,
    acknowledge: Callable[[bytes], None],
    *,
    standby: bool = False,
    started: Callable[[], None] = lambda: None,
    before_wave: Callable[[int], None] = lambda _: None,
) -> None:
    """Sends everything, each wave concurrently and each operation until it is answered, and tells
    what was acknowledged."""
    clock = _Clock()
    ledger = Ledger(load.world.market, load.world.signers["ledger"], url, clock)
    await _start(ledger, standby)
    started()

    async def send(caller: str, operation: pb.Operation) -> None:
        result = await _until_answered(ledger, caller, operation)
        if result.status != pb.Result.REFUSED:
            acknowledge(operation.id)
        elif result.code not in load.refusals:
            raise TrueweightError(f"{result.code}: {result.message}")

    for number, wave in enumerate(load.waves):
        await asyncio.to_thread(before_wave, number)
        clock.offset_ms = load.time_ms(number)
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


@dataclass(frozen=True)
class _Order:
    """One victim's: what it sends where, and what it kills."""

    url: str
    load: str
    kills: Sequence[Kill]
    standby: bool
    # A pipe through which the standby tells the writer that it is up. The writer waits for that
    # with all but its first wave, and what it kills is counted from there. (-1, -1): no waiting.
    gate: tuple[int, int]


def _victim(order: _Order, out: int) -> None:
    waiting, opening = order.gate
    is_gated = waiting >= 0 and not order.standby
    counted = _Kills(order.kills, lambda text: _write(out, f"{text}\n"), armed=not is_gated)
    # The service opens its backend by this name; the victim's is wrapped.
    vars(service_module)["open_backend"] = lambda url_: _Fatal(open_backend(url_), counted)
    acknowledge = lambda id_: _write(out, f"{id_.hex()} {time.monotonic()}\n")  # noqa: E731

    def started() -> None:
        if order.standby and opening >= 0:
            os.write(opening, b"!")

    def before_wave(number: int) -> None:
        if is_gated and number == 1:
            os.read(waiting, 1)
            counted.armed = True

    load = _LOADS[order.load]()
    asyncio.run(
        run_load(
            load,
            order.url,
            acknowledge,
            standby=order.standby,
            started=started,
            before_wave=before_wave,
        )
    )
    lines = [f"boundary {count} {name}\n" for name, count in counted.boundaries.items()]
    _write(out, "".join(["end\n", *lines]))


def _write(out: int, text: str) -> None:
    os.write(out, text.encode())


def serve() -> None:
    """Reads {"url", "victims": [[[step, what, at], ...], ...], "load", "gate"} lines; answers each
    with a list of the victims' lives, see ``_life_of``."""
    for line in sys.stdin:
        order = json.loads(line)
        gate = os.pipe() if order["gate"] else (-1, -1)
        started: list[tuple[int, int]] = []
        for kills in order["victims"]:
            made = [Kill(*kill) for kill in kills]
            started.append(_fork(_Order(order["url"], order["load"], made, bool(started), gate)))
        answers = [_life_of(*each) for each in started]
        for end in gate:
            if end >= 0:
                os.close(end)
        print(json.dumps(answers), flush=True)  # noqa: T201


def _fork(order: _Order) -> tuple[int, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            if order.standby:
                time.sleep(_STANDBY_AFTER_S)
            _victim(order, writing)
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    os.close(writing)
    return child, reading


def _life_of(child: int, reading: int) -> dict[str, Any]:
    """Whether it "died" or "ended", "kills" as (when, what, boundary), what it "acknowledged" as
    {id: when}, and how often it came by each of its "boundaries", if it ended."""
    with os.fdopen(reading) as answers:
        lines = [line.split(maxsplit=1) for line in answers.read().splitlines()]
    _, status = os.waitpid(child, 0)
    kills = [rest[0].split(maxsplit=2) for word, *rest in lines if word == "kill"]
    passed = [rest[0].split(maxsplit=1) for word, *rest in lines if word == "boundary"]
    return {
        "died": os.WIFSIGNALED(status),
        "status": status,
        "kills": [(float(when), what, name) for when, what, name in kills],
        "acknowledged": {w: float(rest[0]) for w, *rest in lines if len(w) == 2 * ID_BYTES},
        "ended": ["end"] in lines,
        "boundaries": {name: int(count) for count, name in passed},
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

    def round(
        self, url: str, *victims: Sequence[Kill], load: str = "life", gate: bool = False
    ) -> list[dict[str, Any]]:
        """The lives of some victims on one database, all but the first as standbys. With a gate
        the first one goes on after its first wave, and may be killed, when a standby is up."""
        if self._process.stdin is None or self._process.stdout is None:
            raise TrueweightError("the crasher has no pipes")
        order = {"url": url, "victims": victims, "load": load, "gate": gate}
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


def problems(url: str, acknowledged: Iterable[str]) -> list[str]:
    """What is wrong with the books after a kill: fsck's findings and lost acknowledgements."""
    market_id = World().market_id
    engine = make_engine(normal_url(url))
    try:
        found = check(engine, market_id).problems
        with engine.connect() as connection:
            known = {
                bytes(row[0]).hex()
                for row in connection.exec_driver_sql("SELECT id FROM operation")
            }
    finally:
        engine.dispose()
    return found + [
        f"operation {id_} was acknowledged and is lost" for id_ in set(acknowledged) - known
    ]


if __name__ == "__main__":
    serve()
