"""The ledger as the other roles see it, and its gRPC client.

``trueweight.ledger.service`` implements ``LedgerPort`` in process; ``GrpcLedger`` speaks to a
running ledger. Callers cannot tell the two apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc.aio

from trueweight.protos.envelope import digest_of
from trueweight.protos.errors import (
    DeadlineExceeded,
    InvalidRequest,
    OverCapacity,
    PayloadTooLarge,
    TrueweightError,
    Unauthenticated,
    Unavailable,
    error_for,
)
from trueweight.protos.ids import derived_id
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1 import log_pb2
from trueweight.protos.v1.ledger_pb2_grpc import LedgerStub
from trueweight.protos.v1.market_pb2 import Member
from trueweight.runtime import rpc
from trueweight.runtime.market import Market

log = logging.getLogger(__name__)

T = TypeVar("T")
# Of one call.
MAX_OPERATIONS = 1024
MAX_BATCH = 256
# Of one message to the ledger.
MAX_REQUEST_BYTES = 8 * 1024 * 1024
# Of one call: every operation has a few bytes around it.
_MAX_CALL_BYTES = MAX_REQUEST_BYTES - 16 * MAX_OPERATIONS
# Of several calls in one message.
_MAX_BATCH_BYTES = MAX_REQUEST_BYTES // 4
_MAX_QUEUE = 8192
_DEFAULT_TIMEOUT_MS = 15_000
_RECONNECT_S = (0.1, 0.3, 1.0, 2.0)
# How long a batch that the ledger had no room for keeps its place on the wire, so that callers who
# are still waiting here are not refused as well.
_FULL_PAUSE_S = (0.02, 0.05, 0.1, 0.25)


class LedgerPort(Protocol):
    """Every method has a deadline of its own and raises errors of ``trueweight.protos.errors``.

    ``apply`` never raises for a refused operation: each result says what became of it. It raises
    Unavailable or DeadlineExceeded when the outcome is unknown; the same operations may then be
    sent again, because ids make them idempotent. It raises OverCapacity when the ledger's queue is
    full: then nothing was done, and they may be sent again after a while.
    """

    async def apply(self, operations: Sequence[pb.Operation]) -> list[pb.Result]: ...

    async def publish(self, envelope: bytes) -> int:
        """Puts evidence into the log; its index. Idempotent by the message's digest."""
        ...

    async def read_log(
        self, from_index: int, limit: int = 1000, kinds: Sequence[str] = ()
    ) -> pb.ReadLogResponse: ...

    def follow_log(
        self, from_index: int, kinds: Sequence[str] = ()
    ) -> AsyncIterator[log_pb2.LogEntry]:
        """All leaves from an index on, then new ones as they come; ends only when cancelled."""
        ...

    async def balances(self, accounts: Sequence[str]) -> list[pb.AccountRecord]: ...

    async def transfers(
        self, account: str, after_sequence: int = 0, limit: int = 1000
    ) -> pb.ListTransfersResponse: ...

    async def hold(self, hold_id: bytes) -> pb.HoldRecord: ...

    async def checkpoint(self) -> log_pb2.Checkpoint: ...

    async def inclusion(self, request: pb.InclusionProofRequest) -> pb.InclusionProofResponse: ...

    async def consistency(self, old_size: int, new_size: int) -> log_pb2.ConsistencyProof: ...

    async def close(self) -> None: ...


def publish_operation(envelope: bytes) -> pb.Operation:
    """The idempotent operation that publishes an envelope."""
    return pb.Operation(
        id=derived_id("publish", digest_of(envelope)), publish=pb.Publish(envelope=envelope)
    )


def raise_refused(result: pb.Result) -> pb.Result:
    """The result, or the error that a refused one stands for."""
    if result.status == pb.Result.REFUSED:
        raise error_for(result.code, result.message)
    return result


