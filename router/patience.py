"""How long a request waits for a place, and how often it asks nodes that say they are full."""

from __future__ import annotations

from trueweight.runtime.clock import Clock

# A refusal costs a request only a moment. When all nodes have refused, or so many, there is a pause
# that grows.
_REFUSALS_AT_ONCE = 32
_FIRST_PAUSE_MS, _LONGEST_PAUSE_MS = 100.0, 6_000.0


class Patience:
    """Begins anew with every node that took the work and lost it."""

    def __init__(self, clock: Clock, until_ms: float) -> None:
        self.until_ms = until_ms
        self._clock = clock
        self._pause_ms = _FIRST_PAUSE_MS
        self._refusals = 0

    @property
    def is_over(self) -> bool:
        """True once the request has waited long enough."""
        return self._clock.monotonic_ms() >= self.until_ms

    async def refused(self) -> None:
        """A node said that it is full."""
        self._refusals += 1
        if self._refusals % _REFUSALS_AT_ONCE == 0:
            await self.pause()

    async def pause(self) -> None:
        """Gives full nodes time to become less so."""
        left_ms = max(0.0, self.until_ms - self._clock.monotonic_ms())
        await self._clock.sleep_ms(min(self._pause_ms, left_ms))
        self._pause_ms = min(2 * self._pause_ms, _LONGEST_PAUSE_MS)
