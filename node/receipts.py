"""Receipts: what the node did for an assignment. Exactly one per assignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trueweight.protos.tokens import token_digest
from trueweight.protos.v1.market_pb2 import EngineFingerprint, FinishReason, Receipt


@dataclass(frozen=True, slots=True)
class Durations:
    """Milliseconds on the node's monotonic clock: when the call was received, handed to the
    engine, gave its first token (None if it gave none) and ended."""

    received_ms: float
    started_ms: float
    first_token_ms: float | None
    ended_ms: float

    def queue_us(self) -> int:
        """From receiving the call to handing it to the engine."""
        return _microseconds(self.started_ms - self.received_ms)

    def first_token_us(self) -> int:
        """From receiving the call to its first token; 0 without one."""
        if self.first_token_ms is None:
            return 0
        return _microseconds(self.first_token_ms - self.received_ms)

    def total_us(self) -> int:
        """From receiving the call to its end."""
        return _microseconds(self.ended_ms - self.received_ms)


def build_receipt(
    *,
    market_id: str,
    node_id: str,
    assignment_digest: bytes,
    salt: bytes,
    prompt_tokens: int,
    output: Sequence[int],
    finish_reason: FinishReason,
    fingerprint: EngineFingerprint,
    durations: Durations,
) -> Receipt:
    """The unsigned receipt. ``output`` is this leg's tokens, exactly those that are billed."""
    return Receipt(
        market_id=market_id,
        assignment_digest=assignment_digest,
        node_id=node_id,
        output_digest=token_digest(salt, output),
        prompt_tokens=prompt_tokens,
        output_tokens=len(output),
        finish_reason=finish_reason,
        fingerprint=fingerprint,
        queue_us=durations.queue_us(),
        first_token_us=durations.first_token_us(),
        total_us=durations.total_us(),
    )


def _microseconds(duration_ms: float) -> int:
    return max(0, round(duration_ms * 1000))
