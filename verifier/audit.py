"""One audit: transcript, L0, margins, verdict. The steps are numbered; each has one way to fail."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from trueweight.protos.envelope import Opened, parse_envelope, parse_payload
from trueweight.protos.errors import (
    BadSignature,
    Erased,
    InvalidRequest,
    NotFound,
    ReceiptRefused,
    TrueweightError,
)
from trueweight.protos.grammar import digest_of_source
from trueweight.protos.market_terms import refusal_in
from trueweight.protos.receipts import (
    SAMPLING,
    TRANSCRIPT_CHECKS,
    ReceiptFacts,
    check_receipt,
    open_assignment,
)
from trueweight.protos.sampling_parameters import Sampling, parameter_class
from trueweight.protos.tokens import SALT_BYTES, token_digest
from trueweight.protos.v1.audit_pb2 import AuditRequest, Transcript, Verdict
from trueweight.protos.v1.market_pb2 import Assignment, EngineFingerprint, Receipt
from trueweight.protos.v1.node_pb2 import ScoreItem
from trueweight.protos.v1.router_pb2 import OpenTranscriptRequest
from trueweight.verifier import verdicts
from trueweight.verifier.epochs import SecretStore, wrap_private_key
from trueweight.verifier.leaves import Leaf
from trueweight.verifier.reference import Scorer
from trueweight.verifier.selection import ReceiptLeaf
from trueweight.verifier.state import LogView
from trueweight.verifier.transcripts import TranscriptSource, unseal
from trueweight.verifier.verdicts import AuditContext, Scored

log = logging.getLogger(__name__)


class TranscriptMissing(TrueweightError):
    """The router cannot or will not open the transcript; worth another try until the deadline."""

    code = "TRANSCRIPT_MISSING"
    retryable = True


@dataclass(frozen=True)
class Auditor:
    """What audits need. ``run`` is one audit; it publishes nothing."""

    view: LogView
    secrets: SecretStore
    transcripts: TranscriptSource
    scorer: Scorer

    async def run(self, context: AuditContext, *, last_try: bool) -> Verdict:
        """The verdict. Raises retryable errors; with ``last_try`` a missing transcript is one, and
        weights that are missing at the reference."""
        try:
            transcript = await self._open(context)  # 1
            assignment = self._assignment(transcript, context.receipt)
        except TranscriptMissing as error:
            if not last_try:
                raise
            log.info("audit of receipt leaf %d: %s", context.receipt.index, error.message)
            return verdicts.missing_transcript(context)
        except Erased:
            return verdicts.erased(context)
        if not is_what_was_signed(transcript):
            # The router paid for this receipt, so it had the signed tokens: it withholds them.
            return verdicts.missing_transcript(context)
        try:
            self._check(transcript, assignment, context.receipt)  # 2
            sampling = Sampling.from_proto(assignment.message.sampling)  # 3
        except ReceiptRefused as error:
            if error.check in TRANSCRIPT_CHECKS:
                return verdicts.missing_transcript(context)
            return verdicts.invalid_receipt(context, error.check)
        except InvalidRequest:
            # Router and node agreed on parameters that the contract forbids.
            return verdicts.invalid_receipt(context, SAMPLING)
        try:
            return await self._score(context, transcript, assignment.message, sampling)  # 4
        except NotFound:
            # Weights that this verifier's reference does not have.
            if not last_try:
                raise
            return verdicts.unscorable(context, parameter_class(sampling))

    async def _open(self, context: AuditContext) -> Transcript:
        receipt = context.receipt
        request = self.view.requests.get((context.verifier_id, receipt.receipt_digest))
        if request is None:
            raise TranscriptMissing("the audit request is not in the log yet")
        message = OpenTranscriptRequest(audit_request=request.envelope, log_index=request.index)
        router_id = (self.view.receipts.get(receipt.receipt_digest) or receipt).router_id
        try:
            answer = await self.transcripts.open(router_id, message)
            return unseal(answer, self._key(request), receipt)
        except Erased:
            raise
        except TrueweightError as error:  # not found, refused, unreachable, damaged
            raise TranscriptMissing(error.message) from error

    def _key(self, request: Leaf[AuditRequest]) -> X25519PrivateKey:
        message = request.message
        return wrap_private_key(
            self.secrets.wrapping(), message.receipt_digest, message.duplicate_index
        )

    def _assignment(self, transcript: Transcript, receipt: ReceiptLeaf) -> Opened[Assignment]:
        envelope = transcript.assignment_envelope
        try:
            ring = self.view.ring_for(envelope, receipt.index)
            opened = open_assignment(envelope, ring, self.view.market.market_id)
        except BadSignature as error:
            raise TranscriptMissing(error.message) from error
        if not is_source_of(opened.message.sampling.grammar.source_sha256, transcript):
            raise TranscriptMissing("the transcript's grammar is not the one that was signed")
        return opened

    def _check(
        self, transcript: Transcript, assignment: Opened[Assignment], receipt: ReceiptLeaf
    ) -> None:
        order = assignment.message
        manifest = self.view.registry.manifests.get(order.manifest_digest)
        known = self.view.registry.was_sold(order.model_id, order.manifest_digest, receipt)
        facts = ReceiptFacts(
            assignment=assignment,
            receipt=transcript.receipt_envelope,
            salt=transcript.salt,
            prompt=transcript.prompt_token_ids,
            prefix=transcript.prefix_token_ids,
            received=transcript.output_token_ids,
            manifest_digest=order.manifest_digest if known else b"",
            vocabulary_size=manifest.vocabulary_size if manifest else 0,
            refusal=refusal_in(self.view.market.descriptor),
        )
        ring = self.view.ring_for(facts.receipt, receipt.index)
        check_receipt(facts, ring, self.view.market.market_id)

    async def _score(
        self,
        context: AuditContext,
        transcript: Transcript,
        order: Assignment,
        sampling: Sampling,
    ) -> Verdict:
        name = parameter_class(sampling)
        calibration = self.view.calibrations.in_force(
            context.verifier_id, order.manifest_digest, context.receipt.index
        )
        output = transcript.output_token_ids[: context.receipt.output_tokens]
        item = ScoreItem(
            prompt_token_ids=transcript.prompt_token_ids,
            prefix_token_ids=transcript.prefix_token_ids,
            output_token_ids=output,
            sampling=order.sampling,
            seed=order.seed,
            grammar_source=transcript.grammar_source,
        )
        if not output:
            return verdicts.scored(context, Scored((), name, EngineFingerprint()), calibration)
        found = await self.scorer.score(order.manifest_digest, item)
        if found.result.error:
            log.warning("leaf %d cannot be scored: %s", context.receipt.index, found.result.error)
            return verdicts.unscorable(context, name)
        scored = Scored(list(found.result.margins), name, found.fingerprint)
        return verdicts.scored(context, scored, calibration)


def is_source_of(signed_sha256: bytes, transcript: Transcript) -> bool:
    """True if the transcript carries the grammar that the assignment signs, or neither has one."""
    source = transcript.grammar_source
    return signed_sha256 == (digest_of_source(source) if source else b"")


def is_what_was_signed(transcript: Transcript) -> bool:
    """True if the output is the one that the receipt's digest names, whoever lies otherwise."""
    try:
        receipt = parse_payload(parse_envelope(transcript.receipt_envelope), Receipt)
    except BadSignature:
        return False
    output = transcript.output_token_ids
    if len(transcript.salt) != SALT_BYTES or len(output) != receipt.output_tokens:
        return False
    return token_digest(transcript.salt, output) == receipt.output_digest
