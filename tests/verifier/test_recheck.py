"""Bundles replay, forged ones do not, and hostile transcripts and bundles crash nobody."""

import asyncio
import json
import os
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rpds import HashTrieMap

from trueweight.protos.envelope import digest_of, seal
from trueweight.protos.errors import BadSignature, InvalidRequest, NotFound
from trueweight.protos.receipt_bundle import ReceiptBundle
from trueweight.protos.transcript_box import seal_data, wrap_key
from trueweight.protos.v1.audit_pb2 import Transcript, Verdict
from trueweight.protos.v1.market_pb2 import SamplingParams
from trueweight.protos.v1.router_pb2 import OpenTranscriptResponse
from trueweight.verifier.appeal import missing_requests, rerun
from trueweight.verifier.audit import Auditor
from trueweight.verifier.bundle import Bundle, read_bundle, write_bundle
from trueweight.verifier.epochs import EpochPlan, SecretStore
from trueweight.verifier.export import (
    find_any_verdict,
    find_verdict,
    held_transcript,
    make_bundle,
    open_transcript,
)
from trueweight.verifier.recheck import Replay, Step, replay, with_log
from trueweight.verifier.reference import Scorer
from trueweight.verifier.selection import ReceiptLeaf
from trueweight.verifier.state import LogView
from trueweight.verifier.transcripts import unseal
from trueweight.verifier.verdicts import AuditContext

HONEST = [0.0] * 39 + [0.01]
WRONG = [3.0] * 50


@pytest.fixture
async def judged(world, kit):
    """A market with verdicts: (world, app, receipt of an honest answer, of a wrong one)."""
    world.add_node("good"), world.add_node("bad")
    app = world.app()
    await kit.drive(world, app, app.service.ready.is_set)
    good = world.serve("good", HONEST)
    bad = [world.serve("bad", WRONG) for _ in range(5)]
    app = world.app()
    await kit.settle(world, app)
    return world, app, good, bad[0]


async def bundle_of(world, app, receipt_digest):
    view, agenda = app.service.view, app.service.agenda
    index = view.receipts.get(receipt_digest).index
    found = find_verdict(view, agenda.verifier_id, index)
    transcript = await open_transcript(view, agenda.secrets, world, found)
    return await make_bundle(view, world.ledger, found, transcript)


@pytest.mark.parametrize("which", [2, 3], ids=["honest", "wrong"])
async def test_an_honest_verdict_replays(judged, which, tmp_path):
    world, app, *_ = judged
    path = tmp_path / "evidence.json"
    write_bundle(path, await bundle_of(world, app, judged[which]))
    assert path.stat().st_mode & 0o077 == 0
    found = await replay(read_bundle(path.read_bytes()), world.market, Scorer(world))
    assert found.agrees, found.steps
    assert [s.number for s in found.steps] == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(InvalidRequest, match="exists already"):
        write_bundle(path, await bundle_of(world, app, judged[which]))


async def test_attack_a_convicted_node_floods_and_revokes_its_keys(world, kit):
    """What was certified when its receipt was logged still is what a bundle is judged by."""
    root = Ed25519PrivateKey.generate()
    world.nodes["bad"] = signer = kit.signer(world.market_id, root=root)
    world.ledger.log_envelope(signer.key_event)
    for sequence in range(2, 20):
        more = kit.signer(world.market_id, root=root, sequence=sequence)
        world.ledger.log_envelope(more.key_event)
    app = world.app()
    await kit.drive(world, app, app.service.ready.is_set)
    receipt = world.serve("bad", WRONG)
    world.ledger.log_envelope(kit.revocation(signer, root, sequence=20))
    app = world.app()
    await kit.settle(world, app)
    bundle = await bundle_of(world, app, receipt)
    found = with_log(await replay(bundle, world.market, Scorer(world)), app.service.view)
    assert found.agrees and len(found.steps) == 9, found.steps


