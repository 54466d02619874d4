"""The whole verifier against a small market: verdicts, refunds, convictions, calibration."""

import pytest

from trueweight.protos.audit import check_reveal
from trueweight.protos.errors import DeadlineExceeded, EngineError, NotFound
from trueweight.protos.evidence import Wealth, sum_nano
from trueweight.protos.v1 import audit_pb2, market_pb2
from trueweight.protos.v1.audit_pb2 import AuditRequest, Conviction, EpochOpen, Verdict
from trueweight.protos.v1.market_pb2 import EngineFingerprint
from trueweight.protos.v1.node_pb2 import ScoreItem, ScoreResponse, ScoreResult
from trueweight.verifier import reference
from trueweight.verifier.epochs import RatePolicy
from trueweight.verifier.plot import write_png
from trueweight.verifier.reference import Scorer
from trueweight.verifier.report import explain, status_rows

HONEST = [0.0] * 199 + [0.0078125]
CHEAT = [0.0] * 180 + [0.1] * 20
WRONG = [3.0] * 50


async def opened(world, kit, app):
    await kit.drive(world, app, app.service.ready.is_set)


async def test_an_honest_node_is_scored_and_stays_clear(world, kit):
    world.add_node("good")
    await opened(world, kit, world.app())
    for _ in range(12):
        world.serve("good", HONEST)
    app = world.app()
    await kit.settle(world, app)
    verdicts = world.ledger.of_kind("verdict", Verdict)
    assert [v.outcome for v in verdicts] == [Verdict.SCORED] * 12
    assert {v.sum_x_nano for v in verdicts} == {15_625_000}
    assert {v.exact_tokens for v in verdicts} == {199}
    assert not world.ledger.convicted and not world.ledger.refunds
    (row,) = status_rows(app.service.view)
    assert (row.state, row.audits, row.audited_tokens) == ("clear", 12, 2400)
    assert row.wealth < 1


async def test_the_cheat_and_only_the_cheat_is_convicted_once(world, kit):
    good, bad = world.add_node("good"), world.add_node("bad")
    await opened(world, kit, world.app())
    for _ in range(20):
        world.serve("good", HONEST)
        world.serve("bad", CHEAT)
    app = world.app()
    await kit.settle(world, app)
    assert list(world.ledger.convicted) == [bad]
    (conviction,) = world.ledger.of_kind("conviction", Conviction)
    assert conviction.node_id == bad and conviction.wealth_log10_milli >= 6000
    assert conviction.verdicts < 20
    (suspension,) = world.ledger.of_kind("suspension", market_pb2.Suspension)
    assert suspension.node_id == bad and not suspension.lifted
    rows = {r.node_id: r for r in status_rows(app.service.view)}
    assert rows[bad].state == "convicted" and rows[good].state == "clear"
    assert "clients are refunded" in explain(app.service.view, bad).words


async def test_clients_are_refunded_from_the_change_point_on(world, kit):
    world.add_node("turncoat")
    await opened(world, kit, world.app())
    for _ in range(15):
        world.serve("turncoat", HONEST)
    first_bad = world.serve("turncoat", CHEAT)
    for _ in range(25):
        world.serve("turncoat", CHEAT)
    app = world.app()
    await kit.settle(world, app)
    (conviction,) = world.ledger.of_kind("conviction", Conviction)
    assert conviction.change_point_index == app.service.view.receipts.get(first_bad).index


async def test_an_answer_far_outside_is_refunded_at_once(world, kit):
    world.add_node("bad")
    await opened(world, kit, world.app())
    digest = world.serve("bad", WRONG)
    await kit.settle(world, world.app())
    (verdict,) = world.ledger.of_kind("verdict", Verdict)
    assert verdict.outcome == Verdict.REFUND
    assert list(world.ledger.refunds) == [digest]
    assert not world.ledger.convicted


async def test_a_missing_transcript_refunds_the_client_and_is_no_evidence(world, kit):
    node = world.add_node("good")
    await opened(world, kit, world.app())
    digest = world.serve("good", HONEST, keep_transcript=False)
    app = world.app()
    await kit.settle(world, app)
    (verdict,) = world.ledger.of_kind("verdict", Verdict)
    assert verdict.outcome == Verdict.MISSING_TRANSCRIPT
    assert list(world.ledger.refunds) == [digest]
    assert app.service.view.nodes[node].pooled.scored == 0


