"""The verifier's own reference node: margins of claimed outputs, in batches, with deadlines."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trueweight.protos.envelope import parse_envelope, parse_payload
from trueweight.protos.errors import DeadlineExceeded, EngineError, OverCapacity
from trueweight.protos.evidence import REFERENCE_DTYPE
from trueweight.protos.v1.market_pb2 import EngineFingerprint, Offer
from trueweight.protos.v1.node_pb2 import (
    ChallengeRequest,
    ChallengeResponse,
    DescribeRequest,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    ScoreResult,
)
from trueweight.protos.v1.node_pb2_grpc import NodeStub
from trueweight.runtime import rpc

log = logging.getLogger(__name__)

MAX_BATCH_ITEMS = 32
# Longest prefill work in one request; a single longer item still goes alone.
MAX_BATCH_TOKENS = 65_536
MAX_WAITING = 1_024
COALESCE_MS = 20
SCORE_TIMEOUT_MS = 120_000
_CALL_SLACK_MS = 5_000


class Reference(Protocol):
    """A node that the verifier trusts because it operates it."""

    async def score(self, manifest_digest: bytes, items: Sequence[ScoreItem]) -> ScoreResponse: ...

    async def close(self) -> None: ...


class GrpcNode:
    """A node's unary calls over one pinned channel. Also used to challenge market nodes."""

    def __init__(
        self, endpoint: str, pinned_pem: str, identity: str, tokens: rpc.AccessTokens
    ) -> None:
        self._channel = rpc.make_channel(endpoint, pinned_pem)
        self._stub = NodeStub(self._channel)
        self._identity, self._tokens = identity, tokens

    async def score(self, manifest_digest: bytes, items: Sequence[ScoreItem]) -> ScoreResponse:
        request = ScoreRequest(
            manifest_digest=manifest_digest, items=items, deadline_ms=SCORE_TIMEOUT_MS
        )
        timeout_ms = SCORE_TIMEOUT_MS + _CALL_SLACK_MS
        metadata = self._tokens.metadata(await self.identity())
        return await rpc.call(self._stub.Score, request, timeout_ms=timeout_ms, metadata=metadata)

    async def challenge(self, request: ChallengeRequest) -> ChallengeResponse:
        """The node's answer; it has the request's deadline and a little for the way."""
        timeout_ms = request.deadline_ms + _CALL_SLACK_MS
        metadata = self._tokens.metadata(await self.identity())
        return await rpc.call(
            self._stub.Challenge, request, timeout_ms=timeout_ms, metadata=metadata
        )

    async def offer(self) -> Offer:
        """What the node says it serves. The pinned certificate says who answers."""
        answer = await rpc.call(self._stub.Describe, DescribeRequest(), timeout_ms=10_000)
        return parse_payload(parse_envelope(answer.offer), Offer)

    async def identity(self) -> str:
        """The node's id; asked for once if it was not given."""
        if not self._identity:
            self._identity = (await self.offer()).node_id
        return self._identity

    async def close(self) -> None:
        await self._channel.close()


@dataclass(frozen=True, slots=True)
class ItemScore:
    """One item's result and the engine that computed it."""

    result: ScoreResult
    fingerprint: EngineFingerprint


@dataclass
class _Waiting:
    manifest_digest: bytes
    item: ScoreItem
    answer: asyncio.Future[ItemScore]

    @property
    def tokens(self) -> int:
        item = self.item
        return len(item.prompt_token_ids) + len(item.prefix_token_ids) + len(item.output_token_ids)


class Scorer:
    """Joins concurrent audits into one prefill batch of up to 32 items; one batch at a time."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._queue: deque[_Waiting] = deque()
        self._task: asyncio.Task[None] | None = None
        # Tokens of a batch; what took too long is halved, or the same batch would come again.
        self._most_tokens = MAX_BATCH_TOKENS
        self.scored_items = 0
        self.scored_tokens = 0

    async def score(self, manifest_digest: bytes, item: ScoreItem) -> ItemScore:
        """Margins of one item. Raises EngineError, Unavailable, DeadlineExceeded, OverCapacity."""
        if len(self._queue) >= MAX_WAITING:
            raise OverCapacity("too many audits wait for the reference node", hint="Retry later.")
        waiting = _Waiting(manifest_digest, item, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return await waiting.answer

    async def close(self) -> None:
        """Cancels what waits and closes the reference."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for waiting in self._queue:
            waiting.answer.cancel()
        self._queue.clear()
        await self._reference.close()

    async def _run(self) -> None:
        await asyncio.sleep(COALESCE_MS / 1000)
        while self._queue:
            await self._score_batch(self._take())

    def _take(self) -> list[_Waiting]:
        """The next batch: same manifest, in order, within bounds. Abandoned items are dropped."""
        batch: list[_Waiting] = []
        tokens = 0
        while self._queue and len(batch) < MAX_BATCH_ITEMS:
            following = self._queue[0]
            if not following.answer.done():
                if batch and following.manifest_digest != batch[0].manifest_digest:
                    break
                if batch and tokens + following.tokens > self._most_tokens:
                    break
                batch.append(following)
                tokens += following.tokens
            self._queue.popleft()
        return batch

    async def _score_batch(self, batch: list[_Waiting]) -> None:
        if not batch:
            return
        try:
            response = await self._reference.score(
                batch[0].manifest_digest, [w.item for w in batch]
            )
            if len(response.results) != len(batch):
                raise EngineError("the reference node returned another number of results")
            _check_dtype(response.fingerprint)
        except asyncio.CancelledError:
            for waiting in batch:
                waiting.answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001  (handed to every waiting audit, none is lost)
            if isinstance(error, DeadlineExceeded):
                self._most_tokens = max(1, sum(w.tokens for w in batch) // 2)
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
            return
        self._most_tokens = min(MAX_BATCH_TOKENS, 2 * self._most_tokens)
        for waiting, result in zip(batch, response.results, strict=True):
            self.scored_items += 1
            self.scored_tokens += len(result.margins)
            if not waiting.answer.done():
                waiting.answer.set_result(ItemScore(result, response.fingerprint))


def _check_dtype(fingerprint: EngineFingerprint) -> None:
    """Null means are those of float32 references: another would add noise that they leave out."""
    if fingerprint.dtype != REFERENCE_DTYPE:
        raise EngineError(
            f"the reference node computes in {fingerprint.dtype[:16]!r}, not in {REFERENCE_DTYPE}",
            hint=f"Start it with '--score-only --dtype {REFERENCE_DTYPE}'.",
        )
