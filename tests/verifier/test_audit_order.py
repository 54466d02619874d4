"""Evidence in the order of audit requests: choosing among true margins gains a verifier nothing."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.protos.calibrations import CalibrationTable, read_calibration
from trueweight.protos.conviction import (
    MAX_WAITING,
    PATIENCE_EPOCHS,
    Answer,
    Asked,
    AuditLine,
    Said,
    answer_of,
    as_zero,
)
from trueweight.protos.envelope import seal
from trueweight.protos.evidence import CONVICT, NANO, Item, wealth_of
from trueweight.protos.market_terms import DEFAULT_AUDIT_TERMS
from trueweight.protos.v1.audit_pb2 import AuditRequest, Calibration, EpochOpen, Verdict
from trueweight.verifier.rules import APPEAL, LATE, WAITS
from trueweight.verifier.state import LogView

MU0, TOKENS = 590_000, 256
HONEST_MEAN = 220_000
PICKED = 40


def honest_sums(count, seed=1):
    """Sums of x of honest requests: one token in two hundred is off, by a tenth of D on average."""
    rng = np.random.default_rng(seed)
    off = rng.binomial(TOKENS, 0.0055, count)
    return [int(rng.exponential(HONEST_MEAN / 0.0055, n).sum()) for n in off]


def line_of(count):
    line = AuditLine()
    for number in range(count):
        assert line.ask(key(number), Asked(2 * number, number, TOKENS, "client:c"))
    return line


def key(number):
    return number.to_bytes(32, "big")


def margins(total, number):
    return Answer(10_000 + number, total, MU0, "p/plain")


def test_attack_a_framing_verifier_publishes_only_the_largest_true_margins():
    sums = honest_sums(2000)
    assert sum(sums) / len(sums) / TOKENS < MU0 / 2, "the node is honest"
    best = sorted(range(2000), key=lambda i: -sums[i])[:PICKED]
    as_published = wealth_of([Item(sums[i], TOKENS, MU0) for i in best])
    assert as_published.value > CONVICT, "added up as they come they would convict it"
    line = line_of(2000)
    for number in best:
        line.answer(key(number), margins(sums[number], number))
    assert line.evidence.largest < 10 and line.waiting
    for epoch in range(PATIENCE_EPOCHS):
        line.epoch_opened(20_000 + epoch)
    assert not line.waiting and line.evidence.wealth.r == 2000
    assert line.evidence.scored == PICKED and line.evidence.largest < 10


@pytest.mark.parametrize("outcome", [o for o in Verdict.Outcome.values() if o not in (1, 2)])
@pytest.mark.parametrize("name", ["", "plain"])
def test_attack_a_framing_verifier_declares_the_small_margins_void(outcome, name, kit):
    """Missing, erased, invalid, uncalibrated though it is calibrated: all count as zero."""
    table = CalibrationTable()
    entry = kit.entry("plain", mu0_nano=MU0)
    table.add(read_calibration(Calibration(verifier_id="v", version=1, entries=[entry]), b"d", 1))
    sums = honest_sums(2000, seed=2)
    best = set(sorted(range(2000), key=lambda i: -sums[i])[:PICKED])
    line = AuditLine()
    for number, total in enumerate(sums):
        asked = Asked(100 + number, 50 + number, TOKENS, "client:c")
        line.ask(key(number), asked)
        said = Said(9_000 + number, b"d", "plain", total, TOKENS, Verdict.SCORED)
        if number not in best:
            said = said._replace(outcome=outcome, parameter_class=name)
        line.answer(key(number), answer_of(said, asked, "v", table))
    assert line.evidence.wealth.r == 2000 and line.evidence.scored == PICKED
    assert line.evidence.largest < 10


def test_a_class_that_the_verifier_has_not_calibrated_is_left_out(kit):
    table = CalibrationTable()
    entry = kit.entry("plain")
    table.add(read_calibration(Calibration(verifier_id="v", version=1, entries=[entry]), b"d", 9))
    asked = Asked(30, 20, TOKENS, "")
    said = Said(40, b"", "amplified", TOKENS * NANO, TOKENS, Verdict.UNCALIBRATED)
    assert answer_of(said, asked, "v", table).is_left_out
    plain = said._replace(parameter_class="plain")
    assert not answer_of(plain, asked, "v", table).is_left_out
    assert answer_of(plain, asked._replace(receipt_index=9), "v", table).is_left_out, "not in force"
    refunded = said._replace(outcome=Verdict.REFUND)
    assert answer_of(refunded, asked, "v", table).is_left_out
    bare = answer_of(refunded._replace(parameter_class="plain"), asked, "v", table)
    assert not bare.is_left_out and not bare.pair, "as zero: it has a calibration that it must cite"
    line = AuditLine()
    line.ask(b"r", asked)
    assert line.answer(b"r", answer_of(said, asked, "v", table))[0].evidence is None
    assert line.evidence.wealth.r == 0 and not line.waiting


@settings(deadline=None)
@given(st.lists(st.integers(0, TOKENS * NANO // 50), max_size=40), st.randoms())
def test_the_order_of_verdicts_does_not_matter(sums, dice):
    orders = [list(range(len(sums))) for _ in range(2)]
    dice.shuffle(orders[1])
    lines = [line_of(len(sums)) for _ in orders]
    for line, order in zip(lines, orders, strict=True):
        for number in order:
            line.answer(key(number), margins(sums[number], number))
    one, other = lines
    assert one.evidence == other.evidence and list(one.counted) == list(other.counted)
    assert not one.waiting


@settings(deadline=None)
@given(st.lists(st.integers(0, TOKENS * NANO // 50), max_size=40), st.data())
def test_whatever_a_verifier_withholds_the_wealth_is_never_above_the_true_one(sums, data):
    line, whole = line_of(len(sums)), line_of(len(sums))
    for number, total in enumerate(sums):
        whole.answer(key(number), margins(total, number))
    order = list(range(len(sums)))
    random.Random(data.draw(st.integers())).shuffle(order)
    for place, number in enumerate(order):
        act = data.draw(st.sampled_from(["publish", "void", "withhold", "epoch"]))
        if act == "epoch":
            line.epoch_opened(50_000 + place)
        elif act != "withhold":
            found = margins(sums[number], number)
            line.answer(key(number), found if act == "publish" else as_zero(1, "void"))
    if whole.evidence.crossed_by is None:
        assert line.evidence.crossed_by is None
        assert line.evidence.largest <= whole.evidence.largest * (1 + 1e-12)


def test_a_line_is_bounded_and_answers_nothing_twice(monkeypatch):
    monkeypatch.setattr("trueweight.protos.conviction.MAX_WAITING", 3)
    line = AuditLine()
    taken = [line.ask(key(n), Asked(n, n, TOKENS, "")) for n in range(5)]
    assert taken == [True] * 3 + [False] * 2 and MAX_WAITING == 100_000
    assert not AuditLine().ask(b"r", Asked(1, 1, 0, "")), "nothing to score"
    assert line.answer(key(4), margins(0, 4)) == []
    assert line.answer(key(1), margins(0, 1)) == [] and line.asked(key(1)) is None
    assert line.answer(key(1), margins(TOKENS * NANO, 1)) == []
    settled = line.answer(key(0), margins(5, 0))
    assert [s.receipt_digest for s in settled] == [key(0), key(1)]
    assert line.evidence.wealth == wealth_of([Item(5, TOKENS, MU0), Item(0, TOKENS, MU0)])


# The same in the log.


class Market:
    """One verifier's statements about many receipts of one node."""

    def __init__(self, world, count):
        self.world, self.me = world, world.verifiers[0]
        self.node, self.view = world.add_node("good"), LogView(world.market)
        statement = world.measured().statement(
            world.market_id, self.me.identity, world.manifest_digest, 0
        )
        self.log(statement)
        self.receipts = [world.serve("good", [0.0] * 50) for _ in range(count)]
        self.fold()
        (self.calibration,) = self.view.calibrations.all()

    def log(self, message):
        self.world.ledger.log_envelope(seal(message, self.me))
        self.fold()

    def fold(self):
        for entry in self.world.ledger.entries[self.view.next_index :]:
            self.view.apply(entry)

    def ask(self, receipt, **fields):
        request = AuditRequest(
            market_id=self.world.market_id,
            verifier_id=self.me.identity,
            receipt_digest=receipt,
            **fields,
        )
        self.log(request)

    def judge(self, receipt, total=50 * NANO):
        leaf = self.view.receipts.get(receipt)
        verdict = Verdict(
            market_id=self.world.market_id,
            verifier_id=self.me.identity,
            node_id=self.node,
            assignment_digest=leaf.assignment_digest,
            receipt_digest=receipt,
            calibration_digest=self.calibration.digest,
            parameter_class="plain",
            sum_x_nano=total,
            scored_tokens=50,
            outcome=Verdict.SCORED,
        )
        self.log(verdict)
        return self.view.verdicts.get((self.me.identity, receipt))

    def open_epoch(self, number):
        self.log(
            EpochOpen(market_id=self.world.market_id, verifier_id=self.me.identity, epoch=number)
        )

    def own(self):
        return self.view.node(self.node).by_verifier.get(self.me.identity)


