"""Making an evidence bundle: the log's envelopes about one audit, and its opened transcript."""

from __future__ import annotations

from trueweight.protos.envelope import digest_of, kind_of_type, parse_envelope, parse_payload
from trueweight.protos.errors import NotFound
from trueweight.protos.receipts import open_assignment
from trueweight.protos.v1.audit_pb2 import Transcript
from trueweight.protos.v1.envelope_pb2 import KeyEvent
from trueweight.protos.v1.log_pb2 import LogEntry
from trueweight.protos.v1.model_pb2 import RegistryEntry
from trueweight.protos.v1.router_pb2 import OpenTranscriptRequest
from trueweight.runtime.ledger_port import LedgerPort
from trueweight.verifier.bundle import MAX_KEY_EVENTS, Bundle
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
    order = open_assignment(transcript.assignment_envelope, view.ring, view.market.market_id)
    wanted = order.message.manifest_digest
    registry, calibration, events = b"", b"", []
    for entry in await _read(ledger, ("registry-entry", "calibration", "key-event")):
        body = entry.body
        kind = kind_of_type(entry.kind) or entry.kind
        if kind == "key-event":
            event = parse_payload(parse_envelope(body), KeyEvent)
            if event.identity == verdict.node_id:
                events.append(body)
        elif kind == "registry-entry":
            if parse_payload(parse_envelope(body), RegistryEntry).manifest_digest == wanted:
                registry = body
        elif digest_of(body) == verdict.calibration_digest:
            calibration = body
    return Bundle(
        found.leaf.envelope, registry, calibration, tuple(events[-MAX_KEY_EVENTS:]), transcript
    )


async def _read(ledger: LedgerPort, kinds: tuple[str, ...]) -> list[LogEntry]:
    entries: list[LogEntry] = []
    place = 0
    while True:
        page = await ledger.read_log(place, 1000, kinds)
        entries.extend(page.entries)
        place = page.next_index
        if place >= page.tree_size:
            return entries
