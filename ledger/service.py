"""The ledger as one object: checks operations, hands them to the writer, reads for everyone.

``Ledger.as_caller(identity)`` is the in-process ``LedgerPort`` of that identity; the gRPC
servicer calls the same methods.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from trueweight.ledger import deadline
from trueweight.ledger.accounts import CLIENT, kind_of, owner_of
from trueweight.ledger.backend import Backend, open_backend
from trueweight.ledger.core import Outcome, bounded, weight_of
from trueweight.ledger.court import court_of, with_key_events
from trueweight.ledger.evidence import Court
from trueweight.ledger.pipeline import Answer, Call, Hooks, KeysChanged
from trueweight.ledger.prepare import MAX_EXPIRE, SYSTEM, is_hopeless, is_key_event, prepare
from trueweight.ledger.prepare_pool import PreparePool
from trueweight.ledger.reader import Reader
from trueweight.ledger.schema import make_engine, migrate, normal_url
from trueweight.ledger.values import Leaf, Prepared
from trueweight.ledger.writer import Writer
from trueweight.protos.errors import (
    DeadlineExceeded,
    InvalidRequest,
    PermissionDenied,
    TrueweightError,
    Unavailable,
)
from trueweight.protos.identity import Signer
from trueweight.protos.ids import uuid7
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1 import log_pb2
from trueweight.runtime.clock import Clock
from trueweight.runtime.ledger_port import MAX_OPERATIONS, publish_operation, raise_refused
from trueweight.runtime.market import Market

log = logging.getLogger(__name__)

T = TypeVar("T")
APPLY_TIMEOUT_MS = 15_000
FOLLOW_WAIT_S = 0.5
_READ_TIMEOUT_S = 15.0
_SWITCH_INTERVAL_S = 0.001
_FOLLOW_KEYS_MS = 1_000.0
# A call is checked again after a key was revoked, which costs somebody a key each time.
_MAX_CHECKS = 16
# Who may look into any account.
_SEES_ALL = frozenset({"router", "verifier", "admin", "market", "ledger", "operator"})


class Ledger:
    """One process's ledger: active writer or warm standby, and always a reader."""

    def __init__(
        self,
        market: Market,
        signer: Signer,
        database: str,
        clock: Clock,
        random: Callable[[int], bytes] = os.urandom,
        *,
        verify_workers: int = 0,
        archive: Path | None = None,
    ) -> None:
        self._url = normal_url(database)
        self._signer, self._clock, self._random = signer, clock, random
        self._court = court_of(market)
        # Key events below this log index were read.
        self._keys_from = 0
        self._keys_read_ms = 0.0
        self._engine = make_engine(self._url)
        self._reader = Reader(self._engine, archive)
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="ledger-read")
        self._checkers = PreparePool(verify_workers)
        self._writer: Writer | None = None
        self._size = 0
        self._grown = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def identity(self) -> str:
        """Whose ledger this is."""
        return self._signer.identity

    @property
    def court(self) -> Court:
        """Keys and roles as of the last commit."""
        return self._court

    @property
    def is_writer(self) -> bool:
        """True while this process is the one that writes."""
        return self._writer is not None and self._writer.is_active

    async def start(self, wait_ms: float = 10_000) -> None:
        """Migrates the database, starts the writer, waits until it writes (or stands by)."""
        self._loop = asyncio.get_running_loop()
        # The committing thread comes back from the database some twenty times a group, and would
        # wait for Python's lock 5 ms each time while the next group is judged.
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        await self._loop.run_in_executor(self._pool, migrate, self._engine)
        self._reload_keys()
        self._writer = Writer(self._court.terms, self._signer, self._hooks())
        self._writer.start()
        deadline = self._clock.monotonic_ms() + wait_ms
        while not self.is_writer and self._clock.monotonic_ms() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Commits what is queued and lets go of the database."""
        if self._writer is not None:
            await asyncio.to_thread(self._writer.stop)
        self._checkers.close()
        self._pool.shutdown(wait=True)
        self._reader.close()

    def as_caller(self, identity: str) -> LocalLedger:
        """The ledger as this identity may use it."""
        return LocalLedger(self, identity)

    # -- writing ------------------------------------------------------------------------------

    async def apply(self, operations: Sequence[pb.Operation], caller: str) -> list[pb.Result]:
        """See LedgerPort.apply."""
        if len(operations) > MAX_OPERATIONS:
            raise InvalidRequest(
                f"at most {MAX_OPERATIONS} operations at once", hint="Send several calls."
            )
        if not operations:
            return []
        if self._writer is None:
            raise Unavailable("the ledger is not started")
        for _ in range(_MAX_CHECKS):
            # A standby may not know yet whose keys its predecessor has heard of: what it thinks of
            # signatures is nobody's answer, nor is what was checked before it took over.
            term, court = self._writer.term, self._court
            prepared = bounded(await self._checkers.prepare(operations, caller, court))
            if self._writer.term != term:
                continue
            if not court.roles_of(caller) and all(map(is_hopeless, prepared)):
                # The writer is for those who may write.
                return [result_of(Outcome("refused", error=op.error)) for op in prepared]
            try:
                outcomes = await self.apply_prepared(prepared, court)
            except KeysChanged:
                continue
            return [result_of(outcome) for outcome in outcomes]
        raise Unavailable(
            "keys are revoked faster than operations are checked", hint="Send the same again."
        )

    async def apply_prepared(
        self, prepared: Sequence[Prepared], court: Court | None = None
    ) -> list[Outcome]:
        """Applies operations that were checked by ``prepare``, here or in another process. Raises
        KeysChanged if a key was revoked since the court that they were checked by (None: this
        one)."""
        if self._writer is None:
            raise Unavailable("the ledger is not started")
        answer: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        caller, court = prepared[0].caller, court or self._court
        # Identities cost nothing: strangers, and the nodes among them, share one part.
        payer = caller if court.roles_of(caller) else ""
        has_key_event = any(map(is_key_event, prepared))
        weight = weight_of(prepared)
        call = Call(prepared, answer, payer, court.revocations, has_key_event, weight)
        self._writer.submit(call)
        try:
            async with asyncio.timeout(APPLY_TIMEOUT_MS / 1000):
                return await answer
        except TimeoutError:
            raise DeadlineExceeded(
                "the ledger did not commit in time", hint="Send the same operations again."
            ) from None

    # -- reading ------------------------------------------------------------------------------

    async def balances(self, accounts: Sequence[str], caller: str) -> list[pb.AccountRecord]:
        for account in accounts:
            self.check_may_read(account, caller)
        return await self._read(lambda: self._reader.balances(accounts))

    async def all_balances(self, after: str, limit: int, caller: str) -> list[pb.AccountRecord]:
        if not self._court.roles_of(caller) & {"admin", "market", "verifier"}:
            raise PermissionDenied("listing all accounts is for administrators and verifiers")
        return await self._read(lambda: self._reader.all_balances(after, limit))

    async def transfers(
        self, account: str, after: int, limit: int, caller: str
    ) -> pb.ListTransfersResponse:
        self.check_may_read(account, caller)
        return await self._read(lambda: self._reader.transfers(account, after, limit))

    async def hold(self, hold_id: bytes, caller: str) -> pb.HoldRecord:
        record = await self._read(lambda: self._reader.hold(hold_id))
        self.check_may_read(record.account, caller)
        return record

    async def read_log(
        self, from_index: int, limit: int, kinds: Sequence[str]
    ) -> pb.ReadLogResponse:
        return await self._read(lambda: self._reader.read_log(from_index, limit, kinds))

    async def follow_pages(
        self, from_index: int, limit: int, kinds: Sequence[str], pause_s: float = 0.0
    ) -> AsyncIterator[pb.ReadLogResponse]:
        """Pages of leaves, then new ones as they are committed, or ``pause_s`` later; empty pages
        are not sent."""
        place = from_index
        while True:
            grown = self._grown
            page = await self.read_log(place, limit, kinds)
            place = page.next_index
            if page.entries:
                yield page
            if page.next_index >= page.tree_size:
                # A standby hears of no commits, so it looks again by itself. (``wait_for`` may
                # lose the end of whoever follows if the log grows at that moment.)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(FOLLOW_WAIT_S):
                        await grown.wait()
                await asyncio.sleep(pause_s)

    async def checkpoint(self) -> log_pb2.Checkpoint:
        return await self._read(self._reader.checkpoint)

    async def inclusion(
        self, request: pb.InclusionProofRequest, caller: str = ""
    ) -> pb.InclusionProofResponse:
        """By index or message digest for anybody; by a leaf's hash for members of the market."""
        # There is no index of hashes: finding one is a scan.
        if request.WhichOneof("which") == "leaf_hash" and not self._court.roles_of(caller):
            raise PermissionDenied(
                "finding a leaf by its hash is for members of the market",
                hint="Ask by its index or by the message's digest.",
            )
        return await self._read(lambda: self._reader.inclusion(request))

    async def consistency(self, old_size: int, new_size: int) -> log_pb2.ConsistencyProof:
        return await self._read(lambda: self._reader.consistency(old_size, new_size))

    async def tile(self, level: int, number: int, width: int) -> bytes:
        return await self._read(lambda: self._reader.tile(level, number, width))

    def check_may_read(self, account: str, caller: str) -> None:
        """Raises PermissionDenied unless the caller owns the account or has a role that reads."""
        kind = kind_of(account)
        if self._court.roles_of(caller) & _SEES_ALL or (caller and owner_of(account) == caller):
            return
        what = "client's account" if kind == CLIENT else "account"
        raise PermissionDenied(f"this {what} is not yours to see")

    async def _read(self, work: Callable[[], T]) -> T:
        """Reads in a thread of the pool, which has it back when nobody waits for the answer any
        more: otherwise as many slow reads as there are threads would end all reading."""
        loop = asyncio.get_running_loop()
        until = time.monotonic() + _READ_TIMEOUT_S

        def bounded() -> T:
            with deadline.ends_by(until):
                return work()

        try:
            reading = loop.run_in_executor(self._pool, bounded)
            async with asyncio.timeout(_READ_TIMEOUT_S):
                return await reading
        except TimeoutError:
            raise deadline.too_late() from None

    # -- called by the writer thread ----------------------------------------------------------

    def _hooks(self) -> Hooks:
        return Hooks(
            open_backend=self._open_backend,
            now_unix_ms=self._clock.now_unix_ms,
            monotonic_ms=self._clock.monotonic_ms,
            expire=self._expire_operation,
            new_id=self._new_id,
            deliver=self._deliver,
            committed=self._committed,
            became_writer=self._reload_keys,
            stands_by=self._follow_keys,
            revocations=lambda: self._court.revocations,
        )

    def _open_backend(self) -> Backend:
        return open_backend(self._url)

    def _reload_keys(self) -> None:
        # Whoever takes over checks what is new, not all keys that there ever were.
        bodies, self._keys_from = self._reader.key_events(self._keys_from)
        leaves = [Leaf("key-event", body, b"") for body in bodies]
        self._court = with_key_events(self._court, leaves)

    def _follow_keys(self) -> None:
        # A standby answers questions too: revoked keys must not open its door, nor new ones fail.
        now = self._clock.monotonic_ms()
        if now >= self._keys_read_ms + _FOLLOW_KEYS_MS:
            self._keys_read_ms = now
            self._reload_keys()

    def _expire_operation(self) -> Prepared:
        operation = pb.Operation(id=self._new_id(), expire=pb.Expire(limit=MAX_EXPIRE))
        return prepare(operation, SYSTEM, self._court)

    def _new_id(self) -> bytes:
        """Of the ledger's own operations: nobody can know it and take it first."""
        return uuid7(self._clock.now_unix_ms(), self._random(10))

    def _deliver(self, answers: list[Answer]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop ended before the writer
                self._loop.call_soon_threadsafe(_settle, answers)

    def _committed(self, size: int, leaves: tuple[Leaf, ...]) -> None:
        self._court = with_key_events(self._court, leaves)
        if self._loop is not None and size != self._size:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._notify, size)

    def _notify(self, size: int) -> None:
        self._size = size
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()


