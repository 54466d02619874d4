"""Making an evidence bundle: the log's envelopes about one audit, and its opened transcript."""

from __future__ import annotations

from trueweight.protos.envelope import digest_of, kind_of_type, parse_envelope, parse_payload
from trueweight.protos.errors import BadSignature, InvalidRequest, NotFound
from trueweight.protos.identity import key_id
from trueweight.protos.receipt_bundle import parse_bundle
from trueweight.protos.receipts import open_assignment
from trueweight.protos.v1.audit_pb2 import Transcript
from trueweight.protos.v1.envelope_pb2 import KeyEvent
from trueweight.protos.v1.log_pb2 import LogEntry
from trueweight.protos.v1.model_pb2 import RegistryEntry
from trueweight.protos.v1.router_pb2 import OpenTranscriptRequest
from trueweight.runtime.ledger_port import LedgerPort
from trueweight.verifier.bundle import FORMAT, MAX_KEY_EVENTS, Bundle, read_bundle
from trueweight.verifier.epochs import SecretStore, wrap_private_key
from trueweight.verifier.leaves import VerdictLeaf
from trueweight.verifier.state import LogView
from trueweight.verifier.transcripts import TranscriptSource, unseal


def find_verdict(view: LogView, verifier_id: str, index: int) -> VerdictLeaf:
    """One's own verdict, by its own log index or its receipt's. Raises NotFound."""
    for verdict in view.verdicts.values():
        message = verdict.leaf.message
        if message.verifier_id == verifier_id and index in (
            verdict.leaf.index,
            message.receipt_log_index,
        ):
            return verdict
    raise NotFound(
        f"leaf {index} is neither a verdict of this verifier nor a receipt it has judged",
        hint="See 'trueweight verifier explain NODE'.",
    )


def find_any_verdict(view: LogView, index: int) -> VerdictLeaf:
    """Anybody's verdict, by its own log index or its receipt's. Raises NotFound."""
    found = [
        v
        for v in view.verdicts.values()
        if index in (v.leaf.index, v.leaf.message.receipt_log_index)
    ]
    if len(found) > 1:
        raise NotFound(
            f"{len(found)} verifiers have judged receipt leaf {index}",
            hint="Name a verdict's own leaf, as 'trueweight verifier explain' shows it.",
        )
    if not found:
        raise NotFound(f"leaf {index} is neither a verdict nor a receipt that was judged")
    return found[0]


def held_transcript(data: bytes, receipt_digest: bytes) -> Transcript:
    """The transcript of a receipt in a file that somebody holds: a client's receipt file, or an
    evidence bundle. What it says is judged at the replay. Raises InvalidRequest or NotFound."""
    if FORMAT.encode() in data[:200]:
        transcript = read_bundle(data).transcript
        if digest_of(transcript.receipt_envelope) != receipt_digest:
            raise NotFound("the bundle holds the transcript of another receipt")
        return transcript
    held = parse_bundle(data)
    for leg, receipt in enumerate(held.receipts):
        if _digest(receipt) == receipt_digest:
            return Transcript(
                assignment_envelope=held.assignments[leg],
                receipt_envelope=receipt,
                salt=held.salt,
                prompt_token_ids=held.prompt_token_ids,
                prefix_token_ids=held.prefix_token_ids[leg],
                output_token_ids=held.output_token_ids[leg],
                delivered_tokens=len(held.output_token_ids[leg]),
            )
    raise NotFound("the receipt file holds another request than the verdict judges")


def _digest(envelope: bytes) -> bytes:
    try:
        return digest_of(envelope)
    except BadSignature as error:
        raise InvalidRequest(f"the receipt file is damaged: {error.message}") from None


async def open_transcript(
    view: LogView, secrets: SecretStore, transcripts: TranscriptSource, found: VerdictLeaf
) -> Transcript:
    """The transcript behind a verdict, by the audit request that is in the log already."""
    message = found.leaf.message
    receipt = view.receipts.get(message.receipt_digest)
    request = view.requests.get((message.verifier_id, message.receipt_digest))
    if receipt is None or request is None:
        raise NotFound("the log's receipt or audit request is too old to be remembered")
    answer = await transcripts.open(
        receipt.router_id,
        OpenTranscriptRequest(audit_request=request.envelope, log_index=request.index),
    )
    key = wrap_private_key(
        secrets.wrapping(), message.receipt_digest, request.message.duplicate_index
    )
    return unseal(answer, key, receipt)


async def make_bundle(
    view: LogView, ledger: LedgerPort, found: VerdictLeaf, transcript: Transcript
) -> Bundle:
    """Collects the envelopes that a replay needs."""
    verdict = found.leaf.message
    receipt = view.receipts.get(verdict.receipt_digest)
    index = receipt.index if receipt else view.next_index
    ring = view.ring_for(transcript.assignment_envelope, index)
    order = open_assignment(transcript.assignment_envelope, ring, view.market.market_id)
    signed_by = {s.key_id for s in parse_envelope(transcript.receipt_envelope).signatures}
    wanted = order.message.manifest_digest
    registry, calibration, events, about_its_key = b"", b"", [], []
    for entry in await _read(ledger, ("registry-entry", "calibration", "key-event")):
        body = entry.body
        kind = kind_of_type(entry.kind) or entry.kind
        if kind == "key-event":
            event = parse_payload(parse_envelope(body), KeyEvent)
            # By what was certified when the receipt was logged.
            if event.identity == verdict.node_id and entry.index < index:
                events.append(body)
                if key_id(event.operational_public_key) in signed_by:
                    about_its_key.append(body)
        elif kind == "registry-entry":
            if parse_payload(parse_envelope(body), RegistryEntry).manifest_digest == wanted:
                registry = body
        elif digest_of(body) == verdict.calibration_digest:
            calibration = body
    kept = (about_its_key or events)[-MAX_KEY_EVENTS:]
    return Bundle(found.leaf.envelope, registry, calibration, tuple(kept), transcript)


async def _read(ledger: LedgerPort, kinds: tuple[str, ...]) -> list[LogEntry]:
    entries: list[LogEntry] = []
    place = 0
    while True:
        page = await ledger.read_log(place, 1000, kinds)
        entries.extend(page.entries)
        place = page.next_index
        if place >= page.tree_size:
            return entries
