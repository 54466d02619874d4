"""The wealth: what it must never do to honest nodes, and what it must do to cheats."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueweight.protos.errors import InvalidRequest
from trueweight.protos.evidence import (
    CONVICT,
    LAMBDAS,
    MEAN_TOKENS,
    NANO,
    SUSPECT,
    Item,
    Wealth,
    bet,
    change_point,
    clipped_nano,
    sum_nano,
    wealth_of,
)

MU0 = 200_000


@st.composite
def items(draw):
    n = draw(st.integers(1, 400))
    return Item(draw(st.integers(0, n * NANO)), n, draw(st.integers(1, NANO)))


def literal(sequence):
    """The documented formula, each lambda on its own, nothing shared with the module."""
    total = 0.0
    for fraction in (0.05, 0.1, 0.2, 0.4, 0.8):
        s = 0.0
        for r, (sum_x, n, mu0) in enumerate(sequence, 1):
            weight = min(n, 256) / 256
            e = 1 + fraction * weight * ((sum_x / max(n, 64)) / mu0 - 1)
            s = e * (s + 1 / (r * (r + 1)))
        total += s + 1 / (len(sequence) + 1)
    return total / 5


@given(st.lists(items(), max_size=30))
def test_wealth_is_the_documented_formula(sequence):
    assert wealth_of(sequence).value == pytest.approx(literal(sequence), rel=1e-9)


def test_wealth_starts_at_one():
    assert Wealth().value == 1.0
    assert Wealth().state == "clear"
    assert Wealth().log10_milli == 0


@given(items())
def test_a_bet_is_fair_at_the_null_and_never_ruins(item):
    for fraction in LAMBDAS:
        assert bet(item, fraction) > 0
    fair = Item(item.n * item.mu0_nano, item.n, item.mu0_nano)
    if fair.sum_x_nano <= fair.n * NANO:
        factors = [bet(fair, fraction) for fraction in LAMBDAS]
        assert all(f == 1.0 if item.n >= MEAN_TOKENS else f < 1.0 for f in factors)


@given(st.integers(1, MEAN_TOKENS - 1), st.integers(0, NANO), st.integers(1, NANO))
def test_one_token_of_a_short_request_counts_no_more_than_in_a_longer_one(n, x, mu0):
    for fraction in LAMBDAS:
        gain = bet(Item(x, n, mu0), fraction) - bet(Item(0, n, mu0), fraction)
        longer = bet(Item(x, n + 1, mu0), fraction) - bet(Item(0, n + 1, mu0), fraction)
        assert gain <= longer


@given(items(), st.integers(1, 1000))
def test_more_mismatch_never_lowers_the_wealth(item, more):
    worse = Item(min(item.sum_x_nano + more, item.n * NANO), item.n, item.mu0_nano)
    assert Wealth().add(*worse).value >= Wealth().add(*item).value


def test_an_honest_node_is_never_convicted_at_the_null_mean():
    """Supermartingale, the hardest honest case: mean exactly mu0, in rare bursts."""
    generator, peak = np.random.default_rng(1), 0.0
    for _ in range(40):
        wealth = Wealth()
        for _ in range(500):
            x = NANO // 4 if generator.random() < MU0 / (NANO // 4) * 200 / 256 else 0
            wealth = wealth.add(x * 256 // 200 if x else 0, 200, MU0)
            peak = max(peak, wealth.value)
    assert peak < CONVICT


def test_the_mean_wealth_of_honest_nodes_stays_at_one():
    generator, ends = np.random.default_rng(2), []
    for _ in range(3000):
        wealth = Wealth()
        for _ in range(20):
            # x in {0, 2 mu0} with equal chances: mean exactly mu0.
            wealth = wealth.add(int(generator.integers(0, 2)) * 2 * MU0 * 200, 200, MU0)
        ends.append(wealth.value)
    assert np.mean(ends) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize(("mean", "most"), [(0.0089, 6), (0.0123, 6), (0.5, 3)])
def test_the_cheats_of_the_facts_are_convicted_in_time(mean, most):
    wealth = Wealth()
    for _ in range(most):
        wealth = wealth.add(int(mean * 200 * NANO), 200, MU0)
    assert wealth.state == "convict"


def test_a_node_that_turns_bad_after_5000_honest_requests_is_noticed():
    wealth = wealth_of([Item(0, 200, MU0)] * 5000)
    assert wealth.state == "clear"
    for _ in range(12):
        wealth = wealth.add(int(0.0089 * 200 * NANO), 200, MU0)
    assert wealth.state == "convict"


def test_short_requests_do_not_wash_evidence_out():
    bad = wealth_of([Item(int(0.0089 * 200 * NANO), 200, MU0)] * 4)
    washed = bad
    for _ in range(20):
        washed = washed.add(0, 1, MU0)
    assert washed.value > bad.value / 1.2


def test_states_change_exactly_at_their_thresholds():
    flat = tuple(0.0 for _ in LAMBDAS)

    def at(value):
        rest = 1 / 2
        return Wealth(1, tuple(value - rest + x for x in flat), 1)

    assert at(SUSPECT - 1e-6).state == "clear"
    assert at(SUSPECT).state == "suspect"
    assert at(CONVICT - 1e-3).state == "suspect"
    assert at(CONVICT).state == "convict"
    assert at(CONVICT).log10_milli == 6000


def test_overflow_is_clamped():
    wealth = wealth_of([Item(256 * NANO, 256, 1)] * 200)
    assert math.isfinite(wealth.value)
    assert wealth.state == "convict"


@pytest.mark.parametrize("item", [(0, 0, MU0), (-1, 1, MU0), (NANO + 1, 1, MU0), (0, 1, 0)])
def test_impossible_evidence_is_refused(item):
    with pytest.raises(InvalidRequest):
        Wealth().add(*item)


@pytest.mark.parametrize("margin", [float("nan"), -1e-9, float("-inf")])
def test_impossible_margins_are_refused(margin):
    with pytest.raises(InvalidRequest):
        clipped_nano(margin)


@given(st.lists(st.floats(0, 1000), max_size=20))
def test_margins_are_rounded_down_and_clipped(margins):
    total = sum_nano(margins)
    exact = sum(min(m, 0.5) / 0.5 for m in margins) * NANO
    assert exact - len(margins) - 1 <= total <= exact + 1
    assert clipped_nano(float("inf")) == NANO


# --- change point ----------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(8, 30))
def test_the_change_point_is_where_the_cheating_began(honest, bad):
    sequence = [Item(20_000 * 200, 200, MU0)] * honest
    sequence += [Item(int(0.0089 * 200 * NANO), 200, MU0)] * bad
    # The mixture favours early starts: two clean requests at the very beginning excuse nobody.
    assert change_point(sequence) == (honest if honest > 2 else 0)


def slow_change_point(sequence):
    """The mixture's largest share, in logarithms."""
    shares = []
    for start in range(len(sequence)):
        logs = [
            sum(math.log(bet(item, fraction)) for item in sequence[start:]) for fraction in LAMBDAS
        ]
        top = max(logs)
        mixture = top + math.log(sum(math.exp(x - top) for x in logs))
        shares.append(mixture - math.log((start + 1) * (start + 2)))
    return shares


@given(st.lists(items(), min_size=1, max_size=25))
def test_the_change_point_has_the_largest_share_of_the_mixture(sequence):
    shares = slow_change_point(sequence)
    assert shares[change_point(sequence)] == pytest.approx(max(shares), abs=1e-9)


def test_the_change_point_survives_thousands_of_requests():
    sequence = [Item(256 * NANO, 256, 1)] * 3000
    assert change_point(sequence) == 0
    assert change_point([Item(0, 256, MU0)] * 3000) >= 0
    with pytest.raises(InvalidRequest):
        change_point([])
