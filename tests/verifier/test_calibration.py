"""Null means: the bound covers, floors hold, versions go forward, hostile entries are refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueweight.protos.errors import InvalidRequest
from trueweight.protos.evidence import MU0_FLOOR_NANO
from trueweight.protos.v1.audit_pb2 import Calibration, CalibrationEntry
from trueweight.verifier.bounds import upper_bound
from trueweight.verifier.calibration import (
    CalibrationTable,
    PairSample,
    calibrate_class,
    is_far_outside,
    is_usable,
    measure,
    read_calibration,
)
from trueweight.verifier.calibration_file import Measured, read_measured, write_measured


def honest(rng, tokens, share=0.005, size=0.04):
    """Like measured margins: mostly exact, now and then small."""
    return np.where(rng.random(tokens) < share, rng.random(tokens) * 2 * size, 0.0)


def test_the_bound_covers_the_true_mean():
    rng = np.random.default_rng(1)
    true = 0.005 * 0.04
    misses = sum(upper_bound(honest(rng, 5000), 0.95).upper < true for _ in range(400))
    assert misses / 400 <= 0.05


def test_the_bound_covers_noise_that_comes_in_whole_requests():
    # One request in ten is noisy throughout: tokens within it are as dependent as can be.
    rng = np.random.default_rng(2)
    true, misses = 0.1 * 0.02, 0
    for _ in range(200):
        level = np.where(rng.random(300) < 0.1, 20_000_000, 0)
        found = measure(PairSample("p", tuple((int(x),) * 50 for x in level)), 0.95)
        misses += found.bound.upper < true
    assert misses / 200 <= 0.09
    alone = upper_bound(np.repeat(level / 1e9, 50), 0.95).upper
    assert found.bound.upper > alone, "tokens alone would claim more than they know"


def test_the_bound_tightens_with_tokens_and_loosens_with_confidence():
    rng = np.random.default_rng(3)
    small, large = honest(rng, 2_000), honest(rng, 200_000)
    assert upper_bound(large, 0.999).upper < upper_bound(small, 0.999).upper / 5
    assert upper_bound(small, 0.9).upper < upper_bound(small, 0.999).upper


def test_zeros_alone_do_not_certify_zero():
    bound = upper_bound(np.zeros(1000), 0.999)
    assert bound.mean == 0 and 0.006 < bound.upper < 0.012


@given(st.lists(st.floats(0, 1), min_size=1, max_size=200))
def test_the_bound_lies_between_the_mean_and_one(values):
    bound = upper_bound(values, 0.99)
    assert bound.mean <= bound.upper <= 1


@pytest.mark.parametrize("bad", [[-0.1], [1.1], [float("nan")]])
def test_values_outside_the_unit_interval_are_refused(bad):
    with pytest.raises(ValueError):
        upper_bound(bad, 0.9)


def sample(mean_nano, tokens=200_000, pair="p"):
    return PairSample(pair, ((mean_nano,) * 1000,) * (tokens // 1000))


def test_the_worst_pair_decides_and_the_floor_holds():
    entry = calibrate_class("plain", [sample(0, pair="quiet"), sample(0, pair="quiet too")])
    assert entry.mu0_nano >= MU0_FLOOR_NANO and entry.mu0_nano >= 2 * entry.upper_bound_nano
    worse = calibrate_class("plain", [sample(0, pair="quiet"), sample(500_000, pair="noisy")])
    assert worse.worst_pair == "noisy" and worse.mu0_nano >= 2 * 500_000
    assert is_usable(entry) and is_usable(worse)


def test_one_token_cannot_be_far_outside_by_rounding_but_a_wrong_one_is():
    entry = calibrate_class("plain", [sample(0)])
    assert not is_far_outside(120_000_000, 1, entry)
    assert is_far_outside(10**9, 1, entry)
    assert is_far_outside(200 * 500_000_000, 200, entry)
    assert not is_far_outside(200 * 12_300_000, 200, entry)


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


def leaf(index, version, mu0=400_000):
    entry = CalibrationEntry(
        parameter_class="plain",
        mu0_nano=mu0,
        upper_bound_nano=1,
        refund_above_nano=1,
        requests=1,
    )
    message = Calibration(manifest_digest=b"m", version=version, entries=[entry])
    return read_calibration(message, b"digest %d" % version, index)


def test_a_calibration_applies_from_its_leaf_on_and_older_ones_stay_cited():
    table = CalibrationTable()
    assert table.add(leaf(10, 1)) and table.add(leaf(20, 2))
    assert table.in_force(b"m", 10) is None
    assert table.in_force(b"m", 15).version == 1 and table.in_force(b"m", 21).version == 2
    assert table.cited(b"digest 1", 15).version == 1
    assert table.cited(b"digest 2", 15) is None, "it would apply backwards"
    assert table.cited(b"digest 1", 25) is None, "a newer one is in force"


def test_attack_an_older_version_cannot_come_back():
    table = CalibrationTable()
    assert table.add(leaf(10, 2))
    assert not table.add(leaf(20, 1)) and not table.add(leaf(20, 2))
    assert table.in_force(b"m", 30).version == 2


def test_a_file_round_trips_and_damage_is_named(tmp_path, kit):
    measured = Measured(b"w" * 32, 3, "here", (kit.entry(), kit.entry("greedy")))
    path = tmp_path / "c.json"
    write_measured(path, measured)
    assert read_measured(path) == measured
    document = json.loads(path.read_text())
    for key in document:
        broken = {k: v for k, v in document.items() if k != key}
        path.write_text(json.dumps(broken))
        with pytest.raises(InvalidRequest):
            read_measured(path)
    with pytest.raises(InvalidRequest, match="no calibration file"):
        read_measured(tmp_path / "missing.json")
