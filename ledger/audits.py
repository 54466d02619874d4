"""Does what a verifier has logged about a node carry its conviction? Pure.

The ledger recomputes the node's wealth from that verifier's own requests, verdicts, epochs and
calibrations, by the same code as the verifier (``protos.conviction``, ``protos.calibrations``). It
knows more than the log shows: which weights each receipt was for. What it does not recompute is
what the verdicts say: that takes the weights (``trueweight verifier appeal``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from google.protobuf.message import Message

from trueweight.ledger.accounts import check_owner
from trueweight.ledger.requests import NONE, check_digest
from trueweight.protos.blind_verdicts import COPIED, is_copied
from trueweight.protos.calibrations import CalibrationTable, read_calibration
from trueweight.protos.conviction import (
    Asked,
    AuditLine,
    Evidence,
    NodeEvidence,
    Said,
    answer_of,
    as_zero,
    change_point_index,
)
from trueweight.protos.envelope import parse_envelope, parse_payload
from trueweight.protos.errors import Conflict, InvalidRequest, Unavailable
from trueweight.protos.v1.audit_pb2 import Calibration, Conviction, EpochOpen, Verdict

EPOCH, CALIBRATION = 1, 2
MAX_CLASS = 100
# What the table's column takes. The outcomes that are known need less; later ones may come.
MAX_OUTCOME = 2**15 - 1
STEP_KINDS = {"epoch-open": EPOCH, "calibration": CALIBRATION}
_MOST = 2**63 - 1


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
    # 1: its verifier's first on the receipt. What a verifier says later of the same is no evidence.
    is_first: int = 1
    # See ``protos.blind_verdicts.bound_since``.
    bound_since: int = NONE

    @property
    def key(self) -> tuple[str, bytes]:
        """Who judged what."""
        return self.verifier_id, self.receipt_digest


class Judged(NamedTuple):
    """A logged verdict, and the leaf of the first verdict on its receipt by another of the market's
    verifiers, if any."""

    log_index: int
    row: VerdictRow
    first_of_others: int | None


class StepRow(NamedTuple):
    """What else of a verifier's leaves a conviction follows from, as its table keeps it.

    ``version`` is the number of the epoch or calibration; digest and envelope (``body``) are a
    calibration's."""

    log_index: int
    kind: int
    verifier_id: str
    version: int
    digest: bytes
    body: bytes


class Audit(NamedTuple):
    """An audit request together with the receipt that it is about, as the ledger settled it."""

    log_index: int
    receipt_digest: bytes
    for_appeal: int
    receipt_index: int
    client: str
    tokens: int
    manifest_digest: bytes


@dataclass(frozen=True, slots=True)
class Case:
    """What one verifier's audits of one node add up to. ``is_behind``: not all are added up yet."""

    evidence: NodeEvidence = field(default_factory=NodeEvidence)
    counted: Sequence[Evidence] = ()
    is_behind: bool = False

    @property
    def is_carried(self) -> bool:
        """True once the wealth has reached the threshold."""
        return self.evidence.crossed_by is not None


