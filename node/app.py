"""Composition: an engine, checked weights, the service, sessions and registration.

The engine is passed in, so that tests and simulation run any engine through the real node.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import grpc.aio

from trueweight.node.assembly import Parts, make_context, make_service
from trueweight.node.attach import attach_forever
from trueweight.node.claims import claim_forever
from trueweight.node.config import NodeConfig, check_config
from trueweight.node.context import NodeContext
from trueweight.node.engine import Engine
from trueweight.node.journal import ReceiptJournal
from trueweight.node.registration import RegisterCall, Registrar
from trueweight.node.session import NodeSession
from trueweight.node.weights import (
    Registry,
    ServedWeights,
    check_weights,
    read_registry,
    until_withdrawn,
)
from trueweight.node.workload import Workload
from trueweight.protos.envelope import parse_envelope, parse_payload
from trueweight.protos.errors import EngineError, InvalidRequest, TrueweightError, WeightsRefused
from trueweight.protos.identity import Signer
from trueweight.protos.v1.envelope_pb2 import KeyEvent
from trueweight.protos.v1.market_pb2 import Member
from trueweight.protos.v1.node_pb2_grpc import add_NodeServicer_to_server
from trueweight.protos.v1.router_pb2 import RegisterRequest, RegisterResponse
from trueweight.protos.v1.router_pb2_grpc import RouterStub
from trueweight.runtime import rpc
from trueweight.runtime.clock import Clock, SystemClock
from trueweight.runtime.keys import load_or_create
from trueweight.runtime.ledger_port import LedgerPort, connect_ledger
from trueweight.runtime.tls import ensure_certificate

log = logging.getLogger(__name__)

_REGISTER_TIMEOUT_MS = 10_000
_POLL_MS = 50
_END_MS = 3_000


class NodeApp:
    """``start``, then ``drain`` and ``close`` (or only ``close``), once each."""

    def __init__(
        self,
        config: NodeConfig,
        engine: Engine,
        *,
        ledger: LedgerPort | None = None,
        register: RegisterCall | None = None,
        clock: Clock | None = None,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """``ledger`` and ``register`` replace the gRPC connections to ledger and router."""
        self._config, self._engine = config, engine
        self._clock, self._random = clock or SystemClock(), random
        self._ledger, self._register = ledger, register
        self._cleanup = contextlib.AsyncExitStack()
        self._sessions: set[NodeSession] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._draining = False
        self.signer = _own_keys(config, self._clock)
        self._tokens = rpc.AccessTokens(
            self.signer, config.market.market_id, self._clock, self._random
        )
        self.endpoint = ""
        self.registrar: Registrar | None = None
        self.weights: ServedWeights | None = None
        self._broken: asyncio.Future[TrueweightError] | None = None

    @property
    def node_id(self) -> str:
        """The node's identity; known before ``start``."""
        return self.signer.identity

    async def start(self) -> None:
        """Checks the weights, starts the engine, serves, then registers.

        Raises WeightsRefused before the engine starts if the weights may not be served. After any
        error everything that was started is closed.
        """
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise

    async def broken(self) -> TrueweightError:
        """Waits until the node can no longer do honest work; the reason."""
        if self._broken is None:
            raise InvalidRequest("the node was not started")
        return await self._broken

    async def drain(self) -> None:
        """Takes no new work and waits, bounded, until running calls have ended."""
        self._draining = True
        for task in self._tasks:
            if task.get_name() == "register":
                task.cancel()
        for session in list(self._sessions):
            session.drain()
        await self._until_sessions_end(self._config.drain_ms)

    async def close(self) -> None:
        """Ends sessions (their calls get partial receipts), the service and the engine."""
        self._draining = True
        for session in list(self._sessions):
            session.end()
        await self._until_sessions_end(_END_MS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._cleanup.aclose()

    async def _start(self) -> None:
        config = self._config
        check_config(config, has_register=self._register is not None)
        ledger = self._connect_ledger()
        empty = Registry(config.market.market_id, config.market.ring)
        registry = await read_registry(ledger, empty)
        weights = await check_weights(config.model_dir, registry, config.model_id)
        self.weights = weights
        log.info("weights of %s are registered and unaltered; starting engine", weights.model_id)
        self._cleanup.push_async_callback(self._engine.close)
        await self._engine.start()
        journal = ReceiptJournal(config.journal_path)
        self._cleanup.callback(journal.close)
        node = await self._serve(weights, journal)
        self._broken = asyncio.get_running_loop().create_future()
        self._spawn("watch engine", partial(self._watch_engine, node.workload))
        self._spawn("watch registry", partial(self._watch_registry, ledger, registry, weights))
        if not config.score_only:
            self._spawn(
                "claims", partial(claim_forever, journal, ledger, self.node_id, self._clock)
            )
            self._work_for_router(node)

    async def _serve(self, weights: ServedWeights, journal: ReceiptJournal) -> NodeContext:
        keys = self._config.keys
        pem = ensure_certificate(keys, self._clock.now_unix_ms())
        server = rpc.make_server()
        self.endpoint = rpc.listen(server, self._config.listen, keys)
        parts = Parts(
            config=self._config,
            signer=self.signer,
            engine=self._engine,
            weights=weights,
            journal=journal,
            listening=self.endpoint,
            certificate_pem=pem,
            clock=self._clock,
            random=self._random,
        )
        node = make_context(parts)
        add_NodeServicer_to_server(make_service(parts, node, self._add_session), server)
        await server.start()
        self._cleanup.push_async_callback(server.stop, 1.0)
        return node

    def _connect_ledger(self) -> LedgerPort:
        if self._ledger is not None:
            return self._ledger
        config = self._config
        ledger = connect_ledger(config.market, self._tokens, config.ledger_endpoint)
        self._cleanup.push_async_callback(ledger.close)
        return ledger

    def _work_for_router(self, node: NodeContext) -> None:
        router = self._config.router
        if self._config.attach and router is not None:
            channel = self._channel(router)
            attach = partial(
                attach_forever,
                node,
                channel,
                router.identity,
                self._add_session,
                lambda: self._draining,
            )
            self._spawn("attach", attach)
            return
        register = self._register or self._register_call(self._channel(router), router)
        self.registrar = Registrar(register, node.offer, self._clock, self._random)
        self._spawn("register", self.registrar.run)

    def _channel(self, router: Member | None) -> grpc.aio.Channel:
        if router is None:
            raise InvalidRequest("a node needs a router", hint="Give --router.")
        channel = rpc.make_channel(router.endpoint, router.tls_certificate_pem)
        self._cleanup.push_async_callback(channel.close)
        return channel

    def _register_call(self, channel: grpc.aio.Channel, router: Member | None) -> RegisterCall:
        stub = RouterStub(channel)
        audience = router.identity if router else ""

        async def register(request: RegisterRequest) -> RegisterResponse:
            answer: RegisterResponse = await rpc.call(
                stub.Register,
                request,
                timeout_ms=_REGISTER_TIMEOUT_MS,
                metadata=self._tokens.metadata(audience),
            )
            return answer

        return register

    def _spawn(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        self._tasks.append(asyncio.create_task(self._or_give_up(name, work), name=name))

    async def _or_give_up(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        # Without it the node would serve on, deaf to withdrawn weights, or unpaid.
        try:
            await work()
        except Exception:
            log.exception("the node's %s loop ended", name)
            self._give_up(
                TrueweightError(
                    f"a bug ended the node's {name!r} loop", hint="Its log says where; restart it."
                )
            )

    async def _watch_engine(self, workload: Workload) -> None:
        await workload.engine_broken.wait()
        self._give_up(EngineError("the engine fails every call", hint="See the log; restart."))

    async def _watch_registry(
        self, ledger: LedgerPort, registry: Registry, weights: ServedWeights
    ) -> None:
        reason = await until_withdrawn(ledger, registry, weights, self._clock)
        self._give_up(WeightsRefused(reason, hint="Serve what the market sells."))

    def _give_up(self, error: TrueweightError) -> None:
        if self._broken is not None and not self._broken.done():
            self._broken.set_result(error)

    def _add_session(self, session: NodeSession) -> None:
        self._live_sessions()
        self._sessions.add(session)
        if self._draining:
            session.drain()

    async def _until_sessions_end(self, at_most_ms: float) -> None:
        deadline_ms = self._clock.monotonic_ms() + at_most_ms
        while self._live_sessions() and self._clock.monotonic_ms() < deadline_ms:
            await self._clock.sleep_ms(_POLL_MS)

    def _live_sessions(self) -> bool:
        self._sessions = {s for s in self._sessions if not s.ended}
        return bool(self._sessions)


def _own_keys(config: NodeConfig, clock: Clock) -> Signer:
    """The node's signer; new keys if there are none. Raises InvalidRequest for another market's."""
    market_id = config.market.market_id
    signer = load_or_create(config.keys, market_id, clock, config.operator_keys)
    if parse_payload(parse_envelope(signer.key_event), KeyEvent).market_id != market_id:
        raise InvalidRequest(
            f"the keys in {config.keys} belong to another market",
            hint="Name an empty directory with --keys; new keys are made there.",
        )
    return signer


async def run_node(
    config: NodeConfig,
    engine: Engine,
    stop: asyncio.Event,
    on_ready: Callable[[NodeApp], Any] = lambda _app: None,
    **parts: Any,
) -> None:
    """A node's whole life: start, serve until ``stop``, drain, close. ``parts`` go to NodeApp.

    Raises what ``NodeApp.start`` raises, and, after draining, the reason if the engine or a part
    of the node broke, or the market withdrew the weights.
    """
    app = NodeApp(config, engine, **parts)
    stopping = asyncio.create_task(stop.wait())
    try:
        if not await _finished_first(app.start(), stopping):
            return
        on_ready(app)
        broken = asyncio.create_task(app.broken())
        await asyncio.wait([broken, stopping], return_when=asyncio.FIRST_COMPLETED)
        log.info("draining; running calls will be finished")
        await app.drain()
        if broken.done():
            raise broken.result()
        broken.cancel()
    finally:
        stopping.cancel()
        await app.close()


async def _finished_first(work: Coroutine[Any, Any, None], other: asyncio.Task[Any]) -> bool:
    """Runs ``work`` to its end (True), or cancels it when ``other`` ends first."""
    task = asyncio.create_task(work)
    await asyncio.wait([task, other], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False
