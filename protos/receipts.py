"""L0: what is checked of every receipt before anybody is paid. Pure, bounded, in fixed order.

The checks are the numbered list ``CHECKS``; the first that fails is the verdict. They cost two
hashes of the token ids and one signature. Facts that only the router has (what it asked to stop
or cancel, how long it waited) may be unknown to another checker, who skips those checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trueweight.protos.envelope import Opened, open_envelope
from trueweight.protos.errors import BadSignature, ReceiptRefused
from trueweight.protos.identity import KeyRing
from trueweight.protos.sampling import SAMPLER_ID
from trueweight.protos.tokens import SALT_BYTES, token_digest
from trueweight.protos.v1.market_pb2 import (
    CANCELLED,
    DEADLINE,
    ENGINE_ERROR,
    EOS,
    LENGTH,
    STOPPED,
    Assignment,
    EngineFingerprint,
    Receipt,
)

MAX_RECEIPT_BYTES = 64 * 1024
MAX_TOKENS = 1 << 22
# No engine makes a token of one sequence faster than this; zero durations fail here.
MIN_TOKEN_US = 2
# A node that gives up reports at least this share of its deadline.
_DEADLINE_SHARE = 0.9
_LATE_US = 60_000_000
_CLOCK_SLACK_US, _CLOCK_SLACK_SHARE = 1_000_000, 1.05


@dataclass(frozen=True, slots=True)
class RouterEvents:
    """What the router did to the call, and how long it saw it take (0 if not measured)."""

    stop_at: int | None = None
    cancelled: bool = False
    session_lost: bool = False
    elapsed_us: int = 0


@dataclass(frozen=True, slots=True)
class ReceiptFacts:
    """Everything L0 looks at.

    ``assignment`` was verified by ``open_assignment``. ``received`` are the ids that the router
    got for this leg, in order, all of them. ``manifest_digest`` is what the model id stands for
    in the registry at the assignment. ``events`` None: unknown here. ``offered`` None: the
    node's offer is not at hand. ``refusal`` says why the market gives an engine no paid work;
    None: not asked here.
    """

    assignment: Opened[Assignment]
    receipt: bytes
    salt: bytes
    prompt: Sequence[int]
    prefix: Sequence[int]
    received: Sequence[int]
    manifest_digest: bytes
    vocabulary_size: int
    events: RouterEvents | None = None
    offered: EngineFingerprint | None = None
    refusal: Callable[[EngineFingerprint], str] | None = None


_Ids = NDArray[np.int64]


class _Case(NamedTuple):
    """Token ids as arrays, converted once; None if they are not even 64-bit integers."""

    facts: ReceiptFacts
    order: Assignment
    receipt: Receipt
    prompt: _Ids | None
    prefix: _Ids | None
    # The signed tokens: the first ``receipt.output_tokens`` of what was received.
    output: _Ids | None


def open_assignment(data: bytes, ring: KeyRing, market_id: str) -> Opened[Assignment]:
    """A verified assignment, signed by the router that it names. Raises BadSignature."""
    opened = open_envelope(data, Assignment, ring, market_id)
    if opened.signer != opened.message.router_id:
        raise BadSignature("the assignment is not signed by the router that it names")
    return opened


def check_receipt(facts: ReceiptFacts, node_ring: KeyRing, market_id: str) -> Opened[Receipt]:
    """The verified receipt. Raises ReceiptRefused naming the first failed check.

    ``node_ring`` must know the node's operational key (from its offer's key events).
    """
    order = facts.assignment.message
    if len(facts.receipt) > MAX_RECEIPT_BYTES:
        raise _refused("size", f"a receipt has at most {MAX_RECEIPT_BYTES} bytes")
    if max(len(facts.prompt), len(facts.prefix), len(facts.received)) > MAX_TOKENS:
        raise _refused("size", f"at most {MAX_TOKENS} tokens")
    try:
        opened = open_envelope(facts.receipt, Receipt, node_ring, market_id, signer=order.node_id)
    except BadSignature as error:
        raise _refused("signature", error.message) from None
    receipt = opened.message
    signed = facts.received[: receipt.output_tokens]
    case = _Case(facts, order, receipt, *map(_ids, (facts.prompt, facts.prefix, signed)))
    for check in CHECKS[2:]:
        if not check.holds(case):
            raise _refused(check.name, check.meaning)
    return opened


def billable_output(receipt: Receipt, delivered: int) -> int:
    """Output tokens that a client pays for: min(receipt, delivered)."""
    return min(receipt.output_tokens, max(delivered, 0))


def _refused(check: str, meaning: str) -> ReceiptRefused:
    return ReceiptRefused(f"receipt refused ({check}): {meaning}", check=check)


# --- the checks ----------------------------------------------------------------------------


def _ids(ids: Sequence[int]) -> _Ids | None:
    try:
        return np.asarray(ids, dtype=np.int64)
    except (OverflowError, TypeError, ValueError):
        return None


def _ids_in_range(ids: _Ids | None, vocabulary_size: int) -> bool:
    if ids is None:
        return False
    return not ids.size or (int(ids.min()) >= 0 and int(ids.max()) < vocabulary_size)


def _is_digest_of(digest: bytes, ids: _Ids | None, facts: ReceiptFacts) -> bool:
    """True if these are ids of the vocabulary and the digest is theirs."""
    if ids is None or not _ids_in_range(ids, facts.vocabulary_size):
        return False
    return token_digest(facts.salt, ids) == digest


def _prompt_matches(case: _Case) -> bool:
    facts, order = case.facts, case.order
    return (
        len(facts.salt) == SALT_BYTES
        and len(facts.prompt) == order.prompt_len
        and _is_digest_of(order.prompt_digest, case.prompt, facts)
    )


def _prefix_matches(case: _Case) -> bool:
    facts, order = case.facts, case.order
    if len(facts.prefix) != order.prefix_len:
        return False
    if not len(facts.prefix) and not order.prefix_digest:
        return True
    return _is_digest_of(order.prefix_digest, case.prefix, facts)


def _not_under_reported(case: _Case) -> bool:
    # Only a Stop makes a node sign less than it sent.
    return (
        case.receipt.finish_reason == STOPPED
        or len(case.facts.received) == case.receipt.output_tokens
    )


def _stop_index(case: _Case) -> int | None:
    """Index of the first output token that ends the output: the first stop id, also before
    min_tokens. There it is only allowed if nothing else is, and engines end with it."""
    if case.output is None:
        return None
    found = np.flatnonzero(np.isin(case.output, list(case.order.sampling.stop_token_ids)))
    return int(found[0]) if found.size else None


def _nothing_after_eos(case: _Case) -> bool:
    index = _stop_index(case)
    return index is None or index == case.receipt.output_tokens - 1


def _eos_agrees(case: _Case) -> bool:
    ends = _stop_index(case) is not None
    if case.receipt.finish_reason == EOS:
        return ends
    return not (ends and case.receipt.finish_reason == LENGTH)


def _length_agrees(case: _Case) -> bool:
    return (
        case.receipt.finish_reason != LENGTH or case.receipt.output_tokens == case.order.max_tokens
    )


def _stop_agrees(case: _Case) -> bool:
    events = case.facts.events
    if case.receipt.finish_reason != STOPPED or events is None:
        return True
    return events.stop_at == case.receipt.output_tokens


def _cancel_agrees(case: _Case) -> bool:
    events = case.facts.events
    if case.receipt.finish_reason != CANCELLED or events is None:
        return True
    return events.cancelled or events.session_lost


def _deadline_agrees(case: _Case) -> bool:
    limit_us = case.order.deadline_ms * 1000
    if case.receipt.finish_reason == DEADLINE:
        return case.receipt.total_us >= limit_us * _DEADLINE_SHARE
    return case.receipt.total_us <= limit_us + _LATE_US


def _durations_possible(case: _Case) -> bool:
    receipt = case.receipt
    if receipt.queue_us > receipt.total_us or receipt.first_token_us > receipt.total_us:
        return False
    if receipt.output_tokens and receipt.first_token_us < receipt.queue_us:
        return False
    return receipt.total_us >= receipt.output_tokens * MIN_TOKEN_US


def _durations_seen(case: _Case) -> bool:
    events = case.facts.events
    if events is None or events.elapsed_us <= 0:
        return True
    return case.receipt.total_us <= events.elapsed_us * _CLOCK_SLACK_SHARE + _CLOCK_SLACK_US


def _sampler_is_canonical(case: _Case) -> bool:
    fingerprint = case.receipt.fingerprint
    return fingerprint.sampler_id == SAMPLER_ID and fingerprint.sampler_precision == "fp32"


def _fingerprint_is_offered(case: _Case) -> bool:
    return case.facts.offered is None or case.receipt.fingerprint == case.facts.offered


def _engine_is_allowed(case: _Case) -> bool:
    return case.facts.refusal is None or not case.facts.refusal(case.receipt.fingerprint)


class Check(NamedTuple):
    """One L0 check: its stable name, what it demands, and the decision."""

    name: str
    meaning: str
    holds: Callable[[_Case], bool]


def _before(_: _Case) -> bool:
    return True


# fmt: off
CHECKS: tuple[Check, ...] = (
    # 1 and 2 come before anything is parsed; see check_receipt.
    Check("size", "the envelope and all token lists are within bounds", _before),
    Check("signature", "signed by the assigned node's certified key, for this market", _before),
    # 3
    Check("assignment", "it answers this assignment",
          lambda c: c.receipt.assignment_digest == c.facts.assignment.digest),
    # 4
    Check("node", "it names the node that was assigned",
          lambda c: c.receipt.node_id == c.order.node_id),
    # 5
    Check("manifest", "the weights of the assignment are the registered ones",
          lambda c: c.order.manifest_digest == c.facts.manifest_digest),
    # 6, 7
    Check("prompt_digest", "the prompt is the assigned one", _prompt_matches),
    Check("prefix_digest", "the prefix is the assigned one", _prefix_matches),
    # 8
    Check("prompt_tokens", "it counts exactly the assigned prompt, without prefix",
          lambda c: c.receipt.prompt_tokens == c.order.prompt_len),
    # 9
    Check("max_tokens", "it does not exceed the assigned number of tokens",
          lambda c: c.receipt.output_tokens <= c.order.max_tokens),
    # 10, 11
    Check("over_reported", "it counts no token that was not sent",
          lambda c: c.receipt.output_tokens <= len(c.facts.received)),
    Check("under_reported", "it covers every token that was sent, unless stopped",
          _not_under_reported),
    # 12
    Check("token_ids", "every id is in the vocabulary",
          lambda c: _ids_in_range(c.output, c.facts.vocabulary_size)),
    # 13
    Check("output_digest", "the digest is that of the tokens that were sent",
          lambda c: _is_digest_of(c.receipt.output_digest, c.output, c.facts)),
    # 14
    Check("finish_reason", "it gives a known reason",
          lambda c: c.receipt.finish_reason in
          (EOS, LENGTH, STOPPED, CANCELLED, DEADLINE, ENGINE_ERROR)),
    # 15 to 20
    Check("after_eos", "nothing follows a stop token", _nothing_after_eos),
    Check("eos", "EOS exactly if the last token is a stop token", _eos_agrees),
    Check("length", "LENGTH only with exactly the assigned number of tokens", _length_agrees),
    Check("stopped", "STOPPED only after exactly as many tokens as the router said", _stop_agrees),
    Check("cancelled", "CANCELLED only if the router cancelled or was lost", _cancel_agrees),
    Check("deadline", "DEADLINE only near it, and no work long after it", _deadline_agrees),
    # 21, 22
    Check("durations", "durations are in order and an engine could reach them",
          _durations_possible),
    Check("elapsed", "it does not claim more time than the router saw", _durations_seen),
    # 23 to 25
    Check("sampler", "canonical sampling in fp32", _sampler_is_canonical),
    Check("fingerprint", "the engine is the one that was offered", _fingerprint_is_offered),
    Check("allowed", "the engine is on the market's allow-list", _engine_is_allowed),
)
# fmt: on

# The name, next to those of L0, for parameters that the contract forbids.
SAMPLING = "sampling"
# Checks that only a wrong transcript or assignment fails, never a node: its router answers for
# them. (The name that is sold is the router's word; a node only ever sees the weights' digest.)
TRANSCRIPT_CHECKS = frozenset({"assignment", "manifest", "prompt_digest", "prefix_digest"})
# What a verdict of INVALID_RECEIPT may name: without a name there would be nothing to check it by.
NODE_FAULTS = frozenset(c.name for c in CHECKS) - TRANSCRIPT_CHECKS | {SAMPLING}