async def test_a_lying_receipt_is_refunded_naming_the_failed_check(world, kit):
    world.add_node("liar")
    await opened(world, kit, world.app())

    def fewer(receipt):
        receipt.total_us = 5
        receipt.first_token_us = 1
        receipt.queue_us = 0

    digest = world.serve("liar", HONEST, lie=fewer)
    await kit.settle(world, world.app())
    (verdict,) = world.ledger.of_kind("verdict", Verdict)
    assert (verdict.outcome, verdict.l0_failure) == (Verdict.INVALID_RECEIPT, "durations")
    assert list(world.ledger.refunds) == [digest]


async def test_a_class_without_calibration_cannot_convict(world, kit):
    node = world.add_node("odd")
    await opened(world, kit, world.app())
    cut = market_pb2.SamplingParams(temperature=1, top_p=0.5, repetition_penalty=1)
    for _ in range(10):
        world.serve("odd", CHEAT, sampling=cut)
    app = world.app()
    await kit.settle(world, app)
    assert {v.outcome for v in world.ledger.of_kind("verdict", Verdict)} == {Verdict.UNCALIBRATED}
    assert app.service.view.nodes[node].pooled.scored == 0 and not world.ledger.convicted


async def test_calibration_applies_forward_only(world, kit):
    node = world.add_node("odd")
    await opened(world, kit, world.app(measured=()))
    world.serve("odd", CHEAT)
    app = world.app()  # this one has the calibration and publishes it, after the receipt
    await kit.settle(world, app)
    assert len(world.ledger.of_kind("calibration", audit_pb2.Calibration)) == 1
    (verdict,) = world.ledger.of_kind("verdict", Verdict)
    assert verdict.outcome == Verdict.UNCALIBRATED
    assert app.service.view.nodes[node].pooled.scored == 0


async def test_receipts_before_the_first_epoch_are_not_owed(world, kit):
    world.add_node("early")
    world.serve("early", CHEAT)
    await kit.settle(world, world.app())
    assert not world.ledger.of_kind("audit-request", AuditRequest)


async def test_scores_are_asked_for_in_batches(world, kit):
    world.add_node("good")
    await opened(world, kit, world.app())
    for _ in range(64):
        world.serve("good", HONEST)
    await kit.settle(world, world.app())
    assert sum(world.score_batches) == 64
    assert max(world.score_batches) <= 32 and len(world.score_batches) < 20


async def test_a_reference_that_is_down_delays_and_changes_no_verdict(world, kit):
    world.add_node("good")
    await opened(world, kit, world.app())
    world.serve("good", HONEST)
    world.reference_down = True
    app = world.app()
    began = world.clock.now_unix_ms()
    await kit.drive(world, app, lambda: world.clock.now_unix_ms() > began + 200_000)
    assert not world.ledger.of_kind("verdict", Verdict)
    world.reference_down = False
    await kit.settle(world, world.app())
    assert [v.outcome for v in world.ledger.of_kind("verdict", Verdict)] == [Verdict.SCORED]


async def test_epochs_roll_over_and_old_secrets_are_revealed(world, kit):
    world.add_node("good")
    policy = RatePolicy(epoch_ms=20_000)
    app = world.app(policy=policy)
    await opened(world, kit, app)
    world.serve("good", HONEST)
    app = world.app(policy=policy)
    await kit.drive(world, app, lambda: len(app.service.agenda.my_epochs) >= 4)
    opens = world.ledger.of_kind("epoch-open", EpochOpen)
    reveals = world.ledger.of_kind("epoch-reveal", audit_pb2.EpochReveal)
    assert [o.epoch for o in opens][:3] == [1, 2, 3]
    by_epoch = {o.epoch: o.commitment for o in opens}
    assert len(reveals) >= 2
    for reveal in reveals:
        check_reveal(reveal.secret, by_epoch[reveal.epoch])


