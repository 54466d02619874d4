"""The node's gRPC service: sessions of routers, scores for verifiers, challenges, description."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

from trueweight.node.challenge import Challenger
from trueweight.node.context import NodeContext
from trueweight.node.engine import SelfTest
from trueweight.node.scoring import Scorer
from trueweight.node.session import NodeSession
from trueweight.protos.errors import OverCapacity, PermissionDenied, Unavailable
from trueweight.protos.v1 import node_pb2 as pb
from trueweight.protos.v1.node_pb2_grpc import NodeServicer
from trueweight.runtime import rpc

# Strangers can open sessions but not finish the handshake: of too many, the oldest goes.
MAX_HANDSHAKES = 64
_MAX_SESSIONS = 64


class ServedStream:
    """A session whose router dialled this node."""

    def __init__(self, requests: AsyncIterator[pb.RouterFrame], context: Any) -> None:
        self._requests, self._context = requests, context

    async def read(self) -> pb.RouterFrame | None:
        try:
            return await anext(self._requests, None)
        except grpc.RpcError:
            return None

    async def write(self, frame: pb.NodeFrame) -> None:
        try:
            await self._context.write(frame)
        except (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError) as error:
            raise Unavailable("the router left") from error


class NodeService(NodeServicer):
    """The calls of node.proto. ``score_for`` are the identities that may ask for scores;
    ``challengers`` those that may challenge. ``manifests`` are the envelopes served."""

    def __init__(
        self,
        node: NodeContext,
        *,
        authenticator: rpc.Authenticator,
        scorer: Scorer,
        challenger: Challenger,
        score_for: frozenset[str],
        challengers: frozenset[str],
        manifests: tuple[bytes, ...],
        on_session: Callable[[NodeSession], None] = lambda _session: None,
    ) -> None:
        self._node, self._authenticator = node, authenticator
        self._scorer, self._challenger = scorer, challenger
        self._score_for, self._challengers = score_for, challengers
        self._manifests = manifests
        self._on_session = on_session
        self._handshakes: deque[NodeSession] = deque()
        self._sessions: set[NodeSession] = set()

    @rpc.unary
    async def Session(self, request_iterator: Any, context: Any) -> None:
        stream = ServedStream(request_iterator, context)
        session = NodeSession(self._node, stream, on_open=self._opened)
        self._handshakes.append(session)
        if len(self._handshakes) > MAX_HANDSHAKES:
            self._handshakes.popleft().abandon()
        try:
            await session.run()
        finally:
            self._sessions.discard(session)
            if session in self._handshakes:
                self._handshakes.remove(session)

    def _opened(self, session: NodeSession) -> None:
        if len(self._sessions) >= _MAX_SESSIONS:
            raise OverCapacity(f"at most {_MAX_SESSIONS} sessions", hint="Close one.")
        if session in self._handshakes:
            self._handshakes.remove(session)
        self._sessions.add(session)
        self._on_session(session)

    @rpc.unary
    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        self._require(context, self._score_for, "scores", "Start the node with --score-for ID.")
        return await self._scorer.score(request)

    @rpc.unary
    async def Challenge(self, request: pb.ChallengeRequest, context: Any) -> pb.ChallengeResponse:
        self._require(context, self._challengers, "challenges", "Verifiers of the market may.")
        return await self._challenger.answer(request)

    @rpc.unary
    async def Describe(self, _request: pb.DescribeRequest, _context: Any) -> pb.DescribeResponse:
        self_test: SelfTest = getattr(self._node.engine, "self_test", SelfTest())
        return pb.DescribeResponse(
            offer=self._node.offer(),
            manifests=self._manifests,
            load=self._node.load(),
            self_test_positions=self_test.positions,
            self_test_equal=self_test.equal,
        )

    def _require(self, context: Any, allowed: frozenset[str], what: str, hint: str) -> None:
        identity = self._authenticator.caller(context).identity
        if identity is None or identity not in allowed:
            raise PermissionDenied(f"you may not ask this node for {what}", hint=hint)
