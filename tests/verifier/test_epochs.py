"""Commit before, reveal after; frozen rates; who is audited."""

import hashlib
import os
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.protos.audit import check_reveal, commitment
from trueweight.protos.errors import BadSignature, NotFound, StorageError
from trueweight.protos.v1.audit_pb2 import EpochOpen, NodeRate
from trueweight.verifier.epochs import (
    PPM,
    EpochPlan,
    RatePolicy,
    SecretStore,
    Standing,
    open_epoch,
    rate_ppm,
    wrap_private_key,
)
from trueweight.verifier.selection import ReceiptLeaf, epoch_leaf, epoch_of, is_decidable, owes

POLICY = RatePolicy()
PLAN = EpochPlan("market", "verifier", 1, 1000)


def receipt(number, *, index=10, node="node", charge=None):
    digest = hashlib.sha256(str(number).encode()).digest()
    return ReceiptLeaf(index, 0, digest, digest, node, 100, charge)


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_a_reveal_opens_its_own_commitment_and_no_other(secret, other):
    message = open_epoch(PLAN, secret, POLICY, {})
    check_reveal(secret, message.commitment)
    if other != secret:
        with pytest.raises(BadSignature):
            check_reveal(other, message.commitment)


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 2 * PPM))
def test_rates_fall_with_evidence_and_never_below_the_floor(tokens, more, needed):
    rate = rate_ppm(POLICY, Standing(tokens, needed_ppm=needed))
    assert POLICY.floor_ppm <= rate <= PPM
    assert rate_ppm(POLICY, Standing(tokens + more, needed_ppm=needed)) <= rate
    assert rate >= min(PPM, needed)
    assert rate_ppm(POLICY, Standing(tokens, suspect=True)) == PPM


def test_newcomers_and_suspects_are_audited_in_full():
    standings = {"old": Standing(10**7), "new": Standing(10), "bad": Standing(10**7, suspect=True)}
    message = open_epoch(PLAN, os.urandom(32), POLICY, standings)
    leaf = epoch_leaf(5, message)
    assert leaf.rate_ppm("old") == POLICY.floor_ppm
    assert leaf.rate_ppm("new") == leaf.rate_ppm("bad") == leaf.rate_ppm("never seen") == PPM


@pytest.mark.parametrize("rate", [20_000, 300_000, 1_000_000])
def test_the_frequency_of_audits_is_the_rate(rate):
    message = EpochOpen(rates=[NodeRate(node_id="node", rate_ppm=rate)], default_rate_ppm=PPM)
    secret, count = b"s" * 32, 20_000
    found = sum(owes(epoch_leaf(0, message), secret, receipt(i)) for i in range(count))
    expected = count * rate / PPM
    assert abs(found - expected) <= 4 * (expected * (1 - rate / PPM)) ** 0.5 + 1e-9


def test_what_is_audited_depends_on_the_secret_and_not_on_the_node():
    message = EpochOpen(default_rate_ppm=PPM // 2)
    leaf = epoch_leaf(0, message)
    chosen = [
        {i for i in range(400) if owes(leaf, secret, receipt(i, node=node))}
        for secret, node in ((b"a" * 32, "x"), (b"a" * 32, "y"), (b"b" * 32, "x"))
    ]
    assert chosen[0] == chosen[1] != chosen[2]


def test_small_charges_are_audited_less_and_unbilled_claims_in_full():
    message = EpochOpen(default_rate_ppm=PPM // 2, charge_reference_nano=1000)
    leaf, secret = epoch_leaf(0, message), b"s" * 32

    def share(charge):
        return sum(owes(leaf, secret, receipt(i, charge=charge)) for i in range(4000)) / 4000

    assert share(100) == pytest.approx(0.05, abs=0.02)
    assert share(1000) == share(10**6) == share(None) == pytest.approx(0.5, abs=0.04)
    assert not is_decidable(leaf, receipt(1), now_unix_ms=9_999)
    assert is_decidable(leaf, receipt(1), now_unix_ms=10_000)
    assert is_decidable(leaf, receipt(1, charge=5), now_unix_ms=0)


def test_rates_hold_for_leaves_after_the_opening_until_the_next():
    epochs = [epoch_leaf(10, EpochOpen(epoch=1)), epoch_leaf(20, EpochOpen(epoch=2))]
    assert epoch_of(epochs, 10) is None
    assert epoch_of(epochs, 11).message.epoch == epoch_of(epochs, 20).message.epoch == 1
    assert epoch_of(epochs, 21).message.epoch == 2


def test_secrets_are_on_disk_private_and_survive(tmp_path):
    store = SecretStore(tmp_path / "data", os.urandom)
    secret = store.get_or_create(3)
    assert store.get_or_create(3) == SecretStore(tmp_path / "data", os.urandom).get(3) == secret
    mode = stat.S_IMODE((tmp_path / "data" / "3.secret").stat().st_mode)
    assert mode == 0o600
    with pytest.raises(NotFound):
        store.get(4)
    assert store.wrapping() == store.wrapping() != secret


def test_a_damaged_secret_is_refused_not_used(tmp_path):
    store = SecretStore(tmp_path, os.urandom)
    store.get_or_create(1)
    (tmp_path / "1.secret").write_bytes(b"short")
    with pytest.raises(StorageError):
        store.get(1)


def test_a_leftover_of_a_crash_is_not_a_secret(tmp_path):
    (tmp_path / "1.tmp").write_bytes(b"x")
    store = SecretStore(tmp_path, os.urandom)
    assert len(store.get_or_create(1)) == 32


@settings(max_examples=30)
@given(st.binary(min_size=32, max_size=32), st.integers(0, 9))
def test_revealed_secrets_do_not_open_transcripts(secret, duplicate):
    digest = b"r" * 32
    key = wrap_private_key(secret, digest, duplicate).private_bytes_raw()
    assert key == wrap_private_key(secret, digest, duplicate).private_bytes_raw()
    assert key != wrap_private_key(secret, b"q" * 32, duplicate).private_bytes_raw()
    assert key != wrap_private_key(secret, digest, duplicate + 1).private_bytes_raw()
    assert commitment(secret) != key
