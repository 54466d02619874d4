"""Admission: a good dispatch is taken, and every single thing that can be wrong is refused."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trueweight.node.admission import (
    FRESH_MS,
    Admitted,
    ModelTerms,
    Refused,
    Situation,
    Terms,
    admit,
)
from trueweight.protos.grammar import COMPILER, source_of, with_grammar
from trueweight.protos.sampling import Sampling
from trueweight.protos.v1.market_pb2 import Grammar, SamplingParams
from trueweight.protos.v1.node_pb2 import Dispatch

NODE = "n" * 32
SOURCE = source_of("choice", ["yes", "no"])
GRAMMAR = with_grammar(Sampling(stop_token_ids=(2,)), SOURCE)
fixture_ok = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass
class Desk:
    """``desk(**changes)`` admits a dispatch; terms and situation can be changed too."""

    router: Any
    terms: Terms
    situation: Situation

    def __call__(self, terms=None, now=None, **changes):
        situation = replace(self.situation, **(now or {}))
        return admit(self.router.dispatch(**changes), terms or self.terms, situation)


@pytest.fixture
def desk(world, fake_router):
    model = ModelTerms(100_000_000, 300_000_000, 512, 300)
    terms = Terms(world.market.market_id, NODE, {world.manifest_digest: model}, capacity=4)
    situation = Situation(
        router_id=world.signers["router"].identity,
        ring=world.market.ring,
        running=0,
        draining=False,
        now_unix_ms=time.time_ns() // 1_000_000,
        was_seen=lambda _digest: False,
    )
    return Desk(fake_router(world, NODE), terms, situation)


def with_source(dispatch):
    dispatch.grammar_source = SOURCE


def test_a_grammar_whose_digest_is_signed_reaches_the_engine(desk):
    taken = desk(sampling=GRAMMAR, tamper=with_source)
    assert isinstance(taken, Admitted)
    assert taken.job("j").grammar_source == SOURCE
    assert taken.job("j").sampling.grammar_sha256


def test_a_good_dispatch_becomes_the_engine_job_it_describes(desk):
    sampling = Sampling(temperature=0.5, top_p=0.5, stop_token_ids=(2,))
    taken = desk(prompt=(9, 8), prefix=(7,), seed=-5, max_tokens=6, sampling=sampling)
    assert isinstance(taken, Admitted)
    job = taken.job("j")
    assert (job.prompt, job.prefix, job.seed, job.max_tokens) == ((9, 8), (7,), -5, 6)
    assert job.sampling == sampling


def test_a_better_price_is_taken(desk):
    assert isinstance(desk(ask_input_nano_per_mtok=10**12), Admitted)


HOUR = 3_600_000
REFUSALS = {
    "another market": ({"market_id": "other"}, "BAD_SIGNATURE"),
    "another node": ({"node_id": "m" * 32}, "PERMISSION_DENIED"),
    "another router named": ({"router_id": "r" * 32}, "PERMISSION_DENIED"),
    "unregistered weights": ({"manifest_digest": b"x" * 32}, "NOT_FOUND"),
    "input below ask": ({"ask_input_nano_per_mtok": 99_999_999}, "CONFLICT"),
    "output below ask": ({"ask_output_nano_per_mtok": 299_999_999}, "CONFLICT"),
    "prompt digest": ({"prompt_digest": b"x" * 32}, "INVALID_REQUEST"),
    "no prompt digest": ({"prompt_digest": b""}, "INVALID_REQUEST"),
    "prefix digest": ({"prefix": (1,), "prefix_digest": b"x" * 32}, "INVALID_REQUEST"),
    "no prefix digest": ({"prefix": (1,), "prefix_digest": b""}, "INVALID_REQUEST"),
    "hidden prefix": ({"prefix": (1,), "prefix_len": 0}, "INVALID_REQUEST"),
    "short prompt_len": ({"prompt_len": 2}, "INVALID_REQUEST"),
    "empty prompt": ({"prompt": ()}, "INVALID_REQUEST"),
    "prompt id beyond vocabulary": ({"prompt": (5, 300)}, "INVALID_REQUEST"),
    "prefix id beyond vocabulary": ({"prefix": (300,)}, "INVALID_REQUEST"),
    "seed -1": ({"seed": -1}, "INVALID_REQUEST"),
    "no tokens wanted": ({"max_tokens": 0}, "INVALID_REQUEST"),
    "too many tokens wanted": ({"max_tokens": 510}, "CONTEXT_LENGTH_EXCEEDED"),
    "endless prompt": ({"prompt": (5,) * 513}, "CONTEXT_LENGTH_EXCEEDED"),
    "no deadline": ({"deadline_ms": 0}, "INVALID_REQUEST"),
    "endless deadline": ({"deadline_ms": 2**63}, "INVALID_REQUEST"),
    "hold ends first": ({"hold_expires_at_unix_ms": 5}, "DEADLINE_EXCEEDED"),
    "no hold": ({"hold_id": b""}, "INVALID_REQUEST"),
    "no request id": ({"request_id": b"1"}, "INVALID_REQUEST"),
    "old": ({"issued_at_unix_ms": 1}, "CONFLICT"),
    "short salt": ({"tamper": lambda d: setattr(d, "salt", b"s")}, "INVALID_REQUEST"),
    "other salt": ({"tamper": lambda d: setattr(d, "salt", b"t" * 16)}, "INVALID_REQUEST"),
    "other prompt": (
        {"tamper": lambda d: d.prompt_token_ids.__setitem__(0, 4)},
        "INVALID_REQUEST",
    ),
    "large envelope": (
        {"tamper": lambda d: setattr(d, "assignment", b"x" * 300_000)},
        "PAYLOAD_TOO_LARGE",
    ),
    "hold that ends never": (
        {"hold_expires_at_unix_ms": int(time.time() + 3 * 86_400) * 1000},
        "INVALID_REQUEST",
    ),
    "unsigned": ({"tamper": lambda d: setattr(d, "assignment", b"")}, "BAD_SIGNATURE"),
    "grammar beside": (
        {"tamper": lambda d: setattr(d, "grammar_source", b"{}")},
        "INVALID_REQUEST",
    ),
    "bias beyond vocabulary": (
        {"sampling": Sampling(logit_bias=((300, 1.0),))},
        "INVALID_REQUEST",
    ),
    "stop id beyond vocabulary": (
        {"sampling": Sampling(stop_token_ids=(300,))},
        "INVALID_REQUEST",
    ),
    "grammar": (
        {"sampling": Sampling(grammar_sha256=b"g" * 32, grammar_compiler=COMPILER)},
        "INVALID_REQUEST",
    ),
    "another compiler": (
        {"sampling": replace(GRAMMAR, grammar_compiler="x"), "tamper": with_source},
        "UNSUPPORTED_PARAMETER",
    ),
    "grammar without an end": (
        {"sampling": replace(GRAMMAR, stop_token_ids=()), "tamper": with_source},
        "INVALID_REQUEST",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(desk, name):
    changes, code = REFUSALS[name]
    decision = desk(**changes)
    assert isinstance(decision, Refused), name
    assert decision.code == code, decision.message
    assert decision.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.001),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_k", 1),
        ("min_p", 2.0),
        ("repetition_penalty", -1.0),
    ],
)
def test_attack_unresolved_sampling_is_refused(desk, field, value):
    class Raw:
        def to_proto(self):
            message = SamplingParams(temperature=1, top_p=1, repetition_penalty=1)
            setattr(message, field, value)
            return message

    decision = desk(sampling=Raw())
    assert isinstance(decision, Refused)
    assert decision.code == "INVALID_REQUEST"


def test_refuses_when_full_draining_or_seen(desk):
    assert desk(now={"running": 4}).code == "OVER_CAPACITY"
    assert isinstance(desk(now={"running": 3}), Admitted)
    assert desk(now={"draining": True}).code == "UNAVAILABLE"
    assert desk(now={"was_seen": lambda _digest: True}).code == "CONFLICT"


def test_freshness_is_symmetric_and_bounded(desk):
    now = desk.situation.now_unix_ms
    late = now + 2 * FRESH_MS
    for age, taken in ((FRESH_MS - 5_000, True), (FRESH_MS + 5_000, False)):
        for sign in (1, -1):
            decision = desk(issued_at_unix_ms=now - sign * age, hold_expires_at_unix_ms=late)
            assert isinstance(decision, Admitted) == taken


def test_attack_assignment_signed_by_another_identity_is_refused(desk, world):
    for who in ("verifier", "publisher", "market", "stranger"):
        assert desk(signer=world.signers[who]).code == "BAD_SIGNATURE"


@fixture_ok
@given(data=st.binary(max_size=400))
def test_attack_random_bytes_never_raise(desk, data):
    dispatch = desk.router.dispatch()
    dispatch.assignment = data
    decision = admit(dispatch, desk.terms, desk.situation)
    assert isinstance(decision, Refused)


@fixture_ok
@given(st.data())
def test_attack_one_flipped_byte_is_never_admitted_as_signed(desk, data):
    """Whatever byte of the envelope changes, either it is refused or the signed content is the
    same (the envelope itself is malleable, its payload is not)."""
    dispatch = desk.router.dispatch()
    raw = bytearray(dispatch.assignment)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    original = admit(dispatch, desk.terms, desk.situation)
    dispatch.assignment = bytes(raw)
    decision = admit(dispatch, desk.terms, desk.situation)
    if isinstance(decision, Admitted):
        assert decision.opened.digest == original.opened.digest


@fixture_ok
@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=40),
    st.lists(st.integers(0, 2**32 - 1), max_size=40),
    st.binary(max_size=20),
)
def test_attack_other_tokens_than_signed_are_never_admitted(desk, prompt, prefix, salt):
    dispatch = desk.router.dispatch(prompt=(1, 2, 3), prefix=(4,))
    changed = Dispatch()
    changed.CopyFrom(dispatch)
    del changed.prompt_token_ids[:], changed.prefix_token_ids[:]
    changed.prompt_token_ids.extend(prompt)
    changed.prefix_token_ids.extend(prefix)
    changed.salt = salt
    same = (prompt, prefix, salt) == ([1, 2, 3], [4], dispatch.salt)
    decision = admit(changed, desk.terms, desk.situation)
    assert isinstance(decision, Admitted) == same


def test_attack_grammar_without_digest_cannot_slip_in(desk):
    class Raw:
        def to_proto(self):
            message = SamplingParams(temperature=1, top_p=1, repetition_penalty=1)
            message.grammar.CopyFrom(Grammar(compiler="x"))
            return message

    assert isinstance(desk(sampling=Raw()), Refused)