async def test_a_lying_verdict_does_not_replay(judged):
    world, app, good, _ = judged
    honest = await bundle_of(world, app, good)
    verdict = Verdict()
    found = find_verdict(app.service.view, world.verifiers[0].identity, _index(app, good))
    verdict.CopyFrom(found.leaf.message)
    verdict.sum_x_nano = 20 * 10**9
    verdict.outcome = Verdict.REFUND
    forged = _with(honest, verdict=seal(verdict, world.verifiers[0]))
    result = await replay(forged, world.market, Scorer(world))
    assert not result.agrees
    assert [s.name for s in result.steps if not s.passed] == ["margins", "outcome"]


def _index(app, receipt_digest):
    return app.service.view.receipts.get(receipt_digest).index


def _with(bundle, **changes):
    fields = {
        "verdict": bundle.verdict,
        "registry_entry": bundle.registry_entry,
        "calibration": bundle.calibration,
        "key_events": bundle.key_events,
        "transcript": bundle.transcript,
    }
    return Bundle(**{**fields, **changes})


async def test_attack_bundles_with_swapped_parts(judged, kit):
    world, app, good, bad = judged
    mine, other = await bundle_of(world, app, good), await bundle_of(world, app, bad)
    stranger = kit.signer(world.market_id)
    swapped = [
        _with(mine, transcript=other.transcript),
        _with(mine, registry_entry=mine.calibration),
        _with(mine, calibration=mine.verdict),
        _with(mine, calibration=b""),
        _with(mine, key_events=()),
        _with(mine, verdict=seal(Verdict(market_id=world.market_id), stranger)),
        _with(mine, verdict=b"nothing"),
        _with(mine, transcript=Transcript()),
    ]
    for number, forged in enumerate(swapped):
        result = await replay(forged, world.market, Scorer(world))
        assert not result.agrees, number


async def refused(world, app, digest, named, **forged):
    """A signed refusal of this receipt, with a transcript that was damaged to fit."""
    mine = await bundle_of(world, app, digest)
    found = find_verdict(app.service.view, world.verifiers[0].identity, _index(app, digest))
    verdict, transcript = Verdict(), Transcript()
    verdict.CopyFrom(found.leaf.message)
    transcript.CopyFrom(mine.transcript)
    for name in ("sum_x_nano", "scored_tokens", "exact_tokens", "calibration_digest"):
        verdict.ClearField(name)
    verdict.outcome, verdict.l0_failure = Verdict.INVALID_RECEIPT, named
    for name, value in forged.items():
        if isinstance(value, list):
            del getattr(transcript, name)[:]
            getattr(transcript, name).extend(value)
        else:
            setattr(transcript, name, value)
    bundle = _with(mine, verdict=seal(verdict, world.verifiers[0]), transcript=transcript)
    return bundle, verdict


@pytest.mark.parametrize("named", ["", "erased", "counts", "durations", "prompt_digest"])
async def test_attack_an_honest_receipt_is_refused_for_nothing(judged, named):
    world, app, good, _ = judged
    forged, _ = await refused(world, app, good, named)
    result = await replay(forged, world.market, Scorer(world))
    assert [s.name for s in result.steps if not s.passed] == ["L0"]


@pytest.mark.parametrize(
    ("named", "damage"),
    [
        ("prompt_digest", {"prompt_token_ids": [9, 9, 9]}),
        ("prompt_digest", {"prompt_token_ids": [5]}),
        ("prefix_digest", {"prefix_token_ids": [5]}),
        ("output_digest", {"output_token_ids": [9] * len(HONEST)}),
        ("over_reported", {"output_token_ids": [9]}),
        ("token_ids", {"output_token_ids": [2**31] * len(HONEST)}),
        ("output_digest", {"salt": b"x" * 16}),
    ],
)
async def test_attack_a_transcript_is_damaged_until_it_fails_the_named_check(judged, named, damage):
    world, app, good, _ = judged
    forged, _ = await refused(world, app, good, named, **damage)
    result = await replay(forged, world.market, Scorer(world))
    assert not result.agrees


