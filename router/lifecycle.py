"""The life of a request: hold, choose, dispatch, stream, check, journal, capture; or void.

A request runs in its own task, so that a client who leaves cannot interrupt the settlement. One
hold, one bill. A dead leg's tokens are free for the client; whoever continues is paid for reading
them again from the verification pool.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from trueweight.protos.errors import (
    ContextOverflow,
    EngineError,
    InsufficientFunds,
    InvalidRequest,
    OverCapacity,
    ReceiptRefused,
    TrueweightError,
    Unavailable,
    UnsupportedParameter,
)
from trueweight.protos.identity import Signer
from trueweight.protos.ids import uuid7
from trueweight.protos.v1.ledger_pb2 import Hold, Operation
from trueweight.protos.v1.market_pb2 import FinishReason
from trueweight.router.answers import Answer, AnswerEvent, Completed, Failed
from trueweight.router.billing import ServedLeg
from trueweight.router.channel import Channel, ClientGone
from trueweight.router.choosing import Choice, NodeView, Work, choose, eligible, price_ceilings
from trueweight.router.fleet import Fleet, NodeRecord
from trueweight.router.keyring import Keys
from trueweight.router.legs import (
    NO_OUTPUT,
    LegEnd,
    LegOrder,
    LegResult,
    LegRunner,
    LegTiming,
    make_assignment,
)
from trueweight.router.patience import Patience
from trueweight.router.planning import Plan
from trueweight.router.quoting import Prices, Quote, quote
from trueweight.router.settlement import Account, Settlement
from trueweight.router.settling import Settler
from trueweight.router.waiting import all_busy
from trueweight.runtime.clock import Clock
from trueweight.runtime.ledger_port import LedgerPort, raise_refused

log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3
# An answer that ran into its deadline still gets this long to be written out.
_LAST_WORD_MS = 5_000.0
# Who gives nothing for this long before its client gives up is slow, if not worse.
_STALLED_MS = 5_000.0
# Refusals that say nothing about the node's health.
_HARMLESS = frozenset(
    error.code
    for error in (OverCapacity, Unavailable, InvalidRequest, UnsupportedParameter, ContextOverflow)
)
# What a node answers to a grammar that it cannot or will not compile.
_GRAMMAR_REFUSALS = frozenset({InvalidRequest.code, UnsupportedParameter.code})


@dataclass(frozen=True, slots=True)
class Timing:
    """Deadlines of a request in milliseconds."""

    request_ms: float = 600_000.0
    # Waiting for a free place on some node.
    queue_ms: float = 60_000.0
    # From the deadline until the hold expires: time for receipts, captures and skewed clocks.
    hold_grace_ms: float = 120_000.0
    # How long an answer waits for its capture; it goes on in the background.
    capture_wait_ms: float = 2_000.0
    leg: LegTiming = field(default_factory=LegTiming)


@dataclass(frozen=True)
class Services:
    """What requests run on. ``draw`` gives floats in [0, 1)."""

    signer: Signer
    keys: Keys
    fleet: Fleet
    ledger: LedgerPort
    settler: Settler
    settlement: Settlement
    clock: Clock
    random: Callable[[int], bytes]
    draw: Callable[[], float]
    timing: Timing = field(default_factory=Timing)


class RequestRun:
    """One request. The HTTP side reads ``answers``; ``abandon`` says that the client left."""

    def __init__(self, plan: Plan, services: Services) -> None:
        self.plan, self._services = plan, services
        self.answers: Channel[AnswerEvent] = Channel()
        self.answer = Answer(plan, self.answers)
        self.route: Choice | None = None
        self._leg: LegRunner | None = None
        self._legs: list[LegResult] = []
        self._kept_legs = 0
        now = services.clock.now_unix_ms()
        self._until_ms = services.clock.monotonic_ms() + services.timing.request_ms
        self._hold_id = uuid7(now, services.random(10))
        self._hold_expires = now + int(services.timing.request_ms + services.timing.hold_grace_ms)

    def withdraw(self) -> None:
        """This router goes away: stop the work, bill what the client has."""
        self.answer.withdraw()
        if not self.answer.is_complete:
            # A complete one waits for its capture only, and is billed: it is still handed out.
            self.abandon()

    def abandon(self) -> None:
        """The client left: stop the work, bill what was delivered."""
        self.answers.hang_up()
        if self._leg is not None:
            self._leg.cancel()

    async def run(self) -> None:
        """Runs to the end. Never raises for what goes wrong; the last event tells."""
        try:
            end = await self._hold_serve_settle()
        except TrueweightError as error:
            end = Failed(error)
        except Exception:
            log.exception("request %s failed", self.plan.request_id.hex())
            end = Failed(TrueweightError("Internal error.", hint="Try again."))
        try:
            await self.answers.put(end, self._left_ms() + _LAST_WORD_MS)
        except TrueweightError:
            log.debug("request %s ended without a reader", self.plan.request_id.hex())

    async def _hold_serve_settle(self) -> AnswerEvent:
        most = await self._hold_for(self._price_ceilings())
        failure: TrueweightError | None = None
        reason = FinishReason.CANCELLED
        try:
            reason = await self._serve(most)
            await self.answer.finish(self._left_ms() + _LAST_WORD_MS)
        except TrueweightError as error:
            failure = error
        except Exception:
            log.exception("request %s failed", self.plan.request_id.hex())
            failure = TrueweightError("Internal error.", hint="Try again.")
        # Whatever happened: a hold never outlives its request.
        settled = await self._services.settlement.settle(self._account())
        if failure is not None:
            return Failed(failure, settled)
        return Completed(self.answer.rest, reason, len(self.answer.output), settled)

    async def _hold_for(self, ceilings: list[Prices]) -> Prices:
        """Holds for the first ceiling that the client's balance covers; nodes above it are out."""
        for most in ceilings[:-1]:
            try:
                await self._hold(quote(len(self.plan.prompt), self.plan.max_tokens, most))
            except InsufficientFunds:
                continue
            return most
        await self._hold(quote(len(self.plan.prompt), self.plan.max_tokens, ceilings[-1]))
        return ceilings[-1]

    async def _hold(self, cost: Quote) -> None:
        operation = Operation(
            id=self._hold_id,
            hold=Hold(
                account=self.plan.account,
                amount_nano=cost.hold_nano,
                expires_at_unix_ms=self._hold_expires,
                api_key_id=self.plan.api_key_id,
                router_id=self._services.signer.identity,
            ),
        )
        try:
            result = (await self._services.ledger.apply([operation]))[0]
        except OverCapacity:
            # Nothing was done, and a void would only be one operation more.
            raise
        except TrueweightError:
            # It may or may not stand: take it back either way.
            await self._services.settler.void(self._hold_id, self._hold_expires, wait_ms=0)
            raise
        raise_refused(result)

    def _price_ceilings(self) -> list[Prices]:
        views = self._services.fleet.views(self.plan.model.manifest_digest)
        able = eligible(views, self._work(frozenset()))
        if not able:
            raise Unavailable(
                f"No node can serve {self.plan.model.model_id!r} under these conditions now.",
                hint="Try again soon, or ask for less: price, context, named nodes.",
            )
        return price_ceilings(able)

    async def _serve(self, most: Prices) -> FinishReason:
        """Legs until the output is complete. Raises if it cannot be completed."""
        tried: set[str] = set()
        codes: set[str] = set()
        full: set[str] = set()
        attempts, patience = 0, self._patience()
        problem = "none is left to try"
        while attempts < _MAX_ATTEMPTS:
            choice = await self._choose(most, frozenset(tried | full), patience.until_ms)
            if choice is None and (not full or patience.is_over):
                break
            if choice is None:
                # Nobody else can, whatever the price.
                full.clear()
                await patience.pause()
                continue
            leg = await self._run_leg(choice)
            if self.answers.is_gone:
                raise ClientGone("the client is gone")
            if leg.end is LegEnd.SERVED and leg.receipt is not None:
                return self.answer.ended_by() or leg.receipt.message.finish_reason
            problem = leg.problem
            codes.add(leg.code)
            log.info("node %s did not serve: %s", leg.node.node_id, problem)
            if leg.code == ReceiptRefused.code:
                self._disown_output()
            if (complete := self.answer.ended_by()) is not None:
                return complete
            if leg.code == OverCapacity.code:
                full.add(leg.node.node_id)
                if patience.is_over:
                    break
                await patience.refused()
            else:
                tried.add(leg.node.node_id)
                attempts, patience = attempts + 1, self._patience()
        raise self._not_served(codes, problem)

    def _patience(self) -> Patience:
        services = self._services
        queue_until_ms = services.clock.monotonic_ms() + services.timing.queue_ms
        return Patience(services.clock, min(queue_until_ms, self._until_ms))

    def _not_served(self, codes: set[str], problem: str) -> TrueweightError:
        """What to tell the client when no node is left. ``codes``: of all legs' ends."""
        if self.answer.output:
            return EngineError(
                "The node was lost in the middle of the answer and no other could go on.",
                hint="The lost part is free; send the request again.",
            )
        if codes == {OverCapacity.code}:
            return all_busy()
        if self.plan.grammar_source and codes and codes <= _GRAMMAR_REFUSALS:
            return InvalidRequest(
                "The nodes refused the grammar: it does not compile or costs too much.",
                hint="You were not charged; simplify the schema or expression.",
                param="response_format",
            )
        return Unavailable(
            f"No node could serve the request: {problem}.", hint="You were not charged; try again."
        )

    def _disown_output(self) -> None:
        """Nobody answers for these tokens: they are neither kept nor continued."""
        if self.plan.stream and self.answer.output:
            raise EngineError(
                "The node's receipt for this answer does not hold.",
                hint="You were not charged; send the request again.",
            )
        self.answer.reset()
        self._kept_legs = 0

    async def _choose(self, most: Prices, tried: frozenset[str], until_ms: float) -> Choice | None:
        """A node with a free place, waiting for one if need be; None if nobody is eligible."""
        services, work = self._services, self._work(tried, most)
        fleet, digest = services.fleet, self.plan.model.manifest_digest
        number, woken = fleet.line.number(), 0
        while True:
            if self.answers.is_gone:
                fleet.line.pass_on(digest, number, woken)
                raise ClientGone("the client is gone")
            nodes = fleet.views(digest)
            able = eligible(nodes, work)
            choice = choose(able, work, services.draw) if able else None
            if woken and _have_room(nodes, choice):
                # There is more than this one takes, or what it may not have.
                fleet.line.pass_on(digest, number, woken - (choice is None))
            if choice is not None or not able:
                return choice
            left_ms = until_ms - services.clock.monotonic_ms()
            woken = await fleet.line.wait(digest, number, left_ms)

    async def _run_leg(self, choice: Choice) -> LegResult:
        services = self._services
        node = services.fleet.get(choice.node.node_id)
        if node is None:
            raise Unavailable("The chosen node is gone.", hint="Try again.")
        self.route = choice
        order = self._order(choice.node.prices)
        now_unix_ms = services.clock.now_unix_ms()
        assignment = make_assignment(
            order, node.node_id, services.signer, services.keys.market_id, now_unix_ms
        )
        runner = LegRunner(
            order,
            node,
            assignment,
            clock=services.clock,
            timing=services.timing.leg,
            keys=services.keys,
        )
        self._leg = runner
        self._legs.append(runner.result)
        most = quote(len(self.plan.prompt), self.plan.max_tokens, choice.node.prices)
        tokens = most.prompt_tokens + most.max_tokens
        with services.fleet.place(node, tokens, most.hold_nano):
            try:
                return await runner.run(lambda ids: self.answer.take(ids, self._left_ms()))
            finally:
                self._leg = None
                # Attempts that brought no token leave nothing to continue.
                self._kept_legs += bool(runner.result.received)
                rate(node, runner.result, services.clock.monotonic_ms())

    def _order(self, prices: Prices) -> LegOrder:
        return LegOrder(
            plan=self.plan,
            leg=self._kept_legs,
            prefix=tuple(self.answer.output),
            prices=prices,
            deadline_ms=self._left_ms(),
            hold_id=self._hold_id,
            hold_expires_at_unix_ms=self._hold_expires,
        )

    def _account(self) -> Account:
        delivered = self.answer.delivered
        legs: list[ServedLeg] = []
        events: list[bytes] = []
        for leg in self._legs:
            if leg.receipt is None or self.answer.was_withheld:
                continue
            mine = min(len(leg.received), max(0, delivered - len(leg.prefix)))
            received = tuple(leg.received)
            legs.append(ServedLeg(leg.assignment, leg.receipt, leg.prefix, received, mine))
            events.extend(leg.node.offer.key_events)
        return Account(
            plan=self.plan,
            legs=legs,
            key_events=events,
            hold_id=self._hold_id,
            hold_expires_at_unix_ms=self._hold_expires,
            route=self.route.as_json() if self.route else {},
        )

    def _work(self, tried: frozenset[str], most: Prices | None = None) -> Work:
        preferences = self.plan.preferences
        if most is not None:
            # What is held must cover every leg.
            preferences = replace(
                preferences,
                max_input_nano_per_mtok=most.input_nano_per_mtok,
                max_output_nano_per_mtok=most.output_nano_per_mtok,
            )
        return Work(len(self.plan.prompt), self.plan.max_tokens, preferences, tried)

    def _left_ms(self) -> float:
        return max(0.0, self._until_ms - self._services.clock.monotonic_ms())


