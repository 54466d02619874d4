"""Runs one call: feeds the state machine from the engine and carries out what it says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from trueweight.node.admission import Admitted
from trueweight.node.calls import (
    AbortEngine,
    CallState,
    EngineFailed,
    EngineRefused,
    Event,
    Finish,
    Instruction,
    Produced,
    Reject,
    Send,
    advance,
)
from trueweight.node.context import NodeContext
from trueweight.node.journal import JournalEntry
from trueweight.node.outbox import Outbox
from trueweight.node.receipts import Durations, build_receipt
from trueweight.protos.envelope import seal
from trueweight.protos.errors import (
    InvalidRequest,
    OverCapacity,
    StorageError,
    TrueweightError,
)
from trueweight.protos.v1.market_pb2 import FinishReason

log = logging.getLogger(__name__)

# A leg that ended like this is free for the client; the ledger would refuse a claim.
_DEAD = (FinishReason.DEADLINE, FinishReason.ENGINE_ERROR)


class CallRunner:
    """``feed`` is synchronous: when it returns, every instruction was carried out, the receipt
    signed and journalled included. ``on_finished`` is called exactly once."""

    def __init__(
        self,
        call: int,
        admitted: Admitted,
        node: NodeContext,
        outbox: Outbox,
        on_finished: Callable[[CallRunner], None],
    ) -> None:
        assignment = admitted.opened.message
        self.call = call
        self._admitted, self._node, self._outbox = admitted, node, outbox
        self._on_finished = on_finished
        self._state = CallState(assignment.max_tokens, admitted.window_tokens)
        self._received_ms = node.clock.monotonic_ms()
        self._started_ms = self._received_ms
        self._first_token_ms: float | None = None
        self.deadline_at_ms = self._received_ms + assignment.deadline_ms
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        """Starts the engine's work; the task ends when the engine has let go of the job."""
        self._task = asyncio.create_task(self._run())
        return self._task

    def feed(self, event: Event) -> None:
        """Something happened to the call; ignored once it is over."""
        self._state, instructions = advance(self._state, event)
        for instruction in instructions:
            self._carry_out(instruction)

    async def _run(self) -> None:
        self._started_ms = self._node.clock.monotonic_ms()
        # Unique for the engine even if two routers choose the same call number.
        job = self._admitted.job(self._admitted.opened.digest.hex())
        try:
            async with contextlib.aclosing(self._node.engine.generate(job)) as steps:  # type: ignore[type-var]
                async for step in steps:
                    self.feed(Produced(step.token_ids, step.finish))
                    if self._state.end is not None or self._state.finished:
                        break
            self._node.workload.note_engine(failed=False)
        except (InvalidRequest, OverCapacity) as error:
            # The call's fault or the moment's, not the engine's. What it says may quote the call.
            log.info("the engine refused a call: %s", error.code)
            self.feed(EngineRefused(error.code, str(error)))
        except TrueweightError as error:
            log.warning("the engine gave up on a call: %s", error)
            self._node.workload.note_engine(failed=True)
        except Exception:
            log.exception("the engine failed on a call")
            self._node.workload.note_engine(failed=True)
        if self._state.end is None:
            self.feed(EngineFailed())  # without effect on a finished call

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Send(token_ids=token_ids):
                if self._first_token_ms is None:
                    self._first_token_ms = self._node.clock.monotonic_ms()
                self._outbox.add_tokens(self.call, token_ids)
            case AbortEngine():
                self._abort()
            case Finish():
                self._finish(instruction)
            case Reject(code=code, message=message):
                self._outbox.add_rejected(self.call, code, message)
                self._on_finished(self)

    def _abort(self) -> None:
        # From inside its own task the loop in _run sees the state and leaves by itself.
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    def _finish(self, finish: Finish) -> None:
        opened = self._admitted.opened
        receipt = build_receipt(
            market_id=self._node.market_id,
            node_id=self._node.signer.identity,
            assignment_digest=opened.digest,
            salt=self._admitted.salt,
            prompt_tokens=opened.message.prompt_len,
            output=finish.output,
            finish_reason=finish.reason,
            fingerprint=self._node.engine.fingerprint,
            durations=Durations(
                self._received_ms,
                self._started_ms,
                self._first_token_ms,
                self._node.clock.monotonic_ms(),
            ),
        )
        envelope = seal(receipt, self._node.signer)
        self._journal(envelope, claimable=finish.reason not in _DEAD)
        self._outbox.add_finished(self.call, envelope)
        self._on_finished(self)

    def _journal(self, receipt: bytes, *, claimable: bool) -> None:
        opened = self._admitted.opened
        entry = JournalEntry(
            assignment_digest=opened.digest,
            hold_id=opened.message.hold_id,
            hold_expires_at_unix_ms=opened.message.hold_expires_at_unix_ms,
            assignment=opened.envelope,
            receipt=receipt,
            claimable=claimable,
        )
        try:
            self._node.journal.record(entry)
        except StorageError as error:
            # The router still gets the receipt; only the node's own claim is at stake.
            log.error("%s", error)
