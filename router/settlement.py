"""From receipts to money: bill, journal, capture. Without a receipt: void."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from trueweight.protos.envelope import seal
from trueweight.protos.identity import Signer
from trueweight.protos.ids import uuid7
from trueweight.protos.v1.audit_pb2 import Transcript
from trueweight.protos.v1.ledger_pb2 import Capture, Operation
from trueweight.protos.v1.market_pb2 import Bill, FinishReason
from trueweight.router.billing import ServedLeg, Terms, make_bill
from trueweight.router.journal import Journal, RequestRecord
from trueweight.router.planning import Plan
from trueweight.router.settling import Settler
from trueweight.router.transcripts import TranscriptBox
from trueweight.runtime.clock import Clock


@dataclass(frozen=True, slots=True)
class Settled:
    """What the request came to."""

    charge_nano: int
    bill_id: bytes
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Account:
    """A request at its end. ``key_events``: of each leg's node. ``route``: why it went there."""

    plan: Plan
    legs: Sequence[ServedLeg]
    key_events: Sequence[bytes]
    hold_id: bytes
    hold_expires_at_unix_ms: int
    route: Mapping[str, Any]


class Settlement:
    """Ends holds, one way or the other."""

    def __init__(
        self,
        *,
        signer: Signer,
        terms: Terms,
        journal: Journal,
        settler: Settler,
        box: TranscriptBox,
        clock: Clock,
        random: Callable[[int], bytes],
        wait_ms: float,
    ) -> None:
        self._signer, self._terms, self._journal = signer, terms, journal
        self._settler, self._box = settler, box
        self._clock, self._random, self._wait_ms = clock, random, wait_ms

    async def settle(self, account: Account) -> Settled | None:
        """Bills what was receipted and delivered; gives the hold back if nothing was.

        The journal entry is durable before the ledger hears of the bill. Raises StorageError if
        it cannot be written: then the hold stays until the node claims it or it expires.
        """
        if not account.legs:
            await self._settler.void(
                account.hold_id, account.hold_expires_at_unix_ms, self._wait_ms
            )
            return None
        now = self._clock.now_unix_ms()
        bill_id = uuid7(now, self._random(10))
        bill = make_bill(account.legs, self._terms, bill_id=bill_id, now_unix_ms=now)
        envelope = seal(bill, self._signer)
        operation = Operation(
            id=bill_id,
            capture=Capture(
                hold_id=account.hold_id,
                bill=envelope,
                assignments=[leg.assignment.envelope for leg in account.legs],
                receipts=[leg.receipt.envelope for leg in account.legs],
            ),
        )
        record = RequestRecord(
            account.plan.request_id, account.plan.account, _document(account, bill, envelope), now
        )
        keep = [
            self._box.put(
                leg.receipt.digest, account.plan.request_id, _transcript(account.plan, leg), now
            )
            for leg in account.legs
        ]
        await self._journal.record_bill(record, operation, keep)
        await self._settler.capture(operation, self._wait_ms)
        return Settled(
            charge_nano=bill.charge_nano,
            bill_id=bill_id,
            prompt_tokens=len(account.plan.prompt),
            output_tokens=sum(leg.billed_output_tokens for leg in bill.legs),
        )


def _transcript(plan: Plan, leg: ServedLeg) -> Transcript:
    return Transcript(
        assignment_envelope=leg.assignment.envelope,
        receipt_envelope=leg.receipt.envelope,
        salt=plan.salt,
        prompt_token_ids=plan.prompt,
        prefix_token_ids=leg.prefix,
        # What the receipt signs; tokens sent beyond a Stop are nobody's.
        output_token_ids=leg.received[: leg.receipt.message.output_tokens],
        delivered_tokens=leg.delivered,
        grammar_source=plan.grammar_source,
    )


def _document(account: Account, bill: Bill, bill_envelope: bytes) -> bytes:
    """What is kept in the clear: nothing of it reveals text (salts are in the transcripts)."""
    plan, last = account.plan, account.legs[-1].receipt.message
    return orjson.dumps(
        {
            "request_id": plan.request_id.hex(),
            "model": plan.model.model_id,
            "assignments": [_text(leg.assignment.envelope) for leg in account.legs],
            "receipts": [_text(leg.receipt.envelope) for leg in account.legs],
            "receipt_digests": [leg.receipt.digest.hex() for leg in account.legs],
            "bill": _text(bill_envelope),
            "key_events": [_text(event) for event in dict.fromkeys(account.key_events)],
            "template_sha256": (
                plan.model.tokenizer.template_sha256.hex()
                if plan.is_chat and plan.model.tokenizer
                else ""
            ),
            "date": plan.date,
            "seed": str(plan.seed),
            "client_nonce": plan.client_nonce.hex(),
            "router_nonce": plan.router_nonce.hex(),
            "charge_nano": bill.charge_nano,
            "finish_reason": FinishReason.Name(last.finish_reason).lower(),
            "nodes": [leg.assignment.message.node_id for leg in account.legs],
            "route": dict(account.route),
        }
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
