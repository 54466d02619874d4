"""Attacks on calibration itself: parameters and declarations chosen to move the threshold."""

import pytest

from trueweight.protos.envelope import seal
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


# Calibration by a verifier that means harm: it answers for it with its own verdicts only.

HONEST_NOISE = [0.0] * 199 + [0.02]
ABSURD = {"shields": (2, 990_000_000), "convicts": (2, 200_000), "freezes": (2**32 - 1, 400_000)}


@pytest.mark.parametrize("how", ABSURD)
async def test_attack_one_verifiers_absurd_calibration_binds_nobody_else(make_world, kit, how):
    """mu0 of 0.99 shields every cheat, 0.0002 convicts the honest, version 2^32-1 leaves no room
    for another: each for the verdicts of its author, who is one of two."""
    world = make_world(verifier_count=2, convictions_needed=2)
    good, bad = world.add_node("good"), world.add_node("bad")
    for number in (0, 1):
        app = world.app(number)
        await kit.drive(world, app, app.service.ready.is_set)
    version, mu0_nano = ABSURD[how]
    entry = kit.entry(mu0_nano=mu0_nano)
    statement = world.measured(version, entry).statement(
        world.market_id, world.verifiers[1].identity, world.manifest_digest, 0
    )
    world.ledger.log_envelope(seal(statement, world.verifiers[1]))
    for _ in range(12):
        world.serve("good", HONEST_NOISE)
        world.serve("bad", CHEAT)
    own = world.measured(3, kit.entry("plain"))
    apps = [world.app(0, measured=(own,)), world.app(1, measured=())]
    await kit.settle_together(world, apps)
    view, (mine, other) = apps[0].service.view, (v.identity for v in world.verifiers)
    assert view.node(bad).by_verifier[mine].state == "convict", "nobody is shielded from the others"
    assert mine in view.node(bad).convictions
    assert view.node(good).by_verifier[mine].wealth.value < 1
    assert not view.node(good).convictions or other in view.node(good).convictions
    assert not view.convicted(good) and mine not in view.node(good).convictions
    assert view.calibrations.newest(mine)[0].version == 3, "its own next version came into force"
    assert view.calibrations.newest(other)[0].version == version
