"""Replaying an audit: does the verdict follow from the signed evidence and the public weights?

The steps are numbered; the first that fails ends the replay. Only step 6 needs an engine, only 8
and 9 need the market's log.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from trueweight.protos.calibrations import CalibrationLeaf, read_calibration
from trueweight.protos.conviction import Asked
from trueweight.protos.envelope import (
    Opened,
    digest_of,
    open_envelope,
    parse_envelope,
    parse_payload,
    ring_of,
)
from trueweight.protos.errors import BadSignature, InvalidRequest, ReceiptRefused, TrueweightError
from trueweight.protos.identity import KeyRing
from trueweight.protos.market_terms import refusal_in
from trueweight.protos.receipts import (
    NODE_FAULTS,
    SAMPLING,
    ReceiptFacts,
    check_receipt,
    open_assignment,
)
from trueweight.protos.sampling_parameters import Sampling, parameter_class
from trueweight.protos.v1.audit_pb2 import Calibration, Transcript, Verdict
from trueweight.protos.v1.market_pb2 import Assignment, Member, Receipt
from trueweight.protos.v1.model_pb2 import Manifest, RegistryEntry
from trueweight.protos.v1.node_pb2 import ScoreItem
from trueweight.runtime.market import Market
from trueweight.verifier.audit import is_what_was_signed
from trueweight.verifier.bundle import Bundle
from trueweight.verifier.reference import Scorer
from trueweight.verifier.rules import answer_in
from trueweight.verifier.selection import ReceiptLeaf
from trueweight.verifier.state import LogView
from trueweight.verifier.verdicts import AuditContext, Scored, agree, mean_x, scored


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the replay."""

    number: int
    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Replay:
    """All steps that ran. ``recomputed`` is the verdict that the replay itself comes to,
    ``receipt`` the envelope that was judged."""

    steps: tuple[Step, ...]
    verdict: Verdict | None = None
    recomputed: Verdict | None = None
    receipt: bytes = b""

    @property
    def agrees(self) -> bool:
        """True if every step passed."""
        return bool(self.steps) and all(step.passed for step in self.steps)


@dataclass(frozen=True)
class _Case:
    """What the signed part of a bundle says, once it is verified."""

    verdict: Verdict
    manifest: Manifest
    manifest_digest: bytes
    ring: KeyRing
    assignment: Opened[Assignment]
    calibration: CalibrationLeaf | None


async def replay(bundle: Bundle, market: Market, scorer: Scorer) -> Replay:
    """Replays one audit. Never raises for what is in the bundle."""
    steps: list[Step] = []
    try:
        case = _signed(bundle, market, steps)
        l0_failure = _l0(bundle, case, market, steps)
        if l0_failure or case.verdict.outcome == Verdict.INVALID_RECEIPT:
            receipt = bundle.transcript.receipt_envelope
            return Replay(tuple(steps), case.verdict, receipt=receipt)
        found = await _score(bundle, case, scorer)
    except TrueweightError as error:
        steps.append(Step(len(steps) + 1, "failed", False, error.message))
        return Replay(tuple(steps))
    steps.extend(_compare(case, found))
    return Replay(tuple(steps), case.verdict, found)


def _signed(bundle: Bundle, market: Market, steps: list[Step]) -> _Case:
    opened = open_envelope(bundle.verdict, Verdict, market.ring, market.market_id)
    verdict = opened.message
    if opened.signer != verdict.verifier_id or not market.has_role(opened.signer, Member.VERIFIER):
        raise BadSignature("the verdict is not signed by a verifier of this market")
    steps.append(Step(1, "verdict", True, f"signed by verifier {opened.signer}"))
    manifest, digest = _manifest(bundle, market)
    steps.append(Step(2, "weights", True, f"registered by the market: {manifest.name}"))
    ring = ring_of(bundle.key_events, market.market_id, market.ring)
    transcript = bundle.transcript
    if digest_of(transcript.receipt_envelope) != verdict.receipt_digest:
        raise BadSignature("the transcript carries another receipt than the verdict judges")
    assignment = open_assignment(transcript.assignment_envelope, ring, market.market_id)
    if assignment.digest != verdict.assignment_digest:
        raise BadSignature("the transcript carries another assignment than the verdict judges")
    if assignment.message.manifest_digest != digest:
        raise BadSignature("the assignment is for other weights than the bundle's")
    _check_transcript(transcript, assignment.message, ring)
    steps.append(Step(3, "transcript", True, "the receipt and assignment that were judged"))
    calibration = _calibration(bundle, market, verdict, digest)
    detail = "in the bundle" if calibration else "none cited"
    steps.append(Step(4, "calibration", True, detail))
    return _Case(verdict, manifest, digest, ring, assignment, calibration)


