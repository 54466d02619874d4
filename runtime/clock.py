"""Time as a value that is passed in."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Wall time for signatures and the ledger, monotonic time for durations."""

    def now_unix_ms(self) -> int: ...

    def monotonic_ms(self) -> float: ...

    async def sleep_ms(self, duration_ms: float) -> None: ...


class SystemClock:
    """The machine's clocks."""

    def now_unix_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic_ms(self) -> float:
        return time.monotonic_ns() / 1e6

    async def sleep_ms(self, duration_ms: float) -> None:
        await asyncio.sleep(max(0.0, duration_ms) / 1000)


class ManualClock:
    """A clock that moves only when told; sleepers wake when their time has come."""

    def __init__(self, unix_ms: int = 1_700_000_000_000) -> None:
        self._unix_ms = unix_ms
        self._elapsed_ms = 0.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def now_unix_ms(self) -> int:
        return self._unix_ms + int(self._elapsed_ms)

    def monotonic_ms(self) -> float:
        return self._elapsed_ms

    async def sleep_ms(self, duration_ms: float) -> None:
        if duration_ms <= 0:
            await asyncio.sleep(0)
            return
        wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self._elapsed_ms + duration_ms, wake))
        await wake

    def advance_ms(self, duration_ms: float) -> None:
        """Moves time forward and wakes whoever was due."""
        self._elapsed_ms += duration_ms
        due = [s for s in self._sleepers if s[0] <= self._elapsed_ms]
        self._sleepers = [s for s in self._sleepers if s[0] > self._elapsed_ms]
        for _, wake in sorted(due, key=lambda s: s[0]):
            if not wake.done():
                wake.set_result(None)
