"""One leg: an assignment on one node, from dispatch to checked receipt."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum

from trueweight.protos.envelope import Opened, digest_of, seal
from trueweight.protos.errors import (
    DeadlineExceeded,
    EngineError,
    ReceiptRefused,
    TrueweightError,
    Unavailable,
    error_for,
)
from trueweight.protos.identity import Signer
from trueweight.protos.receipts import ReceiptFacts, RouterEvents, check_receipt
from trueweight.protos.tokens import token_digest
from trueweight.protos.v1.market_pb2 import ENGINE_ERROR, Assignment, Receipt
from trueweight.protos.v1.node_pb2 import Dispatch
from trueweight.router.calls import Call, CallEvent, Finished, Lost, NewTokens, Rejected
from trueweight.router.fleet import NodeRecord
from trueweight.router.keyring import Keys
from trueweight.router.planning import Plan
from trueweight.router.quoting import Prices
from trueweight.runtime.clock import Clock

_WINDOW_TOKENS = 512
# Code of a leg that ended without a single token: nothing was done that could be paid.
NO_OUTPUT = "NO_OUTPUT"


@dataclass(frozen=True, slots=True)
class LegTiming:
    """Longest waits in milliseconds."""

    first_token_ms: float = 120_000.0
    between_tokens_ms: float = 60_000.0
    # For the receipt, once the end was asked for.
    receipt_ms: float = 10_000.0


class LegEnd(Enum):
    """How a leg ended, from the router's point of view."""

    # A valid receipt: the output is complete, was stopped, cancelled or ran out of time.
    SERVED = "served"
    # The node did not take it; another may.
    REJECTED = "rejected"
    # The node's fault: lost, silent, engine error, invalid receipt.
    FAILED = "failed"


@dataclass(frozen=True)
class LegOrder:
    """What is sent. ``prefix`` are tokens of earlier legs; ``deadline_ms`` counts from now."""

    plan: Plan
    leg: int
    prefix: tuple[int, ...]
    prices: Prices
    deadline_ms: float
    hold_id: bytes
    hold_expires_at_unix_ms: int


@dataclass
class LegResult:
    """What came of it. ``received`` grows while the leg runs."""

    node: NodeRecord
    assignment: Opened[Assignment]
    prefix: tuple[int, ...]
    received: list[int] = field(default_factory=list)
    end: LegEnd = LegEnd.FAILED
    receipt: Opened[Receipt] | None = None
    problem: str = ""
    code: str = ""
    stop_at: int | None = None
    cancelled: bool = False
    first_ms: float = 0.0
    rest_ms: float = 0.0
    # From dispatch to the end.
    total_ms: float = 0.0


def make_assignment(
    order: LegOrder, node_id: str, signer: Signer, market_id: str, now_unix_ms: int
) -> Opened[Assignment]:
    """The signed assignment of a leg."""
    plan = order.plan
    message = Assignment(
        market_id=market_id,
        request_id=plan.request_id,
        choice_index=0,
        leg=order.leg,
        router_id=signer.identity,
        node_id=node_id,
        manifest_digest=plan.model.manifest_digest,
        prompt_digest=token_digest(plan.salt, plan.prompt),
        prompt_len=len(plan.prompt),
        prefix_len=len(order.prefix),
        prefix_digest=token_digest(plan.salt, order.prefix) if order.prefix else b"",
        sampling=plan.sampling.to_proto(),
        seed=plan.seed,
        max_tokens=plan.max_tokens - len(order.prefix),
        ask_input_nano_per_mtok=order.prices.input_nano_per_mtok,
        ask_output_nano_per_mtok=order.prices.output_nano_per_mtok,
        deadline_ms=max(1, int(order.deadline_ms)),
        hold_id=order.hold_id,
        hold_expires_at_unix_ms=order.hold_expires_at_unix_ms,
        issued_at_unix_ms=now_unix_ms,
        model_id=plan.model.model_id,
    )
    envelope = seal(message, signer)
    return Opened(message, signer.identity, digest_of(envelope), envelope)