class GrpcLedger:
    """LedgerPort over one channel. Concurrent ``apply`` calls share micro-batches on one stream.
    Without ``tokens`` it is nobody's: then it reads the log, which is public, and nothing else."""

    def __init__(
        self,
        endpoint: str,
        pinned_pem: str,
        ledger_identity: str,
        tokens: rpc.AccessTokens | None = None,
    ) -> None:
        self._channel = rpc.make_channel(endpoint, pinned_pem)
        self._stub = LedgerStub(self._channel)
        self._identity, self._tokens = ledger_identity, tokens
        self._batcher = _Batcher(self._submit)

    async def apply(self, operations: Sequence[pb.Operation]) -> list[pb.Result]:
        return await self._batcher.apply(list(operations), _DEFAULT_TIMEOUT_MS)

    async def publish(self, envelope: bytes) -> int:
        operation = publish_operation(envelope)
        for delay_s in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 0.0):
            result = raise_refused((await self.apply([operation]))[0])
            if result.log_index_known:
                return result.log_index
            await asyncio.sleep(delay_s)
        raise DeadlineExceeded("the ledger has not sequenced the leaf yet", hint="Ask again.")

    async def read_log(
        self, from_index: int, limit: int = 1000, kinds: Sequence[str] = ()
    ) -> pb.ReadLogResponse:
        request = pb.ReadLogRequest(from_index=from_index, limit=limit, kinds=kinds)
        return await self._call(self._stub.ReadLog, request)

    async def follow_log(
        self, from_index: int, kinds: Sequence[str] = ()
    ) -> AsyncIterator[log_pb2.LogEntry]:
        next_index, failures = from_index, 0
        while True:
            request = pb.ReadLogRequest(from_index=next_index, limit=1000, kinds=kinds)
            try:
                async for page in self._stub.FollowLog(request, metadata=self._metadata()):
                    failures = 0
                    for entry in page.entries:
                        yield entry
                    next_index = page.next_index
            except grpc.aio.AioRpcError as error:
                log.debug("following the log again after %s", error.code().name)
            delay_s = _RECONNECT_S[min(failures, len(_RECONNECT_S) - 1)]
            failures += 1
            await asyncio.sleep(delay_s)

    async def balances(self, accounts: Sequence[str]) -> list[pb.AccountRecord]:
        records: list[pb.AccountRecord] = []
        after = ""
        while True:
            request = pb.BalanceRequest(accounts=accounts, after=after, limit=1000)
            page = await self._call(self._stub.GetBalance, request)
            records.extend(page.accounts)
            if not page.next:
                return records
            after = page.next

    async def transfers(
        self, account: str, after_sequence: int = 0, limit: int = 1000
    ) -> pb.ListTransfersResponse:
        request = pb.ListTransfersRequest(
            account=account, after_sequence=after_sequence, limit=limit
        )
        return await self._call(self._stub.ListTransfers, request)

    async def hold(self, hold_id: bytes) -> pb.HoldRecord:
        return await self._call(self._stub.GetHold, pb.GetHoldRequest(hold_id=hold_id))

    async def checkpoint(self) -> log_pb2.Checkpoint:
        return await self._call(self._stub.GetCheckpoint, pb.CheckpointRequest())

    async def inclusion(self, request: pb.InclusionProofRequest) -> pb.InclusionProofResponse:
        return await self._call(self._stub.GetInclusionProof, request)

    async def consistency(self, old_size: int, new_size: int) -> log_pb2.ConsistencyProof:
        request = pb.ConsistencyProofRequest(old_size=old_size, new_size=new_size)
        return await self._call(self._stub.GetConsistencyProof, request)

    async def close(self) -> None:
        await self._batcher.close()
        await self._channel.close()

    def _metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._tokens.metadata(self._identity) if self._tokens else ()

    async def _call(self, method: Callable[..., Awaitable[T]], request: object) -> T:
        metadata = self._metadata()
        return await rpc.call(method, request, timeout_ms=_DEFAULT_TIMEOUT_MS, metadata=metadata)

    def _submit(self, requests: AsyncIterator[pb.ApplyRequest]) -> AsyncIterator[pb.ApplyResponse]:
        answers: AsyncIterator[pb.ApplyResponse] = self._stub.Submit(
            requests, metadata=self._metadata()
        )
        return answers


def connect_ledger(
    market: Market, tokens: rpc.AccessTokens | None = None, endpoint: str = ""
) -> GrpcLedger:
    """The market's ledger over gRPC; ``endpoint`` (host:port) replaces the address in the market
    file, never the pinned certificate. Raises InvalidRequest if there is nothing to dial."""
    member = market.member(Member.LEDGER)
    address = endpoint or member.endpoint
    if not address or not member.tls_certificate_pem:
        raise InvalidRequest(
            "the market file has no address or certificate for the ledger",
            hint="Name the address with 'trueweight market reissue DIR --ledger-endpoint'.",
        )
    return GrpcLedger(address, member.tls_certificate_pem, member.identity, tokens)


@dataclass
class _Waiting:
    operations: list[pb.Operation]
    answer: asyncio.Future[list[pb.Result]]
    bytes: int