def test_attack_verdicts_wait_for_what_was_asked_for_before_them(world):
    market = Market(world, 8)
    for receipt in market.receipts:
        market.ask(receipt)
    found = [market.judge(receipt) for receipt in market.receipts[1:]]
    assert {v.why_not for v in found} == {WAITS} and market.own() is None
    market.open_epoch(1)
    assert market.own() is None, "the first request may still be answered"
    market.judge(market.receipts[0], 0)
    assert market.own().state == "convict" and market.own().unscored == 0
    assert [
        e.receipt_index for e in market.view.counted(market.me.identity, market.node)
    ] == sorted(market.view.receipts.get(r).index for r in market.receipts[: market.own().wealth.r])


def test_attack_a_verdict_that_comes_once_its_audit_counts_as_zero(world):
    market = Market(world, 3)
    for receipt in market.receipts:
        market.ask(receipt)
    market.open_epoch(1)
    market.judge(market.receipts[1], 7)
    market.open_epoch(1)  # the same number again is no epoch
    assert market.own() is None
    market.open_epoch(2)
    assert (market.own().wealth.r, market.own().unscored) == (3, 2)
    for receipt in (market.receipts[0], market.receipts[2]):
        assert market.judge(receipt).why_not == LATE
    assert market.own().wealth.r == 3 and market.own().scored_tokens == 50


