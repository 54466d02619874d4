"""Judging signed evidence before it meets the books. Pure: bytes and a key ring in, facts out.

A capture costs two signature checks for each one-leg bill: the router's over the bill, which
names every assignment's digest, and each node's over its receipt, which names it too. So the
assignments need no third check: their bytes hash to what both have signed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from google.protobuf.message import Message

from trueweight.ledger.accounts import check_owner
from trueweight.ledger.audits import StepRow, VerdictRow, check_verdict, step_row, verdict_row
from trueweight.ledger.commitments import CommitmentRow, check_commitment, commitment_row
from trueweight.ledger.requests import RequestRow, check_digest, request_row
from trueweight.ledger.values import Terms
from trueweight.protos.blind_verdicts import opening_of
from trueweight.protos.envelope import (
    Opened,
    apply_key_event,
    digest_of,
    kind_of_type,
    message_class,
    open_envelope,
    parse_envelope,
    parse_payload,
    payload_type,
)
from trueweight.protos.errors import BadSignature, InvalidRequest, PermissionDenied
from trueweight.protos.identity import KeyRing
from trueweight.protos.money import charge_nano, split_charge
from trueweight.protos.receipts import NODE_FAULTS
from trueweight.protos.v1 import audit_pb2, ledger_pb2, market_pb2
from trueweight.protos.v1.envelope_pb2 import KeyEvent
from trueweight.protos.v1.market_pb2 import Assignment, Bill, BillLeg, Receipt

M = TypeVar("M", bound=Message)
MAX_LEGS = 64
# floor(1000 * log10(1/alpha)): no conviction on less, whatever threshold it names.
CONVICT_LOG10_MILLI = 6000
MAX_EVIDENCE_BYTES = 256 * 1024
MAX_INDEX = 2**63 - 1
# From an assignment's deadline until its node may claim: the router's time to settle.
CLAIM_GRACE_MS = 30_000
REFUNDABLE = frozenset(
    (
        audit_pb2.Verdict.REFUND,
        audit_pb2.Verdict.INVALID_RECEIPT,
        audit_pb2.Verdict.MISSING_TRANSCRIPT,
    )
)
CLAIMABLE = frozenset((market_pb2.EOS, market_pb2.LENGTH, market_pb2.STOPPED, market_pb2.CANCELLED))
# Evidence that anyone may publish who is entitled: kind -> roles of the signer.
_PUBLISHERS: dict[str, frozenset[str]] = {
    "registry-entry": frozenset({"market"}),
    "calibration": frozenset({"verifier"}),
    "epoch-open": frozenset({"verifier"}),
    "epoch-reveal": frozenset({"verifier"}),
    "audit-request": frozenset({"verifier"}),
    "margin-commitment": frozenset({"verifier"}),
    "verdict": frozenset({"verifier"}),
    "conviction": frozenset({"verifier"}),
    "suspension": frozenset({"market", "verifier"}),
}
# The field that names the signer, where a message has one.
_SIGNER_FIELDS = ("verifier_id", "issuer")


@dataclass(frozen=True, slots=True)
class Court:
    """Whose signatures count for what: the ring and the roles at one moment."""

    terms: Terms
    ring: KeyRing
    roles: dict[str, frozenset[str]]
    # How often a key ceased to count: what was prepared before that is prepared again.
    revocations: int = 0

    def roles_of(self, identity: str) -> frozenset[str]:
        return self.roles.get(identity, frozenset())

    def with_role(self, role: str) -> tuple[str, ...]:
        return tuple(i for i, roles in self.roles.items() if role in roles)


class LegFacts(NamedTuple):
    """One leg of a checked bill."""

    receipt: bytes
    receipt_digest: bytes
    assignment_digest: bytes
    node_id: str
    charge: int
    fee: int
    pool: int
    node: int
    subsidy: int
    output_tokens: int
    manifest_digest: bytes


class CaptureFacts(NamedTuple):
    """A checked bill."""

    hold_id: bytes
    router_id: str
    charge: int
    bill: bytes
    bill_digest: bytes
    legs: tuple[LegFacts, ...]


@dataclass(frozen=True, slots=True)
class ClaimFacts:
    """A checked claim of a node against a hold."""

    hold_id: bytes
    router_id: str
    assignment_digest: bytes
    receipt: bytes
    receipt_digest: bytes
    node_id: str
    charge: int
    # Before this the router may still settle, and a claim would stand in its way.
    not_before_unix_ms: int
    output_tokens: int
    manifest_digest: bytes


@dataclass(frozen=True, slots=True)
class PublishFacts:
    """Evidence that may become a leaf."""

    kind: str
    digest: bytes
    envelope: bytes
    signer: str
    # "<node>:<verifier>" of a conviction, else empty.
    conviction: str = ""
    # What a verdict says, its log index not being known yet, and the commitment that it opens.
    verdict: VerdictRow | None = None
    opening: bytes = b""
    # The same of an audit request, a commitment, and an epoch or a calibration.
    request: RequestRow | None = None
    commitment: CommitmentRow | None = None
    step: StepRow | None = None


@dataclass(frozen=True, slots=True)
class RefundFacts:
    """A checked verdict, or none for an administrator."""

    receipt_digest: bytes
    verdict: PublishFacts | None
    node_id: str = ""
    # The router lost or withholds the transcript: not the node's fault.
    by_router: bool = False


@dataclass(frozen=True, slots=True)
class ConvictFacts:
    """A checked conviction."""

    published: PublishFacts
    node_id: str
    verifier_id: str
    change_point: int
    statement: audit_pb2.Conviction


@dataclass(frozen=True, slots=True)
class ReinstateFacts:
    """A checked reinstatement."""

    published: PublishFacts
    node_id: str
    pay_back: int


def check_capture(operation_id: bytes, body: ledger_pb2.Capture, court: Court) -> CaptureFacts:
    """The bill's facts, or BadSignature / InvalidRequest at the first numbered check that fails.

    1. Sizes. 2. The bill is a router's. 3. Ids agree. 4. Each leg (see ``_check_leg``).
    5. Nobody is paid twice for one assignment, nor for one prompt. 6. The sum. 7. A bill never
    takes more out of the pool than it brings, so that nodes cannot drain it by continuing
    each other's invented prefixes.
    """
    if not 1 <= len(body.receipts) <= MAX_LEGS or len(body.assignments) != len(body.receipts):
        raise InvalidRequest("a capture carries 1 to 64 pairs of assignment and receipt")  # 1
    _bounded(body.bill, *body.assignments, *body.receipts)
    opened = open_envelope(body.bill, Bill, court.ring, court.terms.market_id)  # 2
    bill = opened.message
    if opened.signer != bill.router_id or "router" not in court.roles_of(opened.signer):
        raise BadSignature("the bill is not signed by the router it names")
    if bill.bill_id != operation_id or bill.hold_id != body.hold_id:  # 3
        raise InvalidRequest("the bill names another operation or hold")
    if len(bill.legs) != len(body.receipts):
        raise InvalidRequest("the bill has another number of legs than receipts were sent")
    legs = tuple(
        _check_leg(bill, leg, assignment, receipt, court)
        for leg, assignment, receipt in zip(bill.legs, body.assignments, body.receipts, strict=True)
    )  # 4
    if len({leg.assignment_digest for leg in legs}) != len(legs):
        raise InvalidRequest("the bill charges one assignment twice")  # 5
    _check_prompt_once(bill)
    if sum(leg.charge for leg in legs) != bill.charge_nano:
        raise InvalidRequest("the bill's charge is not the sum of its legs")  # 6
    if sum(leg.subsidy for leg in legs) > sum(leg.pool for leg in legs):
        raise InvalidRequest("the bill's subsidies are more than its shares for the pool")  # 7
    return CaptureFacts(
        bill.hold_id, bill.router_id, bill.charge_nano, body.bill, opened.digest, legs
    )


def _check_prompt_once(bill: Bill) -> None:
    paying = [leg.choice_index for leg in bill.legs if leg.billed_input_tokens]
    if len(set(paying)) != len(paying):
        raise InvalidRequest("the bill charges the prompt of one choice twice")


def _check_leg(
    bill: Bill, leg: BillLeg, assignment_envelope: bytes, receipt_envelope: bytes, court: Court
) -> LegFacts:
    """a. The assignment is the one that bill and receipt name. b. It belongs to this bill.
    c. The receipt is the node's. d. No more is billed than was done. e. The arithmetic."""
    if digest_of(assignment_envelope) != leg.assignment_digest:  # a
        raise BadSignature("a leg's assignment is not the one that the bill names")
    assignment = _payload(assignment_envelope, Assignment)
    same = (
        assignment.market_id == bill.market_id
        and assignment.router_id == bill.router_id
        and assignment.request_id == bill.request_id
        and assignment.hold_id == bill.hold_id
        and assignment.node_id == leg.node_id
        and assignment.choice_index == leg.choice_index
        and assignment.leg == leg.leg
        and assignment.ask_input_nano_per_mtok == leg.ask_input_nano_per_mtok
        and assignment.ask_output_nano_per_mtok == leg.ask_output_nano_per_mtok
    )
    if not same:  # b
        raise InvalidRequest("a leg and its assignment disagree")
    opened = _open_receipt(receipt_envelope, leg.node_id, court)  # c
    receipt = opened.message
    if opened.digest != leg.receipt_digest or receipt.assignment_digest != leg.assignment_digest:
        raise BadSignature("a leg's receipt is not the one that the bill names")
    if leg.billed_output_tokens > min(receipt.output_tokens, assignment.max_tokens):  # d
        raise InvalidRequest("more output is billed than the node signed for")
    if leg.billed_input_tokens > min(receipt.prompt_tokens, assignment.prompt_len):
        raise InvalidRequest("more input is billed than the node signed for, or the prompt has")
    _check_arithmetic(leg, assignment, court.terms)  # e
    return LegFacts(
        receipt_envelope,
        opened.digest,
        leg.assignment_digest,
        leg.node_id,
        leg.client_charge_nano,
        leg.fee_nano,
        leg.pool_nano,
        leg.node_nano,
        leg.pool_subsidy_nano,
        receipt.output_tokens,
        assignment.manifest_digest,
    )


