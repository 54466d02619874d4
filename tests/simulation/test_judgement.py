"""The demo's verdict on itself must be able to say no, to each demand on its own."""

from __future__ import annotations

import dataclasses

import pytest

from trueweight.simulation.judgement import Answered, Observed, judge, refunds_due
from trueweight.simulation.observation import BilledLeg

HONEST, CHEAT = "n-honest", "n-cheat"


def leg(number, node, charge=100, tokens=10):
    return BilledLeg(f"r{number}", node, bytes([number]), charge, tokens)


def good_run(**changes):
    """Requests 1 to 4; the cheat served 2, 3 and 4; its change point is leaf 20."""
    seen = Observed(
        requests_wanted=4,
        answered=[Answered(f"r{n}", "ab"[n % 2], 100, 10) for n in (1, 2, 3, 4)],
        legs=[leg(1, HONEST), leg(2, CHEAT), leg(3, CHEAT), leg(4, CHEAT)],
        node_names={HONEST: "honest", CHEAT: "cheat"},
        cheats=frozenset({CHEAT}),
        convicted=frozenset({CHEAT}),
        suspended=frozenset({CHEAT}),
        unaudited=0,
        refundable_from={CHEAT: 20},
        receipt_index={bytes([n]): 10 * n for n in (1, 2, 3, 4)},
        refunded_at_once=frozenset(),
        refunds_by_client={"a": 200, "b": 100},
        challenges={"honest": True, "cheat": True},
        fsck={"clean": True, "transfers": 9},
    )
    return dataclasses.replace(seen, **changes)


def failed(seen):
    return [check.name for check in judge(seen) if not check.passed]


def test_a_good_run_passes_everything():
    assert failed(good_run()) == []
    assert refunds_due(good_run()) == {"a": 200, "b": 100}


def test_refunds_begin_at_the_change_point_or_with_the_requests_own_verdict():
    seen = good_run(refundable_from={CHEAT: 35})
    assert refunds_due(seen) == {"a": 100}
    seen = good_run(refundable_from={CHEAT: 35}, refunded_at_once=frozenset({bytes([1])}))
    assert refunds_due(seen) == {"a": 100, "b": 100}
    assert failed(seen) == ["its clients refunded"]


REFUNDED = "its clients refunded"
CONVICTED = "the cheat and only the cheat convicted"


@pytest.mark.parametrize(
    ("changes", "demand"),
    [
        ({"requests_wanted": 5}, "requests answered"),
        ({"convicted": frozenset()}, CONVICTED),
        ({"convicted": frozenset({CHEAT, HONEST})}, CONVICTED),
        ({"suspended": frozenset()}, CONVICTED),
        ({"unaudited": 1}, "every newcomer's receipt audited"),
        ({"refunds_by_client": {}}, REFUNDED),
        ({"refunds_by_client": {"a": 200, "b": 99}}, REFUNDED),
        ({"refunds_by_client": {"a": 200, "b": 101}}, REFUNDED),
        ({"refunds_by_client": {"a": 200, "b": 100, "c": 1}}, REFUNDED),
        ({"challenges": {"honest": True, "cheat": False}}, "weights challenge answered"),
        ({"fsck": {"clean": False, "problems": ["p"]}}, "books balance"),
        ({"fsck": {}}, "books balance"),
        (
            {"legs": [leg(1, HONEST), leg(2, CHEAT), leg(3, CHEAT), leg(4, CHEAT), leg(4, CHEAT)]},
            "each billed once",
        ),
        (
            {"legs": [leg(1, HONEST, tokens=11), leg(2, CHEAT), leg(3, CHEAT), leg(4, CHEAT)]},
            "each billed once",
        ),
        (
            {"legs": [leg(2, CHEAT), leg(3, CHEAT), leg(4, CHEAT), leg(9, HONEST)]},
            "each billed once",
        ),
    ],
)
def test_each_demand_fails_on_its_own_fact(changes, demand):
    assert demand in failed(good_run(**changes))


def test_an_error_fails_the_run_and_is_shown():
    answered = [*good_run().answered[:3], Answered("r4", "a", 0, 0, "503: no node")]
    (check, *_) = judge(good_run(answered=answered))
    assert not check.passed
    assert "503: no node" in check.detail


def test_nothing_to_refund_fails_when_there_was_a_cheat():
    seen = good_run(refundable_from={}, refunds_by_client={})
    assert REFUNDED in failed(seen)
