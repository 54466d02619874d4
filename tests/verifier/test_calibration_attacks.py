"""Attacks on calibration itself: parameters and declarations chosen to move the threshold."""

import pytest

from trueweight.protos.errors import InvalidRequest
from trueweight.protos.sampling_parameters import (
    MIN_REPETITION,
    Sampling,
    parameter_class,
    resolve,
)
from trueweight.protos.v1.audit_pb2 import Verdict
from trueweight.simulation.calibration_traffic import CLASSES

CHEAT = [0.0] * 180 + [0.1] * 20
# What an honest node shows when a repetition penalty of 0.01 makes its rounding 100 times larger.
AMPLIFIED = [0.0] * 150 + [0.4] * 50


async def opened(world, kit):
    app = world.app()
    await kit.drive(world, app, app.service.ready.is_set)


@pytest.mark.parametrize("penalty", [1e-6, 0.01, 0.5, 0.74])
def test_attack_a_client_amplifies_an_honest_rivals_rounding(penalty):
    for extra in ({}, {"top_p": 0.5}, {"temperature": 0.0}, {"presence_penalty": 1.0}):
        assert parameter_class(resolve(Sampling(repetition_penalty=penalty, **extra))) == (
            "amplified"
        )
    grammar = Sampling(repetition_penalty=penalty, grammar_sha256=b"g" * 32, grammar_compiler="c")
    assert parameter_class(resolve(grammar)) == "amplified"
    assert "amplified" not in CLASSES


def test_what_multiplies_logits_otherwise_is_out_of_range_or_calibrated():
    assert parameter_class(resolve(Sampling(repetition_penalty=MIN_REPETITION))) == "penalties"
    assert parameter_class(resolve(Sampling(repetition_penalty=2.0))) == "penalties"
    with pytest.raises(InvalidRequest):
        resolve(Sampling(repetition_penalty=2.1))


async def test_attack_amplified_requests_are_no_evidence_against_an_honest_node(world, kit):
    node = world.add_node("good")
    await opened(world, kit)
    sampling = resolve(Sampling(repetition_penalty=0.01)).to_proto()
    for _ in range(30):
        world.serve("good", AMPLIFIED, sampling=sampling)
    app = world.app()
    await kit.settle(world, app)
    verdicts = world.ledger.of_kind("verdict", Verdict)
    assert {v.outcome for v in verdicts} == {Verdict.UNCALIBRATED} and len(verdicts) == 30
    assert app.service.view.nodes[node].pooled.wealth.r == 0
    assert not world.ledger.refunds and not world.ledger.convicted


async def test_attack_a_noisy_fingerprint_buys_no_larger_threshold(world, kit):
    def declares_noise(receipt):
        receipt.fingerprint.quantization = "int4"
        receipt.fingerprint.dtype = "float16"
        receipt.fingerprint.kv_dtype = "fp8"

    plain, noisy = world.add_node("plain"), world.add_node("noisy")
    await opened(world, kit)
    for _ in range(20):
        world.serve("plain", CHEAT)
        world.serve("noisy", CHEAT, lie=declares_noise)
    app = world.app()
    await kit.settle(world, app)
    nodes = app.service.view.nodes
    assert nodes[noisy].pooled.wealth == nodes[plain].pooled.wealth
    assert set(world.ledger.convicted) == {plain, noisy}