def _have_room(nodes: Sequence[NodeView], taken: Choice | None) -> bool:
    """True if somebody else might find a place once this choice has taken its own."""
    mine = taken.node if taken else None
    return any(n.connected and n.in_flight + (n is mine) < n.capacity for n in nodes)


def rate(node: NodeRecord, leg: LegResult, now_ms: float) -> None:
    """Remembers what a leg says about its node."""
    if leg.end is LegEnd.SERVED:
        node.breaker = node.breaker.succeeded()
        node.measured = node.measured.with_success(
            prompt_tokens=len(leg.prefix) + leg.assignment.message.prompt_len,
            output_tokens=len(leg.received),
            first_ms=leg.first_ms,
            rest_ms=leg.rest_ms,
        )
    elif leg.end is LegEnd.REJECTED and leg.code in _HARMLESS and not leg.received:
        node.breaker = node.breaker.abandoned()
        if leg.code in (OverCapacity.code, Unavailable.code):
            # No fault, but no service either: the draw must know.
            node.measured = node.measured.with_failure()
    elif leg.code == NO_OUTPUT and leg.cancelled:
        node.breaker = node.breaker.abandoned()
        if leg.total_ms >= _STALLED_MS:
            node.measured = node.measured.with_failure()
    else:
        node.breaker = node.breaker.failed(now_ms)
        node.measured = node.measured.with_failure()
