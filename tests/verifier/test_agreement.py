"""Second opinions: a verifier that adds a little to every verdict is found by the mean."""

from dataclasses import replace

import numpy as np
import pytest

from trueweight.protos.audit import commitment
from trueweight.protos.envelope import digest_of, seal
from trueweight.protos.evidence import NANO, Item, wealth_of
from trueweight.protos.money import PPM
from trueweight.protos.v1.audit_pb2 import EpochOpen, EpochReveal, Verdict
from trueweight.verifier.agreement import CONTRADICTED, Capital
from trueweight.verifier.owed import DONE, VOID, account
from trueweight.verifier.rewards import payable
from trueweight.verifier.state import LogView
from trueweight.verifier.verdicts import agree

MU0, HONEST = 0.00059, 0.00022
TOKENS = 128


def noise(rng, count, mean=HONEST, tokens=TOKENS):
    """Mean x of honest requests: few tokens are off, by a tenth of D on average."""
    off = rng.binomial(tokens, mean / 0.1, count)
    return np.array([rng.exponential(0.1, n).sum() / tokens for n in off])


def verdict(mean):
    return Verdict(
        outcome=Verdict.SCORED, sum_x_nano=int(mean * TOKENS * NANO), scored_tokens=TOKENS
    )


def receipts_until_contradicted(more, less, limit=CONTRADICTED):
    """How many doubly judged receipts it takes; 0 if they do not contradict each other."""
    capital = Capital()
    for number, (one, other) in enumerate(zip(more, less, strict=True), 1):
        capital.bet(float(one), float(other), TOKENS, MU0)
        if capital.largest >= limit:
            return number
    return 0


def test_two_honest_references_differ_on_single_answers_but_not_on_average():
    rng = np.random.default_rng(1)
    beyond = 0
    for _ in range(40):
        one, other = noise(rng, 500), noise(rng, 500)
        beyond += sum(
            not agree(verdict(a), verdict(b), int(MU0 * NANO))
            for a, b in zip(one, other, strict=True)
        )
        assert not receipts_until_contradicted(one, other)
        assert not receipts_until_contradicted(other, one)
    assert beyond > 40 * 500 // 20, "the tolerance for single receipts is no test of honesty"


def test_attack_a_framing_verifier_adds_mu0_to_every_honest_verdict():
    rng = np.random.default_rng(2)
    needed = []
    for _ in range(20):
        truth = noise(rng, 1000)
        assert all(agree(verdict(x), verdict(x + MU0 * 0.999), int(MU0 * NANO)) for x in truth[:50])
        needed.append(receipts_until_contradicted(noise(rng, 1000) + MU0, noise(rng, 1000)))
    framed = [Item(int((x + MU0) * TOKENS * NANO), TOKENS, int(MU0 * NANO)) for x in truth]
    assert wealth_of(framed).state == "convict", "it would convict an honest node"
    assert all(needed) and max(needed) < 600


def test_attack_a_verifier_shields_a_cheat():
    rng = np.random.default_rng(3)
    found = [receipts_until_contradicted(noise(rng, 300, 0.0085), [0.0] * 300) for _ in range(20)]
    assert all(found) and max(found) < 100


