"""Attacks on the evidence: who signs what nobody believes, and bytes that nobody should parse."""

import os

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trueweight.protos.blind_verdicts import BLIND_WINDOW_MS
from trueweight.protos.conviction import (
    CAPPED_STRIDE,
    CLIENT_FREE_WEIGHT,
    Evidence,
    NodeEvidence,
    frozen_pairs,
    should_convict,
)
from trueweight.protos.envelope import digest_of, parse_envelope, seal
from trueweight.protos.v1.audit_pb2 import (
    AuditRequest,
    Conviction,
    EpochOpen,
    MarginCommitment,
    Verdict,
)
from trueweight.protos.v1.log_pb2 import LogEntry
from trueweight.protos.v1.market_pb2 import Suspension
from trueweight.protos.v1.model_pb2 import RegistryEntry
from trueweight.verifier.duplicates import commit
from trueweight.verifier.epochs import RatePolicy
from trueweight.verifier.leaves import Recent
from trueweight.verifier.owed import accounts
from trueweight.verifier.registry import WITHDRAWAL_GRACE_MS
from trueweight.verifier.report import state_of
from trueweight.verifier.state import KINDS, LogView

WRONG = [3.0] * 50
MU0 = 400_000


class Forger:
    """Writes whatever it likes into the log, past the ledger's own checks."""

    def __init__(self, world):
        self.world = world
        self.view = LogView(world.market)

    def log(self, message, signer):
        return self.world.ledger.log_envelope(seal(message, signer))

    def fold(self):
        for entry in self.world.ledger.entries[self.view.next_index :]:
            self.view.apply(entry)
        return self.view

    def setup(self, kit):
        """A calibration of each verifier in force, one served receipt and its audit request."""
        world, me = self.world, self.world.verifiers[0]
        self.calibrations = {}
        for verifier in world.verifiers:
            self.log(self.statement(1, verifier), verifier)
            self.calibrations[verifier.identity] = digest_of(world.ledger.entries[-1].body)
        self.receipt = world.serve("good", WRONG)
        self.log(self.request(me), me)
        return self.fold()

    def statement(self, version, signer):
        world = self.world
        return world.measured(version).statement(
            world.market_id, signer.identity, world.manifest_digest, 0
        )

    def request(self, signer, receipt=None):
        return AuditRequest(
            market_id=self.world.market_id,
            verifier_id=signer.identity,
            receipt_digest=receipt or self.receipt,
        )

    def verdict(self, signer, **changes):
        leaf = self.view.receipts.get(self.receipt)
        fields = {
            "market_id": self.world.market_id,
            "verifier_id": signer.identity,
            "node_id": leaf.node_id,
            "assignment_digest": leaf.assignment_digest,
            "receipt_digest": self.receipt,
            "calibration_digest": self.calibrations.get(signer.identity, b""),
            "parameter_class": "plain",
            "sum_x_nano": 50 * 10**9,
            "scored_tokens": 50,
            "outcome": Verdict.SCORED,
            "receipt_log_index": leaf.index,
        }
        return Verdict(**{**fields, **changes})


@pytest.fixture
def forger(make_world, kit):
    world = make_world(verifier_count=2)
    world.add_node("good"), world.add_node("rival")
    found = Forger(world)
    found.setup(kit)
    return found


def wealth(forger, name="good"):
    view = forger.fold()
    return view.node(forger.world.nodes[name].identity).pooled.wealth


def scored(forger, name="good"):
    """Audits whose margins are held against the node; what is none never speaks against it."""
    view = forger.fold()
    record = view.node(forger.world.nodes[name].identity)
    assert record.pooled.scored or record.pooled.wealth.value <= 1
    return record.pooled.scored


def test_an_entitled_verdict_counts(forger):
    me = forger.world.verifiers[0]
    forger.log(forger.verdict(me), me)
    assert wealth(forger).r == 1


def test_attack_verdict_by_somebody_who_is_no_verifier(forger, kit):
    for signer in (kit.signer(forger.world.market_id), forger.world.router):
        forger.log(forger.verdict(signer), signer)
    assert scored(forger) == 0 and forger.view.ignored == 2


def test_attack_verdict_in_another_verifiers_name(forger):
    me, other = forger.world.verifiers
    forger.log(forger.verdict(me), other)
    assert scored(forger) == 0 and forger.view.ignored == 1