async def test_attack_a_bundle_leaves_out_the_key_that_signed_the_receipt(judged, kit):
    """Without any key of the node it is no bundle; with another one only, the log has the right."""
    world, app, good, _ = judged
    forged, verdict = await refused(world, app, good, "signature")
    assert not (await replay(_with(forged, key_events=()), world.market, Scorer(world))).agrees
    view, receipt = fold(world), forged.transcript.receipt_envelope
    key = (world.verifiers[0].identity, good)
    known = view.verdicts.get(key)
    view.verdicts.put(key, replace(known, leaf=replace(known.leaf, message=verdict)))
    step = Step(5, "L0", True, "signature")
    found = with_log(Replay((step,), verdict, receipt=receipt), view)
    assert [s.name for s in found.steps if not s.passed] == ["key"]
    node = world.nodes["good"].identity
    others = {k: v for k, v in view.ring.keys.items() if v[0] != node}
    view.ring = replace(view.ring, keys=HashTrieMap(others))
    assert with_log(Replay((step,), verdict, receipt=receipt), view).agrees


async def test_a_refusal_for_what_a_node_did_replays(world, kit):
    def hasty(receipt):
        receipt.queue_us, receipt.first_token_us, receipt.total_us = 0, 1, 5

    world.add_node("liar")
    app = world.app()
    await kit.drive(world, app, app.service.ready.is_set)
    digest = world.serve("liar", HONEST, lie=hasty)
    app = world.app()
    await kit.settle(world, app)
    result = await replay(await bundle_of(world, app, digest), world.market, Scorer(world))
    assert with_log(result, fold(world)).agrees and result.verdict.l0_failure == "durations"


async def test_a_refund_without_calibration_replays(world, kit):
    world.add_node("odd")
    app = world.app()
    await kit.drive(world, app, app.service.ready.is_set)
    cut = SamplingParams(temperature=1, top_p=0.5, repetition_penalty=1)
    digest = world.serve("odd", WRONG, sampling=cut)
    app = world.app()
    await kit.settle(world, app)
    result = await replay(await bundle_of(world, app, digest), world.market, Scorer(world))
    checked = with_log(result, fold(world))
    assert checked.agrees and checked.recomputed.outcome == Verdict.REFUND
    assert "no evidence" in checked.steps[-1].detail


def fold(world):
    view = LogView(world.market)
    for entry in world.ledger.entries:
        view.apply(entry)
    return view


async def test_an_honest_bundle_is_in_the_log_and_its_calibration_was_in_force(judged):
    world, app, good, bad = judged
    for digest in (good, bad):
        found = await replay(await bundle_of(world, app, digest), world.market, Scorer(world))
        checked = with_log(found, fold(world))
        assert checked.agrees and [s.name for s in checked.steps[-2:]] == ["log", "in force"]


async def test_attack_a_bundle_about_a_verdict_that_was_never_logged(judged):
    """Signed by a verifier and true in itself, but nobody was told before."""
    world, app, good, _ = judged
    mine = await bundle_of(world, app, good)
    found = find_verdict(app.service.view, world.verifiers[0].identity, _index(app, good))
    verdict = Verdict()
    verdict.CopyFrom(found.leaf.message)
    verdict.issued_at_unix_ms += 1
    result = await replay(
        _with(mine, verdict=seal(verdict, world.verifiers[0])), world.market, Scorer(world)
    )
    assert result.agrees
    checked = with_log(result, fold(world))
    assert [s.name for s in checked.steps if not s.passed] == ["log"]


@pytest.mark.parametrize(
    ("kind", "failed"), [("audit-request", "log"), ("calibration", "in force"), ("receipt", "log")]
)
async def test_attack_a_bundle_whose_request_calibration_or_receipt_is_not_logged(
    judged, kind, failed
):
    world, app, good, _ = judged
    result = await replay(await bundle_of(world, app, good), world.market, Scorer(world))
    view = LogView(world.market)
    for entry in world.ledger.entries:
        if entry.kind != kind:
            view.apply(entry)
    checked = with_log(result, view)
    assert [s.name for s in checked.steps if not s.passed] == [failed]