@pytest.mark.parametrize("times", [0.8, 3.5, 14, 50])
def test_honest_references_of_a_cheats_answers_do_not_contradict_each_other(times):
    """The mean is anywhere: what both find alike says nothing against either."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        truth = noise(rng, 500, times * MU0)
        one, other = (truth * rng.normal(1, 0.1, 500).clip(0.5) + noise(rng, 500) for _ in "ab")
        assert not receipts_until_contradicted(one, other)


@pytest.mark.parametrize(("mean", "expected"), [(0.5, False), (1.5, True)])
def test_the_bound_has_power_where_it_is_stated(mean, expected):
    """At alpha = 10^-2, one verifier at half of mu0 and the other always at zero: the worst that
    honesty allows. Three times as much is found."""
    rng = np.random.default_rng(5)
    lives = 400
    found = sum(
        receipts_until_contradicted(noise(rng, 400, mean * MU0), [0.0] * 400, 100) > 0
        for _ in range(lives)
    )
    if expected:
        assert found > 0.9 * lives
    else:
        assert found <= 0.01 * lives + 3 * (0.01 * lives) ** 0.5


# The same in the log.

EPOCH = 7


class Two:
    """Two verifiers that audit every receipt of one node."""

    def __init__(self, world, kit):
        self.world, self.node = world, world.add_node("good")
        self.calibrations = {}
        for signer in world.verifiers:
            self.log(
                signer,
                EpochOpen(epoch=EPOCH, commitment=commitment(b"s" * 32), default_rate_ppm=PPM),
                audit_deadline_ms=10**9,
            )
            statement = world.measured(1, kit.entry("plain", int(MU0 * NANO))).statement(
                world.market_id, signer.identity, world.manifest_digest, 0
            )
            self.log(signer, statement)
            self.calibrations[signer.identity] = digest_of(world.ledger.entries[-1].body)

    def log(self, signer, message, **fields):
        message.market_id, message.verifier_id = self.world.market_id, signer.identity
        for name, value in fields.items():
            setattr(message, name, value)
        self.world.ledger.log_envelope(seal(message, signer))

    def judge(self, receipt, number, mean, **fields):
        signer = self.world.verifiers[number]
        message = Verdict(
            node_id=self.node,
            epoch=EPOCH,
            receipt_digest=receipt,
            calibration_digest=self.calibrations[signer.identity],
            parameter_class="plain",
            outcome=Verdict.SCORED,
            sum_x_nano=int(mean * TOKENS * NANO),
            scored_tokens=TOKENS,
        )
        self.log(signer, message, **fields)

    def accounts(self):
        for signer in self.world.verifiers:
            self.log(signer, EpochReveal(epoch=EPOCH, secret=b"s" * 32))
        view = LogView(self.world.market)
        for entry in self.world.ledger.entries:
            view.apply(entry)
        now = self.world.clock.now_unix_ms()
        return view, [account(view, v.identity, EPOCH, now) for v in self.world.verifiers]

    def serve(self):
        return self.world.serve("good", [0.0] * TOKENS)


def test_attack_framing_below_the_tolerance_costs_the_epoch(make_world, kit):
    two = Two(make_world(verifier_count=2), kit)
    rng = np.random.default_rng(6)
    for one, other in zip(noise(rng, 400) + MU0, noise(rng, 400), strict=True):
        receipt = two.serve()
        two.judge(receipt, 0, one)
        two.judge(receipt, 1, other)
    view, found = two.accounts()
    for each in found:
        assert each.contradicted == (two.node,) and not each.kept
        assert not payable(view, each).verdict_digests


def test_honest_second_opinions_keep_the_epoch(make_world, kit):
    two = Two(make_world(verifier_count=2), kit)
    rng = np.random.default_rng(7)
    for one, other in zip(noise(rng, 100), noise(rng, 100), strict=True):
        receipt = two.serve()
        # Both blind within the window of the test's clock: the second is not copied from the first.
        two.judge(receipt, 0, one)
        two.judge(receipt, 1, other)
    _, (first, second) = two.accounts()
    assert first.kept and not first.contradicted and not second.contradicted
    assert first.disputed, "single answers differ by more than the tolerance"


@pytest.mark.parametrize("epoch", [EPOCH, 999, 0])
def test_attack_a_verifier_hides_its_verdicts_in_another_epoch(make_world, kit, epoch):
    """It declares an epoch that nobody looks at; what counts is the receipt's."""
    two = Two(make_world(verifier_count=2), kit)
    receipt = two.serve()
    two.judge(receipt, 1, HONEST)
    two.judge(receipt, 0, 0.6, epoch=epoch)  # copied: no commitment, and beyond any noise
    _, (found, other) = two.accounts()
    assert (found.copied, len(found.disputed), found.contradicted) == (1, 1, (two.node,))
    assert not found.kept and not other.kept


@pytest.mark.parametrize(
    "opposite",
    [
        {"outcome": Verdict.INVALID_RECEIPT, "l0_failure": "counts", "scored_tokens": 0},
        {"scored_tokens": TOKENS - 1},
        {"parameter_class": "amplified"},
    ],
)
def test_attack_a_verifier_says_something_else_about_the_same_receipt(make_world, kit, opposite):
    two = Two(make_world(verifier_count=2), kit)
    receipt = two.serve()
    two.judge(receipt, 1, HONEST)
    two.judge(receipt, 0, HONEST, **opposite)
    _, found = two.accounts()
    assert [each.contradicted for each in found] == [(two.node,)] * 2


# Verdicts that say nothing.

NOTHING = {"calibration_digest": b"", "parameter_class": "", "sum_x_nano": 0, "scored_tokens": 0}
VOIDS = {
    "missing": {"outcome": Verdict.MISSING_TRANSCRIPT, **NOTHING},
    "erased": {"outcome": Verdict.UNCALIBRATED, "l0_failure": "erased", **NOTHING},
    "uncalibrated": {"outcome": Verdict.UNCALIBRATED, **NOTHING, "parameter_class": "plain"},
    "unnamed": {"outcome": Verdict.INVALID_RECEIPT, **NOTHING},
    "unknown": {"outcome": 77, **NOTHING},
}