@pytest.mark.parametrize(
    "changes,why",
    [
        ({"assignment_digest": b"x" * 32}, "another assignment"),
        ({"receipt_digest": b"x" * 32}, "no such receipt"),
        ({"scored_tokens": 51}, "more or fewer tokens"),
        ({"scored_tokens": 0}, "more or fewer tokens"),
        ({"sum_x_nano": 50 * 10**9 + 1}, "larger than its terms"),
        ({"calibration_digest": b"x" * 32}, "calibration"),
        ({"parameter_class": "greedy"}, "calibration"),
        ({"outcome": Verdict.UNCALIBRATED}, "no evidence"),
        ({"outcome": Verdict.INVALID_RECEIPT}, "no evidence"),
        ({"outcome": 77}, "no evidence"),
    ],
)
def test_attack_framing_verdicts_are_no_evidence(forger, changes, why):
    me = forger.world.verifiers[0]
    forger.log(forger.verdict(me, **changes), me)
    assert scored(forger) == 0
    (verdict,) = forger.view.verdicts.values()
    assert why in verdict.why_not


def test_attack_a_rivals_receipt_is_held_against_the_node(forger):
    me, rival = forger.world.verifiers[0], forger.world.nodes["rival"].identity
    forger.log(forger.verdict(me, node_id=rival), me)
    assert scored(forger, "rival") == 0 and scored(forger) == 0


def test_attack_verdict_without_a_logged_request(forger):
    other = forger.world.verifiers[1]
    forger.log(forger.verdict(other), other)
    (verdict,) = forger.fold().verdicts.values()
    assert scored(forger) == 0 and "not requested" in verdict.why_not


def test_attack_the_same_audit_is_counted_again_and_again(forger):
    me = forger.world.verifiers[0]
    for number in range(5):
        forger.log(forger.verdict(me, issued_at_unix_ms=number), me)
    assert wealth(forger).r == 1 and forger.view.ignored == 4


def committed(forger, signer, verdict):
    """Logs the commitment to a verdict; the verdict with its blind."""
    verdict.commitment_blind = b"b" * 16
    forger.log(commit(verdict, verdict.commitment_blind), signer)
    return verdict


def test_two_blind_verdicts_on_one_receipt_count_once_in_the_public_wealth(forger):
    me, other = forger.world.verifiers
    forger.log(forger.request(other), other)
    verdicts = [committed(forger, v, forger.verdict(v)) for v in (me, other)]
    for signer, verdict in zip((me, other), verdicts, strict=True):
        forger.log(verdict, signer)
    record = forger.fold().node(forger.world.nodes["good"].identity)
    assert record.pooled.wealth.r == 1
    assert [e.wealth.r for e in record.by_verifier.values()] == [1, 1]


def copied_by(forger, other):
    view = forger.fold()
    return view.verdicts.get((other.identity, forger.receipt)).copied


@pytest.mark.parametrize("commits", [False, True])
def test_attack_a_lazy_verifier_copies_anothers_margins(forger, commits):
    me, other = forger.world.verifiers
    forger.log(forger.request(other), other)
    forger.log(committed(forger, me, forger.verdict(me)), me)
    forger.world.clock.advance_ms(BLIND_WINDOW_MS + 1)
    verdict = forger.verdict(other)
    forger.log(committed(forger, other, verdict) if commits else verdict, other)
    assert copied_by(forger, other)
    assert forger.view.node(verdict.node_id).by_verifier[other.identity].scored == 0


def test_attack_a_verdict_that_is_not_the_committed_one(forger):
    me = forger.world.verifiers[0]
    verdict = committed(forger, me, forger.verdict(me, sum_x_nano=0))
    verdict.sum_x_nano = 50 * 10**9
    forger.log(verdict, me)
    assert copied_by(forger, me) and scored(forger) == 0


def test_attack_publishing_early_does_not_shut_others_out(forger):
    me, early = forger.world.verifiers
    forger.log(forger.request(early), early)
    forger.log(forger.verdict(early, sum_x_nano=0), early)
    forger.log(committed(forger, me, forger.verdict(me)), me)
    assert not copied_by(forger, me)
    assert forger.view.node(forger.world.nodes["good"].identity).by_verifier[me.identity].wealth.r


