"""The cap on unsettled work, from bills, verdicts and opened epochs."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.protos.deterrence import (
    PRICE_HALF_LIFE_LEGS,
    PaidPrice,
    needed_nano,
    unsettled_cap_nano,
)
from trueweight.protos.v1.audit_pb2 import EpochOpen, NodeRate, Verdict
from trueweight.protos.v1.market_pb2 import Bill, BillLeg
from trueweight.router import exposure
from trueweight.router.exposure import Exposure
from trueweight.router.judges import Judges
from trueweight.router.keyring import Keys
from trueweight.simulation.ledger_world import World, make_signer

ASK, STAKE, GAIN = 400_000_000, 10**9, 10_000


@dataclass
class Market:
    """Verifiers by name, and statements of theirs."""

    world: World
    exposure: Exposure

    def open(self, by="verifier", number=1, gain=GAIN, rate=1_000_000, **rates):
        nodes = [NodeRate(node_id=n, rate_ppm=r) for n, r in rates.items()]
        self.exposure.opened(
            EpochOpen(
                verifier_id=self.world.identity(by),
                epoch=number,
                rates=nodes,
                default_rate_ppm=rate,
                gain_tokens=gain,
            )
        )

    def bill(self, index, *charges, node="n"):
        legs = [
            BillLeg(node_id=node, client_charge_nano=c, billed_output_tokens=c // 400)
            for c in charges
        ]
        self.exposure.billed(Bill(legs=legs), index)

    def judge(self, receipt_index, at=10**6, by="verifier", node="n"):
        verdict = Verdict(
            node_id=node, verifier_id=self.world.identity(by), receipt_log_index=receipt_index
        )
        self.exposure.judged(verdict, at)

    def room(self, stake=STAKE, node="n"):
        return self.exposure.room_nano(node, stake, ASK)


def market(verifiers=1, needed=1, *events):
    world = World(verifiers=verifiers, convictions_needed=needed)
    keys = Keys(world.market_id, world.market.ring)
    for event in events:
        keys.learn(event)
    return Market(world, Exposure(Judges(world.market, keys)))


def test_nothing_is_capped_until_a_verifier_states_the_power_of_its_audits():
    shop = market()
    shop.bill(10, 10**12)
    assert shop.room() is None
    shop.open(gain=0)
    assert shop.room() is None


@pytest.mark.parametrize("rate", [20_000, 1_000_000])
def test_the_cap_is_the_inequality_of_the_design(rate):
    shop = market()
    shop.open(n=rate)
    needed = needed_nano(ASK, GAIN, rate)
    assert shop.room() == unsettled_cap_nano(STAKE, needed) == (STAKE - needed) // 2
    assert shop.room(stake=-1) == shop.room(stake=0) == 0
    assert shop.room(node="newcomer") == (STAKE - needed_nano(ASK, GAIN, 1_000_000)) // 2


def test_attack_a_silent_verifier_lets_no_unaudited_work_pile_up():
    shop = market()
    shop.open()
    most = shop.room()
    shop.bill(13, most // 4, most // 4, most // 4)  # receipts 10, 11, 12
    assert shop.room() == most - 3 * (most // 4)
    shop.bill(15, most)
    assert shop.room() == 0
    shop.judge(11)
    assert shop.room() == 0
    shop.judge(14)
    assert shop.room() == most


def test_work_is_settled_when_as_many_verifiers_as_convict_have_passed_it():
    shop = market(3, 2)
    shop.open()
    assert shop.room() == 0, "one verifier alone convicts nobody"
    shop.open("verifier1", rate=500_000)
    shop.bill(11, 10_000)
    assert shop.room() == (STAKE - needed_nano(ASK, GAIN, 500_000)) // 2 - 10_000
    shop.judge(10)
    assert shop.room() < (STAKE - needed_nano(ASK, GAIN, 500_000)) // 2
    shop.judge(10, by="verifier2")
    assert shop.room() == (STAKE - needed_nano(ASK, GAIN, 500_000)) // 2


def test_attack_a_verdict_about_a_receipt_of_the_future_settles_nothing_of_it():
    shop = market()
    shop.open()
    shop.bill(11, 2_000)
    shop.judge(10**9, at=20)
    assert shop.room() == (STAKE - needed_nano(ASK, GAIN, 1_000_000)) // 2
    shop.bill(30, 2_000)
    assert shop.room() < (STAKE - needed_nano(ASK, GAIN, 1_000_000)) // 2


def test_epochs_only_go_forward_and_an_owners_epoch_does_not_count():
    world = World(verifiers=2)
    owned = make_signer("owned", world.market_id, owner="verifier")
    shop = market(2, 1, owned.key_event)
    shop.open("verifier", rate=1_000_000)
    assert shop.room(node=owned.identity) == 0 and shop.room(node="n") > 0
    shop.open("verifier1", 5, rate=100_000)
    known = shop.room(node=owned.identity)
    assert known == (STAKE - needed_nano(ASK, GAIN, 100_000)) // 2
    shop.open("verifier1", 4, rate=1_000_000)
    assert shop.room(node=owned.identity) == known


def test_the_price_is_what_clients_were_charged_if_that_is_more():
    shop = market()
    shop.open()
    legs = [BillLeg(node_id="n", client_charge_nano=1_000_000, billed_output_tokens=10)]
    shop.exposure.billed(Bill(legs=legs), 5)
    shop.judge(4)
    assert shop.room() == unsettled_cap_nano(STAKE, needed_nano(10**11, GAIN, 1_000_000))


def test_attack_long_answers_to_an_accomplice_do_not_hide_what_short_ones_earn():
    price, plain = PaidPrice(), PaidPrice()
    for _ in range(1_000):
        plain.earned(40_000, 1)
        price.earned(40_000, 1)
        price.earned(40_000, 100)  # as much money for a hundred times the tokens
    assert plain.nano_per_mtok == 40_000 * 10**6
    assert price.nano_per_mtok >= plain.nano_per_mtok // 2
    shop, dear = market(), market()
    for each in (shop, dear):
        each.open()
        legs = [BillLeg(node_id="n", client_charge_nano=40_000, billed_output_tokens=1)]
        each.exposure.billed(Bill(legs=legs), 5)
    legs = [BillLeg(node_id="n", client_charge_nano=40_000, billed_output_tokens=100)]
    shop.exposure.billed(Bill(legs=legs), 9)
    for each in (shop, dear):
        each.judge(8)
    used = (STAKE - 2 * shop.room(), STAKE - 2 * dear.room())
    assert used[0] >= used[1] // 2 > 0


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**6)), max_size=60))
def test_the_price_lies_between_the_cheapest_and_the_dearest_work_and_old_work_fades(legs):
    price = PaidPrice()
    for charge, tokens in legs:
        price.earned(charge, tokens)
    paid = [charge * 10**6 // max(1, tokens) for charge, tokens in legs if charge]
    if not paid:
        assert price.nano_per_mtok == 0
        return
    assert min(paid) - 10**6 <= price.nano_per_mtok <= max(paid) + 1
    total, tokens = sum(c for c, _ in legs), sum(max(1, t) for _, t in legs)
    # Weighing by money never shows less than the plain average.
    assert price.nano_per_mtok >= total * 10**6 // tokens - 10**6
    top = max(paid)
    for _ in range(40 * PRICE_HALF_LIFE_LEGS):
        price.earned(10, 10)
    assert price.nano_per_mtok <= 10**6 + top // 1000


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(exposure, "MAX_NODES", 50)
    shop = market()
    shop.open(gain=1)
    shop.bill(1, 500, node="n0")
    for number in range(1, 200):
        shop.bill(2 * number + 1, 7, node=f"n{number}")
        shop.judge(2 * number, node=f"n{number}")
    assert len(shop.exposure._nodes) == 50 and "n0" in shop.exposure._nodes