async def test_a_picture_of_the_wealth(world, kit, tmp_path):
    node = world.add_node("bad")
    await opened(world, kit, world.app())
    for _ in range(3):
        world.serve("bad", WRONG)
    app = world.app()
    await kit.settle(world, app)
    path = tmp_path / "wealth.png"
    pytest.importorskip("matplotlib")
    write_png(explain(app.service.view, node), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def until(state, margins, mu0=400_000):
    """Audits with these margins after which a node is in this state for the first time."""
    wealth, count = Wealth(), 0
    while wealth.state != state:
        wealth, count = wealth.add(sum_nano(margins), len(margins), mu0), count + 1
    return count


@pytest.mark.parametrize(
    "state,words", [("clear", "beyond chance"), ("suspect", "audited in full from the next epoch")]
)
async def test_explain_says_in_words_why_a_node_is_not_convicted(world, kit, state, words):
    small = [0.0] * 180 + [0.02] * 20
    node = world.add_node("node")
    await opened(world, kit, world.app())
    for _ in range(until("suspect", small) if state == "suspect" else 1):
        world.serve("node", small)
    app = world.app()
    await kit.settle(world, app)
    found = explain(app.service.view, node)
    assert found.state == state and words in found.words
    assert "times as much" in found.words and f"{len(found.steps)} audits" in found.words
    assert found.steps[-1].wealth == app.service.view.nodes[node].pooled.wealth.value


async def test_explain_says_in_words_that_a_calibration_is_in_doubt(world, kit):
    nodes = [world.add_node(name) for name in ("a", "b", "c")]
    await opened(world, kit, world.app())
    for _ in range(12):
        for name in ("a", "b", "c"):
            world.serve(name, CHEAT)
    app = world.app()
    await kit.settle(world, app)
    assert not world.ledger.convicted
    for node in nodes:
        found = explain(app.service.view, node)
        assert found.state == "frozen" and "nobody is convicted by it" in found.words


async def test_a_reference_that_rounds_like_the_nodes_is_refused_with_what_to_do():
    class Rounding:
        async def score(self, manifest_digest, items):
            fingerprint = EngineFingerprint(dtype="bfloat16")
            return ScoreResponse(results=[ScoreResult() for _ in items], fingerprint=fingerprint)

        async def close(self):
            pass

    scorer = Scorer(Rounding())
    with pytest.raises(EngineError, match="bfloat16") as refused:
        await scorer.score(b"m" * 32, ScoreItem(output_token_ids=[1]))
    assert "--dtype float32" in refused.value.hint
    assert scorer.scored_items == 0
    await scorer.close()


async def test_weights_that_the_reference_does_not_have_keep_no_epoch_open(world, kit, monkeypatch):
    """A market that sells two models: what one verifier cannot score must not hold the rest."""
    world.add_node("good")
    await kit.drive(world, app := world.app(), app.service.ready.is_set)
    other = world.transcripts[world.serve("good", [0.0] * 30)].output_token_ids
    world.serve("good", [0.0] * 30)
    score = world.score

    async def score_its_own(manifest_digest, items):
        if any(item.output_token_ids == other for item in items):
            raise NotFound("these weights are not served here")
        return await score(manifest_digest, items)

    monkeypatch.setattr(world, "score", score_its_own)
    monkeypatch.setattr(reference, "MAX_BATCH_ITEMS", 1)
    app = world.app(policy=RatePolicy(epoch_ms=60_000))
    await kit.drive(world, app, lambda: app.service.view.reveals)
    outcomes = [v.outcome for v in world.ledger.of_kind("verdict", Verdict)]
    assert sorted(outcomes) == [Verdict.SCORED, Verdict.UNCALIBRATED] and not world.ledger.refunds


async def test_attack_long_requests_fill_every_batch_beyond_its_deadline(world, kit, monkeypatch):
    """A reference that is too slow for a whole batch must not be asked for the same one again and
    again."""
    world.add_node("good")
    await kit.drive(world, app := world.app(), app.service.ready.is_set)
    for _ in range(16):
        world.serve("good", [0.0] * 200)
    score = world.score

    async def score_slowly(manifest_digest, items):
        if sum(len(item.output_token_ids) for item in items) > 1_000:
            raise DeadlineExceeded("scoring did not end in time")
        return await score(manifest_digest, items)

    monkeypatch.setattr(world, "score", score_slowly)
    await kit.settle(world, world.app())
    verdicts = world.ledger.of_kind("verdict", Verdict)
    assert [v.outcome for v in verdicts] == [Verdict.SCORED] * 16
    assert 2 <= max(world.score_batches) <= 5
