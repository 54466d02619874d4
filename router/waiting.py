"""Requests that wait for a place on some node, in the order in which they came."""

from __future__ import annotations

import asyncio
from bisect import bisect, insort
from collections.abc import Iterable

from trueweight.protos.errors import OverCapacity

_MAX_WAITERS = 2048
# A lost wake-up costs at most this much; it also notices leases and breakers that changed. Many who
# wait look less often each, so that all together look a hundred times a second at most.
_POLL_MS = 100.0
_POLL_EACH_MS = 10.0
# Who is woken for nothing lets so many others look, one after the other: what he waits for may not
# be what has changed.
_PASSED_ON = 8


def all_busy() -> OverCapacity:
    """What a client is told for whom no place was found in time."""
    return OverCapacity("All nodes for this model are busy.", hint="Try again in a few seconds.")


class Line:
    """One line for each model's weights: who waits for one must not be held up by those who wait
    for another."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, list[tuple[int, asyncio.Future[int]]]] = {}
        self._count = 0
        self._last_number = 0

    def number(self) -> int:
        """A place in the line, kept however often one looks in vain."""
        self._last_number += 1
        return self._last_number

    async def wait(self, manifest_digest: bytes, number: int, timeout_ms: float) -> int:
        """Waits until something changed for these weights, at most a short while. Answers with how
        many others may be woken if that was of no use. Raises OverCapacity if too many requests
        wait already or the time is over."""
        if timeout_ms <= 0 or self._count >= _MAX_WAITERS:
            raise all_busy()
        news: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(manifest_digest, [])
        insort(waiting, (number, news), key=_number)
        self._count += 1
        pause_ms = max(_POLL_MS, _POLL_EACH_MS * self._count)
        try:
            await asyncio.wait({news}, timeout=min(timeout_ms, pause_ms) / 1000)
            return news.result() if news.done() else 0
        finally:
            self._count -= 1
            if not news.done():
                news.cancel()
                waiting.remove((number, news))
            if not waiting and self._waiting.get(manifest_digest) is waiting:
                del self._waiting[manifest_digest]

    def wake(self, manifest_digests: Iterable[bytes] | None = None) -> None:
        """Lets the first in the lines for these weights look again; None: in all lines."""
        for manifest_digest in list(
            self._waiting if manifest_digests is None else manifest_digests
        ):
            self.pass_on(manifest_digest, 0, _PASSED_ON)

    def pass_on(self, manifest_digest: bytes, number: int, times: int) -> None:
        """Lets the next after this number look, unless that was done often enough (0)."""
        waiting = self._waiting.get(manifest_digest)
        if waiting is None or times <= 0:
            return
        place = bisect(waiting, number, key=_number)
        if place < len(waiting):
            waiting.pop(place)[1].set_result(times)


def _number(waiter: tuple[int, asyncio.Future[int]]) -> int:
    return waiter[0]