def test_attack_calibration_by_a_node_or_a_router(forger):
    world = forger.world
    for signer in (world.nodes["rival"], world.router):
        forger.log(forger.statement(9, signer), signer)
    forger.log(forger.statement(9, world.verifiers[1]), world.verifiers[0])
    view = forger.fold()
    assert [c.version for c in view.calibrations.all()] == [1, 1] and view.ignored == 3


def test_attack_suspension_and_conviction_by_strangers(forger):
    world, target = forger.world, forger.world.nodes["good"].identity
    rival = world.nodes["rival"]
    forger.log(Suspension(market_id=world.market_id, node_id=target, issuer=rival.identity), rival)
    forger.log(
        Conviction(market_id=world.market_id, node_id=target, verifier_id=rival.identity), rival
    )
    view = forger.fold()
    assert not view.node(target).suspended and not view.convicted(target)


def test_attack_epochs_that_go_back_in_time(forger):
    me = forger.world.verifiers[0]
    for epoch in (1, 2, 2, 1):
        forger.log(
            EpochOpen(market_id=forger.world.market_id, verifier_id=me.identity, epoch=epoch), me
        )
    assert [e.message.epoch for e in forger.fold().epochs[me.identity]] == [1, 2]


async def test_two_of_two_verifiers_must_agree_before_money_moves(make_world, kit):
    world = make_world(verifier_count=2, convictions_needed=2)
    bad = world.add_node("bad")
    for number in (0, 1):
        app = world.app(number)
        await kit.drive(world, app, app.service.ready.is_set)
    for _ in range(8):
        world.serve("bad", WRONG)
    first, second = world.app(0), world.app(1)
    await kit.settle_together(world, [first, second])
    assert second.service.view.convicted(bad) and list(world.ledger.convicted) == [bad]
    assert len(world.ledger.of_kind("conviction", Conviction)) == 2
    assert len(world.ledger.of_kind("margin-commitment", MarginCommitment)) == 16
    assert len(world.ledger.of_kind("suspension", Suspension)) == 2
    assert len(world.ledger.refunds) == 8
    assert not any(v.copied for v in first.service.view.verdicts.values())


async def test_one_of_two_verifiers_alone_moves_no_money(make_world, kit):
    world = make_world(verifier_count=2, convictions_needed=2)
    bad = world.add_node("bad")
    await kit.drive(world, (app := world.app(0)), app.service.ready.is_set)
    for _ in range(8):
        world.serve("bad", WRONG)
    app = world.app(0)
    await kit.settle(world, app)
    assert len(app.service.view.nodes[bad].convictions) == 1
    assert not app.service.view.convicted(bad) and not world.ledger.convicted
    assert not world.ledger.of_kind("suspension", Suspension)


async def test_attack_a_client_erases_its_text_to_have_the_answer_for_nothing(world, kit):
    """Neither refunded nor held against the node; a transcript that is missing without that is
    refunded, and not held against the node either."""
    node = world.add_node("good")
    app = world.app()
    await kit.drive(world, app, app.service.ready.is_set)
    world.erased.add(world.serve("good", WRONG))
    lost = world.serve("good", WRONG, keep_transcript=False)
    app = world.app()
    await kit.settle(world, app)
    found = {v.receipt_digest: v for v in world.ledger.of_kind("verdict", Verdict)}
    (erased,) = world.erased
    assert (found[erased].outcome, found[erased].l0_failure) == (Verdict.UNCALIBRATED, "erased")
    assert found[lost].outcome == Verdict.MISSING_TRANSCRIPT
    assert list(world.ledger.refunds) == [lost]
    assert app.service.view.nodes[node].pooled.scored == 0


async def test_attack_a_router_goes_on_selling_withdrawn_weights(world, kit):
    """Work that was under way may end; what is sold later is the router's fault, not the node's."""
    node = world.add_node("good")
    app = world.app()
    await kit.drive(world, app, app.service.ready.is_set)
    (sold,) = (e for e in world.ledger.entries if e.kind == "registry-entry")
    entry = RegistryEntry.FromString(parse_envelope(sold.body).payload)
    entry.revoked = True
    world.ledger.log_envelope(seal(entry, world.market_signer))
    world.serve("good", [0.0] * 50)
    world.clock.advance_ms(WITHDRAWAL_GRACE_MS + 1)
    world.serve("good", [0.0] * 50)
    app = world.app()
    await kit.settle(world, app)
    outcomes = [v.outcome for v in world.ledger.of_kind("verdict", Verdict)]
    assert sorted(outcomes) == [Verdict.SCORED, Verdict.MISSING_TRANSCRIPT]
    assert app.service.view.nodes[node].pooled.scored == 1
    assert not app.service.view.registry.models