class _Batcher:
    """Joins concurrent calls into batches on one stream; a lost stream fails what is in flight.

    One batch is on the wire at a time per slot; while it is, callers queue up and form the next
    one, so that the batch size follows the load without any timer.
    """

    _SLOTS = 2

    def __init__(
        self, submit: Callable[[AsyncIterator[pb.ApplyRequest]], AsyncIterator[pb.ApplyResponse]]
    ) -> None:
        self._submit = submit
        self._queue: deque[_Waiting] = deque()
        self._queued_operations = 0
        self._wake = asyncio.Event()
        self._flying: dict[int, list[_Waiting]] = {}
        self._next_batch = 1
        self._stream = 0
        self._refused_in_a_row = 0
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def apply(self, operations: list[pb.Operation], timeout_ms: float) -> list[pb.Result]:
        if not operations:
            return []
        if self._closed:
            raise Unavailable("the ledger connection is closed")
        if len(operations) > MAX_OPERATIONS:
            raise InvalidRequest(
                f"at most {MAX_OPERATIONS} operations at once", hint="Send several calls."
            )
        if self._queued_operations + len(operations) > _MAX_QUEUE:
            raise OverCapacity("too many ledger operations are waiting", hint="Try again later.")
        size = sum(operation.ByteSize() for operation in operations)
        if size > _MAX_CALL_BYTES:
            raise PayloadTooLarge("the operations do not fit into one message", hint="Send fewer.")
        waiting = _Waiting(operations, asyncio.get_running_loop().create_future(), size)
        self._queue.append(waiting)
        self._queued_operations += len(operations)
        self._wake.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                return await waiting.answer
        except TimeoutError:
            raise DeadlineExceeded(
                "the ledger did not answer in time", hint="Send the same operation again."
            ) from None

    async def close(self) -> None:
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._fail_all(Unavailable("the ledger connection is closed"))

    async def _run(self) -> None:
        while not self._closed:
            try:
                async for response in self._submit(self._requests(self._stream)):
                    self._settle(response)
                error: TrueweightError = Unavailable("the ledger closed the stream")
            except grpc.aio.AioRpcError as failure:
                error = rpc.from_rpc_error(failure)
            self._fail_all(error)
            if not self._queue:
                return  # the next caller opens a new stream
            await asyncio.sleep(_RECONNECT_S[0])

    async def _requests(self, stream: int) -> AsyncIterator[pb.ApplyRequest]:
        # A lost stream's generator may still be waiting here; it must not take a new one's work.
        while stream == self._stream:
            if self._queue and len(self._flying) < self._SLOTS:
                yield self._take()
                continue
            self._wake.clear()
            await self._wake.wait()

    def _take(self) -> pb.ApplyRequest:
        request = pb.ApplyRequest(batch=self._next_batch)
        taken: list[_Waiting] = []
        left, left_bytes = MAX_BATCH, _MAX_BATCH_BYTES
        while self._queue:
            size = len(self._queue[0].operations)
            if taken and (size > left or self._queue[0].bytes > left_bytes):
                break
            waiting = self._queue.popleft()
            self._queued_operations -= size
            if waiting.answer.done():
                continue  # the caller gave up before it was sent
            request.operations.extend(waiting.operations)
            left, left_bytes = left - size, left_bytes - waiting.bytes
            taken.append(waiting)
        self._flying[self._next_batch] = taken
        self._next_batch += 1
        return request

    def _settle(self, response: pb.ApplyResponse) -> None:
        refused = _full(response)
        start = 0
        for waiting in self._flying.pop(response.batch, []):
            results = list(response.results[start : start + len(waiting.operations)])
            start += len(waiting.operations)
            if waiting.answer.done():
                continue
            if refused is not None:
                waiting.answer.set_exception(refused())
            else:
                waiting.answer.set_result(results)
        if refused is None:
            self._refused_in_a_row = 0
            self._wake.set()
            return
        self._flying[response.batch] = []
        pause_s = _FULL_PAUSE_S[min(self._refused_in_a_row, len(_FULL_PAUSE_S) - 1)]
        self._refused_in_a_row += 1
        asyncio.get_running_loop().call_later(pause_s, self._free, response.batch)

    def _free(self, batch: int) -> None:
        self._flying.pop(batch, None)
        self._wake.set()

    def _fail_all(self, error: TrueweightError) -> None:
        self._stream += 1
        failed = [w for batch in self._flying.values() for w in batch]
        self._flying.clear()
        for waiting in failed:
            if not waiting.answer.done():
                waiting.answer.set_exception(_as_seen_here(error))
        self._wake.set()


def _full(response: pb.ApplyResponse) -> Callable[[], TrueweightError] | None:
    """Makes the error of a batch that the ledger had no room for; None if it was looked at."""
    first = response.results[0] if response.results else pb.Result()
    if first.code != OverCapacity.code:
        return None
    return lambda: OverCapacity(first.message, hint=first.hint)


def _as_seen_here(error: TrueweightError) -> TrueweightError:
    """What a lost stream means for its calls: usually that nobody knows what became of it, because
    the fault may be another call's."""
    if isinstance(error, Unauthenticated | Unavailable | DeadlineExceeded):
        return error  # a stream that was not let in has done nothing
    return Unavailable(
        f"the ledger ended the stream: {error.message}", hint="Send the same operations again."
    )
