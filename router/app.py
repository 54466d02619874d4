"""Puts a router together. Used by ``trueweight router serve`` and, in process, by simulations."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random as random_module
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from trueweight.protos.errors import TrueweightError
from trueweight.protos.identity import Signer
from trueweight.protos.market_terms import allow_list_of
from trueweight.router.api_keys import KeyGate
from trueweight.router.billing import Terms
from trueweight.router.catalog import Catalog
from trueweight.router.connections import Connections
from trueweight.router.exposure import Exposure
from trueweight.router.fleet import Fleet
from trueweight.router.front import Front
from trueweight.router.http import make_app
from trueweight.router.http_errors import error_response
from trueweight.router.journal import Journal
from trueweight.router.judges import Judges
from trueweight.router.keyring import Keys
from trueweight.router.lifecycle import Services, Timing
from trueweight.router.market_feed import MarketFeed
from trueweight.router.metrics import Metrics
from trueweight.router.node_session import MAX_NODE_FRAME_BYTES, SessionIdentity
from trueweight.router.offers import AllowList
from trueweight.router.receipts_view import ReceiptsView
from trueweight.router.reporting import reporter
from trueweight.router.service import RouterService, add_router_service
from trueweight.router.settlement import Settlement
from trueweight.router.settling import Settler
from trueweight.router.store import Store
from trueweight.router.transcripts import TranscriptBox, load_master_key
from trueweight.runtime import rpc
from trueweight.runtime.clock import Clock, SystemClock
from trueweight.runtime.http_server import HttpServer, make_seats
from trueweight.runtime.ledger_port import LedgerPort
from trueweight.runtime.market import Market
from trueweight.runtime.tls import ensure_certificate

log = logging.getLogger(__name__)

STORE_FILE = "router.sqlite"
_SWEEP_EVERY_MS = 60_000.0
_STAKES_EVERY_MS, _STAKES_LEAST_MS = 5_000.0, 200.0
_FOLLOW_AGAIN_MS = 500.0
DAY_MS = 24 * 60 * 60 * 1000


def _draw() -> float:
    # Which of two honest nodes serves is no secret; statistical quality is what counts.
    return random_module.random()  # noqa: S311


@dataclass(frozen=True)
class RouterConfig:
    """How one router runs. ``model_directories``: model id to directory with its tokenizer.

    ``min_bond_nano`` 0 asks for no bond. Retentions are in days.
    """

    data: Path
    keys: Path
    model_directories: Mapping[str, Path] = field(default_factory=dict)
    http_address: str = "127.0.0.1:8000"
    grpc_address: str = "127.0.0.1:0"
    allow_synthetic: bool = False
    min_bond_nano: int = 0
    transcript_days: float = 7.0
    record_days: float = 90.0
    timing: Timing = field(default_factory=Timing)


class Router:
    """A whole router: ``start`` once, ``close`` once. Endpoints are known after ``start``."""

    def __init__(
        self,
        config: RouterConfig,
        market: Market,
        signer: Signer,
        ledger: LedgerPort,
        *,
        clock: Clock | None = None,
        random: Callable[[int], bytes] = os.urandom,
        draw: Callable[[], float] = _draw,
    ) -> None:
        self._config, self._market, self._ledger = config, market, ledger
        self._clock = clock or SystemClock()
        self.store = Store(config.data / STORE_FILE)
        keys = Keys(market.market_id, market.ring)
        allow = AllowList(allow_list_of(market.descriptor), config.allow_synthetic)
        judges = Judges(market, keys)
        exposure = Exposure(judges)
        self.fleet = Fleet(
            self._clock, allow, config.min_bond_nano, judges=judges, exposure=exposure
        )
        self.catalog = Catalog(keys, config.model_directories)
        self._feed = MarketFeed(
            market, keys, self.catalog, self.fleet, judges=judges, exposure=exposure
        )
        self.journal = Journal(self.store)
        box = TranscriptBox(load_master_key(config.data, random), random)
        self.settler = Settler(ledger, self.journal, self._clock, reporter(self.fleet))
        me = SessionIdentity(signer, market.market_id, market.ring, random, self._clock)
        self._connections = Connections(me, self.fleet)
        services = Services(
            signer=signer,
            keys=keys,
            fleet=self.fleet,
            ledger=ledger,
            settler=self.settler,
            settlement=self._settlement(signer, box, random),
            clock=self._clock,
            random=random,
            draw=draw,
            timing=config.timing,
        )
        self.front = Front(
            services=services,
            catalog=self.catalog,
            gate=KeyGate(self.store, self._clock),
            receipts=ReceiptsView(self.journal, self.store, box, ledger),
            metrics=Metrics(),
        )
        self._service = RouterService(
            market=market,
            me=me,
            keys=keys,
            fleet=self.fleet,
            catalog=self.catalog,
            connections=self._connections,
            ledger=ledger,
            store=self.store,
            box=box,
            random=random,
        )
        self.http_endpoint = self.grpc_endpoint = ""
        self._http: HttpServer | None = None
        self._server: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def _settlement(
        self, signer: Signer, box: TranscriptBox, random: Callable[[int], bytes]
    ) -> Settlement:
        descriptor = self._market.descriptor
        return Settlement(
            signer=signer,
            terms=Terms(descriptor.fee_ppm, descriptor.verification_pool_ppm),
            journal=self.journal,
            settler=self.settler,
            box=box,
            clock=self._clock,
            random=random,
            wait_ms=self._config.timing.capture_wait_ms,
        )

    async def start(self) -> None:
        """Catches up with the log, replays the journal, then serves. Raises Unavailable if an
        address is taken or the ledger cannot be reached."""
        await self._feed.catch_up(self._ledger)
        self._tasks = [
            asyncio.create_task(self._replay()),
            asyncio.create_task(self._follow_forever()),
            asyncio.create_task(self._sweep_forever()),
            asyncio.create_task(self._stakes_forever()),
        ]
        for task in self._tasks:
            task.add_done_callback(_report)
        await self._serve_grpc()
        await self._serve_http()

    async def close(self, drain_ms: float = 2_000.0) -> None:
        """Ends requests in good order, settles what can be settled, then closes everything."""
        await self.front.drain(drain_ms)
        if self._http is not None:
            await self._http.close()
        await self._connections.close()
        if self._server is not None:
            await self._server.stop(0.5)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.settler.close(wait_ms=2_000.0)
        await self.store.close()

    async def _serve_grpc(self) -> None:
        ensure_certificate(self._config.keys, self._clock.now_unix_ms())
        self._server = rpc.make_server(max_request_bytes=MAX_NODE_FRAME_BYTES)
        add_router_service(self._service, self._server)
        self.grpc_endpoint = rpc.listen(self._server, self._config.grpc_address, self._config.keys)
        await self._server.start()

    async def _serve_http(self) -> None:
        seats = make_seats()
        self._http = HttpServer(make_app(self.front, seats), seats, error_response)
        await self._http.start(self._config.http_address)
        self.http_endpoint = self._http.endpoint

    async def _replay(self) -> None:
        """At start, and from time to time for captures that met an error nobody expected."""
        while True:
            with _going_on("the journal could not be replayed"):
                if count := await self.settler.replay():
                    log.info("sent %d captures of the journal again", count)
            await self._clock.sleep_ms(_SWEEP_EVERY_MS)

    async def _follow_forever(self) -> None:
        # Whoever does not hear of suspensions must not go deaf for good.
        while True:
            with _going_on("following the log again"):
                await self._feed.follow(self._ledger)
            await self._clock.sleep_ms(_FOLLOW_AGAIN_MS)

    async def _sweep_forever(self) -> None:
        while True:
            now = self._clock.now_unix_ms()
            with _going_on("old transcripts and records could not be deleted"):
                await self.journal.sweep(
                    now - int(self._config.transcript_days * DAY_MS),
                    now - int(self._config.record_days * DAY_MS),
                )
            await self._clock.sleep_ms(_SWEEP_EVERY_MS)

    async def _stakes_forever(self) -> None:
        while True:
            with _going_on("stakes are not up to date"):
                await self.refresh_stakes()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STAKES_EVERY_MS / 1000):
                    await self.fleet.newcomer.wait()
            await self._clock.sleep_ms(_STAKES_LEAST_MS)

    async def refresh_stakes(self) -> None:
        """Asks the ledger how much each known node has at stake."""
        self.fleet.newcomer.clear()
        records = {r.node_id: r for r in self.fleet.all()}
        names = [f"{kind}:{node}" for node in records for kind in ("node-bond", "node-locked")]
        held: dict[str, int] = {}
        for start in range(0, len(names), 1000):
            for account in await self._ledger.balances(names[start : start + 1000]):
                held[account.account] = int(account.available_nano or 0)
        for node_id, record in records.items():
            record.bond_nano = held.get(f"node-bond:{node_id}", 0)
            record.locked_nano = held.get(f"node-locked:{node_id}", 0)
        self.fleet.wake()


@contextlib.contextmanager
def _going_on(what: str) -> Iterator[None]:
    """One turn of a loop that nothing may end."""
    try:
        yield
    except TrueweightError as error:
        log.warning("%s: %s", what, error)
    except Exception:
        log.exception("%s: a bug", what)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a router task ended: %s", type(error).__name__, exc_info=error)
