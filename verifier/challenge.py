"""Weights challenge: does a node hold the registered bytes now? Proves possession, not use."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trueweight.protos.errors import TrueweightError
from trueweight.protos.manifest import chunk_proof, read_chunk
from trueweight.protos.v1.model_pb2 import Manifest
from trueweight.protos.v1.node_pb2 import ChallengeRequest, ChallengeResponse
from trueweight.runtime.clock import Clock

MAX_CHUNKS = 64
NONCE_BYTES = 32
DEFAULT_DEADLINE_MS = 10_000
PROVES = "The node had these chunks of the registered weights at hand when it was asked."
DOES_NOT_PROVE = (
    "That it computes its answers with them; only audits of answers (L1) show that. "
    "Nor that it stores them itself: it may have fetched them within the deadline."
)


class Challenged(Protocol):
    """Whoever answers challenges."""

    async def challenge(self, request: ChallengeRequest) -> ChallengeResponse: ...


@dataclass(frozen=True, slots=True)
class ChallengeResult:
    """What came back. ``wrong`` are chunk indices whose proof does not hold."""

    chunks: tuple[int, ...]
    wrong: tuple[int, ...]
    elapsed_ms: float
    deadline_ms: int
    error: str = ""

    @property
    def passed(self) -> bool:
        """True only if every proof held and came in time."""
        return not self.error and not self.wrong and self.elapsed_ms <= self.deadline_ms


def pick_chunks(chunk_count: int, wanted: int, random: Callable[[int], bytes]) -> tuple[int, ...]:
    """Distinct chunk indices, uniform, ascending; at most 64 and never more than there are."""
    wanted = min(wanted, MAX_CHUNKS, chunk_count)
    picked: set[int] = set()
    while len(picked) < wanted:
        # 16 random bytes: the bias of the modulus is below 2^-64.
        picked.add(int.from_bytes(random(16), "big") % chunk_count)
    return tuple(sorted(picked))


def wrong_chunks(
    directory: Path,
    manifest: Manifest,
    node_id: str,
    request: ChallengeRequest,
    proofs: Sequence[bytes],
) -> tuple[int, ...]:
    """Chunks whose proof differs from the one over our own copy of the weights."""
    if len(proofs) != len(request.chunk_indices):
        return tuple(request.chunk_indices)
    wrong = []
    for index, proof in zip(request.chunk_indices, proofs, strict=True):
        chunk = read_chunk(directory, manifest, index)
        if not hmac.compare_digest(chunk_proof(request.nonce, node_id, index, chunk), proof):
            wrong.append(index)
    return tuple(wrong)


@dataclass(frozen=True)
class Challenger:
    """Asks nodes for chunks of weights that we hold ourselves."""

    directory: Path
    manifest: Manifest
    manifest_digest: bytes
    clock: Clock
    random: Callable[[int], bytes]

    async def challenge(
        self, node: Challenged, node_id: str, chunks: int, deadline_ms: int = DEFAULT_DEADLINE_MS
    ) -> ChallengeResult:
        """One challenge. A node that answers late, wrongly or not at all fails it."""
        request = ChallengeRequest(
            manifest_digest=self.manifest_digest,
            nonce=self.random(NONCE_BYTES),
            chunk_indices=pick_chunks(self.manifest.chunk_count, chunks, self.random),
            deadline_ms=deadline_ms,
        )
        started = self.clock.monotonic_ms()
        indices = tuple(request.chunk_indices)
        try:
            answer = await node.challenge(request)
        except TrueweightError as error:
            elapsed = self.clock.monotonic_ms() - started
            return ChallengeResult(indices, indices, elapsed, deadline_ms, str(error))
        elapsed = self.clock.monotonic_ms() - started
        wrong = wrong_chunks(self.directory, self.manifest, node_id, request, answer.chunk_proofs)
        return ChallengeResult(indices, wrong, elapsed, deadline_ms)