@pytest.mark.parametrize("void", VOIDS)
def test_attack_the_laziest_verifier_calls_everything_void_and_is_paid_nothing(
    make_world, kit, void
):
    two = Two(make_world(verifier_count=2), kit)
    for _ in range(5):
        two.judge(two.serve(), 0, 0, **VOIDS[void])
    view, (lazy, _) = two.accounts()
    assert (lazy.count(VOID), lazy.count(DONE), lazy.as_json()["counts"][VOID]) == (5, 0, 5)
    assert not payable(view, lazy).verdict_digests


@pytest.mark.parametrize("void", ["missing", "erased", "uncalibrated"])
def test_attack_a_lazy_verifier_calls_void_what_another_scored(make_world, kit, void):
    """Three in thirty may happen to a verifier that a router did not answer; four lose the epoch,
    and that of nobody else."""
    two = Two(make_world(verifier_count=2), kit)
    receipts = [two.serve() for _ in range(30)]
    for number, receipt in enumerate(receipts):
        two.judge(receipt, 1, HONEST)
        two.judge(receipt, 0, HONEST, **VOIDS[void] if number < 4 else {})
    view, (lazy, diligent) = two.accounts()
    assert (len(lazy.refuted), lazy.compared, lazy.is_refuted) == (4, 30, True)
    assert not lazy.kept and "void" in payable(view, replace(lazy, copied=0)).why_not
    assert diligent.kept and not diligent.refuted and payable(view, diligent).verdict_digests
    assert not replace(lazy, refuted=lazy.refuted[:3]).is_refuted
    assert not replace(lazy, refuted=lazy.refuted[:2], compared=2).is_refuted


def test_who_has_no_calibration_for_a_class_is_not_refuted_by_one_who_has(make_world, kit):
    two = Two(make_world(verifier_count=2), kit)
    second = two.world.verifiers[1].identity
    statement = two.world.measured(2, kit.entry("plain"), kit.entry("greedy")).statement(
        two.world.market_id, second, two.world.manifest_digest, 0
    )
    two.log(two.world.verifiers[1], statement)
    two.calibrations[second] = digest_of(two.world.ledger.entries[-1].body)
    for _ in range(5):
        receipt = two.serve()
        two.judge(receipt, 1, HONEST, parameter_class="greedy")
        two.judge(receipt, 0, 0, **{**VOIDS["uncalibrated"], "parameter_class": "greedy"})
    _, (found, other) = two.accounts()
    assert (found.count(VOID), found.compared, found.refuted) == (5, 5, ())
    assert other.kept and other.count(DONE) == 5


def test_attack_who_copied_a_score_refutes_nobody(make_world, kit):
    two = Two(make_world(verifier_count=2), kit)
    for _ in range(5):
        receipt = two.serve()
        two.judge(receipt, 0, 0, **VOIDS["missing"])
        two.judge(receipt, 1, HONEST)  # after the first verdict, without a commitment
    _, (honest, copier) = two.accounts()
    assert copier.copied == 5 and not honest.compared


@pytest.mark.parametrize("other", [{}, {"outcome": Verdict.REFUND}, {"outcome": 3}])
@pytest.mark.parametrize("named", ["", "durations"])
def test_attack_a_refusal_of_what_another_scored_is_contradicted(make_world, kit, named, other):
    two = Two(make_world(verifier_count=2), kit)
    receipt = two.serve()
    two.judge(receipt, 1, HONEST, **other)
    two.judge(receipt, 0, 0, outcome=Verdict.INVALID_RECEIPT, **NOTHING, l0_failure=named)
    _, found = two.accounts()
    assert [each.contradicted for each in found] == [(two.node,)] * 2


def test_attack_a_client_erases_an_invalid_receipt_between_two_audits(make_world, kit):
    """Who came too late to see it does not contradict who refused it."""
    two = Two(make_world(verifier_count=2), kit)
    receipt = two.serve()
    two.judge(receipt, 0, 0, outcome=Verdict.INVALID_RECEIPT, **NOTHING, l0_failure="durations")
    two.judge(receipt, 1, 0, **VOIDS["erased"])
    _, found = two.accounts()
    assert not any(each.contradicted or each.disputed for each in found)


def test_attack_a_refund_that_cites_no_calibration_is_held_to_the_others(make_world, kit):
    two = Two(make_world(verifier_count=2), kit)
    receipt = two.serve()
    two.judge(receipt, 1, HONEST)
    two.judge(receipt, 0, 0.9, outcome=Verdict.REFUND, calibration_digest=b"")
    _, found = two.accounts()
    assert [each.contradicted for each in found] == [(two.node,)] * 2
