"""Weights challenges: proofs over random chunks of the files on disk, now, under a fresh nonce.

They prove possession of the weights' bytes, not that answers are computed with them.
"""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

from trueweight.node.weights import ServedWeights
from trueweight.protos.errors import DeadlineExceeded, InvalidRequest, NotFound, OverCapacity
from trueweight.protos.manifest import chunk_proof, read_chunk
from trueweight.protos.v1.node_pb2 import ChallengeRequest, ChallengeResponse

MAX_CHUNKS = 64
NONCE_BYTES = 32
MAX_DEADLINE_MS = 120_000
MAX_WAITING = 8


class Challenger:
    """Answers challenges one at a time, reading in a thread."""

    def __init__(self, weights: ServedWeights, node_id: str) -> None:
        self._weights, self._node_id = weights, node_id
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def answer(self, request: ChallengeRequest) -> ChallengeResponse:
        """Raises NotFound, InvalidRequest, OverCapacity, DeadlineExceeded, or WeightsRefused if a
        file is gone."""
        self._check(request)
        self._waiting += 1
        started_ns = time.monotonic_ns()
        try:
            async with asyncio.timeout(request.deadline_ms / 1000), self._turn:
                proofs = [
                    await asyncio.to_thread(self._prove, request.nonce, index)
                    for index in request.chunk_indices
                ]
        except TimeoutError:
            raise DeadlineExceeded("the chunks were not read in time") from None
        finally:
            self._waiting -= 1
        elapsed_us = (time.monotonic_ns() - started_ns) // 1000
        return ChallengeResponse(chunk_proofs=proofs, elapsed_us=elapsed_us)

    def _check(self, request: ChallengeRequest) -> None:
        if request.manifest_digest != self._weights.manifest_digest:
            raise NotFound("these weights are not served here")
        if len(request.nonce) != NONCE_BYTES:
            raise InvalidRequest(f"a challenge nonce has {NONCE_BYTES} bytes")
        indices = request.chunk_indices
        if not 1 <= len(indices) <= MAX_CHUNKS or any(a >= b for a, b in pairwise(indices)):
            raise InvalidRequest(f"name 1 to {MAX_CHUNKS} chunks in ascending order")
        if indices[-1] >= self._weights.manifest.chunk_count:
            raise InvalidRequest(f"chunks go up to {self._weights.manifest.chunk_count - 1}")
        if not 1 <= request.deadline_ms <= MAX_DEADLINE_MS:
            raise InvalidRequest(f"deadline_ms must be from 1 to {MAX_DEADLINE_MS}")
        if self._waiting >= MAX_WAITING:
            raise OverCapacity("too many challenges are waiting", hint="Try again later.")

    def _prove(self, nonce: bytes, index: int) -> bytes:
        chunk = read_chunk(self._weights.directory, self._weights.manifest, index)
        return chunk_proof(nonce, self._node_id, index, chunk)
