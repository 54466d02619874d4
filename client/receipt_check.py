"""Checks a receipt file without asking anybody. Pure: values in, findings out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from trueweight.protos.checkpoint import LogState, log_origin, open_note
from trueweight.protos.envelope import Opened, open_envelope, ring_of
from trueweight.protos.errors import BadSignature, InvalidRequest, TrueweightError
from trueweight.protos.identity import KeyRing
from trueweight.protos.merkle import leaf_hash, verify_inclusion
from trueweight.protos.money import charge_nano, format_credits, split_charge
from trueweight.protos.receipt_bundle import LeafProof, ReceiptBundle
from trueweight.protos.receipts import ReceiptFacts, check_receipt, open_assignment
from trueweight.protos.v1.market_pb2 import (
    Assignment,
    Bill,
    BillLeg,
    FinishReason,
    MarketDescriptor,
    Member,
    Receipt,
)
from trueweight.protos.v1.model_pb2 import Manifest
from trueweight.runtime.market import Market

T = TypeVar("T")
_MAX_VOCABULARY = 2**32
NOT_PROVEN = (
    "that the node ran these weights: verifiers' audits are for that",
    "that the token ids are your text: recompute them with the tokeniser, template and date",
    "that no key had been revoked when it signed: revocations are in the log",
    "that balances add up: 'trueweight ledger fsck' and the ledger's export are for that",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. ``ok`` None: it could not be made; ``detail`` says what was found."""

    name: str
    ok: bool | None
    detail: str


@dataclass(slots=True)
class _Findings:
    found: list[Finding] = field(default_factory=list)

    def attempt(self, name: str, check: Callable[[], tuple[T, str]]) -> T | None:
        """Runs one check, notes its outcome, returns its value or None."""
        try:
            value, detail = check()
        except TrueweightError as error:
            self.found.append(Finding(name, False, str(error)))
            return None
        self.found.append(Finding(name, True, detail))
        return value


def check_bundle(
    bundle: ReceiptBundle, market: Market, manifest: Opened[Manifest] | None = None
) -> list[Finding]:
    """Every finding, in order: node keys, then each leg's assignment and receipt, then the bill,
    then the log. With a manifest, ids and weights are held against it. Never raises on a bundle
    that was parsed."""
    notes = _Findings()
    nodes = notes.attempt("node keys", lambda: _node_keys(bundle, market)) or KeyRing()
    pairs: list[tuple[Opened[Assignment], Opened[Receipt]]] = []
    for leg in range(len(bundle.assignments)):
        order = notes.attempt(f"assignment {leg}", lambda leg=leg: _order(bundle, market, leg))  # type: ignore[misc]
        if order is None:
            continue
        facts = _facts(bundle, leg, order, manifest)
        receipt = notes.attempt(
            f"receipt {leg}",
            lambda facts=facts: _receipt(facts, nodes, market),  # type: ignore[misc]
        )
        if receipt is not None:
            pairs.append((order, receipt))
    bill = notes.attempt("bill", lambda: _bill(bundle, market))
    if bill is not None and len(pairs) == len(bundle.assignments):
        notes.attempt("charge", lambda: _charge(bill, pairs, market.descriptor))
    else:
        notes.found.append(Finding("charge", None, "not checked: something above does not hold"))
    _check_log(notes, bundle, market)
    return notes.found


def holds(findings: Sequence[Finding]) -> bool:
    """True if nothing was found wrong and the money was checked."""
    return all(f.ok is not False for f in findings) and any(
        f.name == "charge" and f.ok for f in findings
    )


def _node_keys(bundle: ReceiptBundle, market: Market) -> tuple[KeyRing, str]:
    ring = ring_of(bundle.key_events, market.market_id)
    return ring, f"{len(ring.keys)} certified"


def _order(bundle: ReceiptBundle, market: Market, leg: int) -> tuple[Opened[Assignment], str]:
    opened = open_assignment(bundle.assignments[leg], market.ring, market.market_id)
    order = opened.message
    if not market.has_role(opened.signer, Member.ROUTER):
        raise BadSignature("signed by somebody who is not a router of this market")
    if order.request_id != bundle.request_id:
        raise InvalidRequest("it belongs to another request")
    return opened, f"model {order.model_id}, node {order.node_id}, seed {order.seed}"


def _facts(
    bundle: ReceiptBundle,
    leg: int,
    order: Opened[Assignment],
    manifest: Opened[Manifest] | None,
) -> ReceiptFacts:
    return ReceiptFacts(
        assignment=order,
        receipt=bundle.receipts[leg],
        salt=bundle.salt,
        prompt=bundle.prompt_token_ids,
        prefix=bundle.prefix_token_ids[leg],
        received=bundle.output_token_ids[leg],
        # Without the manifest the weights' digest is shown, not judged.
        manifest_digest=manifest.digest if manifest else order.message.manifest_digest,
        vocabulary_size=manifest.message.vocabulary_size if manifest else _MAX_VOCABULARY,
    )


def _receipt(facts: ReceiptFacts, nodes: KeyRing, market: Market) -> tuple[Opened[Receipt], str]:
    opened = check_receipt(facts, nodes, market.market_id)
    receipt = opened.message
    reason = FinishReason.Name(receipt.finish_reason)
    counts = f"{receipt.prompt_tokens} in, {receipt.output_tokens} out, {reason}"
    weights = facts.assignment.message.manifest_digest.hex()
    return opened, f"signed by the node; digests match; {counts}; weights {weights}"


