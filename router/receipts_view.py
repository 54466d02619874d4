"""What clients read back about their requests, and erase."""

from __future__ import annotations

import asyncio
import base64
import logging
from typing import Any

import orjson

from trueweight.protos.envelope import digest_of
from trueweight.protos.errors import NotFound, TrueweightError
from trueweight.protos.receipt_bundle import Inclusion, LeafProof, ReceiptBundle
from trueweight.protos.v1.audit_pb2 import Transcript
from trueweight.protos.v1.ledger_pb2 import InclusionProofRequest
from trueweight.router.journal import CAPTURED, PENDING, Journal, RequestRecord
from trueweight.router.store import Store
from trueweight.router.transcripts import TranscriptBox, erase_request
from trueweight.runtime.ledger_port import LedgerPort

log = logging.getLogger(__name__)

_PROOF_TIMEOUT_S = 3.0
_STATES = {PENDING: "pending", CAPTURED: "captured"}
_EXTRA = (
    "model", "charge_nano", "finish_reason", "nodes", "route", "seed", "client_nonce",
    "router_nonce",
)  # fmt: skip


class ReceiptsView:
    """Read and erase by request id; only the account that asked may."""

    def __init__(
        self, journal: Journal, store: Store, box: TranscriptBox, ledger: LedgerPort
    ) -> None:
        self._journal, self._store, self._box, self._ledger = journal, store, box, ledger

    async def read(self, request_id: bytes, account: str) -> dict[str, Any]:
        """The receipt bundle as JSON (see ``trueweight.protos.receipt_bundle``) plus readable
        facts. After erasure the bundle's salt and token ids are gone and ``erased`` is true."""
        record, state = await self._find(request_id, account)
        document = orjson.loads(record.document)
        extra = {name: document[name] for name in _EXTRA}
        extra["state"] = _STATES.get(state, "refused")
        try:
            transcripts = [
                await self._transcript(bytes.fromhex(d)) for d in document["receipt_digests"]
            ]
        except NotFound:
            public = ("request_id", "assignments", "receipts", "bill", "key_events")
            return {name: document[name] for name in public} | extra | {"erased": True}
        inclusion = await self._inclusion(_bytes(document["bill"])) if state == CAPTURED else None
        return _bundle(document, transcripts, inclusion).to_json() | extra | {"erased": False}

    async def erase(self, request_id: bytes, account: str) -> int:
        """Destroys the keys of a request's transcripts; how many there were."""
        await self._find(request_id, account)
        count = await self._store.erase(erase_request(request_id))
        log.info("transcripts of request %s erased by its client: %d", request_id.hex(), count)
        return count

    async def _find(self, request_id: bytes, account: str) -> tuple[RequestRecord, int]:
        found = await self._journal.find(request_id)
        # Somebody else's receipt is as absent as none.
        if found is None or found[0].account != account:
            raise NotFound(
                "There is no receipt with this id.",
                hint="Use the x-trueweight-receipt header of an answer that was charged.",
            )
        return found

    async def _transcript(self, receipt_digest: bytes) -> Transcript:
        sealed = await self._store.read(self._box.get(receipt_digest))
        return self._box.open(sealed, receipt_digest)

    async def _inclusion(self, bill: bytes) -> Inclusion | None:
        """Proof that the bill is in the log; None while it is not merged."""
        try:
            async with asyncio.timeout(_PROOF_TIMEOUT_S):
                proof = await self._ledger.inclusion(
                    InclusionProofRequest(message_digest=digest_of(bill))
                )
        except (TrueweightError, TimeoutError):
            return None
        return Inclusion(
            checkpoint=proof.checkpoint.note,
            bill=LeafProof(proof.proof.index, tuple(proof.proof.path)),
        )


def _bundle(
    document: dict[str, Any], transcripts: list[Transcript], inclusion: Inclusion | None
) -> ReceiptBundle:
    return ReceiptBundle(
        request_id=bytes.fromhex(document["request_id"]),
        assignments=tuple(_bytes(e) for e in document["assignments"]),
        receipts=tuple(_bytes(e) for e in document["receipts"]),
        bill=_bytes(document["bill"]),
        key_events=tuple(_bytes(e) for e in document["key_events"]),
        salt=transcripts[0].salt,
        prompt_token_ids=tuple(transcripts[0].prompt_token_ids),
        prefix_token_ids=tuple(tuple(t.prefix_token_ids) for t in transcripts),
        output_token_ids=tuple(tuple(t.output_token_ids) for t in transcripts),
        template_sha256=bytes.fromhex(document["template_sha256"]),
        date=document["date"],
        inclusion=inclusion,
    )


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)