async def test_whoever_holds_the_text_makes_the_bundle_without_the_verifier(judged, tmp_path):
    """A client from its receipt file; a node from a bundle that somebody gave it."""
    world, app, good, bad = judged
    view = fold(world)
    found = find_any_verdict(view, _index(app, bad))
    mine = world.transcripts[bad]
    receipt_file = ReceiptBundle(
        request_id=b"r" * 16,
        assignments=(mine.assignment_envelope,),
        receipts=(mine.receipt_envelope,),
        bill=b"",
        key_events=(),
        salt=mine.salt,
        prompt_token_ids=tuple(mine.prompt_token_ids),
        prefix_token_ids=(tuple(mine.prefix_token_ids),),
        output_token_ids=(tuple(mine.output_token_ids),),
    )
    path = tmp_path / "evidence.json"
    write_bundle(path, await bundle_of(world, app, bad))
    for data in (json.dumps(receipt_file.to_json()).encode(), path.read_bytes()):
        held = held_transcript(data, found.leaf.message.receipt_digest)
        assert held == mine
        made = await make_bundle(view, world.ledger, found, held)
        result = await replay(made, world.market, Scorer(world))
        assert with_log(result, view).agrees
        with pytest.raises(NotFound):
            held_transcript(data, good)
    with pytest.raises(NotFound):
        find_any_verdict(view, 10**6)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=50).map(b"trueweight-evidence-1".__add__))
def test_hostile_files_are_no_transcripts(data):
    with pytest.raises((InvalidRequest, NotFound)):
        held_transcript(data, b"r" * 32)


async def test_a_changed_output_is_not_held_against_the_node(judged):
    world, app, good, _ = judged
    mine = await bundle_of(world, app, good)
    mine.transcript.output_token_ids[3] += 1
    result = await replay(mine, world.market, Scorer(world))
    assert [s.name for s in result.steps if not s.passed] == ["failed"]
    assert "another output" in result.steps[-1].detail


async def test_an_appeal_on_an_honest_reference_upholds_a_cheats_conviction(judged, kit):
    world, app, _, _ = judged
    service, me = app.service, world.verifiers[0].identity
    bad = world.nodes["bad"].identity
    found = await rerun(service.view, again(world, app), me, bad)
    assert found.upheld and len(found.retried) == 3
    assert found.wealth.value == pytest.approx(found.wealth_then)


def again(world, app):
    return Auditor(app.service.view, app.service.agenda.secrets, world, Scorer(world))


async def test_an_appeal_against_a_broken_reference_is_not_upheld(judged):
    world, app, _, _ = judged
    bad = world.nodes["bad"].identity
    world.margins = {key: [0.0] * len(value) for key, value in world.margins.items()}
    found = await rerun(app.service.view, again(world, app), world.verifiers[0].identity, bad)
    assert not found.upheld and found.wealth_then >= 10**6


async def test_another_verifier_re_runs_an_appeal_with_transcripts_opened_to_itself(
    make_world, kit
):
    world = make_world(verifier_count=2)
    bad, (convicting, other) = world.add_node("bad"), (v.identity for v in world.verifiers)
    await kit.drive(world, (app := world.app()), app.service.ready.is_set)
    for _ in range(5):
        world.serve("bad", WRONG)
    await kit.settle(world, (app := world.app()))
    secrets = SecretStore(world.directory / "verifier-1", os.urandom)
    view = app.service.view
    assert view.node(bad).by_verifier[convicting].state == "convict"
    auditor = Auditor(view, secrets, world, Scorer(world))
    refused = await rerun(view, auditor, convicting, bad, other)
    assert all("request" in r.error for r in refused.retried)
    reader = EpochPlan(world.market_id, other, 0, 1)
    requests = missing_requests(view, convicting, bad, reader, secrets.wrapping())
    assert len(requests) == len(refused.retried)
    for request in requests:
        world.ledger.log_envelope(seal(request, world.verifiers[1]))
    for entry in world.ledger.entries[view.next_index :]:
        view.apply(entry)
    assert not missing_requests(view, convicting, bad, reader, secrets.wrapping())
    found = await rerun(view, auditor, convicting, bad, other)
    assert found.upheld and not any(r.error for r in found.retried)


