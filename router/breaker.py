"""Circuit breaker of one node, and moving averages of what the router measured. Pure values."""

from __future__ import annotations

from dataclasses import dataclass, replace

_OPEN_AFTER_FAILURES = 3
_FIRST_PAUSE_MS = 2_000.0
LONGEST_PAUSE_MS = 60_000.0
_SMOOTHING = 0.1


@dataclass(frozen=True, slots=True)
class Breaker:
    """Closed until ``_OPEN_AFTER_FAILURES`` in a row; then open for a pause that doubles; then
    half-open: one probe at a time decides. Times are monotonic milliseconds."""

    failures: int = 0
    pauses: int = 0
    open_until_ms: float = 0.0
    probing: bool = False

    def allows(self, now_ms: float) -> bool:
        """True if a request may go there now."""
        if self.pauses == 0:
            return True
        return now_ms >= self.open_until_ms and not self.probing

    def started(self) -> Breaker:
        """A request was sent; in the half-open state it is the probe."""
        return replace(self, probing=True) if self.pauses else self

    def succeeded(self) -> Breaker:
        """A request went well: closed."""
        return Breaker()

    def abandoned(self) -> Breaker:
        """A request ended without telling anything about the node."""
        return replace(self, probing=False)

    def failed(self, now_ms: float) -> Breaker:
        """A request failed by the node's fault."""
        failures = self.failures + 1
        if not self.pauses and failures < _OPEN_AFTER_FAILURES:
            return replace(self, failures=failures)
        pause = min(LONGEST_PAUSE_MS, _FIRST_PAUSE_MS * 2.0 ** min(self.pauses, 10))
        return Breaker(failures, self.pauses + 1, now_ms + pause, probing=False)


@dataclass(frozen=True, slots=True)
class Measured:
    """What the router itself saw of a node. Rates in tokens per second, 0 if unknown."""

    success: float = 1.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    most_in_flight: int = 1
    completed: int = 0
    failed: int = 0

    def with_success(
        self, *, prompt_tokens: int, output_tokens: int, first_ms: float, rest_ms: float
    ) -> Measured:
        """After an answer: time to the first token and from there to the last. The very first
        answer says nothing about rates: engines compile and fill caches in it."""
        prefill, decode = self.prefill_tokens_per_s, self.decode_tokens_per_s
        is_warm = self.completed > 0
        # A plain mean at first: one slow answer must not follow a node for its next twenty.
        share = max(_SMOOTHING, 1 / max(1, self.completed))
        if is_warm and first_ms > 0 and prompt_tokens > 0:
            prefill = _smooth(prefill, prompt_tokens * 1000 / first_ms, share)
        if is_warm and rest_ms > 0 and output_tokens > 1:
            decode = _smooth(decode, (output_tokens - 1) * 1000 / rest_ms, share)
        return replace(
            self,
            success=_smooth(self.success, 1.0, _SMOOTHING),
            prefill_tokens_per_s=prefill,
            decode_tokens_per_s=decode,
            completed=self.completed + 1,
        )

    def with_failure(self) -> Measured:
        """After a failure by the node's fault."""
        return replace(self, success=self.success * (1 - _SMOOTHING), failed=self.failed + 1)

    def with_in_flight(self, in_flight: int) -> Measured:
        """Remembers the most requests the node was seen to carry at once."""
        return replace(self, most_in_flight=max(self.most_in_flight, in_flight))


def _smooth(old: float, new: float, share: float) -> float:
    return new if old == 0 else old + share * (new - old)
