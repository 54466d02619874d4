"""A whole market in one process: real ledger, router and nodes over loopback, synthetic engines.

For tests and simulations. Everything is what runs in production except the engines and that
router and nodes reach the ledger without gRPC. ``async with InProcessMarket(dir) as market``.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from trueweight.client.market_setup import KEYS, MarketPlan, create_market
from trueweight.client.model_files import registry_entry
from trueweight.ledger.service import Ledger, LocalLedger
from trueweight.node.app import NodeApp
from trueweight.node.config import NodeConfig
from trueweight.node.context import Timing as NodeTiming
from trueweight.node.engine import Engine
from trueweight.node.grammar import Grammars
from trueweight.node.synthetic import Speed, SyntheticEngine
from trueweight.node.synthetic_model import ModelShape, SyntheticModel, shape_from_directory
from trueweight.protos.envelope import open_envelope, seal
from trueweight.protos.errors import DeadlineExceeded
from trueweight.protos.identity import Signer
from trueweight.protos.ids import uuid7
from trueweight.protos.manifest import build_manifest
from trueweight.protos.market_terms import DEFAULT_ENGINES, with_synthetic
from trueweight.protos.money import NANO_PER_CREDIT
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1.market_pb2 import Member
from trueweight.protos.v1.model_pb2 import Manifest
from trueweight.router.api_keys import create_key
from trueweight.router.app import Router, RouterConfig
from trueweight.router.lifecycle import Timing
from trueweight.runtime.clock import Clock, SystemClock
from trueweight.runtime.keys import load_or_create, load_signer
from trueweight.runtime.ledger_port import raise_refused
from trueweight.runtime.market import Market
from trueweight.simulation.demo_files import DEMO_MODEL

MODEL_DIRECTORY = DEMO_MODEL
MODEL_ID = "tw-demo-3m"
READY_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class NodeSpec:
    """One node. Asks in nanocredits per million tokens; ``engine`` None is an honest synthetic
    one; adversaries pass their own."""

    name: str
    ask_input: int = 100_000_000
    ask_output: int = 300_000_000
    capacity: int = 64
    speed: Speed = field(default_factory=Speed)
    mean_output_tokens: int = 64
    attach: bool = False
    bond_credits: int = 0
    engine: Engine | None = None
    lease_ms: int = 3_000
    listen: str = "127.0.0.1:0"


@dataclass(frozen=True)
class MarketSpec:
    """What the market consists of. ``draw`` replaces the router's dice."""

    nodes: Sequence[NodeSpec] = (NodeSpec("n0"),)
    model_directory: Path = MODEL_DIRECTORY
    model_id: str = MODEL_ID
    timing: Timing = field(default_factory=Timing)
    min_bond_nano: int = 0
    draw: Callable[[], float] | None = None
    allow_synthetic: bool = True