# Ownership: a verifier does not judge nodes of its own declared owner.


async def test_attack_an_owner_keeps_its_node_clear_or_convicts_it_late(make_world, kit):
    """With two verifiers, the owner's verdicts and conviction count for nothing, and the other
    neither waits for its commitments nor needs its agreement."""
    owner = Ed25519PrivateKey.generate()
    world = make_world(verifier_count=2, owner=owner)
    mine = world.add_node("mine", owner)
    view = LogView(world.market)
    for number in (0, 1):
        app = world.app(number)
        await kit.drive(world, app, app.service.ready.is_set)
    receipts = [world.serve("mine", WRONG) for _ in range(8)]
    owners, other = world.verifiers
    for digest in receipts:  # what an honest verifier of this owner would never publish
        request = AuditRequest(
            market_id=world.market_id, verifier_id=owners.identity, receipt_digest=digest
        )
        world.ledger.log_envelope(seal(request, owners))
        praise = Verdict(
            market_id=world.market_id,
            verifier_id=owners.identity,
            node_id=mine,
            receipt_digest=digest,
            outcome=Verdict.SCORED,
            scored_tokens=50,
        )
        world.ledger.log_envelope(seal(praise, owners))
    for message in (
        Conviction(market_id=world.market_id, verifier_id=owners.identity, node_id=mine),
        Suspension(
            market_id=world.market_id, issuer=owners.identity, node_id=mine, conviction_digest=b"x"
        ),
        Suspension(market_id=world.market_id, issuer=owners.identity, node_id=mine, lifted=True),
    ):
        world.ledger.log_envelope(seal(message, owners))
    for entry in world.ledger.entries:
        view.apply(entry)
    assert not view.node(mine).convictions and view.node(mine).pooled.wealth.r == 0
    assert not view.node(mine).suspended, "its owner's word counts neither way"
    assert view.judges_of(mine) == [other.identity]
    app = world.app(1)
    await kit.settle(world, app)
    assert app.service.view.convicted(mine) and list(world.ledger.convicted) == [mine]
    assert list(app.service.view.node(mine).by_verifier) == [other.identity]


async def test_an_owner_owes_its_nodes_no_audit_and_releases_nothing(make_world, kit):
    owner = Ed25519PrivateKey.generate()
    world = make_world(owner=owner)
    mine = world.add_node("mine", owner)
    world.ledger.stakes = {f"node-bond:{mine}": 10**12, f"node-locked:{mine}": 5_000}
    policy = RatePolicy(epoch_ms=60_000)
    app = world.app(policy=policy)
    await kit.drive(world, app, app.service.ready.is_set)
    for _ in range(3):
        world.serve("mine", WRONG)
    app = world.app(policy=policy)
    await kit.drive(world, app, lambda: len(app.service.agenda.my_epochs) >= 3)
    assert not world.ledger.of_kind("verdict", Verdict) and not world.ledger.released
    (found,) = accounts(app.service.view, 1, world.clock.now_unix_ms())
    assert not found.audits and found.kept


# One client's share, and calibrations in doubt.


def evidence(number, client="", sum_x=0, pair="p", tokens=256):
    return Evidence(number, number, sum_x, tokens, MU0, pair, client)


def test_attack_a_friendly_client_cannot_own_a_nodes_evidence():
    node = NodeEvidence()
    for number in range(2000):
        node = node.add(evidence(number, "client:friend"))
        if number % 20 == 0:
            node = node.add(evidence(number, "client:stranger", sum_x=256 * 5_000_000))
    friend = node.client_weights["client:friend"]
    # Half of all, and an eighth of what it offered beyond that.
    assert friend <= CLIENT_FREE_WEIGHT + (2000 - CLIENT_FREE_WEIGHT) / CAPPED_STRIDE + 1
    assert node.capped_audits > 200 and node.crossed_by is not None