async def test_an_appeal_says_which_texts_are_gone(judged):
    world, app, _, _ = judged
    world.transcripts.clear()
    bad = world.nodes["bad"].identity
    found = await rerun(app.service.view, again(world, app), world.verifiers[0].identity, bad)
    assert all("erased" in r.error for r in found.retried) and not found.upheld


def test_only_known_leaves_can_be_exported(world):
    app = world.app()
    with pytest.raises(NotFound):
        find_verdict(app.service.view, world.verifiers[0].identity, 7)


# Hostile bytes.


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=300))
def test_hostile_bundles_are_refused(data):
    with pytest.raises(InvalidRequest):
        read_bundle(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_hostile_json_bundles_are_refused(data):
    names = ("verdict", "registry_entry", "calibration", "key_events", "transcript")
    document = {name: data.draw(json_values) for name in names}
    document["format"] = "trueweight-evidence-1"
    try:
        bundle = read_bundle(json.dumps(document).encode())
    except InvalidRequest:
        return
    assert isinstance(bundle, Bundle)


def test_a_bundle_bomb_is_refused():
    with pytest.raises(InvalidRequest):
        read_bundle(b"[" * 100_000)
    with pytest.raises(InvalidRequest, match="too large"):
        read_bundle(b" " * (64 * 1024 * 1024 + 1))


KEY = X25519PrivateKey.generate()
LEAF = ReceiptLeaf(5, 0, b"r" * 32, b"a" * 32, "node", 3)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=64), st.binary(max_size=64), st.binary(max_size=20), st.binary())
def test_hostile_sealed_transcripts_are_refused(ephemeral, wrapped, nonce, ciphertext):
    answer = OpenTranscriptResponse(
        ephemeral_public_key=ephemeral, wrapped_key=wrapped, nonce=nonce, ciphertext=ciphertext
    )
    with pytest.raises(BadSignature):
        unseal(answer, KEY, LEAF)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_a_router_that_seals_garbage_is_refused(data):
    data_key, nonce = os.urandom(32), os.urandom(12)
    public = KEY.public_key().public_bytes_raw()
    wrapped = wrap_key(data_key, public, LEAF.receipt_digest, os.urandom)
    answer = OpenTranscriptResponse(
        ephemeral_public_key=wrapped.ephemeral_public_key,
        wrapped_key=wrapped.wrapped_key,
        nonce=nonce,
        ciphertext=seal_data(data_key, nonce, data, LEAF.receipt_digest),
    )
    with pytest.raises(BadSignature):
        unseal(answer, KEY, LEAF)


@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_hostile_transcripts_end_in_a_verdict_without_evidence(world, kit, data):
    """The router opens a transcript with some bytes changed; whatever it is, the audit ends."""
    if not world.nodes:
        world.add_node("good")
        world.kept = world.serve("good", HONEST)
        world.original = world.transcripts[world.kept].SerializeToString()
    body = bytearray(world.original)
    for _ in range(data.draw(st.integers(1, 5))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        transcript = Transcript.FromString(bytes(body))
    except Exception:  # noqa: BLE001  (any parse error: the router would send it sealed as it is)
        return
    verdict = asyncio.run(audited(world, transcript))
    if verdict.outcome in (Verdict.SCORED, Verdict.REFUND, Verdict.UNCALIBRATED):
        assert digest_of(transcript.receipt_envelope) == world.kept
        assert list(transcript.output_token_ids) == list(
            Transcript.FromString(world.original).output_token_ids
        )


async def audited(world, transcript):
    view = LogView(world.market)
    for entry in world.ledger.entries:
        view.apply(entry)
    receipt = view.receipts.get(world.kept)
    secrets = SecretStore(world.directory / "fuzz", os.urandom)
    auditor = Auditor(view, secrets, world, Scorer(world))

    async def opened(_context):
        return transcript

    object.__setattr__(auditor, "_open", opened)
    context = AuditContext(world.market_id, world.verifiers[0].identity, 1, receipt, 0)
    return await auditor.run(context, last_try=True)
