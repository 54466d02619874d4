"""100,000 hostile receipts, manifests, leaves and bundles: never a crash, a hang or growth.

Half of the cases are signed by somebody who is entitled to sign, so that they get past the
signatures: the ring here believes every signature of a known key, which also keeps a case cheap.
"""

import base64
import json

import pytest
from google.protobuf.message import DecodeError

from trueweight.protos.envelope import (
    kind_of_type,
    message_class,
)
from trueweight.protos.errors import TrueweightError
from trueweight.protos.identity import KeyRing
from trueweight.protos.manifest import check_manifest, locate_chunk
from trueweight.protos.receipts import ReceiptFacts, check_receipt, open_assignment
from trueweight.protos.v1.audit_pb2 import Transcript
from trueweight.protos.v1.envelope_pb2 import Envelope
from trueweight.protos.v1.log_pb2 import LogEntry
from trueweight.protos.v1.model_pb2 import Manifest
from trueweight.simulation.mutations import Corpus, Mutator
from trueweight.verifier import registry, state
from trueweight.verifier.bundle import read_bundle, write_bundle
from trueweight.verifier.export import find_verdict, make_bundle, open_transcript
from trueweight.verifier.recheck import replay
from trueweight.verifier.reference import Scorer
from trueweight.verifier.state import KINDS, LogView

CASES = 25_000
SMALL = 300


class Gullible(KeyRing):
    """Believes every signature of a key that it knows."""

    def verify(self, operational_key_id, signature, message):
        return self.keys[operational_key_id][0]


def gullible(ring):
    return Gullible(ring.keys, ring.sequences, ring.operators)


def forged(mutator, data):
    """An envelope: its bytes damaged, or one field of what it says, or its payload's bytes."""
    if mutator.random.randrange(3) == 0:
        return mutator.damaged(data)
    envelope = Envelope()
    try:
        envelope.ParseFromString(data)
    except DecodeError:
        return mutator.damaged(data)
    kind = kind_of_type(envelope.payload_type)
    if kind is None or mutator.random.randrange(4) == 0:
        envelope.payload = mutator.damaged(envelope.payload)
        return envelope.SerializeToString()
    message = message_class(kind)()
    try:
        message.ParseFromString(envelope.payload)
    except DecodeError:
        return mutator.damaged(data)
    mutator.spoil(message)
    envelope.payload = message.SerializeToString()
    return envelope.SerializeToString()


@pytest.fixture
async def judged(world, kit):
    """A market with honest and wrong answers, judged."""
    world.add_node("good"), world.add_node("bad")
    app = world.app()
    await kit.drive(world, app, app.service.ready.is_set)
    world.serve("good", [0.0] * 39 + [0.01])
    for _ in range(5):
        world.serve("bad", [3.0] * 50)
    app = world.app()
    await kit.settle(world, app)
    return world, app


async def test_hostile_receipts(judged):
    world, app = judged
    view = app.service.view
    transcript = next(iter(world.transcripts.values()))
    assignment = open_assignment(transcript.assignment_envelope, view.ring, world.market_id)
    mutator, ring = Mutator(1), gullible(view.ring)
    corpus = Corpus(mutator, [transcript.receipt_envelope])

    def behave(data):
        facts = ReceiptFacts(
            assignment=assignment,
            receipt=data,
            salt=transcript.salt,
            prompt=transcript.prompt_token_ids,
            prefix=transcript.prefix_token_ids,
            received=transcript.output_token_ids,
            manifest_digest=assignment.message.manifest_digest,
            vocabulary_size=1000,
        )
        try:
            check_receipt(facts, ring, world.market_id)
        except TrueweightError as error:
            return error.message
        return "accepted"

    assert behave(transcript.receipt_envelope) == "accepted"
    for _ in range(CASES):
        corpus.run(forged(mutator, corpus.pick()), behave)
    assert mutator.behaviours >= 12, "most checks were reached"


