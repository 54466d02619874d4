"""One call as a pure state machine: typed events in, instructions out.

Whatever happens, in whatever order, a call ends with exactly one ``Finish``, and the tokens it
names are a prefix of the tokens that were sent; or, if the engine would not begin, with one
``Reject``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from trueweight.node.engine import EngineFinish
from trueweight.protos.v1.market_pb2 import FinishReason

Tokens: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CallState:
    """``made`` is what the engine produced for this leg, of which the first ``sent`` tokens went
    to the router; ``window`` more may follow. ``end`` is why the engine stopped, once it has."""

    max_tokens: int
    window: int
    made: Tokens = ()
    sent: int = 0
    stop_at: int | None = None
    end: FinishReason | None = None
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Produced:
    """The engine made tokens; ``finish`` with its last ones."""

    token_ids: Tokens
    finish: EngineFinish | None = None


@dataclass(frozen=True, slots=True)
class StopAt:
    """The router ends the output after exactly ``at`` tokens."""

    at: int


@dataclass(frozen=True, slots=True)
class WindowGrown:
    """The router can take ``tokens`` more."""

    tokens: int


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The router cancelled, or was lost."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The assignment's time is over."""


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine ended without finishing."""


@dataclass(frozen=True, slots=True)
class EngineRefused:
    """The engine would not take the job: an error's code and words."""

    code: str
    message: str


Event: TypeAlias = (
    Produced | StopAt | WindowGrown | Cancelled | DeadlinePassed | EngineFailed | EngineRefused
)


@dataclass(frozen=True, slots=True)
class Send:
    """Send these tokens, the next of this call."""

    token_ids: Tokens


@dataclass(frozen=True, slots=True)
class AbortEngine:
    """Nothing more is wanted from the engine."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Sign a receipt over exactly these tokens. Always the last instruction of a call."""

    reason: FinishReason
    output: Tokens


@dataclass(frozen=True, slots=True)
class Reject:
    """Nothing ran and nothing is owed. The last instruction of such a call."""

    code: str
    message: str


Instruction: TypeAlias = Send | AbortEngine | Finish | Reject
Decision: TypeAlias = tuple[CallState, tuple[Instruction, ...]]

# A window beyond any context is a mistake or an attack; it is cut, not believed.
_MAX_WINDOW = 2**31
_REASONS: dict[EngineFinish, FinishReason] = {
    EngineFinish.EOS: FinishReason.EOS,
    EngineFinish.LENGTH: FinishReason.LENGTH,
}


def advance(state: CallState, event: Event) -> Decision:
    """What to do about an event. After ``Finish`` or ``Reject`` every event is ignored."""
    if state.finished:
        return state, ()
    match event:
        case Produced():
            return _flush(_grow(state, event))
        case StopAt(at=at):
            lowest = at if state.stop_at is None else min(at, state.stop_at)
            return _flush(replace(state, stop_at=max(0, lowest)))
        case WindowGrown(tokens=tokens):
            return _flush(replace(state, window=min(_MAX_WINDOW, state.window + max(0, tokens))))
        case Cancelled():
            return _give_up(state, FinishReason.CANCELLED)
        case DeadlinePassed():
            return _give_up(state, FinishReason.DEADLINE)
        case EngineRefused(code=code, message=message) if not state.made:
            return replace(state, finished=True), (Reject(code, message),)
        case EngineFailed() | EngineRefused():
            return _give_up(state, FinishReason.ENGINE_ERROR)


def _grow(state: CallState, event: Produced) -> CallState:
    if state.end is not None:
        return state
    made = state.made + event.token_ids
    if event.finish is not None:
        end: FinishReason | None = _REASONS[event.finish]
    else:
        end = FinishReason.LENGTH if len(made) >= state.max_tokens else None
    if len(made) > state.max_tokens:
        # Never sign what was not ordered, whatever the engine does.
        made, end = made[: state.max_tokens], FinishReason.LENGTH
    return replace(state, made=made, end=end)


def _flush(state: CallState) -> Decision:
    """Sends what window and Stop allow; finishes when everything wanted has been sent."""
    stopped = state.stop_at is not None and len(state.made) >= state.stop_at
    wanted = state.made[: state.stop_at] if stopped else state.made
    count = max(0, min(state.window, len(wanted) - state.sent))
    out: list[Instruction] = []
    if count:
        out.append(Send(wanted[state.sent : state.sent + count]))
        state = replace(state, sent=state.sent + count, window=state.window - count)
    if not stopped and state.end is None:
        return state, tuple(out)
    if state.end is None:
        # Enough was made for the Stop; the rest of what the engine does is not wanted.
        state = replace(state, made=wanted, end=FinishReason.STOPPED)
        out.append(AbortEngine())
    if state.sent < len(wanted):
        return state, tuple(out)
    cut = stopped and len(wanted) < len(state.made)
    reason = FinishReason.STOPPED if cut or state.end is None else state.end
    out.append(Finish(reason, wanted))
    return replace(state, finished=True), tuple(out)


def _give_up(state: CallState, reason: FinishReason) -> Decision:
    """Signs what was sent; what waits behind the window was never delivered and is dropped."""
    out: list[Instruction] = [AbortEngine()] if state.end is None else []
    signed = state.made[: state.sent]
    return replace(state, finished=True), (*out, Finish(reason, signed))