def _check_transcript(transcript: Transcript, order: Assignment, ring: KeyRing) -> None:
    """What only its maker can have got wrong is held against no node: else whoever hands out the
    bundle could damage the transcript, and find the very failure that the verdict names."""
    lengths = (len(transcript.prompt_token_ids), len(transcript.prefix_token_ids))
    if lengths != (order.prompt_len, order.prefix_len):
        raise BadSignature("the transcript carries another prompt than was assigned")
    if not is_what_was_signed(transcript):
        raise BadSignature("the transcript carries another output than the node signed for")
    if not ring.keys_of(order.node_id):
        raise BadSignature("the bundle lacks the node's key event")


def _manifest(bundle: Bundle, market: Market) -> tuple[Manifest, bytes]:
    entry = open_envelope(
        bundle.registry_entry, RegistryEntry, market.ring, market.market_id, signer=market.market_id
    ).message
    if digest_of(entry.manifest_envelope) != entry.manifest_digest:
        raise BadSignature("the registry entry carries another manifest")
    manifest = parse_payload(parse_envelope(entry.manifest_envelope), Manifest)
    return manifest, entry.manifest_digest


def _calibration(
    bundle: Bundle, market: Market, verdict: Verdict, manifest_digest: bytes
) -> CalibrationLeaf | None:
    if not verdict.calibration_digest:
        return None
    opened = open_envelope(bundle.calibration, Calibration, market.ring, market.market_id)
    if opened.digest != verdict.calibration_digest:
        raise BadSignature("the bundle carries another calibration than the verdict cites")
    if opened.message.manifest_digest != manifest_digest:
        raise BadSignature("the cited calibration is for other weights")
    if not opened.signer == opened.message.verifier_id == verdict.verifier_id:
        raise BadSignature("the cited calibration is not the verifier's own")
    return read_calibration(opened.message, opened.digest, 0)


def _l0(bundle: Bundle, case: _Case, market: Market, steps: list[Step]) -> str:
    transcript = bundle.transcript
    facts = ReceiptFacts(
        assignment=case.assignment,
        receipt=transcript.receipt_envelope,
        salt=transcript.salt,
        prompt=transcript.prompt_token_ids,
        prefix=transcript.prefix_token_ids,
        received=transcript.output_token_ids,
        manifest_digest=case.manifest_digest,
        vocabulary_size=case.manifest.vocabulary_size,
        refusal=refusal_in(market.descriptor),
    )
    failed = ""
    try:
        check_receipt(facts, case.ring, market.market_id)
        Sampling.from_proto(case.assignment.message.sampling)
    except ReceiptRefused as error:
        failed = error.check
    except InvalidRequest:
        failed = SAMPLING
    steps.append(Step(5, "L0", _follows(case.verdict, failed), failed or "every check holds"))
    return failed


def _follows(verdict: Verdict, failed: str) -> bool:
    """True if the verdict names exactly the check that failed. To refuse a receipt it must name one
    that a node can fail."""
    refuses = verdict.outcome == Verdict.INVALID_RECEIPT
    return failed == verdict.l0_failure and refuses == (failed in NODE_FAULTS)