class InProcessMarket:
    """The running market and handles to its parts."""

    def __init__(self, directory: Path, spec: MarketSpec | None = None) -> None:
        self.directory, self.spec = directory, spec or MarketSpec()
        self.clock: Clock = SystemClock()
        self.market: Market
        self.ledger: Ledger
        self.router: Router
        self.nodes: dict[str, NodeApp] = {}

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Ledger, registered model, router, nodes; returns when all nodes can get work."""
        self.market = create_market(
            self.directory,
            MarketPlan("in process", engines=with_synthetic(DEFAULT_ENGINES)),
            self.clock,
        )
        database = f"sqlite:///{self.directory / 'ledger.sqlite'}"
        self.ledger = Ledger(self.market, self.signer("ledger"), database, self.clock)
        await self.ledger.start()
        await self.register_model()
        await self.start_router()
        for spec in self.spec.nodes:
            await self.add_node(spec)
        await self.until_connected(len(self.spec.nodes))

    async def close(self) -> None:
        """Ends everything that was started, nodes first."""
        for node in list(self.nodes.values()):
            await node.close()
        self.nodes.clear()
        if hasattr(self, "router"):
            await self.router.close(drain_ms=0)
        if hasattr(self, "ledger"):
            await self.ledger.close()

    @property
    def base_url(self) -> str:
        """What an OpenAI client is given."""
        return f"http://{self.router.http_endpoint}/v1"

    def signer(self, role: str) -> Signer:
        """A role's signer: "ledger", "router", "verifier", "publisher", "admin", "market"."""
        return load_signer(self.directory / KEYS / role)

    def port(self, role: str) -> LocalLedger:
        """The ledger as this role sees it."""
        return self.ledger.as_caller(self.signer(role).identity)

    async def apply(self, role: str, operation: pb.Operation) -> pb.Result:
        """Applies one operation as a role. Raises if it is refused."""
        if not operation.id:
            operation.id = uuid7(self.clock.now_unix_ms(), os.urandom(10))
        return raise_refused((await self.port(role).apply([operation]))[0])

    async def deposit(self, account: str, credits: int) -> None:
        """Money for a client."""
        deposit = pb.Deposit(
            account=account,
            amount_nano=credits * NANO_PER_CREDIT,
            rail="test",
            reference=os.urandom(8).hex(),
        )
        await self.apply("admin", pb.Operation(deposit=deposit))

    async def client_key(self, name: str, credits: int = 100) -> str:
        """An API key of a client with a balance."""
        account = f"client:{name}"
        if credits:
            await self.deposit(account, credits)
        _, text = create_key(self.router.store, account, "", self.clock, os.urandom)
        return text

    async def balance(self, account: str) -> pb.AccountRecord:
        """An account's counters; all zero if it does not exist yet."""
        found = await self.port("admin").balances([account])
        return found[0] if found else pb.AccountRecord(account=account, available_nano="0")

    async def held_nano(self, name: str) -> int:
        """What a client has in open holds."""
        return int((await self.balance(f"client:{name}")).debits_pending_nano or 0)

    async def available_nano(self, account: str) -> int:
        """An account's available nanocredits."""
        return int((await self.balance(account)).available_nano or 0)

    async def register_model(self) -> None:
        """Signs the model directory as the publisher and registers it as the market."""
        now = self.clock.now_unix_ms()
        manifest = await asyncio.to_thread(
            build_manifest,
            self.spec.model_directory,
            market_id=self.market.market_id,
            name=self.spec.model_id,
            revision="1",
            licence="PSF-2.0",
            now_unix_ms=now,
        )
        envelope = seal(manifest, self.signer("publisher"))
        opened = open_envelope(envelope, Manifest, self.market.ring, self.market.market_id)
        entry = registry_entry(self.spec.model_id, opened, self.signer("market"), self.market, now)
        await self.port("market").publish(entry)

    async def start_router(self) -> None:
        """Starts the router, also again after ``router.close``: its data directory stays."""
        spec, signer = self.spec, self.signer("router")
        config = RouterConfig(
            data=self.directory / "router",
            keys=self.directory / KEYS / "router",
            model_directories={spec.model_id: spec.model_directory},
            http_address="127.0.0.1:0",
            allow_synthetic=spec.allow_synthetic,
            min_bond_nano=spec.min_bond_nano,
            timing=spec.timing,
        )
        ledger = self.ledger.as_caller(signer.identity)
        self.router = Router(
            config, self.market, signer, ledger, clock=self.clock, draw=spec.draw or random.random
        )
        await self.router.start()

    async def add_node(self, spec: NodeSpec) -> NodeApp:
        """Starts a node and stakes its bond."""
        keys = self.directory / "nodes" / spec.name
        config = NodeConfig(
            model_dir=self.spec.model_directory,
            market=self.market,
            keys=keys,
            listen=spec.listen,
            ask_input_nano_per_mtok=spec.ask_input,
            ask_output_nano_per_mtok=spec.ask_output,
            capacity=spec.capacity,
            model_id=self.spec.model_id,
            router=self.router_member(),
            attach=spec.attach,
            score_for=frozenset({self.signer("verifier").identity}),
            lease_ms=spec.lease_ms,
            timing=NodeTiming(heartbeat_ms=200),
        )
        identity = load_or_create(keys, self.market.market_id, self.clock).identity
        app = NodeApp(
            config,
            spec.engine or self.engine(spec),
            ledger=self.ledger.as_caller(identity),
            clock=self.clock,
        )
        if spec.bond_credits:
            bond = pb.BondDeposit(
                node_id=identity,
                amount_nano=spec.bond_credits * NANO_PER_CREDIT,
                rail="test",
                reference=os.urandom(8).hex(),
            )
            await self.apply("admin", pb.Operation(bond_deposit=bond))
        await app.start()
        self.nodes[spec.name] = app
        return app

    def engine(self, spec: NodeSpec) -> SyntheticEngine:
        """An honest synthetic engine for the model."""
        shape = shape_from_directory(
            self.spec.model_directory, ModelShape(mean_output_tokens=spec.mean_output_tokens)
        )
        return SyntheticEngine(
            SyntheticModel(shape),
            speed=spec.speed,
            max_running=spec.capacity,
            grammars=Grammars.from_directory(self.spec.model_directory, shape.vocabulary_size),
        )

    def router_member(self) -> Member:
        """The router's entry with the address it really has."""
        member = Member()
        member.CopyFrom(self.market.member(Member.ROUTER))
        member.endpoint = self.router.grpc_endpoint
        return member

    async def until_connected(self, count: int) -> None:
        """Waits until this many nodes can get work. Raises DeadlineExceeded."""
        await self.router.refresh_stakes()
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while self._connected() < count:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise DeadlineExceeded(f"only {self._connected()} of {count} nodes connected") from None
        await self.router.refresh_stakes()

    def _connected(self) -> int:
        records = self.router.fleet.all()
        return sum(1 for r in records if r.session is not None and r.session.is_open)
