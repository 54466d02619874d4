"""Money is exact, ids are what they say, errors cross borders unchanged."""

from __future__ import annotations

import uuid
from fractions import Fraction

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueweight.protos import errors
from trueweight.protos.errors import InvalidRequest, TrueweightError, error_for
from trueweight.protos.ids import derived_id, uuid7
from trueweight.protos.money import (
    MAX_NANO,
    charge_nano,
    format_credits,
    parse_credits,
    split_charge,
)
from trueweight.protos.tokens import token_digest

TOKENS, ASKS = st.integers(0, 2**22), st.integers(0, 10**12)


@given(TOKENS, TOKENS, ASKS, ASKS)
def test_a_charge_is_the_exact_price_rounded_up_once(tokens_in, tokens_out, ask_in, ask_out):
    exact = Fraction(tokens_in * ask_in + tokens_out * ask_out, 10**6)
    charge = charge_nano(tokens_in, tokens_out, ask_in, ask_out)
    assert exact <= charge < exact + 1


@given(st.integers(0, MAX_NANO), st.integers(0, 500_000), st.integers(0, 500_000))
def test_a_split_loses_and_creates_nothing(charge, fee_ppm, pool_ppm):
    split = split_charge(charge, fee_ppm, pool_ppm)
    assert split.fee_nano + split.pool_nano + split.node_nano == charge
    assert 0 <= split.fee_nano <= Fraction(charge * fee_ppm, 10**6)
    assert 0 <= split.pool_nano <= Fraction(charge * pool_ppm, 10**6)
    assert split.node_nano >= 0


@pytest.mark.parametrize("arguments", [(-1, 0, 0, 0), (0, 0, -1, 0), (2**40, 0, 10**18, 0)])
def test_impossible_charges_are_refused(arguments):
    with pytest.raises(InvalidRequest):
        charge_nano(*arguments)


@pytest.mark.parametrize("arguments", [(-1, 0, 0), (1, -1, 0), (1, 600_000, 600_000)])
def test_impossible_splits_are_refused(arguments):
    with pytest.raises(InvalidRequest):
        split_charge(*arguments)


@given(st.integers(0, MAX_NANO))
def test_credits_are_read_back_exactly(nano):
    assert parse_credits(format_credits(nano)) == nano


NOT_AMOUNTS = ["", "abc", "-1", "1e-10", "0.0000000001", "nan", "inf", "1_000", "9" * 30, "1,5"]
NOT_AMOUNTS += ["1e999999", "1e-999999999", "1e99", "٣", " 5", "5\n", ".", "5.", ".5", "e5"]
NOT_AMOUNTS += ["0.0000000010000000000000000000000000001", "9223372036.854775808"]


@pytest.mark.parametrize("text", NOT_AMOUNTS)
def test_amounts_that_are_not_exact_credits_are_refused(text):
    with pytest.raises(InvalidRequest):
        parse_credits(text)


@given(st.integers(0, 10**6), st.integers(-9, 3))
def test_amounts_with_exponents_are_exact(digits, exponent):
    assert parse_credits(f"{digits}e{exponent}") == digits * Fraction(10) ** (9 + exponent)


@given(st.integers(0, 10**12))
def test_amounts_as_python_prints_floats(micro):
    """Routers get prices as JSON numbers."""
    assert parse_credits(repr(micro / 10**6)) == micro * 1000


@given(st.text(max_size=20))
def test_any_text_as_credits(text):
    try:
        nano = parse_credits(text)
    except TrueweightError:
        return
    assert 0 <= nano <= MAX_NANO


@given(st.integers(0, 2**48 - 1), st.binary(min_size=10, max_size=10))
def test_uuid7_is_a_uuid_of_its_time(unix_ms, random):
    value = uuid.UUID(bytes=uuid7(unix_ms, random))
    assert value.version == 7
    assert value.variant == uuid.RFC_4122
    assert value.int >> 80 == unix_ms


def test_derived_ids_depend_on_every_part_and_its_borders():
    ids = {
        derived_id("a", b"xy"),
        derived_id("a", b"x", b"y"),
        derived_id("b", b"xy"),
        derived_id("a", b"xy", b""),
    }
    assert len(ids) == 4
    assert all(uuid.UUID(bytes=i).version == 8 for i in ids)
    with pytest.raises(ValueError, match="10 random bytes"):
        uuid7(1, b"")


@given(st.lists(st.integers(0, 2**32 - 1)), st.lists(st.integers(0, 2**32 - 1)))
def test_token_digests_differ_by_ids_and_salt(one, two):
    salt, other = bytes(16), b"\x01" * 16
    assert (token_digest(salt, one) == token_digest(salt, two)) == (one == two)
    assert token_digest(salt, one) != token_digest(other, one)


def every_error(root=TrueweightError):
    return {root}.union(*(every_error(child) for child in root.__subclasses__()))


def test_every_error_has_a_code_of_its_own_and_both_mappings():
    # Rooms may derive private ones, which never cross a border under their own code.
    found = {e for e in every_error() if e.__module__ == errors.__name__}
    assert len({e.code for e in found}) == len(found)
    for error in found:
        assert isinstance(error.grpc_status, grpc.StatusCode)
        assert error.grpc_status != grpc.StatusCode.OK
        assert 400 <= error.http_status < 600
        assert 1 <= error.exit_code < 128
        again = error_for(error.code, "message", "hint")
        assert type(again) is error
        assert (again.message, again.hint) == ("message", "hint")
    assert type(error_for("NO_SUCH_CODE", "m")) is TrueweightError
