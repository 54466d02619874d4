"""Who may serve, who is drawn, who is taken: the rules of the design, one by one."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.router.breaker import LONGEST_PAUSE_MS, Breaker, Measured
from trueweight.router.choosing import (
    EXPLORE,
    Ineligible,
    NodeView,
    Work,
    choose,
    eligible,
    expected_completion_s,
    highest_prices,
    ineligible,
    weight,
)
from trueweight.router.openai_requests import Preferences
from trueweight.router.quoting import Prices

WORK = Work(prompt_tokens=100, max_tokens=200)


def node(name="a", **changes):
    base = NodeView(
        node_id=name,
        prices=Prices(100_000_000, 300_000_000),
        capacity=8,
        max_context_tokens=2048,
        connected=True,
        lease_fresh=True,
        breaker_closed=True,
        suspended=False,
        judged=True,
        bonded=True,
        fingerprint_allowed=True,
        completed=10,
        room_nano=None,
    )
    return replace(base, **changes)


@pytest.mark.parametrize(
    ("changes", "preferences", "reason"),
    [
        ({"suspended": True}, {}, Ineligible.SUSPENDED),
        ({"fingerprint_allowed": False}, {}, Ineligible.NOT_ALLOWED),
        ({"judged": False}, {}, Ineligible.NOT_JUDGED),
        ({"bonded": False}, {}, Ineligible.NOT_BONDED),
        # The work costs at most 10,000 + 60,000 nanocredits, and 2 for roundings.
        ({"room_nano": 70_001}, {}, Ineligible.UNSETTLED),
        ({"room_nano": 70_002}, {}, None),
        ({"connected": False}, {}, Ineligible.DISCONNECTED),
        ({"lease_fresh": False}, {}, Ineligible.LEASE),
        ({"draining": True}, {}, Ineligible.DRAINING),
        ({"breaker_closed": False}, {}, Ineligible.BREAKER),
        ({"max_context_tokens": 299}, {}, Ineligible.CONTEXT),
        ({}, {"max_input_nano_per_mtok": 99_999_999}, Ineligible.PRICE),
        ({}, {"max_output_nano_per_mtok": 299_999_999}, Ineligible.PRICE),
        ({}, {"only": ("b",)}, Ineligible.EXCLUDED),
        ({}, {"ignore": ("a",)}, Ineligible.EXCLUDED),
        ({}, {"max_input_nano_per_mtok": 100_000_000, "only": ("a",)}, None),
        ({"max_context_tokens": 300}, {}, None),
    ],
)
def test_eligibility(changes, preferences, reason):
    work = replace(WORK, preferences=Preferences(**preferences))
    assert ineligible(node(**changes), work) is reason


def test_a_node_of_which_nothing_is_known_is_not_eligible():
    bare = NodeView("a", Prices(1, 1), 8, 2048)
    assert eligible([bare], WORK) == []


def test_tried_nodes_are_left_out():
    assert eligible([node()], replace(WORK, tried=frozenset({"a"}))) == []


def test_full_nodes_wait_and_are_never_chosen():
    full = node(in_flight=8)
    assert eligible([full], WORK) == [full]
    assert choose([full], WORK, random.random) is None


def pick(nodes, seed=0):
    return choose(nodes, WORK, random.Random(seed).random)


def test_the_cold_one_is_taken():
    hot, cold = node("a", waiting=8), node("b", prices=Prices(10**9, 10**9))
    taken = Counter(pick([hot, cold], seed).node.node_id for seed in range(300))
    assert set(taken) == {"b"}


def test_self_reports_only_make_a_node_less_attractive():
    modest, boaster = node("a"), node("b", waiting=0, kv_use_ppm=0)
    assert weight(modest, WORK) == weight(boaster, WORK)
    assert expected_completion_s(modest, WORK) == expected_completion_s(boaster, WORK)
    assert node("c", kv_use_ppm=800_000).is_hot


def test_both_cold_the_sooner_is_taken():
    slow, fast = node("a", decode_tokens_per_s=10.0), node("b", decode_tokens_per_s=100.0)
    taken = Counter(pick([slow, fast], seed).node.node_id for seed in range(300))
    assert taken["b"] >= 300 * (1 - 3 * EXPLORE)


def test_a_difference_within_measuring_noise_leaves_the_draw_alone():
    dear = node("a", decode_tokens_per_s=28.0, prices=Prices(15 * 10**7, 15 * 10**7))
    cheap = node("b", decode_tokens_per_s=20.0, prices=Prices(10**8, 10**8))
    taken = Counter(pick([dear, cheap], seed).node.node_id for seed in range(300))
    assert taken["b"] > taken["a"] > 0


def test_a_difference_that_no_client_notices_leaves_the_draw_alone():
    dear = node("a", decode_tokens_per_s=900.0, prices=Prices(15 * 10**7, 15 * 10**7))
    cheap = node("b", decode_tokens_per_s=300.0, prices=Prices(10**8, 10**8))
    taken = Counter(pick([dear, cheap], seed).node.node_id for seed in range(300))
    assert taken["b"] > taken["a"] > 0


def test_one_slow_answer_at_the_start_is_soon_forgotten():
    measured = Measured()
    for rest_ms in (9_000, 9_000, 300, 300, 300, 300, 300):  # the first is not measured at all
        measured = measured.with_success(
            prompt_tokens=10, output_tokens=101, first_ms=10.0, rest_ms=rest_ms
        )
    assert measured.decode_tokens_per_s > 0.8 * 100 / 0.3


def test_both_hot_fewer_in_flight_is_taken():
    busy = node("a", waiting=9, in_flight=7)
    less = node("b", waiting=9, in_flight=3)
    assert {pick([busy, less], seed).node.node_id for seed in range(100)} == {"b"}


def test_price_squared_decides_the_draw():
    nodes = [node(n, prices=Prices(p, p)) for n, p in (("a", 10**8), ("b", 2 * 10**8))]
    assert weight(nodes[0], WORK) == pytest.approx(4 * weight(nodes[1], WORK))


def test_a_floor_price_buys_no_more_traffic_than_the_floor():
    free, floor = node("a", prices=Prices(0, 0)), node("b", prices=Prices(10**6, 10**6))
    assert weight(free, WORK) == weight(floor, WORK)


def test_failing_nodes_are_as_if_dearer():
    assert weight(node(success=0.5), WORK) == pytest.approx(weight(node(), WORK) / 4)
    assert weight(node(success=0.0), WORK) > 0


def test_capacity_seen_counts_not_capacity_claimed():
    honest = node("a", capacity=8, capacity_seen=8.0)
    boaster = node("b", capacity=4000, capacity_seen=8.0)
    assert weight(honest, WORK) == weight(boaster, WORK)


def test_new_nodes_are_explored_a_little():
    nodes = [node("a"), node("b"), node("new", completed=0, success=0.0)]
    rng = random.Random(1)
    taken = Counter(choose(nodes, WORK, rng.random).node.node_id for _ in range(4000))
    assert 0.005 < taken["new"] / 4000 < 0.04


def test_attack_an_absurd_price_gets_nothing_from_exploration_or_speed():
    absurd = node("new", completed=0, prices=Prices(10**12, 10**12), decode_tokens_per_s=1e6)
    rng = random.Random(1)
    for others in ([node("a")], [node("a"), node("b")]):
        taken = Counter(
            choose([*others, absurd], WORK, rng.random).node.node_id for _ in range(999)
        )
        assert taken["new"] == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.builds(
            lambda i, f, w, p, s: (i, f, w, p, s),
            st.integers(0, 20), st.integers(0, 10), st.integers(0, 20), st.integers(0, 10**10),
            st.floats(0, 1),
        ),
        min_size=1, max_size=6, unique_by=lambda t: t[0],
    ),
    st.integers(0, 2**32),
)  # fmt: skip
def test_the_choice_is_always_eligible_free_and_explained(rows, seed):
    nodes = [
        node(f"n{i}", in_flight=f, waiting=w, prices=Prices(p, p), success=s)
        for i, f, w, p, s in rows
    ]
    choice = choose(nodes, WORK, random.Random(seed).random)
    if all(n.is_full for n in nodes):
        assert choice is None
        return
    assert choice is not None
    assert choice.node in nodes
    assert not choice.node.is_full
    assert choice.why
    assert choice.node.node_id in choice.drawn
    assert highest_prices(nodes).input_nano_per_mtok >= choice.node.prices.input_nano_per_mtok


def test_breaker_opens_after_three_probes_once_and_closes():
    breaker = Breaker()
    for _ in range(2):
        breaker = breaker.failed(0.0)
        assert breaker.allows(0.0)
    breaker = breaker.failed(0.0)
    assert not breaker.allows(1_999.0)
    assert breaker.allows(2_000.0)
    probing = breaker.started()
    assert not probing.allows(5_000.0)
    assert probing.abandoned().allows(5_000.0)
    again = probing.failed(5_000.0)
    assert not again.allows(8_999.0)
    assert again.allows(9_000.0)
    assert again.started().succeeded() == Breaker()


def test_a_success_in_between_keeps_the_breaker_closed():
    breaker = Breaker().failed(0).failed(0).succeeded().failed(0).failed(0)
    assert breaker.allows(0)


def test_pauses_are_bounded():
    breaker = Breaker()
    for _ in range(100):
        breaker = breaker.failed(0.0)
    assert breaker.open_until_ms <= LONGEST_PAUSE_MS


def test_measured_rates_are_the_routers_own():
    cold = Measured().with_success(prompt_tokens=9, output_tokens=9, first_ms=5000, rest_ms=9000)
    assert (cold.prefill_tokens_per_s, cold.decode_tokens_per_s) == (0.0, 0.0)
    seen = cold.with_success(prompt_tokens=100, output_tokens=11, first_ms=50, rest_ms=100)
    assert (seen.prefill_tokens_per_s, seen.decode_tokens_per_s) == (2000.0, 100.0)
    assert seen.with_failure().success < 1.0
    one = cold.with_success(prompt_tokens=1, output_tokens=1, first_ms=0, rest_ms=0)
    assert one.decode_tokens_per_s == 0


def test_an_unmeasured_node_gets_work_to_be_measured():
    known = node("a", decode_tokens_per_s=500.0, prefill_tokens_per_s=9000.0)
    new = node("b", decode_tokens_per_s=0.0, tokens_in_flight=0)
    busy = replace(known, tokens_in_flight=10_000)
    taken = Counter(pick([busy, new], seed).node.node_id for seed in range(200))
    assert taken["b"] >= 200 * (1 - 3 * EXPLORE)
