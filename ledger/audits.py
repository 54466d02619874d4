"""Does what a verifier has logged about a node carry its conviction? Pure.

The ledger recomputes the node's wealth from that verifier's own verdicts in leaf order, with the
calibrations they cite, by the same arithmetic as the verifier (``protos.conviction``). What it does
not recompute is what the verdicts say (that takes the weights: ``trueweight verifier appeal``) and
which of them were copied from another verifier's, which can only be where there are several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trueweight.protos.conviction import Evidence, NodeEvidence, change_point_index
from trueweight.protos.envelope import parse_envelope, parse_payload
from trueweight.protos.errors import Conflict, InvalidRequest
from trueweight.protos.evidence import MU0_FLOOR_NANO, NANO
from trueweight.protos.v1.audit_pb2 import Calibration, CalibrationEntry, Conviction, Verdict

MAX_AUDITS = 100_000
MAX_ENTRIES = 256
COUNTING = (int(Verdict.SCORED), int(Verdict.REFUND))


class VerdictRow(NamedTuple):
    """A logged verdict as its table keeps it."""

    log_index: int
    verifier_id: str
    node_id: str
    receipt_digest: bytes
    calibration_digest: bytes
    parameter_class: str
    sum_x_nano: int
    tokens: int
    outcome: int


class Audit(NamedTuple):
    """A verdict together with the receipt that it judges, as the ledger settled it."""

    verdict_index: int
    receipt_digest: bytes
    calibration_digest: bytes
    parameter_class: str
    sum_x_nano: int
    tokens: int
    receipt_index: int
    client: str


class LoggedCalibration(NamedTuple):
    """Where a calibration is in the log, and its envelope."""

    log_index: int
    envelope: bytes


@dataclass(frozen=True, slots=True)
class Case:
    """What one verifier's audits of one node add up to."""

    evidence: NodeEvidence
    counted: tuple[Evidence, ...]
    # More audits than the ledger recomputes while everybody waits: then a verifier's word counts,
    # and so many signed verdicts stand for it.
    is_too_long: bool = False

    @property
    def is_carried(self) -> bool:
        """True once the wealth has reached the threshold."""
        return self.is_too_long or self.evidence.crossed_by is not None


def verdict_row(message: Verdict) -> VerdictRow:
    """The row of a verdict that is about to become a leaf."""
    return VerdictRow(
        -1,
        message.verifier_id,
        message.node_id,
        message.receipt_digest,
        message.calibration_digest,
        message.parameter_class,
        min(message.sum_x_nano, 2**63 - 1),
        message.scored_tokens,
        int(message.outcome),
    )


def add_up(audits: Sequence[Audit], calibrations: Mapping[bytes, LoggedCalibration]) -> Case:
    """The wealth of these audits, which are in leaf order. The first verdict on a receipt counts,
    under a calibration that was logged before the receipt."""
    if len(audits) > MAX_AUDITS:
        return Case(NodeEvidence(), (), is_too_long=True)
    entries = {digest: _entries(found) for digest, found in calibrations.items()}
    own, counted, judged = NodeEvidence(), [], set()
    for audit in audits:
        known = calibrations.get(audit.calibration_digest)
        entry = entries.get(audit.calibration_digest, {}).get(audit.parameter_class)
        if audit.receipt_digest in judged:
            continue
        judged.add(audit.receipt_digest)
        if known is None or entry is None or known.log_index > audit.receipt_index:
            continue
        if not audit.tokens > 0 or audit.sum_x_nano > audit.tokens * NANO:
            continue
        found = Evidence(
            audit.verdict_index,
            audit.receipt_index,
            audit.sum_x_nano,
            audit.tokens,
            entry.mu0_nano,
            f"{audit.calibration_digest.hex()}/{audit.parameter_class}",
            audit.client,
        )
        if own.accepts(found):
            counted.append(found)
        own = own.add(found)
    return Case(own, tuple(counted))


def check_statement(statement: Conviction, case: Case, *, only_verifier: bool) -> None:
    """Raises Conflict if the verdicts do not carry a conviction, InvalidRequest if this one says
    something else than they add up to."""
    if not case.is_carried:
        raise Conflict(
            "the logged verdicts do not add up to a conviction",
            hint=f"They come to a wealth of 10^{case.evidence.wealth.log10_milli / 1000:.1f}.",
        )
    if case.is_too_long or not only_verifier:
        return  # some of the verdicts may not count because they were copied
    wealth = case.evidence.wealth
    said = (statement.verdicts, statement.audited_tokens, statement.wealth_log10_milli)
    if said != (wealth.r, wealth.tokens, wealth.log10_milli):
        raise InvalidRequest(
            f"the conviction says {said} for verdicts, tokens and wealth; the log gives "
            f"{(wealth.r, wealth.tokens, wealth.log10_milli)}"
        )
    if statement.change_point_index != change_point_index(case.counted):
        raise InvalidRequest("the conviction's change point is not the one that its verdicts give")


def _entries(found: LoggedCalibration) -> dict[str, CalibrationEntry]:
    message = parse_payload(parse_envelope(found.envelope), Calibration)
    entries: dict[str, CalibrationEntry] = {}
    for entry in message.entries[:MAX_ENTRIES]:
        if MU0_FLOOR_NANO <= entry.mu0_nano < NANO and entry.mu0_nano >= 2 * entry.upper_bound_nano:
            entries.setdefault(entry.parameter_class, entry)
    return entries
