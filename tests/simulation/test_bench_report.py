"""The interval is exact and the last line is one JSON object."""

from __future__ import annotations

import json
import random

import pytest

from trueweight.protos.envelope import ring_of
from trueweight.protos.receipts import check_receipt
from trueweight.simulation.bench_l0 import make_facts, market_share
from trueweight.simulation.bench_report import Estimate, estimate, finish
from trueweight.simulation.ledger_world import World


def test_nine_values_take_the_second_and_the_eighth():
    assert estimate([5, 1, 9, 2, 8, 3, 7, 4, 6]) == Estimate(5, 2, 8, 9)


def test_fifteen_values_take_the_fourth_and_the_twelfth():
    assert estimate(list(range(1, 16))) == Estimate(8, 4, 12, 15)


def test_too_few_values_have_no_interval():
    with pytest.raises(ValueError, match="at least 6"):
        estimate([1.0] * 5)


@pytest.mark.parametrize("count", [9, 21])
def test_the_interval_covers_the_median_at_least_as_often_as_it_says(count):
    generator = random.Random(1)
    hits = 0
    for _ in range(2000):
        found = estimate([generator.expovariate(1.0) for _ in range(count)])
        hits += found.low <= 0.6931 <= found.high
    assert hits / 2000 > 0.94


def test_the_last_line_is_one_json_object(capsys):
    finish("x", {"ratio": Estimate(1.23456789, 1.0, 2.0, 9)}, {"model": "m"})
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["figures"]["ratio"]["median"] == 1.235
    assert document["machine"]["cores"] >= 1
    assert "numpy" in document["versions"]


def test_the_share_of_the_market_is_audits_at_the_floor_and_l0_of_everything():
    share = market_share(score_over_generate=0.6, request_s=0.1, l0_s=0.0002)
    assert share == pytest.approx({"audits": 0.011 * 0.6, "l0": 0.002, "both": 0.0086})


def test_the_receipt_that_l0_is_timed_on_passes_every_check():
    world = World()
    facts, sealed = make_facts(world, 64, 128)
    ring = ring_of([world.node[0].key_event], world.market_id, world.market.ring)
    assert check_receipt(facts, ring, world.market_id).message.output_tokens == 128
    assert facts.assignment.envelope == sealed