class Docket:
    """One verifier's audits of one node, added up leaf by leaf, as far as they were read."""

    def __init__(self, verifier_id: str) -> None:
        self.next_index = 0
        self._verifier_id = verifier_id
        self._line = AuditLine()
        self._calibrations = CalibrationTable()
        self._newest_epoch: int | None = None

    def add(self, rows: Iterable[Audit | Judged | StepRow], next_index: int) -> None:
        """Rows in the order of their leaves, all that there are below ``next_index``."""
        for row in rows:
            if isinstance(row, Audit):
                self._ask(row)
            elif isinstance(row, Judged):
                self._answer(row.row, row.first_of_others)
            elif row.kind == EPOCH:
                self._open_epoch(row)
            elif row.kind == CALIBRATION:
                message = parse_payload(parse_envelope(row.body), Calibration)
                self._calibrations.add(read_calibration(message, row.digest, row.log_index))
        self.next_index = next_index

    def case(self, *, is_behind: bool) -> Case:
        """What they add up to."""
        return Case(self._line.evidence, tuple(self._line.counted), is_behind)

    def _ask(self, row: Audit) -> None:
        if not row.for_appeal:
            asked = Asked(
                row.log_index, row.receipt_index, row.tokens, row.client, row.manifest_digest
            )
            self._line.ask(row.receipt_digest, asked)

    def _answer(self, row: VerdictRow, first_of_others: int | None) -> None:
        asked = self._line.asked(row.receipt_digest)
        if asked is None or not row.is_first:
            return
        if is_copied(row.bound_since, first_of_others):
            self._line.answer(row.receipt_digest, as_zero(row.log_index, COPIED))
            return
        said = Said(
            row.log_index,
            row.calibration_digest,
            row.parameter_class,
            row.sum_x_nano,
            row.tokens,
            row.outcome,
        )
        answer = answer_of(said, asked, self._verifier_id, self._calibrations)
        self._line.answer(row.receipt_digest, answer)

    def _open_epoch(self, row: StepRow) -> None:
        if self._newest_epoch is None or row.version > self._newest_epoch:
            self._newest_epoch = row.version
            self._line.epoch_opened(row.log_index)


def check_verdict(message: Verdict) -> None:
    """Raises InvalidRequest for a verdict that its table could not keep."""
    if message.node_id:
        check_owner(message.node_id, "the verdict's node id")
    check_digest(message.receipt_digest, "the verdict's receipt digest")
    if message.calibration_digest:
        check_digest(message.calibration_digest, "the verdict's calibration digest")
    name = message.parameter_class
    if not name.isprintable() or len(name) > MAX_CLASS:
        raise InvalidRequest(
            "the verdict's parameter class is not a name of at most 100 characters",
            hint="Write plain, greedy, top_p, …",
        )
    if not 0 <= message.outcome <= MAX_OUTCOME:
        raise InvalidRequest(
            "the verdict's outcome is none", hint="Use a value of Verdict.Outcome."
        )


def verdict_row(message: Verdict) -> VerdictRow:
    """The row of a verdict that is about to become a leaf."""
    return VerdictRow(
        NONE,
        message.verifier_id,
        message.node_id,
        message.receipt_digest,
        message.calibration_digest,
        message.parameter_class,
        min(message.sum_x_nano, _MOST),
        message.scored_tokens,
        int(message.outcome),
    )


def step_row(message: Message, digest: bytes, envelope: bytes) -> StepRow | None:
    """The row of a statement that is about to become a leaf; None for other kinds."""
    if isinstance(message, EpochOpen):
        return StepRow(-1, EPOCH, message.verifier_id, min(message.epoch, _MOST), b"", b"")
    if isinstance(message, Calibration):
        who, version = message.verifier_id, message.version
        return StepRow(-1, CALIBRATION, who, version, digest, envelope)
    return None


def check_added_up(case: Case) -> None:
    """Raises Unavailable if some of the audits are not added up yet."""
    if case.is_behind:
        raise Unavailable(
            f"{case.evidence.wealth.r} audits of this node by a verifier are added up, not all",
            hint="Ask again: each call goes on from there.",
        )


def check_statement(statement: Conviction, case: Case) -> None:
    """Raises Conflict if the verdicts do not carry a conviction, InvalidRequest if this one says
    something else than they add up to."""
    check_added_up(case)
    if not case.is_carried:
        raise Conflict(
            "the logged verdicts do not add up to a conviction",
            hint=f"They come to a wealth of 10^{case.evidence.wealth.log10_milli / 1000:.1f}.",
        )
    wealth = case.evidence.wealth
    said = (statement.verdicts, statement.audited_tokens, statement.wealth_log10_milli)
    if said != (wealth.r, wealth.tokens, wealth.log10_milli):
        raise InvalidRequest(
            f"the conviction says {said} for verdicts, tokens and wealth; the log gives "
            f"{(wealth.r, wealth.tokens, wealth.log10_milli)}"
        )
    if statement.change_point_index != change_point_index(case.counted):
        raise InvalidRequest("the conviction's change point is not the one that its verdicts give")
