"""The market behind ``make up``: a keeper process that runs it, and how others see it.

The keeper is detached from the terminal and supervises the roles; its state file says where the
market is. Roles die with the keeper, however it dies. A role that dies is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from trueweight.protos.errors import TrueweightError
from trueweight.runtime.keys import replace_private
from trueweight.simulation.market import LocalMarket
from trueweight.simulation.market_plan import ClientPlan, MarketSettings, NodePlan
from trueweight.simulation.supervisor import Running, Supervisor, group_is_alive, tail

NODES = (NodePlan("honest-dear", "0.30", "0.90"), NodePlan("honest-cheap", "0.24", "0.72"))
CLIENTS = (ClientPlan("you", "100"),)
STATE_FILE, KEEPER_LOG, ENV_FILE = "state.json", "market.log", "env"
STARTING, SERVING, FAILED = "starting", "serving", "failed"
RESTART_AFTER_S = (1.0, 2.0, 5.0, 15.0, 30.0)
# A role that served for so long is forgiven its earlier deaths.
FORGIVEN_AFTER_S = 300.0
END_WITHIN_S = 60.0
GONE_WITHIN_S = 10.0
_POLL_S = 0.1
MAX_SAID = 50


@dataclass(frozen=True)
class UpPlan:
    """What to run. ``model_id`` empty: the directory's name; ``licence`` empty: none is claimed."""

    model: str
    engine: str = "vllm"
    model_id: str = ""
    licence: str = ""
    engine_options: tuple[str, ...] = ()

    def to_json(self) -> str:
        """For ``from_json``; equal plans give equal text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> UpPlan:
        """What ``to_json`` wrote."""
        document = json.loads(text)
        return cls(**{**document, "engine_options": tuple(document["engine_options"])})


@dataclass(frozen=True)
class State:
    """What the keeper says of itself. ``plan`` is its UpPlan as JSON. ``groups``: process group by
    role. ``born``: start time of the keeper in clock ticks since boot, so that a re-used pid is
    not mistaken for it."""

    pid: int
    born: int
    status: str = STARTING
    base_url: str = ""
    api_key: str = ""
    model: str = ""
    has_chat: bool = True
    plan: str = ""
    error: str = ""
    said: tuple[str, ...] = ()
    groups: dict[str, int] = field(default_factory=dict)


def _write_state(directory: Path, state: State) -> None:
    """Replaces the state file; only its owner can read it, for the key in it."""
    replace_private(directory / STATE_FILE, json.dumps(asdict(state), indent=2).encode())


def write_environment(directory: Path, state: State) -> Path:
    """A file for a shell to read with ".": BASE_URL, API_KEY and MODEL. Its path."""
    values = {"BASE_URL": state.base_url, "API_KEY": state.api_key, "MODEL": state.model}
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in values.items()]
    replace_private(directory / ENV_FILE, "".join(lines).encode())
    return directory / ENV_FILE


def read_state(directory: Path) -> State | None:
    """The last state, None if there is none that can be read."""
    try:
        document = json.loads((directory / STATE_FILE).read_text())
        return State(**{**document, "said": tuple(document["said"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def keeper_is_alive(state: State) -> bool:
    """True if the process that wrote the state still runs."""
    return _born_at(state.pid) == state.born


def _born_at(pid: int) -> int | None:
    """Start time of a process in ticks since boot; None if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def start_keeper(directory: Path, plan: UpPlan) -> subprocess.Popen[bytes]:
    """Starts the keeper in a session of its own; it writes its state into ``directory``."""
    (directory / "logs").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "trueweight.simulation.background"]
    with (directory / "logs" / KEEPER_LOG).open("ab") as log:
        return subprocess.Popen(
            [*command, str(directory), plan.to_json()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=directory,
        )


def end_keeper(directory: Path) -> list[str]:
    """Ends the market of a directory; names of roles that are still alive (none, if all is well).

    Works on what a killed keeper left, too."""
    state = read_state(directory)
    if state is None:
        return []
    _end(state)
    groups = (read_state(directory) or state).groups

    def left() -> list[str]:
        return [name for name, group in groups.items() if group_is_alive(group)]

    _within(GONE_WITHIN_S, lambda: not left())
    remaining = left()
    if not remaining:
        for name in (STATE_FILE, ENV_FILE):
            (directory / name).unlink(missing_ok=True)
    return remaining


def abandon_keeper(keeper: subprocess.Popen[bytes], directory: Path) -> None:
    """Ends a keeper that this process has just started, also one that has not said a word yet."""
    keeper.terminate()
    try:
        keeper.wait(END_WITHIN_S)
    except subprocess.TimeoutExpired:
        keeper.kill()
        keeper.wait()
    end_keeper(directory)


def _end(keeper: State) -> None:
    if not keeper_is_alive(keeper):
        return
    os.kill(keeper.pid, signal.SIGTERM)
    if not _within(END_WITHIN_S, lambda: not keeper_is_alive(keeper)):
        os.kill(keeper.pid, signal.SIGKILL)


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


class Keeper:
    """Runs one market until SIGTERM."""

    def __init__(self, directory: Path, plan: UpPlan) -> None:
        self._directory = directory
        self._supervisor = Supervisor(directory, self._died)
        settings = MarketSettings(
            directory=directory,
            nodes=NODES,
            clients=CLIENTS,
            engine=plan.engine,
            model=Path(plan.model),
            model_id=plan.model_id,
            licence=plan.licence,
            engine_options=plan.engine_options,
        )
        self._market = LocalMarket(settings, self._supervisor, self._tell)
        self._state = State(
            os.getpid(),
            _born_at(os.getpid()) or 0,
            model=settings.sold_as,
            plan=plan.to_json(),
        )
        self._deaths: dict[str, list[float]] = {}
        self._restarts: set[asyncio.Task[None]] = set()

    async def run(self) -> bool:
        """Until SIGTERM; False if the market could not be started."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        self._save(self._state)
        starting = asyncio.create_task(self._market.start())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return True
            starting.result()
            self._serve()
            await stopping
        except TrueweightError as error:
            self._save(replace(self._state, status=FAILED, error=str(error)))
            return False
        finally:
            tasks = (starting, stopping, *self._restarts)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._market.stop()
        return True

    def _serve(self) -> None:
        key = self._market.api_keys[CLIENTS[0].name]
        self._save(
            replace(
                self._state,
                status=SERVING,
                base_url=self._market.base_url,
                api_key=key,
                has_chat=self._market.has_chat,
            )
        )

    def _tell(self, text: str) -> None:
        self._save(replace(self._state, said=(*self._state.said, text)[-MAX_SAID:]))

    def _save(self, state: State) -> None:
        groups = {r.spec.name: r.pid for r in self._supervisor.running}
        self._state = replace(state, groups={**state.groups, **groups})
        _write_state(self._directory, self._state)

    def _died(self, running: Running) -> None:
        task = asyncio.get_running_loop().create_task(self._again(running))
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def _again(self, running: Running) -> None:
        """Starts a role again, after a wait that grows with its deaths."""
        name = running.spec.name
        while True:
            now = time.monotonic()
            deaths = [t for t in self._deaths.get(name, []) if now - t < FORGIVEN_AFTER_S]
            self._deaths[name] = [*deaths, now]
            wait_s = RESTART_AFTER_S[min(len(deaths), len(RESTART_AFTER_S) - 1)]
            self._tell(f"{name} died; starting it again in {wait_s:.0f} s")
            await asyncio.sleep(wait_s)
            with contextlib.suppress(TrueweightError):
                await self._market.restart(name)
                self._tell(f"{name} serves again")
                return


def failure_text(directory: Path, state: State) -> str:
    """Why a start failed and where to look, for people."""
    if state.error:
        return state.error
    log = directory / "logs" / KEEPER_LOG
    return f"the market's keeper ended. The end of {log}:\n{tail(log)}"


def main() -> None:
    """``python -m trueweight.simulation.background DIRECTORY PLAN``, the plan as JSON."""
    directory, plan = Path(sys.argv[1]), UpPlan.from_json(sys.argv[2])
    sys.exit(0 if asyncio.run(Keeper(directory, plan).run()) else 1)


if __name__ == "__main__":
    main()
