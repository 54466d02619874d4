"""From a protobuf operation to a checked value: who may ask for it, and is it well formed.

No state is read here, so this part runs outside the writer and in parallel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from trueweight.ledger import evidence
from trueweight.ledger.accounts import (
    CLIENT,
    FEE,
    VERIFIER,
    check_amount,
    check_owner,
    kind_of,
)
from trueweight.ledger.budget import MAX_PERIOD_MS, MIN_PERIOD_MS
from trueweight.ledger.evidence import Court
from trueweight.ledger.values import Prepared
from trueweight.protos.envelope import digest_of
from trueweight.protos.errors import InvalidRequest, PermissionDenied, TrueweightError
from trueweight.protos.ids import ID_BYTES, derived_id, is_uuid7
from trueweight.protos.money import MAX_NANO
from trueweight.protos.v1 import ledger_pb2 as pb

MAX_TEXT = 200
MAX_EXPIRE = 1000
# What the service itself may do (expiring what is due).
SYSTEM = "system"
_NODE = "the node itself"
# Kinds of account out of which a payout may be, besides a node's available earnings.
_PAYABLE = (CLIENT, FEE, VERIFIER)
# Whose operations may have ids that are derived from anything.
DERIVES_IDS = frozenset({"admin", "market", "operator", "verifier"})
_SCOPES: dict[str, frozenset[str]] = {
    "deposit": frozenset({"admin"}),
    "bond_deposit": frozenset({"admin", "operator"}),
    "hold": frozenset({"router"}),
    "capture": frozenset({"router"}),
    "void_hold": frozenset({"router"}),
    "refund": frozenset({"verifier", "admin"}),
    "convict": frozenset({"verifier", "admin"}),
    "reinstate": frozenset({"market", "admin"}),
    "release": frozenset({"verifier", "admin"}),
    "payout_start": frozenset({"admin", "operator", _NODE}),
    "payout_settle": frozenset({"admin"}),
    "pay_debt": frozenset({"admin"}),
    "claim": frozenset({_NODE}),
    # Not verifiers: who is paid sets neither the price nor the quantity.
    "reward": frozenset({"admin"}),
    "bond_withdraw": frozenset({"admin", "operator", _NODE}),
    # Whose evidence it is the signature says; but strangers could fill the log with identities.
    "publish": frozenset(
        {"market", "admin", "router", "verifier", "publisher", "operator", "ledger"}
    ),
    "expire": frozenset({"router", "admin", SYSTEM}),
    "set_spending_limit": frozenset({"admin"}),
}


class OutOfScope(PermissionDenied):
    """This caller may not send this kind of operation."""


def is_hopeless(operation: Prepared) -> bool:
    """True if its caller cannot have had it applied before either, unless he has lost a role: it is
    not for him, or it is none. Other refused operations may be replays of what was good then."""
    error = operation.error
    return error is not None and (isinstance(error, OutOfScope) or not operation.body_hash)


def is_key_event(operation: Prepared) -> bool:
    """True if it changes whose keys count."""
    return operation.kind == "publish" and getattr(operation.facts, "kind", "") == "key-event"


def prepare(operation: pb.Operation, caller: str, court: Court) -> Prepared:
    """Never raises for what a caller sent: a refusal is part of the value."""
    kind = operation.WhichOneof("body") or ""
    try:
        if len(operation.id) != ID_BYTES:
            raise InvalidRequest("an operation id has 16 bytes", hint="Use a UUIDv7.")
        if not kind:
            raise InvalidRequest("the operation has no body, or one that is not known here")
        body = getattr(operation, kind)
        body_hash = _body_hash(operation, kind, body)
    except TrueweightError as error:
        id_ = operation.id[:ID_BYTES]  # never looked up with success: it has no body's hash
        return Prepared(id_, b"", operation.linked, kind, caller, None, None, error)
    try:
        _check_scope(kind, body, caller, court)
        _check_id(operation.id, kind, body, court.roles_of(caller))
        facts = _CHECKS[kind](operation.id, body, caller, court)
    except TrueweightError as error:
        return Prepared(operation.id, body_hash, operation.linked, kind, caller, body, None, error)
    if kind == "capture":
        body = None  # its facts say everything, and may come from another process
    return Prepared(operation.id, body_hash, operation.linked, kind, caller, body, facts)


def _body_hash(operation: pb.Operation, kind: str, body: Any) -> bytes:
    # The same message may come back in an envelope with other signatures: what counts is its
    # digest. Everything else is hashed as it is.
    if kind == "publish":
        try:
            return digest_of(body.envelope)[:ID_BYTES]
        except TrueweightError:
            pass
    data = kind.encode() + body.SerializeToString(deterministic=True)
    return hashlib.sha256(data).digest()[:ID_BYTES]


def _check_scope(kind: str, body: Any, caller: str, court: Court) -> None:
    allowed = _SCOPES[kind]
    if court.roles_of(caller) & allowed or (caller == SYSTEM and SYSTEM in allowed):
        return
    if _NODE in allowed and (kind == "claim" or (caller and body.node_id == caller)):
        return
    if kind == "payout_start" and caller and body.account == f"verifier:{caller}":
        return
    raise OutOfScope(
        f"{kind.replace('_', ' ')} is not for this caller",
        hint=f"It takes: {', '.join(sorted(allowed - {SYSTEM}))}.",
    )


def _check_id(id_: bytes, kind: str, body: Any, roles: frozenset[str]) -> None:
    """Ids that are no UUIDv7 are derived from public facts, so that a repeat is a replay. Others
    must not take them first: a node that has the ids of its refunds, verdicts and conviction would
    never be refunded, judged or convicted."""
    if is_uuid7(id_) or roles & DERIVES_IDS:
        return
    fact = {"claim": "receipt", "publish": "envelope", "void_hold": "hold_id"}.get(kind)
    if fact is not None:
        value = getattr(body, fact)
        tag, part = (kind, digest_of(value)) if fact != "hold_id" else ("void", value)
        if id_ == derived_id(tag, part):
            return
    raise InvalidRequest("an id of this form is not for this caller", hint="Use a UUIDv7.")


def _deposit(_: bytes, body: pb.Deposit, __: str, ___: Court) -> None:
    if kind_of(body.account) not in (CLIENT,):
        raise InvalidRequest("deposits go to client accounts", hint="Use --node for a bond.")
    check_amount(body.amount_nano)
    _rail(body.rail, body.reference)


def _bond_deposit(_: bytes, body: pb.BondDeposit, __: str, ___: Court) -> None:
    check_owner(body.node_id, "the node id")
    check_amount(body.amount_nano)
    _rail(body.rail, body.reference)


def _hold(_: bytes, body: pb.Hold, caller: str, __: Court) -> None:
    if kind_of(body.account) != CLIENT:
        raise InvalidRequest("holds are taken from client accounts")
    check_amount(body.amount_nano)
    _text(body.api_key_id, "the API key id", empty=True)
    if body.router_id and body.router_id != caller:
        raise PermissionDenied("a router can only hold for itself")


def _void(_: bytes, body: pb.VoidHold, __: str, ___: Court) -> None:
    _id(body.hold_id, "the hold id")


def _expire(_: bytes, body: pb.Expire, __: str, ___: Court) -> None:
    if not 1 <= body.limit <= MAX_EXPIRE:
        raise InvalidRequest(f"the limit must be between 1 and {MAX_EXPIRE}")


def _release(_: bytes, body: pb.Release, caller: str, court: Court) -> None:
    check_owner(body.node_id, "the node id")
    evidence.check_not_owner(caller, body.node_id, court)
    if body.below_log_index > evidence.MAX_INDEX:
        raise InvalidRequest("no log is that long", hint="below_log_index is at most 2^63-1.")
    if body.amount_nano > MAX_NANO:
        raise InvalidRequest("the amount is too large")


def _payout_start(_: bytes, body: pb.PayoutStart, caller: str, court: Court) -> None:
    if not body.account:
        check_owner(body.node_id, "the node id")
    elif body.node_id or kind_of(body.account) not in _PAYABLE:
        raise InvalidRequest(
            "a payout is out of one node's earnings, or of a verifier's, a client's or the fee "
            "account",
            hint="Name either the node or verifier:<id>, client:<id> or fee:market.",
        )
    elif body.account != f"verifier:{caller}" and "admin" not in court.roles_of(caller):
        raise PermissionDenied("paying out of this account is for administrators")
    check_amount(body.amount_nano)
    check_owner(body.rail, "the rail")


def _pay_debt(_: bytes, body: pb.PayDebt, __: str, ___: Court) -> None:
    _id(body.operation_id, "the operation id")
    kind_of(body.creditor)


def _payout_settle(_: bytes, body: pb.PayoutSettle, __: str, ___: Court) -> None:
    _id(body.payout_id, "the payout id")
    _text(body.reference, "the reference", empty=True)


def _reward(_: bytes, body: pb.Reward, __: str, ___: Court) -> None:
    check_owner(body.verifier_id, "the verifier id")
    check_amount(body.amount_nano)
    if len(body.verdict_digest) != 32:
        raise InvalidRequest("a verdict digest has 32 bytes")


def _bond_withdraw(_: bytes, body: pb.BondWithdraw, __: str, ___: Court) -> None:
    check_owner(body.node_id, "the node id")
    check_amount(body.amount_nano)


def _spending(_: bytes, body: pb.SetSpendingLimit, __: str, ___: Court) -> None:
    _text(body.api_key_id, "the API key id")
    if body.limit_nano > MAX_NANO:
        raise InvalidRequest("the limit is too large")
    if body.period_ms and not MIN_PERIOD_MS <= body.period_ms <= MAX_PERIOD_MS:
        raise InvalidRequest("a period is between a minute and 366 days")


def _capture(id_: bytes, body: pb.Capture, caller: str, court: Court) -> evidence.CaptureFacts:
    _id(body.hold_id, "the hold id")
    facts = evidence.check_capture(id_, body, court)
    for leg in facts.legs:
        check_owner(leg.node_id, "the node id")
    if facts.router_id != caller:
        raise PermissionDenied("the bill is another router's")
    return facts


def _claim(_: bytes, body: pb.Claim, caller: str, court: Court) -> evidence.ClaimFacts:
    _id(body.hold_id, "the hold id")
    return evidence.check_claim(body, check_owner(caller, "the caller"), court)


def _refund(_: bytes, body: pb.Refund, caller: str, court: Court) -> evidence.RefundFacts:
    _text(body.reason, "the reason", empty=True)
    return evidence.check_refund(body, court.roles_of(caller), court)


def _convict(_: bytes, body: pb.Convict, caller: str, court: Court) -> evidence.ConvictFacts:
    facts = evidence.check_convict(body, caller, court)
    check_owner(facts.node_id, "the node id")
    return facts


def _reinstate(_: bytes, body: pb.Reinstate, __: str, court: Court) -> evidence.ReinstateFacts:
    facts = evidence.check_reinstate(body, court)
    check_owner(facts.node_id, "the node id")
    if facts.pay_back > MAX_NANO:
        raise InvalidRequest("the amount is too large")
    return facts


def _publish(_: bytes, body: pb.Publish, __: str, court: Court) -> evidence.PublishFacts:
    return evidence.check_publish(body.envelope, court)


_CHECKS: dict[str, Callable[[bytes, Any, str, Court], Any]] = {
    "deposit": _deposit,
    "bond_deposit": _bond_deposit,
    "hold": _hold,
    "capture": _capture,
    "void_hold": _void,
    "refund": _refund,
    "convict": _convict,
    "reinstate": _reinstate,
    "release": _release,
    "payout_start": _payout_start,
    "payout_settle": _payout_settle,
    "pay_debt": _pay_debt,
    "claim": _claim,
    "reward": _reward,
    "bond_withdraw": _bond_withdraw,
    "publish": _publish,
    "expire": _expire,
    "set_spending_limit": _spending,
}


def _rail(rail: str, reference: str) -> None:
    check_owner(rail, "the rail")
    _text(reference, "the rail's reference")


def _text(text: str, what: str, *, empty: bool = False) -> None:
    printable = text.isprintable() and len(text) <= MAX_TEXT
    if not printable or (not text and not empty):
        raise InvalidRequest(f"{what} must be printable, at most {MAX_TEXT} characters")


def _id(value: bytes, what: str) -> None:
    if len(value) != ID_BYTES:
        raise InvalidRequest(f"{what} has 16 bytes")
