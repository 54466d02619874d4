"""Waiting times between attempts: doubling, bounded, with full jitter."""

from __future__ import annotations

from collections.abc import Callable

_SCALE = 2**32


class Backoff:
    """``next_ms`` is drawn from (half, all] of a limit that doubles up to ``most_ms``, so that
    nodes that lost the same router do not come back at the same moment."""

    def __init__(
        self, random: Callable[[int], bytes], first_ms: float = 200, most_ms: float = 15_000
    ) -> None:
        self._random, self._first_ms, self._most_ms = random, first_ms, most_ms
        self._limit_ms = first_ms

    def next_ms(self) -> float:
        """How long to wait before the next attempt."""
        fraction = (int.from_bytes(self._random(4), "little") + 1) / _SCALE
        wait_ms = self._limit_ms * (0.5 + 0.5 * fraction)
        self._limit_ms = min(self._most_ms, self._limit_ms * 2)
        return wait_ms

    def reset(self) -> None:
        """After a success: the next wait is a short one again."""
        self._limit_ms = self._first_ms