def _check_arithmetic(leg: BillLeg, assignment: Assignment, terms: Terms) -> None:
    charge = charge_nano(
        leg.billed_input_tokens,
        leg.billed_output_tokens,
        leg.ask_input_nano_per_mtok,
        leg.ask_output_nano_per_mtok,
    )
    split = split_charge(leg.client_charge_nano, terms.fee_ppm, terms.pool_ppm)
    if charge != leg.client_charge_nano or (split.fee_nano, split.pool_nano, split.node_nano) != (
        leg.fee_nano,
        leg.pool_nano,
        leg.node_nano,
    ):
        raise InvalidRequest(
            "a leg's charge or split is not what its tokens and the market's terms give",
            hint="Use trueweight.protos.money and the current market descriptor.",
        )
    unpaid = assignment.prompt_len + assignment.prefix_len - leg.billed_input_tokens
    most = charge_nano(unpaid, 0, leg.ask_input_nano_per_mtok, 0) if assignment.leg else 0
    if leg.pool_subsidy_nano > most:
        raise InvalidRequest("a leg's subsidy is more than re-reading its prefix costs")


def check_claim(body: ledger_pb2.Claim, caller: str, court: Court) -> ClaimFacts:
    """A node's own claim: assignment signed by a router, receipt signed by the caller."""
    _bounded(body.assignment, body.receipt)
    opened = open_envelope(body.assignment, Assignment, court.ring, court.terms.market_id)
    assignment = opened.message
    if opened.signer != assignment.router_id or "router" not in court.roles_of(opened.signer):
        raise BadSignature("the assignment is not signed by the router it names")
    if assignment.hold_id != body.hold_id or assignment.node_id != caller:
        raise PermissionDenied("the assignment is for another hold or node")
    receipt = _open_receipt(body.receipt, caller, court)
    facts = receipt.message
    if facts.assignment_digest != opened.digest:
        raise BadSignature("the receipt is for another assignment")
    if facts.finish_reason not in CLAIMABLE:
        raise InvalidRequest("a leg that died is free and cannot be claimed")
    if not facts.output_tokens:
        # Else a node that never starts is paid for the prompts of clients who gave up.
        raise InvalidRequest("a leg without output is free and cannot be claimed")
    if facts.output_tokens > assignment.max_tokens or facts.prompt_tokens > assignment.prompt_len:
        raise InvalidRequest("the receipt is for more tokens than were assigned")
    charge = charge_nano(
        facts.prompt_tokens,
        facts.output_tokens,
        assignment.ask_input_nano_per_mtok,
        assignment.ask_output_nano_per_mtok,
    )
    return ClaimFacts(
        body.hold_id,
        assignment.router_id,
        opened.digest,
        body.receipt,
        receipt.digest,
        caller,
        charge,
        _claimable_from(assignment),
        facts.output_tokens,
        assignment.manifest_digest,
    )


