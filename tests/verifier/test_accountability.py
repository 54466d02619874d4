"""Owed audits from public data, deterrence, releases that wait for audits."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueweight.protos.audit import commitment
from trueweight.protos.blind_verdicts import BLIND_WINDOW_MS
from trueweight.protos.deterrence import MAX_LEGS_KEPT, UnsettledWork, needed_nano, needed_rate_ppm
from trueweight.protos.envelope import seal
from trueweight.protos.errors import InvalidRequest
from trueweight.protos.money import PPM
from trueweight.protos.v1.audit_pb2 import EpochOpen, EpochReveal, Verdict
from trueweight.verifier.audit_commands import pay_one
from trueweight.verifier.deterrence import (
    DETECTABLE_TOKENS,
    KNOWN_CHEATS,
    Cheat,
    Power,
    Stake,
    deterrence,
    power_against,
    read_cheats,
    releasable_nano,
    tokens_to_conviction,
)
from trueweight.verifier.epochs import RatePolicy, Standing, rate_ppm
from trueweight.verifier.owed import DONE, LATE, MISSING, PENDING, account, accounts
from trueweight.verifier.report import status_rows
from trueweight.verifier.rewards import payable, reward
from trueweight.verifier.standing import stake_accounts
from trueweight.verifier.state import LogView

HONEST = [0.0] * 40
POLICY = RatePolicy(epoch_ms=60_000, audit_deadline_ms=20_000)


async def live(world, kit, until, **settings):
    app = world.app(**{"policy": POLICY, **settings})
    await kit.drive(world, app, lambda: until(app))
    return app.service.view


def revealed(epoch):
    return lambda app: (app.service.agenda.verifier_id, epoch) in app.service.view.reveals


async def test_a_diligent_verifier_kept_its_promise(world, kit):
    world.add_node("good")
    await live(world, kit, lambda app: app.service.ready.is_set())
    for _ in range(5):
        world.serve("good", HONEST)
    view = await live(world, kit, revealed(1))
    (found,) = accounts(view, 1, world.clock.now_unix_ms())
    assert found.kept and found.count(DONE) == 5 == len(found.audits)


async def test_a_verifier_that_was_down_shows_late_audits(world, kit):
    world.add_node("good")
    await live(world, kit, lambda app: app.service.ready.is_set())
    world.serve("good", HONEST)
    world.clock.advance_ms(30_000)
    view = await live(world, kit, revealed(1))
    (found,) = accounts(view, 1, world.clock.now_unix_ms())
    assert found.count(LATE) == 1 and not found.kept


async def test_a_lazy_verifier_shows_missing_audits(world, kit):
    me = world.verifiers[0]
    world.add_node("good")
    view = await live(world, kit, lambda app: app.service.ready.is_set())
    for _ in range(3):
        world.serve("good", HONEST)
    secret = (world.directory / "verifier-0" / "1.secret").read_bytes()
    reveal = EpochReveal(market_id=world.market_id, verifier_id=me.identity, epoch=1, secret=secret)
    world.ledger.log_envelope(seal(reveal, me))
    for entry in world.ledger.entries[view.next_index :]:
        view.apply(entry)
    found = account(view, me.identity, 1, world.clock.now_unix_ms() + 30_000)
    assert found.count(MISSING) == 3 and not found.kept
    assert account(view, me.identity, 1, world.clock.now_unix_ms()).count(MISSING) == 0


async def test_attack_a_silent_verifier_never_reveals(world, kit):
    world.add_node("good")
    view = await live(world, kit, lambda app: app.service.ready.is_set())
    (found,) = accounts(view, 1, world.clock.now_unix_ms())
    assert not found.revealed and not found.kept


async def test_attack_a_reveal_of_another_secret_does_not_count(world, kit):
    me = world.verifiers[0]
    view = await live(world, kit, lambda app: app.service.ready.is_set())
    reveal = EpochReveal(
        market_id=world.market_id, verifier_id=me.identity, epoch=1, secret=b"x" * 32
    )
    world.ledger.log_envelope(seal(reveal, me))
    for entry in world.ledger.entries[view.next_index :]:
        view.apply(entry)
    assert not view.reveals


async def test_attack_a_verifier_picks_its_own_targets(world, kit):
    me = world.verifiers[0]
    world.add_node("good")
    view = await live(world, kit, lambda app: app.service.ready.is_set())
    digest = world.serve("good", HONEST)
    # The epoch is made to owe nothing; the verdict is published all the same.
    leaf = view.epochs[me.identity][0]
    leaf.message.default_rate_ppm = 0
    verdict = Verdict(
        market_id=world.market_id, verifier_id=me.identity, epoch=1, receipt_digest=digest
    )
    secret = (world.directory / "verifier-0" / "1.secret").read_bytes()
    reveal = EpochReveal(market_id=world.market_id, verifier_id=me.identity, epoch=1, secret=secret)
    for message in (verdict, reveal):
        world.ledger.log_envelope(seal(message, me))
    for entry in world.ledger.entries[view.next_index :]:
        view.apply(entry)
    found = account(view, me.identity, 1, world.clock.now_unix_ms())
    assert found.unasked == 1 and not found.kept


async def test_a_kept_epoch_is_paid_once_per_audit_and_a_broken_one_not_at_all(world, kit):
    world.add_node("good")
    await live(world, kit, lambda app: app.service.ready.is_set())
    for _ in range(3):
        world.serve("good", HONEST)
    view = await live(world, kit, revealed(1))
    me, now = world.verifiers[0].identity, world.clock.now_unix_ms()
    kept = account(view, me, 1, now)
    found = payable(view, kept)
    assert not found.why_not and len(set(found.verdict_digests)) == 3
    operations = [reward(me, digest, 7) for digest in found.verdict_digests]
    assert len({op.id for op in operations}) == 3 and operations[0].reward.amount_nano == 7
    assert await pay_one(world.ledger, found, 7) == 21
    assert await pay_one(world.ledger, found, 7) == 0 == await pay_one(world.ledger, found, 9)
    late = replace(kept.audits[0], status=LATE)
    assert len(payable(view, replace(kept, audits=(late, *kept.audits[1:]))).verdict_digests) == 2
    for broken in (
        replace(kept, revealed=False),
        replace(kept, audits=(replace(late, status=MISSING), *kept.audits[1:])),
        replace(kept, audits=(replace(late, status=PENDING), *kept.audits[1:])),
        replace(kept, unasked=1),
        replace(kept, copied=1),
        replace(kept, contradicted=("node",)),
    ):
        refused = payable(view, broken)
        assert refused.why_not and not refused.verdict_digests


# Second opinions.


def opened(world, number, rate_ppm, duplicate_ppm, secret=b"s" * 32):
    """An epoch of a verifier in the log, with rates that it would not have chosen."""
    verifier = world.verifiers[number]
    epoch = EpochOpen(
        market_id=world.market_id,
        verifier_id=verifier.identity,
        epoch=1,
        commitment=commitment(secret),
        default_rate_ppm=rate_ppm,
        duplicate_rate_ppm=duplicate_ppm,
        opened_at_unix_ms=world.clock.now_unix_ms(),
        audit_deadline_ms=POLICY.audit_deadline_ms,
    )
    world.ledger.log_envelope(seal(epoch, verifier))
    directory = world.directory / f"verifier-{number}"
    directory.mkdir(mode=0o700)
    (directory / "1.secret").write_bytes(secret)


async def test_what_one_verifier_audits_another_owes_a_share_of_blind(make_world, kit):
    world = make_world(verifier_count=2, convictions_needed=2)
    node = world.add_node("good")
    opened(world, 0, PPM, 0)
    opened(world, 1, 0, 500_000, b"t" * 32)  # nothing of its own choice
    first, second = world.app(0, policy=POLICY), world.app(1, policy=POLICY)
    await kit.settle_together(world, [first, second])
    for _ in range(24):
        world.serve("good", HONEST)
    first, second = world.app(0, policy=POLICY), world.app(1, policy=POLICY)
    await kit.settle_together(world, [first, second])
    view = first.service.view
    by = view.nodes[node].by_verifier
    me, other = (v.identity for v in world.verifiers)
    assert by[me].wealth.r == 24 and 1 <= by[other].wealth.r <= 23
    assert not any(v.copied for v in view.verdicts.values())
    world.clock.advance_ms(BLIND_WINDOW_MS + POLICY.epoch_ms)
    view = await live(world, kit, lambda app: bool(app.service.view.reveals), number=1)
    mine = account(view, other, 1, world.clock.now_unix_ms())
    assert mine.kept and mine.count(DONE) == by[other].wealth.r and not mine.disputed


@pytest.mark.parametrize(("sum_x_nano", "disputed"), [(10**9, 0), (25 * 10**9, 1)])
def test_attack_a_framing_verifier_is_contradicted_by_second_opinions(
    make_world, sum_x_nano, disputed
):
    world = make_world(verifier_count=2)
    world.add_node("good")
    for number in (0, 1):
        opened(world, number, PPM, 0)
    digest = world.serve("good", HONEST)
    view = LogView(world.market)
    for signer, total in zip(world.verifiers, (10**9, sum_x_nano), strict=True):
        verdict = Verdict(
            market_id=world.market_id,
            verifier_id=signer.identity,
            node_id=world.nodes["good"].identity,
            epoch=1,
            receipt_digest=digest,
            outcome=Verdict.SCORED,
            sum_x_nano=total,
            scored_tokens=40,
        )
        reveal = EpochReveal(
            market_id=world.market_id, verifier_id=signer.identity, epoch=1, secret=b"s" * 32
        )
        world.ledger.log_envelope(seal(verdict, signer))
        world.ledger.log_envelope(seal(reveal, signer))
    for entry in world.ledger.entries:
        view.apply(entry)
    found = accounts(view, 1, world.clock.now_unix_ms())
    assert [len(a.disputed) for a in found] == [disputed] * 2


# Deterrence.


def test_weak_cheats_take_longer_and_invisible_ones_forever():
    times = [tokens_to_conviction(c.mean_x, 4e-4) for c in KNOWN_CHEATS]
    assert times == sorted(times) and times[0] < 10_000
    assert math.isinf(tokens_to_conviction(1e-4, 4e-4))


def test_the_model_of_power_is_not_below_what_was_measured():
    """95th percentiles of docs/verification.md, measured at the null means of that calibration."""
    found = ((0.83, 412), (0.025, 643), (0.0083, 1_069), (0.0053, 1_064), (0.0016, 2_282))
    for mean_x, measured in (*found, (0.0010, 3_178)):
        assert tokens_to_conviction(mean_x, 0.000061) >= measured


def test_a_cheat_just_above_the_null_mean_does_not_ask_for_any_stake():
    assert power_against(0.00249).cheat != "fp8 weights"
    assert power_against(0.00249).gain_tokens <= DETECTABLE_TOKENS
    assert power_against(0.9) == Power("", math.inf, 0)


@given(st.integers(0, 10**12), st.integers(1, 10**9), st.integers(1, 10**6))
def test_at_the_needed_rate_half_of_the_stake_is_left_for_unsettled_work(stake, price, gain):
    rate = needed_rate_ppm(stake, price, gain)
    assert 0 < rate <= PPM
    if rate < PPM:
        found = deterrence(Stake(stake, 0, price), rate, gain)
        assert found.holds and found.cap_nano >= stake // 4 - 1
    if 10 < rate < PPM and needed_nano(price, gain, PPM) > 100:
        lower = deterrence(Stake(stake, 0, price), rate * 2 // 5, gain)
        assert lower.needed_nano > stake


@given(
    st.integers(0, 10**12),
    st.integers(0, 10**12),
    st.integers(0, 10**9),
    st.integers(0, 10**12),
    st.integers(1, PPM),
)
def test_a_release_leaves_what_deters(locked, bond, price, unsettled, rate):
    stake = Stake(locked, bond, price, unsettled)
    amount = releasable_nano(stake, rate, 5_000)
    assert 0 <= amount <= locked
    assert amount == 0 or deterrence(replace(stake, locked_nano=locked - amount), rate, 5_000).holds


def test_a_cheat_that_saves_nothing_needs_no_stake():
    free = power_against(4e-4, [Cheat("free", 0.5, 0.0)])
    assert needed_rate_ppm(0, 10**9, free.gain_tokens) == 0


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 100)), max_size=60), st.data())
def test_unsettled_work_is_what_comes_after_the_last_judged_receipt(legs, data):
    """Against the obvious definition, with two judges needed."""
    work, seen, log = UnsettledWork(judges=2), {}, []
    index = 0
    for step, charge in legs:
        index += step
        log.append((index, charge))
        work.earned(index, charge)
        if data.draw(st.booleans()):
            who, about = data.draw(st.sampled_from("abc")), data.draw(st.sampled_from(log))[0]
            seen[who] = max(about, seen.get(who, -1))
            work.judged(who, about)
        settled = sorted(seen.values(), reverse=True)[1] if len(seen) > 1 else -1
        assert work.nano == sum(c for i, c in log if i > settled)


def test_unsettled_work_keeps_bounded_memory_and_never_settles_early():
    work = UnsettledWork()
    for index in range(3 * MAX_LEGS_KEPT):
        work.earned(index, 1)
    assert work.nano == 3 * MAX_LEGS_KEPT and len(work._legs) == MAX_LEGS_KEPT
    work.judged("v", 0)
    assert work.nano == 3 * MAX_LEGS_KEPT
    work.judged("v", 3 * MAX_LEGS_KEPT)
    assert work.nano == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "[1]",
        '[{"name": "x", "mean_x": 2}]',
        '[{"name": "x", "mean_x": "nan", "saving_share": 1}]',
    ],
)
def test_a_bad_list_of_cheats_is_refused(tmp_path, text):
    path = tmp_path / "cheats.json"
    path.write_text(text)
    with pytest.raises(InvalidRequest):
        read_cheats(path)
    path.write_text('[{"name": "int4", "mean_x": 0.03, "saving_share": 0.7}]')
    assert read_cheats(path) == (Cheat("int4", 0.03, 0.7),)


async def test_status_shows_unsettled_work_and_the_cap_in_force(world, kit):
    node = world.add_node("good")
    world.ledger.stakes = {f"node-bond:{node}": 10**9}
    app = world.app(policy=POLICY)
    await kit.drive(world, app, app.service.ready.is_set)
    for _ in range(3):
        world.serve("good", HONEST, charge_nano=40_000)
    world.reference_down = True
    view = await live(world, kit, lambda app: app.service.view.nodes[node].receipts == 3)
    records = await world.ledger.balances(stake_accounts([node]))
    (row,) = status_rows(view, records)
    assert row.unsettled_nano == 120_000 and row.needed_nano > 0
    assert row.cap_nano == (10**9 - row.needed_nano) // 2 and row.deterred
    assert (row.judges_needed, row.judges) == (1, 1)
    world.reference_down = False
    view = await live(world, kit, lambda app: app.service.idle and app.service.ready.is_set())
    (row,) = status_rows(view, records)
    assert row.unsettled_nano == 0


async def test_earnings_wait_for_later_evidence_and_owed_audits(world, kit):
    node = world.add_node("good")
    world.ledger.stakes = {f"node-bond:{node}": 10**12, f"node-locked:{node}": 5_000}
    await live(world, kit, lambda app: app.service.ready.is_set())
    for _ in range(3):
        world.serve("good", HONEST, charge_nano=40)
    world.reference_down = True
    await live(world, kit, lambda app: len(app.service.agenda.my_epochs) >= 2)
    assert not world.ledger.released, "nothing is released before any audit speaks for the node"
    world.reference_down = False
    view = await live(world, kit, lambda app: bool(world.ledger.released))
    released_to, amount, below = world.ledger.released[0]
    assert (released_to, amount) == (node, 5_000)
    assert below <= view.epochs[world.verifiers[0].identity][-1].index


async def test_a_suspect_gets_nothing_released(world, kit):
    node = world.add_node("bad")
    world.ledger.stakes = {f"node-locked:{node}": 5_000, f"node-bond:{node}": 10**12}
    await live(world, kit, lambda app: app.service.ready.is_set())
    for _ in range(3):
        world.serve("bad", [0.0] * 30 + [0.3] * 8)
    view = await live(world, kit, lambda app: len(app.service.agenda.my_epochs) >= 3)
    (row,) = status_rows(view)
    assert row.state in ("suspect", "convicted") and not world.ledger.released


async def test_rates_follow_evidence_and_stake(world, kit):
    rich, poor = world.add_node("rich"), world.add_node("poor")
    world.ledger.stakes = {f"node-bond:{rich}": 10**15, f"node-bond:{poor}": 1}
    policy = RatePolicy(epoch_ms=60_000, newcomer_tokens=100)
    app = world.app(policy=policy)
    await kit.drive(world, app, app.service.ready.is_set)
    for _ in range(20):
        world.serve("rich", HONEST)
        world.serve("poor", HONEST)
    app = world.app(policy=policy)
    await kit.drive(world, app, lambda: len(app.service.agenda.my_epochs) >= 2)
    epoch = app.service.agenda.my_epochs[1]
    assert epoch.rate_ppm(rich) == 100 * PPM // 800
    assert epoch.rate_ppm(poor) == PPM, "it has nothing to lose"


@pytest.mark.parametrize("tokens,wanted", [(10**3, PPM), (10**5, 500_000), (10**9, 10_000)])
def test_the_rate_of_a_node_that_is_deterred(tokens, wanted):
    assert rate_ppm(RatePolicy(), Standing(tokens)) == wanted