class LegRunner:
    """Runs one leg. ``take`` gets new ids as they come and answers how many of them are wanted
    (a stop string appeared), or None to go on."""

    def __init__(
        self,
        order: LegOrder,
        node: NodeRecord,
        assignment: Opened[Assignment],
        *,
        clock: Clock,
        timing: LegTiming,
        keys: Keys,
    ) -> None:
        self._order, self._clock, self._timing, self._keys = order, clock, timing, keys
        self.result = LegResult(node, assignment, order.prefix)
        self._call: Call | None = None
        self._started_ms = clock.monotonic_ms()
        self._deadline_ms = self._started_ms + order.deadline_ms
        # Set once the end was asked for: the receipt must come until then.
        self._receipt_by_ms: float | None = None

    def cancel(self) -> None:
        """Asks the node to end; the leg then ends with a partial receipt or fails soon."""
        if not self.result.cancelled:
            self.result.cancelled = True
            self._await_receipt()
            if self._call is not None:
                self._call.cancel()
                self._call.interrupt()

    async def run(self, take: Callable[[tuple[int, ...]], Awaitable[int | None]]) -> LegResult:
        """The result; never raises for what the node does. Errors of ``take`` cancel the leg,
        wait for its receipt, and are raised afterwards."""
        try:
            self._call = self._dispatch()
        except TrueweightError as error:
            return self._ended(LegEnd.REJECTED, error.message, error.code)
        if self.result.cancelled:
            self._call.cancel()
        trouble: TrueweightError | None = None
        try:
            while True:
                event = await self._next(self._call)
                if isinstance(event, NewTokens):
                    if problem := self._problem_with(event.token_ids):
                        self._call.cancel()
                        self._ended(LegEnd.FAILED, problem, ReceiptRefused.code)
                        break
                    if trouble is None:
                        trouble = await self._take(event.token_ids, take)
                    else:
                        self.result.received.extend(event.token_ids)
                elif isinstance(event, Rejected):
                    # Its words stay out of logs and answers: it knows the prompt.
                    code = error_for(event.code, "").code
                    self._ended(LegEnd.REJECTED, f"the node refused it ({code})", code)
                    break
                elif isinstance(event, Lost):
                    self._ended(LegEnd.FAILED, event.reason, Unavailable.code)
                    break
                elif isinstance(event, Finished):
                    self._finish(event.receipt)
                    break
        finally:
            self._call.close()
            self.result.total_ms = self._clock.monotonic_ms() - self._started_ms
        if trouble is not None:
            raise trouble
        return self.result

    @property
    def _vocabulary_size(self) -> int:
        return self._order.plan.model.manifest.vocabulary_size

    def _problem_with(self, token_ids: tuple[int, ...]) -> str:
        """Why no honest node sends these ids; empty if one may."""
        if max(token_ids) >= self._vocabulary_size:
            # As a prefix they would make every other node refuse to continue.
            return "the node sent ids outside the vocabulary"
        # Also while its receipt is awaited: nobody looks at the ids any more, and they are kept.
        wanted = self.result.assignment.message.max_tokens
        if len(self.result.received) + len(token_ids) > wanted:
            return "the node sent more tokens than were asked for"
        return ""

    def _dispatch(self) -> Call:
        session = self.result.node.session
        if session is None:
            raise Unavailable("the session with the node is over")
        plan = self._order.plan
        return session.start(
            Dispatch(
                assignment=self.result.assignment.envelope,
                salt=plan.salt,
                prompt_token_ids=plan.prompt,
                prefix_token_ids=self._order.prefix,
                grammar_source=plan.grammar_source,
            ),
            _WINDOW_TOKENS,
        )

    async def _next(self, call: Call) -> CallEvent:
        now = self._clock.monotonic_ms()
        if self._receipt_by_ms is not None:
            until = self._receipt_by_ms
        else:
            patience = (
                self._timing.between_tokens_ms
                if self.result.received
                else self._timing.first_token_ms
            )
            # The node itself gives up at the deadline and signs what it has.
            until = min(now + patience, self._deadline_ms + self._timing.receipt_ms)
        try:
            return await call.next(until - now)
        except DeadlineExceeded:
            if self._receipt_by_ms is None:
                call.cancel()
            return Lost("the node did not answer in time")

    async def _take(
        self, token_ids: tuple[int, ...], take: Callable[[tuple[int, ...]], Awaitable[int | None]]
    ) -> TrueweightError | None:
        result = self.result
        now = self._clock.monotonic_ms()
        if not result.received:
            result.first_ms = now - self._started_ms
        result.rest_ms = now - self._started_ms - result.first_ms
        result.received.extend(token_ids)
        if result.stop_at is not None or result.cancelled:
            return None
        try:
            wanted = await take(token_ids)
        except TrueweightError as error:
            self.cancel()
            return error
        if wanted is not None and self._call is not None:
            result.stop_at = len(result.received) - len(token_ids) + wanted
            self._await_receipt()
            self._call.stop(result.stop_at)
        return None

    def _await_receipt(self) -> None:
        self._receipt_by_ms = self._clock.monotonic_ms() + self._timing.receipt_ms

    def _finish(self, receipt: bytes) -> None:
        plan, result = self._order.plan, self.result
        facts = ReceiptFacts(
            assignment=result.assignment,
            receipt=receipt,
            salt=plan.salt,
            prompt=plan.prompt,
            prefix=result.prefix,
            received=result.received,
            manifest_digest=plan.model.manifest_digest,
            vocabulary_size=self._vocabulary_size,
            events=RouterEvents(
                stop_at=result.stop_at,
                cancelled=result.cancelled,
                elapsed_us=int((self._clock.monotonic_ms() - self._started_ms) * 1000) + 1,
            ),
            offered=result.node.offer.fingerprint,
        )
        try:
            result.receipt = check_receipt(facts, self._keys.ring, self._keys.market_id)
        except ReceiptRefused as error:
            self._ended(LegEnd.FAILED, error.message, error.code)
            return
        if result.receipt.message.finish_reason == ENGINE_ERROR:
            self._ended(LegEnd.FAILED, "the node's engine failed", EngineError.code)
            result.receipt = None  # a dead leg's tokens are free
            return
        if not result.receipt.message.output_tokens:
            # Else a node could live on the prompts of clients who gave up waiting for it.
            self._ended(LegEnd.FAILED, "the node gave no output", NO_OUTPUT)
            result.receipt = None
            return
        result.end = LegEnd.SERVED

    def _ended(self, end: LegEnd, problem: str, code: str) -> LegResult:
        self.result.end, self.result.problem, self.result.code = end, problem, code
        return self.result