class LocalLedger:
    """``LedgerPort`` in process, as one caller."""

    def __init__(self, ledger: Ledger, caller: str) -> None:
        self._ledger, self._caller = ledger, caller

    async def apply(self, operations: Sequence[pb.Operation]) -> list[pb.Result]:
        return await self._ledger.apply(operations, self._caller)

    async def publish(self, envelope: bytes) -> int:
        result = raise_refused((await self.apply([publish_operation(envelope)]))[0])
        return result.log_index

    async def read_log(
        self, from_index: int, limit: int = 1000, kinds: Sequence[str] = ()
    ) -> pb.ReadLogResponse:
        return await self._ledger.read_log(from_index, limit, kinds)

    async def follow_log(
        self, from_index: int, kinds: Sequence[str] = ()
    ) -> AsyncIterator[log_pb2.LogEntry]:
        async for page in self._ledger.follow_pages(from_index, 1000, kinds):
            for entry in page.entries:
                yield entry

    async def balances(self, accounts: Sequence[str]) -> list[pb.AccountRecord]:
        if accounts:
            return await self._ledger.balances(accounts, self._caller)
        found: list[pb.AccountRecord] = []
        after = ""
        while page := await self._ledger.all_balances(after, 1000, self._caller):
            found += page
            after = page[-1].account
        return found

    async def transfers(
        self, account: str, after_sequence: int = 0, limit: int = 1000
    ) -> pb.ListTransfersResponse:
        return await self._ledger.transfers(account, after_sequence, limit, self._caller)

    async def hold(self, hold_id: bytes) -> pb.HoldRecord:
        return await self._ledger.hold(hold_id, self._caller)

    async def checkpoint(self) -> log_pb2.Checkpoint:
        return await self._ledger.checkpoint()

    async def inclusion(self, request: pb.InclusionProofRequest) -> pb.InclusionProofResponse:
        return await self._ledger.inclusion(request, self._caller)

    async def consistency(self, old_size: int, new_size: int) -> log_pb2.ConsistencyProof:
        return await self._ledger.consistency(old_size, new_size)

    async def close(self) -> None:
        """The ledger lives on; it belongs to whoever started it."""


_STATUS = {
    "applied": pb.Result.APPLIED,
    "replayed": pb.Result.REPLAYED,
    "refused": pb.Result.REFUSED,
}


def result_of(outcome: Outcome) -> pb.Result:
    """The public form of an outcome."""
    if outcome.error is not None:
        error = outcome.error
        advice = f". {error.hint}" if error.hint else ""
        return pb.Result(
            status=pb.Result.REFUSED, code=error.code, message=f"{error.message}{advice}"[:500]
        )
    return pb.Result(
        status=_STATUS[outcome.status],
        amount_nano=outcome.amount,
        log_index=max(0, outcome.log_index),
        log_index_known=outcome.log_index >= 0,
    )


def _settle(answers: list[Answer]) -> None:
    for call, answer in answers:
        if call.answer.done():
            continue
        if isinstance(answer, TrueweightError):
            call.answer.set_exception(answer)
        else:
            call.answer.set_result(answer)
