"""The stated false-conviction bound, tested where it has power, and the power itself."""

import itertools
import math

import numpy as np
import pytest

from trueweight.protos.evidence import CONVICT, Wealth
from trueweight.simulation.wealth_lifetimes import null_draws, simulate, wealth_paths

MU0 = 400_000
ALPHA = 0.01


def upper_limit(chance: float, trials: int) -> float:
    """What a binomial share exceeds with a chance below 10^-4."""
    return chance + 3.8 * math.sqrt(chance * (1 - chance) / trials)


def test_the_arrays_equal_the_contract_to_the_last_bit():
    rng = np.random.default_rng(3)
    for tokens in (1, 7, 200, 256, 900):
        drawn = [rng.integers(0, tokens * 10**7, 4) for _ in range(300)]
        paths = list(wealth_paths(iter(drawn), tokens, MU0))
        for column in range(4):
            wealth = Wealth()
            for row, path in zip(drawn, paths, strict=True):
                wealth = wealth.add(int(row[column]), tokens, MU0)
                assert wealth.value == path[column]


@pytest.mark.parametrize("spread", [2, 10, 50])
@pytest.mark.parametrize("tokens", [40, 256])
def test_false_convictions_stay_within_the_bound_at_the_null(spread, tokens):
    nodes, audits = 3000, 1200
    draws = null_draws(nodes, audits, tokens, MU0, spread=spread, seed=spread + tokens)
    found = simulate(draws, tokens, MU0, 1 / ALPHA)
    assert found.crossed / nodes <= upper_limit(ALPHA, nodes)


@pytest.mark.parametrize("spread", [2, 10])
def test_a_null_that_is_three_times_too_small_is_caught(spread):
    nodes = 500
    draws = null_draws(nodes, 1200, 256, 3 * MU0, spread=spread, seed=1)
    found = simulate(draws, 256, MU0, 1 / ALPHA)
    assert found.crossed / nodes > 0.99


def test_the_bound_is_not_vacuous():
    # At the null some lifetimes do cross: a bound that nothing ever reaches would prove nothing.
    draws = null_draws(3000, 1200, 256, MU0, spread=10, seed=5)
    assert simulate(draws, 256, MU0, 1 / ALPHA).crossed > 3


def test_an_average_node_at_half_the_null_never_gets_anywhere():
    draws = null_draws(2000, 1500, 200, MU0 // 2, spread=10, seed=2)
    assert float(np.max(simulate(draws, 200, MU0, CONVICT).largest)) < 1000


@pytest.mark.parametrize("spread", [2, 10, 50])
def test_false_convictions_over_ten_thousand_lifetimes_of_ten_thousand_audits(spread):
    nodes = 10_000
    draws = null_draws(nodes, 10_000, 256, MU0, spread=spread, seed=spread)
    found = simulate(draws, 256, MU0, 1 / ALPHA)
    # Ville's bound is one-sided; from below, a rate of next to nothing would prove nothing.
    assert ALPHA / 10 < found.crossed / nodes <= upper_limit(ALPHA, nodes)


def test_a_null_that_is_three_times_too_small_is_caught_over_ten_thousand_audits():
    draws = null_draws(2000, 10_000, 256, 3 * MU0, spread=10, seed=1)
    assert simulate(draws, 256, MU0, 1 / ALPHA).crossed / 2000 > 0.99


def requests_to_conviction(mean: float, tokens: int, honest_first: int = 0) -> int:
    wealth = Wealth()
    for _ in range(honest_first):
        wealth = wealth.add(0, tokens, MU0)
    for count in itertools.count(1):
        wealth = wealth.add(int(mean * tokens * 1e9), tokens, MU0)
        if wealth.value >= CONVICT:
            return count
    raise AssertionError


@pytest.mark.parametrize("mean,most", [(0.5, 3), (0.0123, 9), (0.0089, 10), (0.0012, 60)])
def test_power_per_mean_margin(mean, most):
    assert requests_to_conviction(mean, 200) <= most


def test_five_thousand_honest_requests_do_not_buy_a_licence_to_cheat():
    fresh = requests_to_conviction(0.0089, 200)
    assert requests_to_conviction(0.0089, 200, honest_first=5000) <= 2.5 * fresh


def test_one_token_requests_do_not_dilute_the_evidence():
    wealth, count = Wealth(), 0
    while wealth.value < CONVICT and count < 200:
        wealth, count = wealth.add(int(0.0089 * 200 * 1e9), 200, MU0), count + 1
        for _ in range(10):
            wealth = wealth.add(0, 1, MU0)
    assert count <= 2 * requests_to_conviction(0.0089, 200)
