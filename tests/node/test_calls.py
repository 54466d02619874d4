"""The call state machine: whatever happens in whatever order, the receipt is right."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.node.calls import (
    AbortEngine,
    CallState,
    Cancelled,
    DeadlinePassed,
    EngineFailed,
    Finish,
    Produced,
    Send,
    StopAt,
    WindowGrown,
    advance,
)
from trueweight.node.engine import EngineFinish
from trueweight.protos.v1.market_pb2 import (
    CANCELLED,
    DEADLINE,
    ENGINE_ERROR,
    EOS,
    LENGTH,
    STOPPED,
)

MAX_TOKENS = 12
tokens = st.lists(st.integers(0, 99), max_size=5).map(tuple)
events = st.lists(
    st.one_of(
        st.builds(Produced, tokens, st.sampled_from([None, None, None, *EngineFinish])),
        st.builds(StopAt, st.integers(0, MAX_TOKENS + 3)),
        st.builds(WindowGrown, st.integers(0, 6)),
        st.sampled_from([Cancelled(), DeadlinePassed(), EngineFailed()]),
    ),
    max_size=30,
)


def play(script, window=3):
    """Everything a call did under a script that ends, as any call does, with its deadline."""
    state = CallState(MAX_TOKENS, window)
    sent, made, granted, finishes, aborts, ended_by = [], [], window, [], 0, None
    for event in [*script, DeadlinePassed()]:
        if isinstance(event, Produced) and not finishes:
            made.extend(event.token_ids)
        if isinstance(event, WindowGrown) and not finishes:
            granted += event.tokens
        state, instructions = advance(state, event)
        for instruction in instructions:
            assert not finishes, "nothing may follow the receipt"
            match instruction:
                case Send(token_ids=ids):
                    assert ids
                    sent.extend(ids)
                    assert len(sent) <= granted, "sent beyond the window"
                case AbortEngine():
                    aborts += 1
                case Finish():
                    finishes.append(instruction)
                    ended_by = event
    return sent, made, finishes, aborts, ended_by


@given(events)
@settings(max_examples=300, deadline=None)
def test_every_call_ends_with_exactly_one_receipt_over_what_was_sent(script):
    sent, made, finishes, aborts, _ = play(script)
    (finish,) = finishes
    assert tuple(sent) == tuple(made[: len(sent)]), "tokens are those of the engine, in order"
    assert finish.output == tuple(sent[: len(finish.output)])
    assert len(finish.output) <= MAX_TOKENS
    assert aborts <= 1
    if finish.reason != STOPPED:
        assert len(finish.output) == len(sent), "only a Stop signs less than was sent"


@given(events)
@settings(max_examples=300, deadline=None)
def test_reasons_are_true(script):
    _, _, (finish,), _, ended_by = play(script)
    stops = [e.at for e in script if isinstance(e, StopAt)]
    if finish.reason == STOPPED:
        assert len(finish.output) in stops
    if finish.reason == LENGTH:
        ended = [e for e in script if isinstance(e, Produced) and e.finish is EngineFinish.LENGTH]
        assert len(finish.output) == MAX_TOKENS or ended
    causes = {CANCELLED: Cancelled, DEADLINE: DeadlinePassed, ENGINE_ERROR: EngineFailed}
    for reason, cause in causes.items():
        assert (finish.reason == reason) == isinstance(ended_by, cause)


@given(st.integers(0, 20), st.integers(1, 20), st.integers(1, 4))
def test_stop_signs_exactly_k_when_the_engine_ran_past(made, at, window):
    """With k tokens made before or after the Stop, the receipt covers exactly k."""
    total = max(made, at)
    state = CallState(max_tokens=1000, window=window)
    out = []

    def feed(event):
        nonlocal state
        state, instructions = advance(state, event)
        out.extend(instructions)

    feed(Produced(tuple(range(made))))
    feed(StopAt(at))
    feed(Produced(tuple(range(made, total + 5))))
    feed(WindowGrown(1000))
    sent = [t for i in out if isinstance(i, Send) for t in i.token_ids]
    finish = out[-1]
    assert finish == Finish(STOPPED, tuple(range(at)))
    assert sent == list(range(max(at, min(made, window))))
    assert any(isinstance(i, AbortEngine) for i in out)


def test_end_of_sequence_waits_for_the_window_and_keeps_its_reason():
    state, first = advance(CallState(10, 2), Produced((1, 2, 3, 9), EngineFinish.EOS))
    assert first == (Send((1, 2)),)
    state, second = advance(state, WindowGrown(1))
    assert second == (Send((3,)),)
    state, third = advance(state, WindowGrown(5))
    assert third == (Send((9,)), Finish(EOS, (1, 2, 3, 9)))
    assert advance(state, Cancelled()) == (state, ())


def test_cancel_while_waiting_for_the_window_signs_only_what_was_sent():
    state, _ = advance(CallState(10, 2), Produced((1, 2, 3, 9), EngineFinish.EOS))
    _, instructions = advance(state, Cancelled())
    assert instructions == (Finish(CANCELLED, (1, 2)),)


def test_an_engine_that_makes_too_much_is_cut_at_what_was_ordered():
    state, instructions = advance(CallState(3, 100), Produced((1, 2, 3, 4, 5)))
    assert instructions == (Send((1, 2, 3)), Finish(LENGTH, (1, 2, 3)))
    assert state.finished


def test_attack_stop_beyond_the_output_changes_nothing():
    state, none = advance(CallState(5, 100), StopAt(4_000_000_000))
    assert none == ()
    _, instructions = advance(state, Produced((1, 2, 3), EngineFinish.EOS))
    assert instructions[-1] == Finish(EOS, (1, 2, 3))


def test_attack_endless_windows_do_not_overflow():
    state = CallState(5, 0)
    for _ in range(5):
        state, _ = advance(state, WindowGrown(2**32 - 1))
    assert state.window == 2**31
