"""Null means: the bound covers, floors hold, versions go forward, hostile entries are refused."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueweight.protos.calibrations import CalibrationTable, is_usable, read_calibration
from trueweight.protos.evidence import (
    CLIP_LOGIT,
    MU0_FLOOR_NANO,
    NANO,
    clipped_nano,
    counted_nano,
    sum_nano,
)
from trueweight.protos.v1.audit_pb2 import Calibration, CalibrationEntry
from trueweight.verifier.bounds import upper_bound
from trueweight.verifier.calibration import (
    IGNORED_CEILING_NANO,
    PairSample,
    calibrate_class,
    ignored_below_nano,
    is_far_outside,
    measure,
)


def honest(rng, tokens, share=0.005, size=0.04):
    """Like measured margins: mostly exact, now and then small."""
    return np.where(rng.random(tokens) < share, rng.random(tokens) * 2 * size, 0.0)


def by_token(values, confidence):
    """Every token a request of its own."""
    return upper_bound(values, np.ones(len(values)), confidence)


def test_the_bound_covers_the_true_mean():
    rng = np.random.default_rng(1)
    true = 0.005 * 0.04
    misses = sum(by_token(honest(rng, 5000), 0.95).upper < true for _ in range(400))
    assert misses / 400 <= 0.05


@pytest.mark.parametrize("share,level", [(0.1, 0.02), (0.02, 0.1), (0.5, 0.001)])
def test_the_bound_covers_noise_that_comes_in_whole_requests(share, level):
    # A few requests are noisy throughout: tokens within them are as dependent as can be.
    rng = np.random.default_rng(2)
    misses = 0
    for _ in range(200):
        noisy = np.where(rng.random(300) < share, int(level * 1e9), 0)
        found = measure(PairSample("p", tuple((int(x),) * 50 for x in noisy)), confidence=0.95)
        misses += found.bound.upper < share * level
    assert misses / 200 <= 0.05
    alone = by_token(np.repeat(noisy / 1e9, 50), 0.95).upper
    assert found.bound.upper > alone, "tokens alone would claim more than they know"


def test_the_bound_weighs_requests_by_their_tokens():
    # Short requests are noisy, long ones are not; the wealth counts tokens.
    rng = np.random.default_rng(4)
    misses = 0
    for _ in range(200):
        tokens = np.where(rng.random(400) < 0.5, 1, 199)
        sums = np.where((tokens == 1) & (rng.random(400) < 0.1), 0.5, 0.0)
        misses += upper_bound(sums, tokens, 0.95).upper < 0.5 * 0.1 * 0.5 / 100
    assert misses / 200 <= 0.05


def test_attack_a_mean_three_times_too_small_is_caught():
    # The check has power: what claims less than the truth is refuted by its own data.
    rng = np.random.default_rng(5)
    true = 0.005 * 0.04
    claims = [by_token(honest(rng, 100_000), 0.95).upper / 3 for _ in range(10)]
    assert sum(claim < true for claim in claims) >= 9


def test_the_bound_tightens_with_tokens_and_loosens_with_confidence():
    rng = np.random.default_rng(3)
    small, large = honest(rng, 2_000), honest(rng, 200_000)
    assert by_token(large, 0.999).upper < by_token(small, 0.999).upper / 5
    assert by_token(small, 0.9).upper < by_token(small, 0.999).upper


def test_zeros_alone_do_not_certify_zero():
    bound = by_token(np.zeros(1000), 0.999)
    assert bound.mean == 0 and 0.006 < bound.upper < 0.012
    assert upper_bound([], [], 0.999).upper == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=200))
def test_the_bound_lies_between_the_mean_and_one(values):
    bound = by_token(values, 0.99)
    assert bound.mean <= bound.upper <= 1


@pytest.mark.parametrize("bad", [[-0.1], [1.1], [float("nan")]])
def test_values_outside_the_unit_interval_are_refused(bad):
    with pytest.raises(ValueError):
        by_token(bad, 0.9)


def sample(mean_nano, tokens=200_000, pair="p"):
    return PairSample(pair, ((mean_nano,) * 1000,) * (tokens // 1000))


def test_the_worst_pair_decides_and_the_floor_holds():
    entry = calibrate_class("plain", [sample(0, pair="quiet"), sample(0, pair="quiet too")])
    assert entry.mu0_nano >= MU0_FLOOR_NANO and entry.mu0_nano >= 2 * entry.upper_bound_nano
    # Nineteen of twenty differences are small; what counts are the others, one token in 500.
    row = ((10**7,) * 38 + (25 * 10**7,) * 2) + (0,) * 960
    worse = calibrate_class("plain", [sample(0, pair="quiet"), PairSample("noisy", (row,) * 200)])
    assert worse.worst_pair == "noisy" and worse.ignored_below_nano == 20_000_000
    assert round(worse.mean_nano, -3) == 500_000 and worse.mu0_nano >= 2 * 500_000
    assert is_usable(entry) and is_usable(worse)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=40), st.integers(0, 10**9))
def test_what_is_ignored_counts_as_zero_and_the_rest_in_full(xs, below):
    assert counted_nano(xs, below) == sum(xs) - sum(x for x in xs if x < below)
    margins = [x / NANO * CLIP_LOGIT for x in xs]
    assert sum_nano(margins) == sum(clipped_nano(m) for m in margins)
    assert sum_nano(margins, below) == counted_nano(map(clipped_nano, margins), below)


def test_the_noisiest_pair_decides_what_is_ignored_up_to_a_ceiling():
    quiet, noisy = (PairSample("p", ((x,) * 10 + (0,) * 90,) * 9) for x in (10**7, 4 * 10**7))
    assert ignored_below_nano([quiet]) == 20_000_000
    assert ignored_below_nano([quiet, noisy]) == 60_000_000
    assert ignored_below_nano([sample(0)]) == 0
    assert ignored_below_nano([sample(10**9, 1000)]) == IGNORED_CEILING_NANO


def test_one_token_cannot_be_far_outside_by_rounding_but_a_wrong_one_is():
    entry = calibrate_class("plain", [sample(0)])
    assert not is_far_outside(120_000_000, 1, entry)
    assert is_far_outside(10**9, 1, entry)
    assert is_far_outside(200 * 500_000_000, 200, entry)
    assert not is_far_outside(4 * 10**9 - 1, 200, entry)  # 0.1 * isqrt(8 * 200)
    assert is_far_outside(4 * 10**9 + 1, 200, entry)


def test_no_length_makes_ten_times_the_null_mean_far_outside():
    entry = calibrate_class("plain", [sample(0)])

    @given(st.integers(1, 10**7))
    def check(tokens):
        assert not is_far_outside(10 * entry.mu0_nano * tokens, tokens, entry)

    check()


def test_no_request_that_calibration_saw_is_a_third_of_far_outside():
    chance = random.Random(3)
    rows = [
        tuple(chance.choices((0, 10**7, 3 * 10**8), (0.6, 0.38, 0.02), k=chance.randint(1, 300)))
        for _ in range(300)
    ]
    entry = calibrate_class("top_p", [PairSample("harsh", tuple(rows))])
    worst = max(
        sum(x for x in row if x > 10**7) // math.isqrt(8 * max(len(row), 8)) for row in rows
    )
    assert entry.refund_above_nano == 3 * worst > 100_000_000
    assert not any(is_far_outside(3 * sum(row), len(row), entry) for row in rows)


@pytest.mark.parametrize(
    "change",
    [
        {"mu0_nano": 1},
        {"mu0_nano": 10**9},
        {"upper_bound_nano": 300_000},
        {"refund_above_nano": 0},
        {"requests": 0},
    ],
)
def test_attack_calibration_entries_out_of_range_are_ignored(kit, change):
    entry = kit.entry()
    for name, value in change.items():
        setattr(entry, name, value)
    leaf = read_calibration(Calibration(entries=[entry, kit.entry("greedy")]), b"d", 1)
    assert list(leaf.entries) == ["greedy"]


def leaf(index, version, mu0=400_000, by="v"):
    entry = CalibrationEntry(
        parameter_class="plain",
        mu0_nano=mu0,
        upper_bound_nano=1,
        refund_above_nano=1,
        requests=1,
    )
    message = Calibration(manifest_digest=b"m", version=version, entries=[entry], verifier_id=by)
    return read_calibration(message, b"digest %d" % version, index)


def test_a_calibration_applies_from_its_leaf_on_and_older_ones_stay_cited():
    table = CalibrationTable()
    assert table.add(leaf(10, 1)) and table.add(leaf(20, 2))
    assert table.in_force("v", b"m", 10) is None
    assert table.in_force("v", b"m", 15).version == 1 and table.in_force("v", b"m", 21).version == 2
    assert table.cited("v", b"digest 1", 15).version == 1
    assert table.cited("v", b"digest 2", 15) is None, "it would apply backwards"
    assert table.cited("v", b"digest 1", 25) is None, "a newer one is in force"


def test_a_calibration_is_its_signers_alone():
    table = CalibrationTable()
    assert table.add(leaf(10, 2**32 - 1, by="w")) and table.add(leaf(20, 1))
    assert table.in_force("v", b"m", 30).version == 1
    assert table.cited("v", b"digest %d" % (2**32 - 1), 30) is None
    assert table.cited("w", b"digest 1", 30) is None
    assert table.covers("v", "plain", 30) and not table.covers("v", "greedy", 30)
    assert not table.covers("v", "plain", 20) and [c.version for c in table.newest("v")] == [1]


def test_attack_an_older_version_cannot_come_back():
    table = CalibrationTable()
    assert table.add(leaf(10, 2))
    assert not table.add(leaf(20, 1)) and not table.add(leaf(20, 2))
    assert table.in_force("v", b"m", 30).version == 2
