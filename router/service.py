"""The router's gRPC service, for nodes and verifiers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

from trueweight.protos.envelope import open_envelope
from trueweight.protos.errors import (
    InvalidRequest,
    NotFound,
    PermissionDenied,
    TrueweightError,
    Unauthenticated,
)
from trueweight.protos.transcript_box import wrap_key
from trueweight.protos.v1.audit_pb2 import AuditRequest
from trueweight.protos.v1.market_pb2 import Member
from trueweight.protos.v1.node_pb2 import RouterFrame
from trueweight.protos.v1.router_pb2 import (
    OpenTranscriptRequest,
    OpenTranscriptResponse,
    RegisterRequest,
    RegisterResponse,
)
from trueweight.protos.v1.router_pb2_grpc import (
    RouterServicer,
    add_RouterServicer_to_server,
)
from trueweight.router.catalog import Catalog
from trueweight.router.connections import Connections
from trueweight.router.fleet import Fleet, NodeRecord
from trueweight.router.frames import frames_of
from trueweight.router.keyring import Keys
from trueweight.router.node_session import NodeSession, SessionIdentity
from trueweight.router.offers import open_offer
from trueweight.router.store import Store
from trueweight.router.transcripts import TranscriptBox
from trueweight.runtime import rpc
from trueweight.runtime.ledger_port import LedgerPort
from trueweight.runtime.market import Market

log = logging.getLogger(__name__)

_MAX_REMEMBERED_EVENTS = 100_000


class RouterService(RouterServicer):
    """Register, Attach and OpenTranscript. See router.proto."""

    def __init__(
        self,
        *,
        market: Market,
        me: SessionIdentity,
        keys: Keys,
        fleet: Fleet,
        catalog: Catalog,
        connections: Connections,
        ledger: LedgerPort,
        store: Store,
        box: TranscriptBox,
        random: Callable[[int], bytes],
    ) -> None:
        self._market, self._me, self._keys = market, me, keys
        self._fleet, self._catalog, self._connections = fleet, catalog, connections
        self._ledger, self._store, self._box, self._random = ledger, store, box, random
        self._published: set[bytes] = set()

    @rpc.unary
    async def Register(self, request: RegisterRequest, context: Any) -> RegisterResponse:
        """A node offers itself; repeated before each lease ends."""
        record = await self._take_offer(request.offer)
        if record.offer.endpoint:
            self._connections.ensure(record)
        reason = self._fleet.refusal(record)
        if not reason and record.session is None and record.offer.endpoint:
            reason = "" if await self._wait_for_session(record) else "the router cannot reach it"
        return RegisterResponse(lease_ms=record.offer.lease_ms, eligible=not reason, reason=reason)

    @rpc.streaming
    async def Attach(
        self, request_iterator: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[RouterFrame]:
        """A session opened by a node that nobody can dial; its offer comes with its proof."""
        session = NodeSession(self._me)
        task = asyncio.create_task(self._attach(session, _messages(request_iterator)))
        try:
            async for frame in session.outgoing():
                yield frame
            await task
        finally:
            session.close("the node left")
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @rpc.unary
    async def OpenTranscript(
        self, request: OpenTranscriptRequest, context: Any
    ) -> OpenTranscriptResponse:
        """Opens one transcript to the verifier named in a logged AuditRequest."""
        audit = open_envelope(
            request.audit_request, AuditRequest, self._keys.ring, self._market.market_id
        )
        verifier = audit.message.verifier_id
        if audit.signer != verifier or not self._market.has_role(verifier, Member.VERIFIER):
            raise PermissionDenied("only a verifier of this market may open transcripts")
        if len(audit.message.wrap_public_key) != 32 or len(audit.message.receipt_digest) != 32:
            raise InvalidRequest("an audit request names a receipt and a key to wrap to")
        await self._check_logged(request)
        digest = audit.message.receipt_digest
        sealed = await self._store.read(self._box.get(digest))
        wrapped = wrap_key(sealed.data_key, audit.message.wrap_public_key, digest, self._random)
        log.info("transcript of receipt %s opened to verifier %s", digest.hex(), verifier)
        return OpenTranscriptResponse(
            ephemeral_public_key=wrapped.ephemeral_public_key,
            wrapped_key=wrapped.wrapped_key,
            nonce=sealed.nonce,
            ciphertext=sealed.ciphertext,
        )

    async def _take_offer(self, envelope: bytes) -> NodeRecord:
        now = self._me.clock.now_unix_ms()
        opened, _ = open_offer(envelope, self._market.market_id, self._keys.ring, now)
        offer = opened.message
        if not any(self._catalog.is_sold(m.manifest_digest) for m in offer.models):
            raise NotFound(
                "none of the offered models is registered in this market",
                hint="See 'trueweight model register'; the weights must be the registered ones.",
            )
        # First, because it refuses what there is no room for.
        record = self._fleet.remember(offer)
        for event in offer.key_events:
            self._keys.learn(event)
            if event not in self._published:
                # The ledger must know the key before it can accept a receipt of this node.
                await self._ledger.publish(event)
                if len(self._published) > _MAX_REMEMBERED_EVENTS:
                    self._published.clear()
                self._published.add(event)
        return record

    async def _wait_for_session(self, record: NodeRecord) -> bool:
        for _ in range(20):
            if record.session is not None and record.session.is_open:
                return True
            await self._me.clock.sleep_ms(100)
        return False

    async def _attach(self, session: NodeSession, incoming: AsyncIterator[bytes]) -> None:
        record: list[NodeRecord] = []

        async def opened(open_session: NodeSession) -> None:
            found = await self._take_offer(open_session.offer)
            if found.node_id != open_session.node_id:
                raise Unauthenticated("the offer is another node's than the proof")
            record.append(found)
            await self._connections.adopt(found, open_session)

        try:
            await session.run(
                frames_of(session, incoming),
                opened,
                lambda: float(record[0].offer.lease_ms) if record else 10_000.0,
            )
        except TrueweightError as error:
            log.info("an attached session ended: %s", error)
            raise
        finally:
            if record:
                self._connections.drop(record[0], session)

    async def _check_logged(self, request: OpenTranscriptRequest) -> None:
        page = await self._ledger.read_log(request.log_index, 1)
        for entry in page.entries:
            if entry.index == request.log_index and entry.body == request.audit_request:
                return
        raise PermissionDenied(
            "the audit request is not in the log at this index", hint="Publish it first."
        )


def add_router_service(service: RouterService, server: grpc.aio.Server) -> None:
    """As generated, but the messages of Attach come as bytes, to be weighed first."""
    add_RouterServicer_to_server(service, server)
    attach: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
        service.Attach, response_serializer=RouterFrame.SerializeToString
    )
    server.add_registered_method_handlers("trueweight.v1.Router", {"Attach": attach})


async def _messages(requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        async for message in requests:
            yield message
    except (grpc.aio.AioRpcError, grpc.aio.BaseError):
        return