def test_attack_a_hostile_client_cannot_convict_a_rival_alone_once_others_are_there():
    node = NodeEvidence()
    for number in range(300):
        node = node.add(evidence(number, "client:a"))
        node = node.add(evidence(number, "client:b"))
    shares = node.client_weights
    assert shares["client:a"] == pytest.approx(shares["client:b"], rel=0.02)
    before = node.wealth.r
    for number in range(600):
        node = node.add(evidence(number, "client:hostile", sum_x=256 * 700_000))
    beyond = 600 - CLIENT_FREE_WEIGHT
    assert node.wealth.r - before <= CLIENT_FREE_WEIGHT + 1 + beyond / CAPPED_STRIDE + 600 * 0.5


def test_attack_an_accomplices_account_does_not_silence_the_one_real_customer():
    """The node works well until its customer has used up the free share; then it cheats."""
    node = NodeEvidence().add(evidence(1, "client:accomplice", tokens=1))
    for number in range(2, 600):
        node = node.add(evidence(number, "client:customer"))
    assert node.state == "clear" and node.capped_audits > 200
    for number in range(600, 700):
        node = node.add(evidence(number, "client:customer", sum_x=256 * 31_000_000))
    assert node.state == "convict"


def test_a_single_client_is_never_capped():
    node = NodeEvidence()
    for number in range(400):
        node = node.add(evidence(number, "client:only"))
    assert node.wealth.r == 400


def with_noise(pair, mean, count=40):
    node = NodeEvidence()
    for number in range(count):
        node = node.add(evidence(number + 1, sum_x=256 * mean, pair=pair))
    return node


def test_when_the_median_node_looks_guilty_the_calibration_is_frozen():
    guilty = [with_noise("bad pair", 2_000_000) for _ in range(3)]
    frozen = frozen_pairs(guilty)
    assert frozen == {"bad pair"}
    assert guilty[0].crossed_by is not None and not should_convict(guilty[0], frozen)


def test_one_cheat_among_honest_nodes_freezes_nothing():
    nodes = [with_noise("pair", 2_000_000), with_noise("pair", 50_000), with_noise("pair", 0)]
    assert frozen_pairs(nodes) == frozenset() and should_convict(nodes[0], frozenset())


def test_attack_two_sybils_cannot_freeze_a_pair_among_four_honest_nodes():
    nodes = [with_noise("pair", 2_000_000) for _ in range(2)]
    nodes += [with_noise("pair", 50_000) for _ in range(4)]
    assert frozen_pairs(nodes) == frozenset()


def test_attack_one_node_with_most_of_the_work_cannot_freeze_its_own_conviction():
    large = with_noise("pair", 2_000_000, count=40)
    nodes = [large, with_noise("pair", 50_000, count=5), with_noise("pair", 50_000, count=5)]
    assert large.crossed_by is not None and frozen_pairs(nodes) == frozenset()


def test_attack_many_small_identities_do_not_outvote_the_audited_tokens():
    sybils = [with_noise("pair", 8_000_000, count=10) for _ in range(6)]
    honest = [with_noise("pair", 50_000, count=40) for _ in range(5)]
    assert all(n.pairs["pair"].value > 20 for n in sybils)
    assert frozen_pairs(sybils + honest) == frozenset()


async def convicting(world, kit, names, margins, rounds):
    for _ in range(rounds):
        for name in names:
            world.serve(name, margins)
    app = world.app()
    await kit.settle(world, app)
    return app.service.view


async def test_attack_more_convicted_sybils_than_honest_nodes_freeze_nothing(world, kit):
    """Nor do the cheats of the past, once they outnumber the living."""
    honest, sybils = ["a", "b", "c"], ["s1", "s2", "s3", "s4"]
    for name in (*honest, *sybils, "cheat"):
        world.add_node(name)
    app = world.app()
    await kit.drive(world, app, app.service.ready.is_set)
    await convicting(world, kit, honest, [0.0] * 50, 2)
    for name in sybils:
        view = await convicting(world, kit, [name], WRONG, 6)
    assert all(view.convicted(world.nodes[name].identity) for name in sybils)
    view = await convicting(world, kit, ["cheat"], WRONG, 6)
    assert view.convicted(world.nodes["cheat"].identity)
    assert not any(view.convicted(world.nodes[name].identity) for name in honest)