def _claimable_from(assignment: Assignment) -> int:
    deadline = assignment.issued_at_unix_ms + assignment.deadline_ms
    left = max(0, assignment.hold_expires_at_unix_ms - deadline)
    return deadline + min(CLAIM_GRACE_MS, left // 2)


def check_publish(envelope: bytes, court: Court) -> PublishFacts:
    """Evidence whose signer is entitled to its type."""
    _bounded(envelope)
    kind = kind_of_type(parse_envelope(envelope).payload_type)
    if kind == "key-event":
        event = _payload(envelope, KeyEvent)
        apply_key_event(court.ring, envelope, court.terms.market_id)
        return PublishFacts(kind, digest_of(envelope), envelope, event.identity)
    if kind is None or kind not in _PUBLISHERS:
        raise PermissionDenied("evidence of this type cannot be published")
    opened: Opened[Message] = open_envelope(
        envelope, message_class(kind), court.ring, court.terms.market_id
    )
    roles = court.roles_of(opened.signer)
    if not roles & _PUBLISHERS[kind]:
        raise PermissionDenied(f"its signer may not publish a {kind}")
    for name in _SIGNER_FIELDS:
        if getattr(opened.message, name, opened.signer) != opened.signer:
            raise BadSignature(f"the {kind} names another signer")
    _check_no_owner(kind, opened, court)
    return _kept(PublishFacts(kind, opened.digest, envelope, opened.signer), opened.message)


def _kept(facts: PublishFacts, message: Message) -> PublishFacts:
    """With what is kept of the message. Raises InvalidRequest if that is impossible."""
    if isinstance(message, audit_pb2.Conviction):
        check_owner(message.node_id, "the node id")
        return replace(facts, conviction=f"{message.node_id}:{facts.signer}")
    if isinstance(message, audit_pb2.Verdict):
        check_verdict(message)
        return replace(facts, verdict=verdict_row(message), opening=opening_of(message))
    if isinstance(message, audit_pb2.AuditRequest):
        check_digest(message.receipt_digest, "the request's receipt digest")
        return replace(facts, request=request_row(message))
    if isinstance(message, audit_pb2.MarginCommitment):
        check_commitment(message)
        return replace(facts, commitment=commitment_row(message))
    return replace(facts, step=step_row(message, facts.digest, facts.envelope))


def check_not_owner(caller: str, node_id: str, court: Court) -> None:
    """Raises PermissionDenied if a verifier acts on a node of its own declared owner."""
    trusted = court.roles_of(caller) & {"market", "admin"}
    if not trusted and court.ring.have_common_owner(caller, node_id):
        raise PermissionDenied("verifier and node have a declared owner in common")


def _check_no_owner(kind: str, opened: Opened[Message], court: Court) -> None:
    """Nobody judges his own nodes, nor lifts their suspension."""
    message = opened.message
    judges = kind in ("verdict", "conviction") or getattr(message, "lifted", False)
    if judges:
        check_not_owner(opened.signer, getattr(message, "node_id", ""), court)


def check_refund(body: ledger_pb2.Refund, roles: frozenset[str], court: Court) -> RefundFacts:
    """The verdict must name the receipt and have an outcome that refunds."""
    if len(body.receipt_digest) != 32:
        raise InvalidRequest("a receipt digest has 32 bytes")
    if not body.verdict:
        if "admin" in roles:
            return RefundFacts(body.receipt_digest, None)
        raise InvalidRequest("a refund needs the verdict that justifies it")
    published = check_publish(body.verdict, court)
    verdict = _payload(body.verdict, audit_pb2.Verdict)
    if verdict.receipt_digest != body.receipt_digest:
        raise InvalidRequest("the verdict is about another receipt")
    if not verdict.node_id:
        raise InvalidRequest("the verdict names no node")  # nor could its owner be told
    if verdict.outcome not in REFUNDABLE:
        raise InvalidRequest("the verdict's outcome does not refund")
    refused = verdict.outcome == audit_pb2.Verdict.INVALID_RECEIPT
    if refused and verdict.l0_failure not in NODE_FAULTS:
        raise InvalidRequest("the verdict names no check that its node can have failed")
    by_router = verdict.outcome == audit_pb2.Verdict.MISSING_TRANSCRIPT
    return RefundFacts(body.receipt_digest, published, verdict.node_id, by_router)


def check_convict(body: ledger_pb2.Convict, caller: str, court: Court) -> ConvictFacts:
    """The conviction must be the calling verifier's own and state enough evidence. Whether its
    verdicts add up to that is recomputed when it is applied (``ledger.audits``)."""
    if body.reward_ppm > 100_000:
        raise InvalidRequest("a challenger's reward is at most 100,000 ppm")
    published = check_publish(body.conviction, court)
    conviction = _payload(body.conviction, audit_pb2.Conviction)
    if (
        min(conviction.wealth_log10_milli, conviction.threshold_log10_milli) < CONVICT_LOG10_MILLI
        or conviction.wealth_log10_milli < conviction.threshold_log10_milli
        or not 0 < conviction.verdicts <= conviction.audited_tokens
        or conviction.first_verdict_index > conviction.last_verdict_index
    ):
        raise InvalidRequest(
            "the conviction does not state enough evidence",
            hint="A wealth of 10^6 over at least one audited token.",
        )
    if conviction.change_point_index > MAX_INDEX:
        raise InvalidRequest("no log is that long", hint="change_point_index is at most 2^63-1.")
    if published.signer != caller and "admin" not in court.roles_of(caller):
        raise PermissionDenied("the conviction was signed by another verifier")
    return ConvictFacts(
        published,
        conviction.node_id,
        published.signer,
        conviction.change_point_index,
        conviction,
    )


def check_reinstate(body: ledger_pb2.Reinstate, court: Court) -> ReinstateFacts:
    """The statement must be the market's or an administrator's."""
    _bounded(body.reinstatement)
    opened = open_envelope(
        body.reinstatement, market_pb2.Reinstatement, court.ring, court.terms.market_id
    )
    entitled = court.roles_of(opened.signer) & {"market", "admin"}
    if not entitled or opened.message.issuer != opened.signer:
        raise BadSignature("the reinstatement is not signed by the market or an administrator")
    published = PublishFacts("reinstatement", opened.digest, body.reinstatement, opened.signer)
    return ReinstateFacts(published, opened.message.node_id, body.pay_back_nano)


def _open_receipt(envelope: bytes, node_id: str, court: Court) -> Opened[Receipt]:
    try:
        opened = open_envelope(envelope, Receipt, court.ring, court.terms.market_id, signer=node_id)
    except BadSignature as error:
        if not court.ring.keys_of(node_id):
            raise BadSignature(
                f"no key of node {node_id} is known to the ledger",
                hint="Publish the node's key-event first.",
            ) from None
        raise error
    if opened.message.node_id != node_id:
        raise BadSignature("the receipt names another node")
    return opened


def _payload(envelope: bytes, message_type: type[M]) -> M:
    """The payload of an envelope whose digest or signature was judged before."""
    parsed = parse_envelope(envelope)
    if parsed.payload_type != payload_type(message_type):
        raise BadSignature("the evidence is of another type")
    return parse_payload(parsed, message_type)


def _bounded(*envelopes: bytes) -> None:
    if sum(len(e) for e in envelopes) > MAX_EVIDENCE_BYTES:
        raise InvalidRequest("the evidence is too large")
