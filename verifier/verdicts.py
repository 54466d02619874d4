"""From what an audit found to the verdict it publishes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trueweight.protos.calibrations import CalibrationLeaf
from trueweight.protos.errors import EngineError, InvalidRequest
from trueweight.protos.evidence import sum_nano
from trueweight.protos.v1.audit_pb2 import Verdict
from trueweight.protos.v1.market_pb2 import EngineFingerprint
from trueweight.verifier.calibration import REFUND_CEILING_NANO, SHORT_TOKENS, is_far_outside
from trueweight.verifier.selection import ReceiptLeaf

# Outcomes for which the client gets the leg's charge back at once.
REFUNDING = frozenset({Verdict.REFUND, Verdict.INVALID_RECEIPT, Verdict.MISSING_TRANSCRIPT})
MAX_NAME_CHARS = 64
# Two honest references differ by rounding: the mean may differ by the null mean or by this share.
TOLERANCE = 0.2
# ``l0_failure`` of a receipt whose transcript its client had destroyed.
ERASED = "erased"


@dataclass(frozen=True, slots=True)
class AuditContext:
    """Which audit a verdict is about."""

    market_id: str
    verifier_id: str
    epoch: int
    receipt: ReceiptLeaf
    now_unix_ms: int


@dataclass(frozen=True, slots=True)
class Scored:
    """Margins of one output, in logits, and what they were computed with."""

    margins: Sequence[float]
    parameter_class: str
    reference: EngineFingerprint


def missing_transcript(context: AuditContext) -> Verdict:
    """The router could not open the transcript: refunded, no evidence against the node."""
    return _verdict(context, Verdict.MISSING_TRANSCRIPT)


def erased(context: AuditContext) -> Verdict:
    """Its client had the transcript destroyed: no evidence, and no refund, or every answer could
    be had for nothing by erasing it."""
    verdict = _verdict(context, Verdict.UNCALIBRATED)
    verdict.l0_failure = ERASED
    return verdict


def invalid_receipt(context: AuditContext, failed_check: str) -> Verdict:
    """An L0 check failed."""
    verdict = _verdict(context, Verdict.INVALID_RECEIPT)
    verdict.l0_failure = failed_check[:MAX_NAME_CHARS]
    return verdict


def unscorable(context: AuditContext, parameter_class: str) -> Verdict:
    """The reference cannot score this kind of request: no evidence either way."""
    verdict = _verdict(context, Verdict.UNCALIBRATED)
    verdict.parameter_class = parameter_class
    return verdict


def scored(context: AuditContext, found: Scored, calibration: CalibrationLeaf | None) -> Verdict:
    """SCORED, REFUND or UNCALIBRATED. Raises EngineError if the reference returned nonsense."""
    margins = found.margins
    if len(margins) != context.receipt.output_tokens:
        raise EngineError("the reference node returned margins for another number of tokens")
    entry = calibration.entries.get(found.parameter_class) if calibration else None
    try:
        total = sum_nano(margins, entry.ignored_below_nano if entry else 0)
    except InvalidRequest:
        raise EngineError("the reference node returned margins that are no numbers") from None
    if entry is None:
        far, near = _is_beyond_any_class(total, len(margins)), Verdict.UNCALIBRATED
    else:
        far, near = is_far_outside(total, len(margins), entry), Verdict.SCORED
    verdict = _verdict(context, Verdict.REFUND if far else near)
    verdict.calibration_digest = calibration.digest if calibration and entry else b""
    verdict.parameter_class = found.parameter_class
    verdict.sum_x_nano = total
    verdict.scored_tokens = len(margins)
    verdict.exact_tokens = sum(1 for margin in margins if margin == 0)
    verdict.reference_fingerprint.CopyFrom(found.reference)
    return verdict


def _is_beyond_any_class(sum_x_nano: int, tokens: int) -> bool:
    """True if the client is refunded whatever class it is: above the most that a calibration may
    ask for. Another model's text is; honest noise is not, unless somebody amplifies it."""
    return tokens >= SHORT_TOKENS and sum_x_nano > REFUND_CEILING_NANO * tokens


def _verdict(context: AuditContext, outcome: Verdict.Outcome) -> Verdict:
    return Verdict(
        market_id=context.market_id,
        verifier_id=context.verifier_id,
        node_id=context.receipt.node_id,
        epoch=context.epoch,
        assignment_digest=context.receipt.assignment_digest,
        receipt_digest=context.receipt.receipt_digest,
        receipt_log_index=context.receipt.index,
        outcome=outcome,
        issued_at_unix_ms=context.now_unix_ms,
    )


def mean_x(verdict: Verdict) -> float:
    """Mean of x over the scored tokens."""
    return verdict.sum_x_nano / verdict.scored_tokens / 1e9 if verdict.scored_tokens else 0.0


def _is_unseen(verdict: Verdict) -> bool:
    erased_before = verdict.outcome == Verdict.UNCALIBRATED and verdict.l0_failure == ERASED
    return erased_before or verdict.outcome == Verdict.MISSING_TRANSCRIPT


def agree(one: Verdict, other: Verdict, mu0_nano: int) -> bool:
    """True if two references can have come to these verdicts on one receipt. Where one of them did
    not get to see the transcript, or could not score it, there is nothing to compare."""
    if any(_is_unseen(v) for v in (one, other)):
        return True
    if Verdict.INVALID_RECEIPT in (one.outcome, other.outcome):
        return one.outcome == other.outcome and one.l0_failure == other.l0_failure
    if not (one.scored_tokens and other.scored_tokens):
        return True
    before, after = mean_x(one), mean_x(other)
    return abs(before - after) <= max(mu0_nano / 1e9, TOLERANCE * max(before, after))


def outcome_name(verdict: Verdict) -> str:
    """The outcome for people and logs: "scored", "refund", ..."""
    return Verdict.Outcome.Name(verdict.outcome).lower().replace("_", " ")
