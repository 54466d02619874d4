"""A whole market in processes of its own, with the synthetic engine for speed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from trueweight.protos.v1.ledger_pb2 import TransferRecord
from trueweight.runtime.ledger_port import LedgerPort
from trueweight.simulation.market import LocalMarket, trueweight
from trueweight.simulation.market_plan import ClientPlan, MarketSettings, NodePlan
from trueweight.simulation.observation import Observer, transfers_of, wait_until
from trueweight.simulation.run_directory import fresh_directory
from trueweight.simulation.supervisor import Supervisor

REPOSITORY = Path(__file__).resolve().parents[2]


class Kit:
    """A running market and what tests ask about it."""

    def __init__(self, market: LocalMarket) -> None:
        self.market = market
        self.observer = Observer(market.registered)

    @property
    def url(self) -> str:
        return self.market.base_url

    def key(self, client: str) -> str:
        return self.market.api_keys[client]

    def name_of(self, node_id: str) -> str:
        """Process name of a node."""
        for name, participant in self.market.participants.items():
            if participant.node_id == node_id:
                return f"node-{name}"
        raise KeyError(node_id)

    async def refresh(self) -> Observer:
        async with self.market.ledger() as ledger:
            await self.observer.refresh(ledger)
        return self.observer

    async def all_audited(self, within_s: float = 60.0) -> Observer:
        async def refresh() -> None:
            await self.refresh()

        done = await wait_until(
            lambda: len(self.observer.view.receipts) > 0 and self.observer.unaudited == 0,
            refresh,
            within_s,
        )
        assert done, f"{self.observer.unaudited} receipts were not audited"
        return self.observer

    async def transfers(self, client: str) -> list[TransferRecord]:
        async with self.market.ledger() as ledger:
            return await transfers_of(ledger, f"client:{client}")

    async def open_holds(self, client: str) -> list[bytes]:
        return open_holds(await self.transfers(client))

    async def some_open_holds(self, client: str, count: int, within_s: float = 10.0) -> list[bytes]:
        holds: list[bytes] = []

        async def refresh() -> None:
            holds[:] = await self.open_holds(client)

        assert await wait_until(lambda: len(holds) >= count, refresh, within_s), "no hold was made"
        return holds

    async def no_open_holds(self, client: str, within_s: float = 20.0) -> None:
        holds: list[bytes] = []

        async def refresh() -> None:
            holds[:] = await self.open_holds(client)

        assert await wait_until(lambda: not holds, refresh, within_s), "a hold was left behind"

    async def available(self, client: str) -> int:
        async with self.market.ledger() as ledger:
            return await available_of(ledger, f"client:{client}")

    async def fsck(self) -> dict:
        """The real checker over the real database; fails the test if anything is wrong."""
        process = await asyncio.create_subprocess_exec(
            *trueweight(),
            *("ledger", "fsck", "--json", "--database", self.market.database),
            *("--market", str(self.market.market_file)),
            stdout=subprocess.PIPE,
        )
        out, _ = await asyncio.wait_for(process.communicate(), 60)
        found = json.loads(out)
        assert found["clean"] is True, found["problems"]
        assert process.returncode == 0
        return found


async def available_of(ledger: LedgerPort, account: str) -> int:
    (record,) = await ledger.balances([account])
    return int(record.available_nano or 0)


def open_holds(transfers: list[TransferRecord]) -> list[bytes]:
    """Ids of pending transfers that nothing has ended."""
    opened = [t.id for t in transfers if t.phase == TransferRecord.PENDING]
    ended = {t.pending_id for t in transfers if t.pending_id and t.phase != TransferRecord.PENDING}
    return [id_ for id_ in opened if id_ not in ended]


@pytest.fixture(scope="session")
def run_market():
    """``async with run_market(directory, nodes=…, …) as kit``."""

    @contextlib.asynccontextmanager
    async def run(directory, nodes, clients=("alice:5", "bob:5"), **settings):
        deaths: list[str] = []
        directory = fresh_directory(directory)
        supervisor = Supervisor(directory, lambda running: deaths.append(running.spec.name))
        settings.setdefault("engine", "synthetic")
        market = LocalMarket(
            MarketSettings(
                directory=directory,
                nodes=nodes,
                clients=tuple(ClientPlan(*client.split(":")) for client in clients),
                **settings,
            ),
            supervisor,
        )
        await market.start()
        try:
            yield Kit(market)
            assert deaths == [], f"died unasked: {deaths}"
        finally:
            await market.stop()
            assert supervisor.left_behind() == []

    return run


def honest(name: str, ask_input: str = "0.20", ask_output: str = "0.60", speed: int = 0):
    options = ("--synthetic-speed", str(speed)) if speed else ()
    return NodePlan(name, ask_input, ask_output, options=options)


@pytest.fixture(scope="session")
def node_plan():
    return honest


def processes_of(marker: str) -> list[str]:
    """Command lines of live processes that mention ``marker``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if marker in line and state not in "ZX":
                found.append(line)
    return found


@pytest.fixture(scope="session")
def live_processes():
    return processes_of


@pytest.fixture(scope="session")
def command():
    """Runs ``trueweight …``; the completed process."""

    def run(*arguments, within_s=120, **settings):
        return subprocess.run(
            [*trueweight(), *arguments],
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
            cwd=REPOSITORY,
            **settings,
        )

    return run


@pytest.fixture(scope="session")
def python():
    return sys.executable