async def test_a_calibration_under_which_honest_nodes_look_guilty_still_freezes(world, kit):
    names = ["a", "b", "c", "d"]
    for name in names:
        world.add_node(name)
    app = world.app()
    await kit.drive(world, app, app.service.ready.is_set)
    view = await convicting(world, kit, names, [0.0] * 40 + [0.1] * 10, 12)
    nodes = [world.nodes[name].identity for name in names]
    assert all(view.nodes[node].pooled.crossed_by is not None for node in nodes)
    assert not world.ledger.convicted and {state_of(view, node) for node in nodes} == {"frozen"}


# Hostile bytes.


@settings(
    max_examples=1500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_hostile_leaves_never_crash_or_change_the_evidence(forger, data):
    view = forger.fold()
    before = wealth(forger).r
    valid = [e.body for e in forger.world.ledger.entries]
    body = bytearray(data.draw(st.sampled_from(valid) | st.binary(max_size=200)))
    for _ in range(data.draw(st.integers(0, 6))):
        if body:
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    kind = data.draw(st.sampled_from(KINDS) | st.text(max_size=10))
    entry = LogEntry(index=view.next_index, kind=kind, body=bytes(body))
    view.apply(entry)
    view.next_index = len(forger.world.ledger.entries)
    assert view.node(forger.world.nodes["good"].identity).pooled.wealth.r == before


def test_memory_is_bounded():
    recent = Recent(100)
    for number in range(10_000):
        recent.put(number, number)
    assert len(recent) == 100 and recent.get(0) is None and recent.get(9_999) == 9_999


def test_leaves_seen_twice_count_once(forger):
    me = forger.world.verifiers[0]
    forger.log(forger.verdict(me), me)
    forger.fold()
    for entry in list(forger.world.ledger.entries):
        forger.view.apply(entry)
    assert wealth(forger).r == 1


def test_other_kinds_of_leaves_pass_by(forger):
    entry = LogEntry(index=forger.view.next_index, kind="new-kind", body=os.urandom(50))
    assert forger.view.apply(entry) == ""


def truncated(transcript):
    del transcript.output_token_ids[-5:]


def beyond_the_vocabulary(transcript):
    transcript.output_token_ids[3] = 2**31


def other_tokens(transcript):
    transcript.output_token_ids[3] += 1


@pytest.mark.parametrize("forge", [truncated, beyond_the_vocabulary, other_tokens])
async def test_attack_a_router_frames_a_node_with_a_forged_transcript(make_world, kit, forge):
    """It paid for the receipt, so it had the signed tokens: what it shows instead is its own."""
    world = make_world()
    node = world.add_node("good")
    app = world.app()
    await kit.drive(world, app, app.service.ready.is_set)
    digest = world.serve("good", [0.0] * 50)
    forge(world.transcripts[digest])
    app = world.app()
    await kit.settle(world, app)
    (verdict,) = world.ledger.of_kind("verdict", Verdict)
    assert verdict.outcome == Verdict.MISSING_TRANSCRIPT and not verdict.l0_failure
    assert app.service.view.nodes[node].pooled.scored == 0


@pytest.mark.parametrize("margins", [WRONG, [0.0] * 50])
async def test_attack_a_node_revokes_its_key_once_it_is_audited(world, kit, margins):
    """A receipt is judged by the keys of its leaf. Else a cheat that sees audit requests would turn
    margins into a signature that does not hold, and an honest node that changes its key would
    be refunded away."""
    root = Ed25519PrivateKey.generate()
    world.nodes["node"] = signer = kit.signer(world.market_id, root=root)
    world.ledger.log_envelope(signer.key_event)
    app = world.app()
    await kit.drive(world, app, app.service.ready.is_set)
    receipt = world.serve("node", margins)
    world.ledger.log_envelope(kit.revocation(signer, root))
    late = world.serve("node", margins)
    app = world.app()
    await kit.settle(world, app)
    found = {v.receipt_digest: v for v in world.ledger.of_kind("verdict", Verdict)}
    assert found[receipt].scored_tokens == 50 and not found[receipt].l0_failure
    assert found[late].l0_failure == "signature"
    assert app.service.view.nodes[signer.identity].pooled.scored == 1