async def _score(bundle: Bundle, case: _Case, scorer: Scorer) -> Verdict:
    order, transcript = case.assignment.message, bundle.transcript
    count = case.verdict.scored_tokens or len(transcript.output_token_ids)
    item = ScoreItem(
        prompt_token_ids=transcript.prompt_token_ids,
        prefix_token_ids=transcript.prefix_token_ids,
        output_token_ids=transcript.output_token_ids[:count],
        sampling=order.sampling,
        seed=order.seed,
        grammar_source=transcript.grammar_source,
    )
    found = await scorer.score(case.manifest_digest, item)
    if found.result.error:
        raise InvalidRequest(f"the reference cannot score it: {found.result.error}")
    verdict = case.verdict
    receipt = ReceiptLeaf(
        index=verdict.receipt_log_index,
        merged_at_unix_ms=0,
        receipt_digest=verdict.receipt_digest,
        assignment_digest=verdict.assignment_digest,
        node_id=verdict.node_id,
        output_tokens=count,
    )
    context = AuditContext(verdict.market_id, verdict.verifier_id, verdict.epoch, receipt, 0)
    name = parameter_class(Sampling.from_proto(order.sampling))
    margins = Scored(list(found.result.margins), name, found.fingerprint)
    return scored(context, margins, case.calibration)


def _compare(case: _Case, found: Verdict) -> Iterator[Step]:
    claimed = case.verdict
    before, after = mean_x(claimed), mean_x(found)
    entry = case.calibration.entries.get(found.parameter_class) if case.calibration else None
    detail = f"mean clipped margin {before:.6f} claimed, {after:.6f} recomputed"
    yield Step(6, "margins", agree(claimed, found, entry.mu0_nano if entry else 0), detail)
    same = claimed.outcome == found.outcome and claimed.parameter_class == found.parameter_class
    name = Verdict.Outcome.Name
    yield Step(7, "outcome", same, f"{name(claimed.outcome)}, recomputed {name(found.outcome)}")


def with_log(found: Replay, view: LogView) -> Replay:
    """The replay and what the log says: 8. the verdict, its receipt and its request are there, the
    request before the verdict; 9. the verdict counts as evidence, so that the calibration it cites
    was in force. Not asked of what is no verdict at all."""
    if found.verdict is None:
        return found
    steps = (*found.steps, *_log_steps(found, found.verdict, view))
    return replace(found, steps=steps)


def _is_signed(envelope: bytes, receipt: ReceiptLeaf, view: LogView) -> bool:
    """True if a key in the log signed the receipt; a bundle may leave key events out."""
    try:
        ring = view.ring_for(envelope, receipt.index)
        open_envelope(envelope, Receipt, ring, view.market.market_id, signer=receipt.node_id)
    except BadSignature:
        return False
    return True


def _log_steps(found: Replay, verdict: Verdict, view: LogView) -> Iterator[Step]:
    key = (verdict.verifier_id, verdict.receipt_digest)
    logged, request = view.verdicts.get(key), view.requests.get(key)
    receipt = view.receipts.get(verdict.receipt_digest)
    if logged is None or logged.leaf.message != verdict:
        yield Step(8, "log", False, "this is not the verdict that the log has")
        return
    if receipt is None or receipt.node_id != verdict.node_id:
        yield Step(8, "log", False, "the log has no such receipt of this node")
        return
    if request is None or request.index > logged.leaf.index:
        yield Step(8, "log", False, "the audit was not requested in the log first")
        return
    leaves = f"receipt {receipt.index}, request {request.index}, verdict {logged.leaf.index}"
    yield Step(8, "log", True, leaves)
    if verdict.l0_failure == "signature":
        signed = _is_signed(found.receipt, receipt, view)
        yield Step(9, "key", not signed, "the log has the key" if signed else "no key signed it")
    if verdict.outcome not in (Verdict.SCORED, Verdict.REFUND):
        return
    # Whether its margins count, whatever became of the audits before it.
    why_not = "the node was reinstated after this receipt"
    if receipt.index >= view.node(receipt.node_id).reinstated:
        asked = Asked(request.index, receipt.index, receipt.output_tokens, "")
        answer = answer_in(view, logged.leaf, asked, copied=False)
        if answer.is_left_out:
            yield Step(9, "in force", True, f"no evidence: {answer.why_not}")
            return
        why_not = answer.why_not
    yield Step(9, "in force", not why_not, why_not or "the cited calibration was in force")