def test_epochs_outside_the_markets_terms_end_waiting_as_they_do_in_the_ledger(make_world):
    """The ledger knows no terms: were waiting longer here, a conviction that is right for a
    verifier would be wrong for the ledger, for good."""
    market = Market(make_world(audit_terms=DEFAULT_AUDIT_TERMS), 3)
    for receipt in market.receipts:
        market.ask(receipt)
    market.judge(market.receipts[1], 7)
    for number in (1, 2):
        market.open_epoch(number)
    assert not market.view.epochs.get(market.me.identity), "it states no rates"
    assert (market.own().wealth.r, market.own().unscored) == (3, 2)


def test_attack_a_transcript_opened_for_an_appeal_makes_no_evidence_and_blocks_none(world):
    """Else its margins would be known before the audit is asked for."""
    market = Market(world, 2)
    market.ask(market.receipts[0], for_appeal=True)
    market.ask(market.receipts[0])
    assert market.judge(market.receipts[0]).why_not == APPEAL and market.own() is None
    market.ask(market.receipts[1])
    market.judge(market.receipts[1])
    assert market.own().scored == 1


def test_attack_an_audit_is_asked_for_before_its_receipt_is_in_the_log(world):
    market = Market(world, 1)
    market.ask(b"x" * 32)
    assert market.view.ignored == 1 and not market.view.requests.values()
