"""Who is audited: the committed secret decides, in the promised proportion, for anyone to check."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueweight.protos.audit import check_reveal, commitment, is_owed, margin_commitment
from trueweight.protos.errors import BadSignature, InvalidRequest

SECRET = bytes(range(32))


def digests(count):
    return [hashlib.sha256(i.to_bytes(4, "big")).digest() for i in range(count)]


@pytest.mark.parametrize(
    ("rate", "charge", "reference", "share"),
    [
        (20_000, 1, 0, 0.02),
        (500_000, 1, 0, 0.5),
        (500_000, 10, 40, 0.125),
        (500_000, 99, 40, 0.5),
    ],
)
def test_the_share_of_audits_is_rate_times_charge_weight(rate, charge, reference, share):
    owed = sum(is_owed(SECRET, d, rate, charge, reference) for d in digests(5000))
    assert owed / 5000 == pytest.approx(share, abs=0.02)


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_rate_one_audits_everything_and_rate_zero_nothing(secret, digest):
    assert is_owed(secret, digest, 1_000_000, 1, 0)
    assert is_owed(secret, digest, 5_000_000, 1, 0)
    assert not is_owed(secret, digest, 0, 1, 0)


@given(
    st.binary(min_size=32, max_size=32),
    st.integers(0, 1_000_000),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**63 - 1),
)
def test_the_decision_is_exact_integer_arithmetic(digest, rate, charge, reference):
    import hmac

    drawn = int.from_bytes(hmac.new(SECRET, digest, "sha256").digest()[:8], "big")
    weight = Fraction(1) if reference == 0 else min(Fraction(1), Fraction(charge, reference))
    wanted = Fraction(drawn, 2**64) < Fraction(rate, 10**6) * weight
    assert is_owed(SECRET, digest, rate, charge, reference) is wanted


def test_two_secrets_audit_different_requests():
    other = bytes(32)
    picks = [{d for d in digests(400) if is_owed(s, d, 100_000, 1, 0)} for s in (SECRET, other)]
    assert picks[0] and picks[1] and picks[0] != picks[1]


def test_reveal():
    check_reveal(SECRET, commitment(SECRET))
    for secret, committed in ((bytes(32), commitment(SECRET)), (b"short", b""), (SECRET, b"")):
        with pytest.raises(BadSignature):
            check_reveal(secret, committed)


def test_malformed_inputs_are_refused():
    with pytest.raises(InvalidRequest):
        commitment(b"short")
    for arguments in ((b"s", bytes(32), 1, 1, 1), (SECRET, b"d", 1, 1, 1)):
        with pytest.raises(InvalidRequest):
            is_owed(*arguments)
    for numbers in ((-1, 0, 0), (0, -1, 0), (0, 0, -1)):
        with pytest.raises(InvalidRequest):
            is_owed(SECRET, bytes(32), *numbers)


def test_margins_are_bound_by_blind_and_payload():
    one = margin_commitment(bytes(16), b"verdict")
    assert one != margin_commitment(bytes(15) + b"\x01", b"verdict")
    assert one != margin_commitment(bytes(16), b"verdicT")
    with pytest.raises(InvalidRequest):
        margin_commitment(b"", b"verdict")
