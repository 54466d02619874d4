"""Composition: an engine, checked weights, the service, sessions and registration.

The engine is passed in, so that tests and simulation run any engine through the real node.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import grpc.aio

from trueweight.node.admission import ModelTerms, Terms
from trueweight.node.attach import attach_forever
from trueweight.node.challenge import Challenger
from trueweight.node.claims import claim_forever
from trueweight.node.config import NodeConfig, advertised_endpoint
from trueweight.node.context import NodeContext
from trueweight.node.engine import Engine
from trueweight.node.journal import ReceiptJournal
from trueweight.node.registration import OfferTerms, RegisterCall, Registrar, sign_offer
from trueweight.node.scoring import Scorer
from trueweight.node.service import NodeService
from trueweight.node.session import NodeSession
from trueweight.node.weights import ServedWeights, check_weights, read_registry
from trueweight.node.workload import Workload
from trueweight.protos.errors import InvalidRequest, WeightsRefused
from trueweight.protos.v1.market_pb2 import Member, OfferedModel
from trueweight.protos.v1.node_pb2_grpc import add_NodeServicer_to_server
from trueweight.protos.v1.router_pb2 import RegisterRequest, RegisterResponse
from trueweight.protos.v1.router_pb2_grpc import RouterStub
from trueweight.runtime import rpc
from trueweight.runtime.clock import Clock, SystemClock
from trueweight.runtime.keys import load_or_create
from trueweight.runtime.ledger_port import GrpcLedger, LedgerPort
from trueweight.runtime.tls import ensure_certificate

log = logging.getLogger(__name__)

_REGISTER_TIMEOUT_MS = 10_000
_POLL_MS = 50


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
        self.signer = load_or_create(config.keys, config.market.market_id, self._clock)
        self._tokens = rpc.AccessTokens(
            self.signer, config.market.market_id, self._clock, self._random
        )
        self.endpoint = ""
        self.registrar: Registrar | None = None
        self.weights: ServedWeights | None = None

    @property
    def node_id(self) -> str:
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

    async def drain(self) -> None:
        """Takes no new work and waits, bounded, until running calls have ended."""
        self._draining = True
        for task in self._tasks:
            if task.get_name() == "register":
                task.cancel()
        for session in list(self._sessions):
            session.drain()
        deadline_ms = self._clock.monotonic_ms() + self._config.drain_ms
        while self._live_sessions() and self._clock.monotonic_ms() < deadline_ms:
            await self._clock.sleep_ms(_POLL_MS)

    async def close(self) -> None:
        """Ends sessions (their calls get partial receipts), the service and the engine."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._cleanup.aclose()

    async def _start(self) -> None:
        config = self._config
        ledger = self._connect_ledger()
        registry = await read_registry(ledger, config.market.market_id, config.market.ring)
        weights = await check_weights(config.model_dir, registry, config.model_id)
        self.weights = weights
        log.info("weights of %s are registered and unaltered; starting engine", weights.model_id)
        self._cleanup.push_async_callback(self._engine.close)
        await self._engine.start()
        if self._engine.limits.vocabulary_size < weights.manifest.vocabulary_size:
            raise WeightsRefused("the engine's vocabulary is smaller than the manifest's")
        journal = ReceiptJournal(config.journal_path)
        self._cleanup.callback(journal.close)
        pem = ensure_certificate(config.keys, self._clock.now_unix_ms())
        server = rpc.make_server()
        self.endpoint = rpc.listen(server, config.listen, config.keys)
        node = self._context(weights, journal, pem)
        add_NodeServicer_to_server(self._service(node, weights), server)
        await server.start()
        self._cleanup.push_async_callback(server.stop, 1.0)
        if not config.score_only:
            self._spawn("claims", partial(claim_forever, journal, ledger, self._clock))
            self._work_for_router(node)

    def _connect_ledger(self) -> LedgerPort:
        if self._ledger is not None:
            return self._ledger
        member = self._config.market.member(Member.LEDGER)
        endpoint = self._config.ledger_endpoint or member.endpoint
        if not endpoint or not member.tls_certificate_pem:
            raise InvalidRequest(
                "the market file has no address or certificate for the ledger",
                hint="Give the address with --ledger HOST:PORT.",
            )
        ledger = GrpcLedger(endpoint, member.tls_certificate_pem, member.identity, self._tokens)
        self._cleanup.push_async_callback(ledger.close)
        return ledger

    def _context(self, weights: ServedWeights, journal: ReceiptJournal, pem: str) -> NodeContext:
        config, limits = self._config, self._engine.limits
        capacity = config.capacity or limits.max_running
        context_tokens = limits.max_context_tokens
        if weights.manifest.max_context_tokens:
            context_tokens = min(context_tokens, weights.manifest.max_context_tokens)
        model = ModelTerms(
            ask_input_nano_per_mtok=config.ask_input_nano_per_mtok,
            ask_output_nano_per_mtok=config.ask_output_nano_per_mtok,
            max_context_tokens=context_tokens,
            vocabulary_size=weights.manifest.vocabulary_size,
        )
        offer_terms = OfferTerms(
            market_id=config.market.market_id,
            endpoint=advertised_endpoint(config, self.endpoint),
            tls_certificate_pem=pem,
            models=(
                OfferedModel(
                    manifest_digest=weights.manifest_digest,
                    ask_input_nano_per_mtok=model.ask_input_nano_per_mtok,
                    ask_output_nano_per_mtok=model.ask_output_nano_per_mtok,
                    max_context_tokens=context_tokens,
                ),
            ),
            fingerprint=self._engine.fingerprint,
            capacity=capacity,
            lease_ms=config.lease_ms,
            operator_id=config.operator_id,
        )
        routers = (
            {config.router.identity}
            if config.router is not None
            else {m.identity for m in config.market.members(Member.ROUTER)}
        )
        return NodeContext(
            signer=self.signer,
            market_id=config.market.market_id,
            ring=config.market.ring,
            router_ids=frozenset() if config.score_only else frozenset(routers),
            terms=Terms(
                market_id=config.market.market_id,
                node_id=self.node_id,
                models={weights.manifest_digest: model},
                capacity=capacity,
            ),
            engine=self._engine,
            clock=self._clock,
            random=self._random,
            journal=journal,
            workload=Workload(journal.knows),
            offer=lambda: sign_offer(offer_terms, self.signer, self._clock.now_unix_ms()),
            timing=config.timing,
        )

    def _service(self, node: NodeContext, weights: ServedWeights) -> NodeService:
        market = self._config.market
        verifiers = {m.identity for m in market.members(Member.VERIFIER)}
        context_tokens = node.terms.models[weights.manifest_digest].max_context_tokens
        return NodeService(
            node,
            authenticator=rpc.Authenticator(
                self.node_id, market.market_id, market.ring, self._clock
            ),
            scorer=Scorer(self._engine, weights.manifest_digest, context_tokens),
            challenger=Challenger(weights, self.node_id),
            score_for=self._config.score_for,
            challengers=frozenset(verifiers | self._config.score_for),
            manifests=(weights.manifest_envelope,),
            on_session=self._add_session,
        )

    def _work_for_router(self, node: NodeContext) -> None:
        router = self._config.router
        if router is None and self._register is None:
            raise InvalidRequest("a node needs a router", hint="Give --router or --score-only.")
        if self._config.attach:
            if router is None:
                raise InvalidRequest("--attach needs a router to dial")
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
        self._tasks.append(asyncio.create_task(_logged(name, work), name=name))

    def _add_session(self, session: NodeSession) -> None:
        self._live_sessions()
        self._sessions.add(session)
        if self._draining:
            session.drain()

    def _live_sessions(self) -> bool:
        self._sessions = {s for s in self._sessions if not s.ended}
        return bool(self._sessions)


async def _logged(name: str, work: Callable[[], Awaitable[None]]) -> None:
    try:
        await work()
    except asyncio.CancelledError:
        raise
    except Exception:
        log.exception("the node's %s loop ended", name)


async def run_node(
    config: NodeConfig,
    engine: Engine,
    stop: asyncio.Event,
    on_ready: Callable[[NodeApp], Any] = lambda _app: None,
    **parts: Any,
) -> None:
    """A node's whole life: start, serve until ``stop``, drain, close. ``parts`` go to NodeApp."""
    app = NodeApp(config, engine, **parts)
    await app.start()
    try:
        on_ready(app)
        await stop.wait()
        log.info("draining; running calls will be finished")
        await app.drain()
    finally:
        await app.close()
