"""Sends captures and voids to the ledger until their outcome is known."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from trueweight.protos.errors import TrueweightError
from trueweight.protos.ids import derived_id
from trueweight.protos.v1.ledger_pb2 import Operation, Result, VoidHold
from trueweight.router.journal import CAPTURED, REFUSED, Journal
from trueweight.runtime.clock import Clock
from trueweight.runtime.ledger_port import LedgerPort

log = logging.getLogger(__name__)

_PAUSES_MS = (100.0, 300.0, 1_000.0, 3_000.0, 10_000.0)
# Beyond this a capture waits in the journal for the next replay, a void for its hold's expiry.
MAX_IN_BACKGROUND = 10_000
_REPLAY_BATCH = 200


class Settler:
    """Captures are journalled before they come here and stay journalled until they are settled,
    so that a crash loses none. Voids are not: a hold nobody voids expires by itself."""

    def __init__(
        self,
        ledger: LedgerPort,
        journal: Journal,
        clock: Clock,
        on_captured: Callable[[Operation], None] = lambda _: None,
    ) -> None:
        self._ledger, self._journal, self._clock = ledger, journal, clock
        self._on_captured = on_captured
        self._tasks: set[asyncio.Task[None]] = set()
        self._capturing: set[bytes] = set()
        self.captured = 0
        self.refused = 0

    @property
    def in_background(self) -> int:
        """Operations without a known outcome."""
        return len(self._tasks)

    async def capture(self, operation: Operation, wait_ms: float) -> None:
        """Captures; returns when it is done or after ``wait_ms``, then it goes on by itself."""
        await self._in_background(self._capture(operation), wait_ms)

    async def void(self, hold_id: bytes, hold_expires_at_unix_ms: int, wait_ms: float) -> None:
        """Gives a hold back, trying until it would have expired anyway."""
        await self._in_background(self._void(hold_id, hold_expires_at_unix_ms), wait_ms)

    async def replay(self) -> int:
        """Sends every journalled capture without a known outcome that is not under way; how many
        there were."""
        pending = [op for op in await self._journal.pending() if op.id not in self._capturing]
        for start in range(0, len(pending), _REPLAY_BATCH):
            batch = pending[start : start + _REPLAY_BATCH]
            await asyncio.gather(*(self.capture(op, wait_ms=60_000) for op in batch))
        return len(pending)

    async def close(self, wait_ms: float) -> None:
        """Gives what is under way a moment, then stops; the journal remembers captures."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=wait_ms / 1000)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _in_background(self, work: Coroutine[Any, Any, None], wait_ms: float) -> None:
        if len(self._tasks) >= MAX_IN_BACKGROUND:
            work.close()
            return
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.wait({task}, timeout=wait_ms / 1000)

    async def _capture(self, operation: Operation) -> None:
        self._capturing.add(operation.id)
        try:
            result = await self._apply(operation, until_unix_ms=None)
            if result is not None:
                await self._write_down(operation, result)
        finally:
            self._capturing.discard(operation.id)

    async def _write_down(self, operation: Operation, result: Result) -> None:
        if result.status == Result.REFUSED:
            self.refused += 1
            log.error(
                "the ledger refused bill %s: %s %s", operation.id.hex(), result.code, result.message
            )
            await self._journal.settle(operation.id, REFUSED, f"{result.code} {result.message}")
        else:
            self.captured += 1
            await self._journal.settle(operation.id, CAPTURED)
            self._on_captured(operation)

    async def _void(self, hold_id: bytes, until_unix_ms: int) -> None:
        operation = Operation(id=derived_id("void", hold_id), void_hold=VoidHold(hold_id=hold_id))
        result = await self._apply(operation, until_unix_ms)
        if result is not None and result.status == Result.REFUSED:
            log.info("void of hold %s: %s", hold_id.hex(), result.code)

    async def _apply(self, operation: Operation, until_unix_ms: int | None) -> Result | None:
        """The outcome; None once it does not matter any more."""
        attempt = 0
        while until_unix_ms is None or self._clock.now_unix_ms() < until_unix_ms:
            try:
                return (await self._ledger.apply([operation]))[0]
            except TrueweightError as error:
                if not error.retryable:
                    log.error("the ledger failed on %s: %s", operation.id.hex(), error)
                    return None
            await self._clock.sleep_ms(_PAUSES_MS[min(attempt, len(_PAUSES_MS) - 1)])
            attempt += 1
        return None
