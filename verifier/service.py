"""The verifier's loop: follow the log, do what it demands, with bounds and deadlines."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from trueweight.protos.envelope import digest_of, parse_envelope, parse_payload
from trueweight.protos.errors import TrueweightError
from trueweight.protos.v1.audit_pb2 import AuditRequest, Verdict
from trueweight.protos.v1.log_pb2 import LogEntry
from trueweight.runtime.clock import Clock
from trueweight.runtime.ledger_port import LedgerPort
from trueweight.verifier import duties
from trueweight.verifier.plan import Agenda
from trueweight.verifier.state import KINDS, LogView
from trueweight.verifier.work import Worker

log = logging.getLogger(__name__)

PAGE = 1000
TICK_MS = 500
FIRST_RETRY_MS, MAX_RETRY_MS = 200.0, 10_000.0
# A done duty whose leaf does not show up is done again after this long; ids keep it harmless.
RECHECK_MS = 15_000.0
MAX_CONCURRENT_DUTIES = 64


@dataclass
class _Try:
    """When a duty may be tried again, and how often it failed."""

    not_before_ms: float = 0.0
    failures: int = 0


class VerifierService:
    """One verifier. ``run`` until ``stop`` is set; ``ready`` is set once its epoch and
    the calibrations it has for the weights on sale are logged."""

    def __init__(self, ledger: LedgerPort, worker: Worker, clock: Clock) -> None:
        self.agenda: Agenda = worker.agenda
        self.view: LogView = worker.agenda.view
        self.ready = asyncio.Event()
        self._ledger, self._worker, self._clock = ledger, worker, clock
        self._tries: dict[str, _Try] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Rebuilds the state from the log, then works until ``stop``."""
        await self.catch_up()
        if not self.agenda.has_calibrations:
            log.warning("no calibration fits the weights on sale: nothing can convict yet")
        follower = asyncio.create_task(self._follow())
        stopper = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                self._start_due()
                await self._wait_for_change(stopper)
                if follower.done():
                    follower.result()  # raises what ended it
                    follower = asyncio.create_task(self._follow())
        finally:
            tasks = [follower, stopper, *self._running.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def idle(self) -> bool:
        """True if nothing that was seen in the log is still to be done."""
        return not self._running and self.agenda.is_settled

    async def catch_up(self) -> None:
        """Folds the log as it is now."""
        while True:
            page = await self._ledger.read_log(self.view.next_index, PAGE, KINDS)
            for entry in page.entries:
                self._fold(entry)
            self.view.next_index = max(self.view.next_index, page.next_index)
            if page.next_index >= page.tree_size:
                return

    async def _follow(self) -> None:
        async for entry in self._ledger.follow_log(self.view.next_index, KINDS):
            self._fold(entry)
            self._changed.set()

    def _fold(self, entry: LogEntry) -> None:
        kind = self.view.apply(entry)
        if kind == "receipt":
            self.agenda.on_receipt(digest_of(entry.body))
        elif kind == "audit-request":
            request = parse_payload(parse_envelope(entry.body), AuditRequest)
            self.agenda.on_request(request.receipt_digest)
        elif kind == "verdict":
            verdict = parse_payload(parse_envelope(entry.body), Verdict)
            self.agenda.on_verdict(verdict.receipt_digest)
        if self.agenda.my_epochs and next(self.agenda.calibration_duties(), None) is None:
            self.ready.set()

    async def _wait_for_change(self, stopper: asyncio.Task[bool]) -> None:
        changed = asyncio.create_task(self._changed.wait())
        tick = asyncio.create_task(self._clock.sleep_ms(TICK_MS))
        await asyncio.wait({changed, tick, stopper}, return_when=asyncio.FIRST_COMPLETED)
        for task in (changed, tick):
            task.cancel()
        self._changed.clear()

    def _start_due(self) -> None:
        now = self._clock.monotonic_ms()
        wanted: dict[str, _Try] = {}
        for duty in self.agenda.duties(self._clock.now_unix_ms()):
            attempt = self._tries.get(duty.key) or _Try()
            wanted[duty.key] = attempt
            full = len(self._running) >= MAX_CONCURRENT_DUTIES
            if full or duty.key in self._running or now < attempt.not_before_ms:
                continue
            self._running[duty.key] = asyncio.create_task(self._attempt(duty, attempt))
        self._tries = wanted

    async def _attempt(self, duty: duties.Duty, attempt: _Try) -> None:
        wait_ms = RECHECK_MS
        try:
            await self._worker.do(duty)
        except TrueweightError as error:
            wait_ms = self._back_off(attempt)
            log.info("%s: %s; again in %d ms", duty.key, error, wait_ms)
        except Exception:
            wait_ms = self._back_off(attempt)
            log.exception("%s failed; again in %d ms", duty.key, wait_ms)
        finally:
            attempt.not_before_ms = self._clock.monotonic_ms() + wait_ms
            self._running.pop(duty.key, None)
            self._changed.set()

    def _back_off(self, attempt: _Try) -> float:
        attempt.failures += 1
        return min(MAX_RETRY_MS, FIRST_RETRY_MS * 2.0 ** min(attempt.failures, 10))