async def test_hostile_manifests(judged):
    world, _ = judged
    files = [f"model-{i:05}.safetensors" for i in range(3)]
    honest = Manifest(
        market_id=world.market_id,
        name="m",
        files=[{"path": p, "size_bytes": 3_000_000, "sha256": b"s" * 32} for p in files],
        chunk_root=b"r" * 32,
        chunk_bytes=1 << 20,
        chunk_count=9,
        vocabulary_size=50,
        eos_token_ids=[3],
        max_context_tokens=64,
    )
    mutator = Mutator(2)
    corpus = Corpus(mutator, [honest.SerializeToString()])

    def behave(data):
        manifest = Manifest()
        try:
            manifest.ParseFromString(data)
            check_manifest(manifest)
        except DecodeError:
            return "no manifest"
        except TrueweightError as error:
            return error.message
        # Whatever is believed can be walked: every chunk lies in one file.
        for index in {0, manifest.chunk_count // 2, manifest.chunk_count - 1} - {-1}:
            if 0 <= index < manifest.chunk_count:
                entry, offset = locate_chunk(manifest, index)
                assert 0 <= offset < entry.size_bytes
        return "accepted"

    assert behave(honest.SerializeToString()) == "accepted"
    for _ in range(CASES):
        data = corpus.pick()
        message = Manifest()
        try:
            message.ParseFromString(data)
        except DecodeError:
            corpus.run(mutator.damaged(data), behave)
            continue
        mutator.spoil(message)
        damaged = message.SerializeToString()
        corpus.run(
            mutator.damaged(damaged) if mutator.random.randrange(3) == 0 else damaged, behave
        )
    assert mutator.behaviours >= 7


def sizes(view):
    """How many entries every container of the fold holds."""
    found = {}
    for name, value in (*vars(view).items(), *vars(view.registry).items()):
        if hasattr(value, "__len__") and not isinstance(value, str | bytes):
            found[name] = len(value)
    return found


async def test_hostile_leaves_with_entitled_signatures(judged, monkeypatch):
    """Verdicts, convictions, epochs, bills, ...: even members who sign anything at all do not make
    the fold crash or grow beyond its bounds."""
    world, _ = judged
    for name in ("MAX_RECEIPTS", "MAX_HOLDS", "MAX_EPOCHS", "MAX_NODES"):
        monkeypatch.setattr(state, name, SMALL)
    monkeypatch.setattr(registry, "MAX_MODELS", SMALL)
    view = LogView(world.market)
    view.ring = gullible(view.ring)
    for entry in world.ledger.entries:
        view.apply(entry)
    mutator = Mutator(3)
    corpora = {
        kind: Corpus(mutator, [e.body for e in world.ledger.entries if e.kind == kind] or [b""])
        for kind in KINDS
    }

    def behave(kind, data):
        ignored = view.ignored
        view.apply(LogEntry(index=view.next_index, kind=kind, body=data, merged_at_unix_ms=10**12))
        view.ring = gullible(view.ring)
        if view.ignored == ignored:
            return f"{kind} taken"
        return f"{kind}: {view.last_reason}"

    for _ in range(CASES):
        # Half of them verdicts: what convicts.
        kind = mutator.random.choice((*KINDS, *["verdict"] * len(KINDS)))
        data = corpora[kind].pick()
        data = mutator.damaged(data) if kind == "transfer" else forged(mutator, data)
        corpora[kind].run(data, lambda d, kind=kind: behave(kind, d))
    assert mutator.behaviours >= 30
    assert max(sizes(view).values()) <= 2 * SMALL, sizes(view)


async def test_hostile_evidence_bundles(judged, tmp_path):
    world, app = judged
    view, agenda = app.service.view, app.service.agenda
    found = find_verdict(view, agenda.verifier_id, next(iter(view.receipts.values())).index)
    transcript = await open_transcript(view, agenda.secrets, world, found)
    path = tmp_path / "evidence.json"
    write_bundle(path, await make_bundle(view, world.ledger, found, transcript))
    honest = path.read_bytes()
    market = world.market
    object.__setattr__(market, "ring", gullible(market.ring))
    mutator = Mutator(4)
    corpus = Corpus(mutator, [honest])
    scorer = Scorer(Silent())

    async def behave(data):
        try:
            bundle = read_bundle(data)
        except TrueweightError as error:
            return error.message
        result = await replay(bundle, market, scorer)
        return (
            " ".join(f"{s.number}{s.name}{s.passed}" for s in result.steps)
            + result.steps[-1].detail
        )

    for _ in range(CASES):
        data = corpus.pick()
        case = forged_bundle(mutator, data)
        behaviour = await behave(case)
        corpus.run(case, lambda _, behaviour=behaviour: behaviour)
    assert mutator.behaviours >= 12


class Silent:
    """A reference that never gets to see anything: hostile bundles end before, or here."""

    async def score(self, manifest_digest, items):
        raise TrueweightError("no engine")

    async def close(self):
        pass


def forged_bundle(mutator, data):
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutator.damaged(data)
    if not isinstance(document, dict) or not document or mutator.random.randrange(8) == 0:
        return mutator.damaged(data)
    if mutator.random.randrange(4) == 0:
        return json.dumps(mutator.spoiled_json(document)).encode()
    key = mutator.random.choice(["verdict", "registry_entry", "calibration", "transcript"])
    try:
        inner = base64.b64decode(document.get(key), validate=True)
    except (TypeError, ValueError):
        return mutator.damaged(data)
    document[key] = base64.b64encode(_forged_part(mutator, key, inner)).decode()
    return json.dumps(document).encode()


def _forged_part(mutator, key, inner):
    if key != "transcript":
        return forged(mutator, inner)
    transcript = Transcript()
    try:
        transcript.ParseFromString(inner)
    except DecodeError:
        return mutator.damaged(inner)
    mutator.spoil(transcript)
    return transcript.SerializeToString()