def _bill(bundle: ReceiptBundle, market: Market) -> tuple[Bill, str]:
    opened = open_envelope(bundle.bill, Bill, market.ring, market.market_id)
    bill = opened.message
    if opened.signer != bill.router_id or not market.has_role(opened.signer, Member.ROUTER):
        raise BadSignature("not signed by a router of this market")
    if bill.request_id != bundle.request_id:
        raise InvalidRequest("the bill is for another request")
    if len(bill.legs) != len(bundle.assignments):
        raise InvalidRequest("the bill has other legs than the receipts")
    return bill, f"signed by the router; {format_credits(bill.charge_nano)} credits"


def _charge(
    bill: Bill,
    pairs: Sequence[tuple[Opened[Assignment], Opened[Receipt]]],
    market: MarketDescriptor,
) -> tuple[int, str]:
    total = 0
    places: set[tuple[int, int]] = set()
    read: Counter[int] = Counter()
    written: Counter[int] = Counter()
    for leg, (order, receipt) in zip(bill.legs, pairs, strict=True):
        _check_leg(bill, leg, order, receipt)
        _check_amounts(leg, market)
        choice, wanted = leg.choice_index, order.message
        if (choice, leg.leg) in places:
            raise InvalidRequest("one part of the answer is billed twice")
        places.add((choice, leg.leg))
        read[choice] += leg.billed_input_tokens
        if read[choice] > wanted.prompt_len:
            raise InvalidRequest("the prompt of one choice is billed more than once")
        written[choice] += leg.billed_output_tokens
        if written[choice] > wanted.prefix_len + wanted.max_tokens:
            raise InvalidRequest("more output of one choice is billed than was asked for")
        total += leg.client_charge_nano
    if total != bill.charge_nano:
        raise InvalidRequest("the legs do not sum to the charge")
    return total, f"recomputed from tokens and locked prices: {format_credits(total)} credits"


def _check_leg(
    bill: Bill, leg: BillLeg, order: Opened[Assignment], receipt: Opened[Receipt]
) -> None:
    wanted = order.message
    about = (bill.router_id, bill.hold_id, bill.model_id)
    if about != (wanted.router_id, wanted.hold_id, wanted.model_id):
        raise InvalidRequest("the bill names another router, hold or model than an assignment")
    if leg.assignment_digest != order.digest or leg.receipt_digest != receipt.digest:
        raise InvalidRequest("a leg of the bill names another assignment or receipt")
    place = (leg.node_id, leg.choice_index, leg.leg)
    if place != (wanted.node_id, wanted.choice_index, wanted.leg):
        raise InvalidRequest("a leg of the bill names another node or place")
    if leg.billed_input_tokens > wanted.prompt_len:
        raise InvalidRequest("more input is billed than the prompt has")
    if leg.billed_output_tokens > receipt.message.output_tokens:
        raise InvalidRequest("more output is billed than the receipt says")
    asks = (leg.ask_input_nano_per_mtok, leg.ask_output_nano_per_mtok)
    if asks != (wanted.ask_input_nano_per_mtok, wanted.ask_output_nano_per_mtok):
        raise InvalidRequest("the billed prices are not those locked in the assignment")


def _check_amounts(leg: BillLeg, market: MarketDescriptor) -> None:
    charge = charge_nano(
        leg.billed_input_tokens,
        leg.billed_output_tokens,
        leg.ask_input_nano_per_mtok,
        leg.ask_output_nano_per_mtok,
    )
    if charge != leg.client_charge_nano:
        raise InvalidRequest(f"a leg charges {leg.client_charge_nano}, right is {charge}")
    split = split_charge(charge, market.fee_ppm, market.verification_pool_ppm)
    if (leg.fee_nano, leg.pool_nano, leg.node_nano) != (
        split.fee_nano,
        split.pool_nano,
        split.node_nano,
    ):
        raise InvalidRequest("fee, pool and node share are not the market's split of the charge")


def _check_log(notes: _Findings, bundle: ReceiptBundle, market: Market) -> None:
    if bundle.inclusion is None:
        notes.found.append(Finding("log", None, "the file carries no inclusion proof"))
        return
    inclusion = bundle.inclusion
    state = notes.attempt("checkpoint", lambda: _checkpoint(inclusion.checkpoint, market))
    if state is None:
        return
    leaves = [("bill in log", bundle.bill, inclusion.bill)]
    for leg, proof in enumerate(inclusion.receipts):
        leaves.append((f"receipt {leg} in log", bundle.receipts[leg], proof))
    for name, body, proof in leaves:
        notes.attempt(
            name,
            lambda body=body, proof=proof: _included(body, proof, state),  # type: ignore[misc]
        )


def _included(body: bytes, proof: LeafProof, state: LogState) -> tuple[int, str]:
    verify_inclusion(leaf_hash(body), proof.index, state.size, proof.path, state.root)
    return proof.index, f"leaf {proof.index} of {state.size}"


def _checkpoint(note: str, market: Market) -> tuple[LogState, str]:
    origin = log_origin(market.market_id)
    error: TrueweightError = BadSignature("the market names no ledger")
    for member in market.members(Member.LEDGER):
        for public_key in market.ring.keys_of(member.identity):
            try:
                state = open_note(note, origin, public_key)
            except TrueweightError as reason:
                error = reason
            else:
                return state, f"signed by the ledger; {state.size} leaves"
    raise error
