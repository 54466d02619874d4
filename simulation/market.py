"""A whole market on this machine: every role in a process of its own, in one directory.

DIR/market.json, DIR/keys/     as made by 'trueweight market init'
DIR/model/NAME                 the model, hard-linked so that its signed files can lie beside it
DIR/ledger/, DIR/router/, DIR/verifier/, DIR/reference/, DIR/nodes/NAME/   each role's own state
DIR/logs/NAME.log              what each process says

It runs the very commands that operators run; only keys, deposits and the registry entry are made
in process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from trueweight.client.market_setup import MarketPlan, create_market
from trueweight.client.model_files import check_model_id, registry_entry, sign_directory
from trueweight.protos.errors import DeadlineExceeded, InvalidRequest
from trueweight.protos.identity import Signer
from trueweight.protos.ids import derived_id
from trueweight.protos.market_terms import DEFAULT_ENGINES, SYNTHETIC, with_synthetic
from trueweight.protos.money import parse_credits
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1.market_pb2 import Member
from trueweight.router import api_keys
from trueweight.router.app import STORE_FILE
from trueweight.router.catalog import load_tokenizer
from trueweight.router.store import Store
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.keys import create_keys, load_signer
from trueweight.runtime.ledger_port import LedgerPort, connect_ledger, raise_refused
from trueweight.runtime.market import Market
from trueweight.runtime.rpc import AccessTokens
from trueweight.runtime.tls import CERTIFICATE, ensure_certificate
from trueweight.simulation.market_plan import ENGINES, MarketSettings, NodePlan
from trueweight.simulation.ports import pick_ports
from trueweight.simulation.run_directory import link_or_copy
from trueweight.simulation.supervisor import ProcessSpec, Supervisor, tail

HOST = "127.0.0.1"
SYNTHETIC_READY_S, VLLM_READY_S = 120.0, 600.0
REGISTERED_S = 60.0
STILL_EVERY_S = 15.0
_CHEATING_NODE = "trueweight.simulation.cheating_node"


@dataclass
class Addresses:
    """Where the servers that must keep their address listen."""

    ledger: str
    router_grpc: str
    router_http: str
    reference: str

    @classmethod
    def pick(cls) -> Addresses:
        """Free ports on the loopback interface."""
        return cls(*(f"{HOST}:{port}" for port in pick_ports(4)))


@dataclass
class Participant:
    """A node that takes part: its identity and, once it serves, its ready line."""

    plan: NodePlan
    signer: Signer
    keys: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def node_id(self) -> str:
        """Its identity in the market."""
        return self.signer.identity


Told = Callable[[str], None]


class LocalMarket:
    """``start`` once, ``stop`` once. ``tell`` hears in words what is going on."""

    def __init__(
        self, settings: MarketSettings, supervisor: Supervisor, tell: Told = lambda _text: None
    ) -> None:
        self.settings, self.supervisor = settings, supervisor
        self._tell, self._clock = tell, SystemClock()
        self.directory = settings.directory
        self.addresses = Addresses.pick()
        self.participants: dict[str, Participant] = {}
        self.api_keys: dict[str, str] = {}
        self.market: Market | None = None
        # Whether the model has a chat template; known once the market was made.
        self.has_chat = False
        self._specs: dict[str, ProcessSpec] = {}

    @property
    def base_url(self) -> str:
        """What OpenAI clients call base_url."""
        return f"http://{self.addresses.router_http}/v1"

    @property
    def market_file(self) -> Path:
        """The public market file."""
        return self.directory / "market.json"

    @property
    def database(self) -> str:
        """URL of the ledger's database."""
        return f"sqlite:///{self.directory / 'ledger' / 'ledger.sqlite'}"

    @property
    def model_directory(self) -> Path:
        """The market's own view of the model's files."""
        return self.directory / "model" / self.settings.sold_as.replace("/", "--")

    @property
    def registered(self) -> Market:
        """The market's descriptor. Raises InvalidRequest before ``start``."""
        if self.market is None:
            raise InvalidRequest("the market was not made yet")
        return self.market

    def keys_of(self, role: str) -> Path:
        """Key directory of a role."""
        return self.directory / "keys" / role

    async def start(self) -> None:
        """Makes the market and starts everything. On an error all processes are ended again."""
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Ends the processes in good order: nobody loses whom it still needs."""
        nodes = [_node_process(name) for name in self.participants]
        await self.supervisor.stop_all([["verifier"], [*nodes, "reference"], ["router"]])

    async def restart(self, name: str) -> dict[str, Any]:
        """Starts a process again that has ended, as it was started before."""
        facts = await self.supervisor.start(self._specs[name])
        for participant in self.participants.values():
            if _node_process(participant.plan.name) == name:
                participant.facts = facts
        return facts

    @asynccontextmanager
    async def ledger(self, role: str = "admin") -> AsyncIterator[LedgerPort]:
        """A connection to the running ledger as one of the market's own identities."""
        market = self.registered
        tokens = AccessTokens(
            load_signer(self.keys_of(role)), market.market_id, self._clock, os.urandom
        )
        port = connect_ledger(market, tokens)
        try:
            yield port
        finally:
            await port.close()

    async def wait_until_serving(self, nodes: int, within_s: float = REGISTERED_S) -> None:
        """Until the router can give work to ``nodes`` nodes. Raises DeadlineExceeded."""
        url = f"http://{self.addresses.router_http}/healthz"
        loop = asyncio.get_running_loop()
        deadline, health = loop.time() + within_s, dict[str, Any]()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while loop.time() < deadline:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(url) as answer:
                        health = await answer.json()
                    if health.get("ready") and health.get("nodes", 0) >= nodes:
                        return
                await asyncio.sleep(0.1)
        log = self.supervisor.log_directory / "router.log"
        state = f"{health.get('nodes', 0)} are connected, models: {health.get('models', [])}"
        raise DeadlineExceeded(
            f"the router cannot give work to {nodes} nodes after {within_s:.0f} s: "
            f"{state if health else f'{url} does not answer'}",
            hint=f"The end of its log {log}:\n{tail(log)}",
        )

    async def _start(self) -> None:
        self._tell("making keys and signing the model")
        self._create()
        if self.settings.calibration is None:
            self._tell("no calibration lies beside the model: audits refund, but convict nobody")
        self._tell("starting the ledger")
        await self._run(self._ledger_spec())
        await self._open_the_books()
        self._tell("starting router, nodes and the verifier's reference node")
        patience = asyncio.create_task(self._say_who_is_starting())
        try:
            await asyncio.gather(
                self._run(self._router_spec()),
                self._verifier_after_reference(),
                *(self._start_node(p) for p in self.participants.values()),
            )
        finally:
            patience.cancel()
        await self.wait_until_serving(len(self.participants))
        self._tell("all nodes are registered at the router")

    async def _say_who_is_starting(self) -> None:
        """Engines take a minute and more: shows that something goes on, and who is waited for."""
        while True:
            await asyncio.sleep(STILL_EVERY_S)
            waiting = ", ".join(r.spec.name for r in self.supervisor.running if not r.facts)
            self._tell(f"still starting: {waiting or 'the verifier'}")

    def _create(self) -> None:
        settings = self.settings
        if settings.engine not in ENGINES:
            raise InvalidRequest(f"there is no engine {settings.engine!r}", hint=str(ENGINES))
        try:
            check_model_id(settings.sold_as)
        except InvalidRequest as error:
            raise InvalidRequest(
                f"{settings.sold_as!r} cannot be sold: {error.message}", hint="Name it: --model-id."
            ) from None
        is_synthetic = settings.engine == SYNTHETIC
        plan = MarketPlan(
            name=self.directory.name,
            endpoints={"ledger": self.addresses.ledger, "router": self.addresses.router_grpc},
            engines=with_synthetic(DEFAULT_ENGINES) if is_synthetic else DEFAULT_ENGINES,
        )
        self.market = create_market(self.directory, plan, self._clock)
        self._link_model()
        self._signed = sign_directory(
            self.model_directory,
            market_id=self.market.market_id,
            signer=load_signer(self.keys_of("publisher")),
            keys=self.keys_of("publisher"),
            name=settings.sold_as,
            revision="1",
            licence=settings.sold_under,
            clock=self._clock,
        )
        # What the router would find out only once everything runs.
        tokenizer = load_tokenizer(self.model_directory, self._signed.message)
        self.has_chat = tokenizer.template is not None
        for node in settings.nodes:
            keys = self.directory / "nodes" / node.name
            signer = create_keys(keys, self.market.market_id, self._clock)
            self.participants[node.name] = Participant(node, signer, keys)
        reference = self.directory / "reference"
        create_keys(reference, self.market.market_id, self._clock)
        ensure_certificate(reference, self._clock.now_unix_ms())
        (self.directory / "ledger").mkdir()

    def _link_model(self) -> None:
        if not (self.settings.model / "config.json").is_file():
            raise InvalidRequest(
                f"{self.settings.model} is no model directory",
                hint="It needs config.json, a tokenizer and safetensors (Hugging Face layout).",
            )
        self.model_directory.parent.mkdir()
        shutil.copytree(self.settings.model, self.model_directory, copy_function=link_or_copy)

    async def _open_the_books(self) -> None:
        """Registers the model, pays in deposits and bonds, makes the API keys."""
        market = self.registered
        signer = load_signer(self.keys_of("market"))
        now = self._clock.now_unix_ms()
        entry = registry_entry(self.settings.sold_as, self._signed, signer, market, now)
        async with self.ledger("market") as port:
            await port.publish(entry)
        async with self.ledger() as port:
            for result in await port.apply([*self._deposits(), *self._bonds()]):
                raise_refused(result)
        store = Store(self.directory / "router" / STORE_FILE)
        try:
            for client in self.settings.clients:
                made = api_keys.create_key(
                    store, client.account, client.name, self._clock, os.urandom
                )
                self.api_keys[client.name] = made[1]
        finally:
            await store.close()

    def _deposits(self) -> list[pb.Operation]:
        return [
            pb.Operation(
                id=derived_id("simulation-deposit", client.account.encode()),
                deposit=pb.Deposit(
                    account=client.account,
                    amount_nano=parse_credits(client.deposit),
                    rail="simulation",
                    reference=client.name,
                ),
            )
            for client in self.settings.clients
        ]

    def _bonds(self) -> list[pb.Operation]:
        return [
            pb.Operation(
                id=derived_id("simulation-bond", participant.node_id.encode()),
                bond_deposit=pb.BondDeposit(
                    node_id=participant.node_id,
                    amount_nano=parse_credits(self.settings.bond),
                    rail="simulation",
                    reference=f"bond-{name}",
                ),
            )
            for name, participant in self.participants.items()
        ]

    async def _start_node(self, participant: Participant) -> None:
        participant.facts = await self._run(self._node_spec(participant))

    async def _verifier_after_reference(self) -> None:
        facts = await self._run(self._reference_spec())
        await self._run(self._verifier_spec(facts["node_id"]))

    async def _run(self, spec: ProcessSpec) -> dict[str, Any]:
        self._specs[spec.name] = spec
        started = self._clock.monotonic_ms()
        facts = await self.supervisor.start(spec)
        self._tell(f"{spec.name} serves ({(self._clock.monotonic_ms() - started) / 1000:.0f} s)")
        return facts

    def _spec(self, name: str, *arguments: str, **settings: Any) -> ProcessSpec:
        environment = {"TRUEWEIGHT_LOG_LEVEL": self.settings.log_level}
        environment.update(self.settings.environment)
        return ProcessSpec(name, (*trueweight(), *arguments), environment, **settings)

    def _who(self, keys: Path) -> tuple[str, ...]:
        return ("--market", str(self.market_file), "--keys", str(keys))

    def _ledger_spec(self) -> ProcessSpec:
        where = ("--database", self.database, "--listen", self.addresses.ledger)
        return self._spec("ledger", "ledger", "serve", *self._who(self.keys_of("ledger")), *where)

    def _router_spec(self) -> ProcessSpec:
        extra = ["--allow-synthetic"] if self.settings.engine == "synthetic" else []
        return self._spec(
            "router",
            *("router", "serve", *self._who(self.keys_of("router"))),
            *("--data", str(self.directory / "router")),
            *("--http", self.addresses.router_http, "--grpc", self.addresses.router_grpc),
            *("--model-dir", f"{self.settings.sold_as}={self.model_directory}"),
            *("--min-bond", self.settings.bond, *extra, *self.settings.router_options),
        )

    def _engine_arguments(self) -> tuple[str, ...]:
        return ("--engine", self.settings.engine, *self.settings.engine_options)

    def _engine_ready_s(self) -> float:
        return VLLM_READY_S if self.settings.engine == "vllm" else SYNTHETIC_READY_S

    def _node_spec(self, participant: Participant) -> ProcessSpec:
        plan = participant.plan
        arguments = (
            *("--model", str(self.model_directory), *self._who(participant.keys)),
            *("--ask-input", plan.ask_input, "--ask-output", plan.ask_output),
            *("--drain-s", "5"),
            *self._engine_arguments(),
            *plan.options,
        )
        name = _node_process(plan.name)
        if not plan.cheating:
            return self._spec(
                name, "node", "up", *arguments, ready_timeout_s=self._engine_ready_s()
            )
        honest = self._spec(name, ready_timeout_s=self._engine_ready_s())
        command = (sys.executable, "-m", _CHEATING_NODE, *arguments)
        return ProcessSpec(name, command, honest.environment, honest.ready_timeout_s)

    def _reference_spec(self) -> ProcessSpec:
        verifier = self.registered.member(Member.VERIFIER).identity
        return self._spec(
            "reference",
            *("node", "up", "--score-only", "--score-for", verifier),
            *("--model", str(self.model_directory), *self._who(self.directory / "reference")),
            *("--listen", self.addresses.reference, *self._engine_arguments()),
            ready_timeout_s=self._engine_ready_s(),
        )

    def _verifier_spec(self, reference_id: str) -> ProcessSpec:
        calibration = self.settings.calibration
        certificate = self.directory / "reference" / CERTIFICATE
        return self._spec(
            "verifier",
            *("verifier", "run", *self._who(self.keys_of("verifier"))),
            *("--data", str(self.directory / "verifier")),
            *("--reference", self.addresses.reference, "--reference-cert", str(certificate)),
            *("--reference-id", reference_id),
            *(("--calibration", str(calibration)) if calibration else ()),
            *self.settings.verifier_options,
        )


def _node_process(name: str) -> str:
    """Process name of a node."""
    return f"node-{name}"


def trueweight() -> tuple[str, ...]:
    """The command line of ``trueweight``, in this very environment."""
    script = Path(sys.executable).parent / "trueweight"
    if script.is_file():
        return (sys.executable, str(script))
    return (sys.executable, "-c", "from trueweight.client.launcher import main; main()")


def names_of(participants: Sequence[Participant]) -> dict[str, str]:
    """Names for people by node id."""
    return {p.node_id: p.plan.name for p in participants}
