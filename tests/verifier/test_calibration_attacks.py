"""Attacks on calibration itself: parameters and declarations chosen to move the threshold."""

import numpy as np
import pytest

from trueweight.protos.envelope import seal
from trueweight.protos.errors import InvalidRequest
from trueweight.protos.evidence import CLIP_LOGIT, NANO, Wealth, counted_nano, sum_nano
from trueweight.protos.sampling import sample, score_row
from trueweight.protos.sampling_parameters import (
    MIN_REPETITION,
    Sampling,
    parameter_class,
    resolve,
)
from trueweight.protos.v1.audit_pb2 import Verdict
from trueweight.simulation.calibration_traffic import CLASSES
from trueweight.verifier.calibration import PairSample, calibrate_class

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


ANOTHER_MODELS = [0.0] * 20 + [3.0] * 30


async def test_attack_another_models_text_in_a_class_that_is_never_calibrated(world, kit):
    """Its client is refunded; it is no evidence for or against the node."""
    node = world.add_node("bad")
    await opened(world, kit)
    sampling = resolve(Sampling(repetition_penalty=0.01)).to_proto()
    receipts = [world.serve("bad", ANOTHER_MODELS, sampling=sampling) for _ in range(30)]
    world.serve("bad", [3.0] * 7, sampling=sampling)  # too few tokens to tell
    app = world.app()
    await kit.settle(world, app)
    verdicts = world.ledger.of_kind("verdict", Verdict)
    assert [v.outcome for v in verdicts] == [Verdict.REFUND] * 30 + [Verdict.UNCALIBRATED]
    assert not any(v.calibration_digest for v in verdicts)
    assert set(world.ledger.refunds) == set(receipts) and not world.ledger.convicted
    assert app.service.view.nodes[node].pooled.wealth.r == 0
    assert not app.service.view.nodes[node].lines[world.verifiers[0].identity].waiting


# Like the shipped model: standard deviation of the rounding between two tokens, and how many
# tokens have their two best within a logit of each other.
NOISE, TIES_PER_LOGIT = 0.02, 0.6


def flips(gaps, noise, rng):
    """x of an honest node's tokens whose two best are ``gaps`` apart for the reference."""
    flipped = rng.normal(0.0, noise, gaps.size) > gaps
    return np.where(flipped, np.minimum(gaps, CLIP_LOGIT) / CLIP_LOGIT * NANO, 0).astype(int)


def ordinary_traffic():
    rng = np.random.default_rng(1)
    gaps = rng.uniform(0, 1 / TIES_PER_LOGIT, (6000, 64))
    rows = flips(gaps.ravel(), NOISE, rng).reshape(gaps.shape)
    return calibrate_class("plain", [PairSample("p", tuple(map(tuple, rows.tolist())))])


def largest_wealth(gap, mu0_nano, ignored_nano, requests=2000):
    """Of an honest node whose client asks for one token each time, always where two are as close
    together as he likes: he has the weights, searches for such prompts, or repeats one."""
    rng = np.random.default_rng(2)
    wealth, largest = Wealth(), 1.0
    for x in flips(np.full(requests, gap), NOISE, rng).tolist():
        wealth = wealth.add(counted_nano([x], ignored_nano), 1, mu0_nano)
        largest = max(largest, wealth.value)
    return largest


@pytest.mark.parametrize(
    "cut", [{"min_p": 1.0}, {"min_p": 0.999}, {"min_p": 1.0, "top_k": 9}, {"top_k": 2}]
)
def test_attack_a_client_leaves_an_honest_rival_no_choice_but_the_likeliest_token(cut):
    """Where rounding decides which token is the likeliest, and that one is all that a cut leaves,
    the noise of the seed must not be held against the node: it would be far above any rounding."""
    entry = ordinary_traffic()
    sampling, rng = resolve(Sampling(**cut)), np.random.default_rng(3)
    wealth, largest = Wealth(), 1.0
    for request in range(100):
        margins = []
        for token in range(64):
            logits = rng.normal(0, 2, 64).astype(np.float32)
            if token % 8 == 0:  # he looked for such a place, or made it with logit_bias
                logits[np.argsort(logits)[-3:]] = logits.max()
            node = (logits + rng.normal(0, NOISE / np.sqrt(2), 64)).astype(np.float32)
            seed = 64 * request + token
            claimed = sample(node, sampling, seed, [1], [])
            margins.append(score_row(logits, sampling, seed, [1], [], claimed).margin)
        wealth = wealth.add(sum_nano(margins, entry.ignored_below_nano), 64, entry.mu0_nano)
        largest = max(largest, wealth.value)
    assert largest < 10


def test_attack_a_client_asks_an_honest_rival_for_near_ties():
    entry = ordinary_traffic()
    assert 1.8 * NOISE < entry.ignored_below_nano / NANO * CLIP_LOGIT < 2.5 * NOISE
    gaps = [NOISE * times for times in (0.5, 1, 1.5, 1.8, 2, 2.1, 2.2, 2.4, 2.7, 3, 3.5, 4)]
    assert max(largest_wealth(g, entry.mu0_nano, entry.ignored_below_nano) for g in gaps) < 10
    # It is an attack: if every difference counted in full, it would convict within these requests.
    rng = np.random.default_rng(2)
    found = flips(np.full(2000, NOISE), NOISE, rng) / entry.mu0_nano
    assert np.log1p(0.8 / 256 * (found - 1)).sum() > np.log(1e12)


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
