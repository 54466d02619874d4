"""The ledger over gRPC: names the caller, bounds the request, asks ``Ledger``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio

from trueweight.ledger.service import Ledger
from trueweight.protos.errors import (
    InvalidRequest,
    OverCapacity,
    TrueweightError,
    Unauthenticated,
)
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1 import log_pb2
from trueweight.protos.v1.ledger_pb2_grpc import LedgerServicer, add_LedgerServicer_to_server
from trueweight.runtime import rpc
from trueweight.runtime.ledger_port import MAX_REQUEST_BYTES

# Batches of one stream that may be in the writer's queue at once.
MAX_BATCHES_IN_FLIGHT = 8
# Questions about the log, and streams of it, that strangers may have open at once. Every commit is
# read anew for each stream, so they look a few times a second and not at each.
MAX_STRANGERS = 64
STRANGERS_PAUSE_S = 0.25
Context = grpc.aio.ServicerContext[Any, Any]


class LedgerRpc(LedgerServicer):
    """Thin: every rule is in ``Ledger``."""

    def __init__(self, ledger: Ledger, gate: rpc.Authenticator) -> None:
        self._ledger, self._gate = ledger, gate
        self._questions, self._streams = (_Seats(MAX_STRANGERS) for _ in range(2))

    @rpc.unary
    async def Apply(self, request: pb.ApplyRequest, context: Context) -> pb.ApplyResponse:
        return await self._apply(request, self._named_caller(context))

    @rpc.streaming
    async def Submit(
        self, request_iterator: AsyncIterator[pb.ApplyRequest], context: Context
    ) -> AsyncIterator[pb.ApplyResponse]:
        caller = self._named_caller(context)
        async for response in _pipelined(request_iterator, lambda r: self._submitted(r, caller)):
            yield response

    @rpc.unary
    async def GetBalance(self, request: pb.BalanceRequest, context: Context) -> pb.BalanceResponse:
        caller = self._caller(context)
        if request.accounts:
            found = await self._ledger.balances(list(request.accounts), caller)
            return pb.BalanceResponse(accounts=found)
        found = await self._ledger.all_balances(request.after, request.limit, caller)
        return pb.BalanceResponse(accounts=found, next=found[-1].account if found else "")

    @rpc.unary
    async def ListTransfers(
        self, request: pb.ListTransfersRequest, context: Context
    ) -> pb.ListTransfersResponse:
        caller = self._caller(context)
        return await self._ledger.transfers(
            request.account, request.after_sequence, request.limit, caller
        )

    @rpc.unary
    async def GetHold(self, request: pb.GetHoldRequest, context: Context) -> pb.HoldRecord:
        return await self._ledger.hold(request.hold_id, self._caller(context))

    @rpc.unary
    async def ReadLog(self, request: pb.ReadLogRequest, context: Context) -> pb.ReadLogResponse:
        with self._questions.taken(is_free=self._is_member(context)):
            return await self._ledger.read_log(
                request.from_index, request.limit, list(request.kinds)
            )

    @rpc.streaming
    async def FollowLog(
        self, request: pb.ReadLogRequest, context: Context
    ) -> AsyncIterator[pb.ReadLogResponse]:
        is_member = self._is_member(context)
        pages = self._ledger.follow_pages(
            request.from_index,
            request.limit,
            list(request.kinds),
            0.0 if is_member else STRANGERS_PAUSE_S,
        )
        with self._streams.taken(is_free=is_member):
            async for page in pages:
                yield page

    @rpc.unary
    async def GetCheckpoint(
        self, request: pb.CheckpointRequest, context: Context
    ) -> log_pb2.Checkpoint:
        with self._questions.taken(is_free=self._is_member(context)):
            return await self._ledger.checkpoint()

    @rpc.unary
    async def GetInclusionProof(
        self, request: pb.InclusionProofRequest, context: Context
    ) -> pb.InclusionProofResponse:
        with self._questions.taken(is_free=self._is_member(context)):
            return await self._ledger.inclusion(request, self._caller(context))

    @rpc.unary
    async def GetConsistencyProof(
        self, request: pb.ConsistencyProofRequest, context: Context
    ) -> log_pb2.ConsistencyProof:
        with self._questions.taken(is_free=self._is_member(context)):
            return await self._ledger.consistency(request.old_size, request.new_size)

    def _caller(self, context: Context) -> str:
        return self._gate.caller(context).identity or ""

    def _is_member(self, context: Context) -> bool:
        return bool(self._ledger.court.roles_of(self._caller(context)))

    def _named_caller(self, context: Context) -> str:
        """Who wants to write; nobody may do it unnamed."""
        caller = self._caller(context)
        if not caller:
            raise Unauthenticated(
                "operations need an access token", hint="Anybody may read the log without one."
            )
        return caller

    async def _submitted(self, request: pb.ApplyRequest, caller: str) -> pb.ApplyResponse:
        """A full queue refuses one batch; the others of its stream go on."""
        try:
            return await self._apply(request, caller)
        except OverCapacity as error:
            refused = pb.Result(
                status=pb.Result.REFUSED, code=error.code, message=error.message, hint=error.hint
            )
            return pb.ApplyResponse(
                batch=request.batch, results=[refused] * len(request.operations)
            )

    async def _apply(self, request: pb.ApplyRequest, caller: str) -> pb.ApplyResponse:
        results = await self._ledger.apply(list(request.operations), caller)
        return pb.ApplyResponse(batch=request.batch, results=results)


class _Seats:
    """So many strangers at once; members of the market always find room."""

    def __init__(self, most: int) -> None:
        self._left = most

    @contextlib.contextmanager
    def taken(self, *, is_free: bool) -> Iterator[None]:
        """Raises OverCapacity if there is none."""
        if is_free:
            yield
            return
        if not self._left:
            raise OverCapacity("too many strangers ask at once", hint="Ask again in a second.")
        self._left -= 1
        try:
            yield
        finally:
            self._left += 1


async def _pipelined(
    requests: AsyncIterator[pb.ApplyRequest], apply: Any
) -> AsyncIterator[pb.ApplyResponse]:
    """Answers in the order of the requests, with a bounded number in flight."""
    room = asyncio.Semaphore(MAX_BATCHES_IN_FLIGHT)
    flying: asyncio.Queue[asyncio.Task[pb.ApplyResponse] | None] = asyncio.Queue()

    async def read() -> None:
        try:
            async for request in requests:
                await room.acquire()
                flying.put_nowait(asyncio.ensure_future(apply(request)))
        finally:
            # Never waits: after the stream's end nobody takes anything any more.
            flying.put_nowait(None)

    reader = asyncio.ensure_future(read())
    try:
        while (task := await flying.get()) is not None:
            yield await task
            room.release()
    finally:
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError, TrueweightError):
            await reader
        left = [task for _ in range(flying.qsize()) if (task := flying.get_nowait()) is not None]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


class LedgerServer:
    """A gRPC server around one ledger."""

    def __init__(self, ledger: Ledger, gate: rpc.Authenticator, address: str, keys: Path) -> None:
        self._server = rpc.make_server(max_request_bytes=MAX_REQUEST_BYTES)
        self.endpoint = rpc.listen(self._server, address, keys)
        add_LedgerServicer_to_server(LedgerRpc(ledger, gate), self._server)

    async def start(self) -> None:
        await self._server.start()

    async def stop(self, grace_s: float = 2.0) -> None:
        await self._server.stop(grace_s)


def check_address(address: str) -> str:
    """host:port, or InvalidRequest. Unlike elsewhere the host must be named."""
    rpc.split_address(address)
    if address.startswith(":"):
        raise InvalidRequest(f"{address!r} is not host:port", hint="Write 127.0.0.1:0.")
    return address
