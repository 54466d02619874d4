"""What the public log says about verification, folded leaf by leaf.

Anyone who reads the same log gets the same state: the verifier after a crash, ``explain``, ``owed``
and a third party. Leaves that are malformed, unentitled or out of order are counted and ignored;
no leaf can crash or grow the fold without bound.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from trueweight.protos.audit import check_reveal
from trueweight.protos.blind_verdicts import BLIND_WINDOW_MS, Committed
from trueweight.protos.calibrations import CalibrationTable, read_calibration
from trueweight.protos.conviction import Asked, AuditLine, Evidence, Settled
from trueweight.protos.deterrence import UnsettledWork
from trueweight.protos.envelope import (
    Opened,
    apply_key_event,
    digest_of,
    kind_of_type,
    open_envelope,
    parse_envelope,
    parse_payload,
)
from trueweight.protos.errors import TrueweightError
from trueweight.protos.identity import KeyRing
from trueweight.protos.market_terms import epoch_refusal
from trueweight.protos.suspension import Suspensions
from trueweight.protos.v1.audit_pb2 import (
    AuditRequest,
    Calibration,
    Conviction,
    EpochOpen,
    EpochReveal,
    MarginCommitment,
    Verdict,
)
from trueweight.protos.v1.ledger_pb2 import TransferBatch
from trueweight.protos.v1.log_pb2 import LogEntry
from trueweight.protos.v1.market_pb2 import Bill, Member, Receipt, Reinstatement, Suspension
from trueweight.protos.v1.model_pb2 import RegistryEntry
from trueweight.runtime.market import Market
from trueweight.verifier.clients import Clients
from trueweight.verifier.leaves import Leaf, NodeRecord, Recent, VerdictLeaf
from trueweight.verifier.registry import Registry
from trueweight.verifier.rules import (
    APPEAL,
    LATE,
    NO_RECEIPT,
    OWN_NODE,
    WAITS,
    answer_in,
    is_copied,
)
from trueweight.verifier.selection import EpochLeaf, ReceiptLeaf, epoch_leaf

log = logging.getLogger(__name__)

# Receipts remembered. A verdict about an older receipt is not evidence any more.
MAX_RECEIPTS = 500_000
MAX_HOLDS = 200_000
MAX_NODES = 100_000
MAX_LEGS = 256
# Epochs remembered per verifier; audits of older ones cannot be accounted for any more.
MAX_EPOCHS = 1_000
# Ignored leaves that are worth a line each; a flood of them is not.
MAX_WARNINGS = 100
KINDS = (
    "key-event",
    "registry-entry",
    "calibration",
    "epoch-open",
    "epoch-reveal",
    "receipt",
    "bill",
    "audit-request",
    "margin-commitment",
    "verdict",
    "conviction",
    "suspension",
    "reinstatement",
    "transfer",
)

M = TypeVar("M", bound=Message)


class LogView:
    """The fold. ``apply`` takes leaves in index order; ``next_index`` is where to go on."""

    def __init__(self, market: Market) -> None:
        self.market = market
        self.ring = market.ring
        # Keys that were revoked: by which leaf, and whose they were.
        self._revoked: Recent[str, tuple[int, str, bytes]] = Recent(MAX_NODES)
        self.next_index = 0
        self.ignored = 0
        # Why the last ignored leaf was.
        self.last_reason = ""
        self.registry = Registry()
        self.calibrations = CalibrationTable()
        self.epochs: dict[str, list[EpochLeaf]] = {}
        # Opened outside the market's terms, and why; they do not count.
        self.refused_epochs: Recent[tuple[str, int], str] = Recent(MAX_EPOCHS)
        # The highest number that each verifier has used, refused or not.
        self.epoch_numbers: dict[str, int] = {}
        self.reveals: dict[tuple[str, int], bytes] = {}
        self.receipts: Recent[bytes, ReceiptLeaf] = Recent(MAX_RECEIPTS)
        self.requests: Recent[tuple[str, bytes], Leaf[AuditRequest]] = Recent(MAX_RECEIPTS)
        self.verdicts: Recent[tuple[str, bytes], VerdictLeaf] = Recent(MAX_RECEIPTS)
        self.commitments: Recent[tuple[str, bytes], Committed] = Recent(MAX_RECEIPTS)
        self.nodes: dict[str, NodeRecord] = {}
        # Leaf of the first verdict of each receipt by a verifier that may judge its node.
        self.first_verdicts: Recent[bytes, int] = Recent(MAX_RECEIPTS)
        self._clients = Clients(MAX_HOLDS)
        # Nodes with audits that wait, by verifier.
        self._waiting: dict[str, dict[str, None]] = {}
        self._judged: Recent[bytes, bool] = Recent(MAX_RECEIPTS)
        # Of receipts that are not in the log yet: charge, router and client.
        self._bills: Recent[bytes, tuple[int, str, str]] = Recent(MAX_HOLDS)
        self._handlers: dict[str, Callable[[LogEntry], None]] = {
            "key-event": self._on_key_event,
            "registry-entry": self._on_registry_entry,
            "calibration": self._on_calibration,
            "epoch-open": self._on_epoch_open,
            "epoch-reveal": self._on_epoch_reveal,
            "receipt": self._on_receipt,
            "bill": self._on_bill,
            "audit-request": self._on_audit_request,
            "margin-commitment": self._on_margin_commitment,
            "verdict": self._on_verdict,
            "conviction": self._on_conviction,
            "suspension": self._on_suspension,
            "reinstatement": self._on_reinstatement,
            "transfer": self._on_transfer,
        }

    def apply(self, entry: LogEntry) -> str:
        """Folds one leaf; returns its kind, or "" if it was ignored."""
        if entry.index < self.next_index:
            return ""
        self.next_index = entry.index + 1
        kind = kind_of_type(entry.kind) or entry.kind
        handler = self._handlers.get(kind)
        if handler is None:
            return ""
        try:
            handler(entry)
        except TrueweightError as error:
            self.ignored += 1
            self.last_reason = error.message
            level = logging.WARNING if self.ignored <= MAX_WARNINGS else logging.DEBUG
            log.log(level, "leaf %d (%s) ignored: %s", entry.index, kind, error.message)
            return ""
        return kind

    def node(self, node_id: str) -> NodeRecord:
        """The record of a node, made on first use."""
        record = self.nodes.get(node_id)
        if record is None:
            if len(self.nodes) >= MAX_NODES:
                raise TrueweightError("the log names too many nodes")
            needed = self.convictions_needed
            record = NodeRecord(unsettled=UnsettledWork(needed), standing=Suspensions(needed))
            self.nodes[node_id] = record
        return record

    @property
    def convictions_needed(self) -> int:
        """How many verifiers convict."""
        return max(1, self.market.descriptor.convictions_needed)

    def ring_for(self, envelope: bytes, index: int) -> KeyRing:
        """The keys by which an envelope is judged that was in the log at this index, or before it:
        those that signed it may have been revoked since."""
        keys = self.ring.keys
        for signature in parse_envelope(envelope).signatures:
            revoked = self._revoked.get(signature.key_id)
            if revoked is not None and index < revoked[0]:
                keys = keys.insert(signature.key_id, revoked[1:])
        return self.ring if keys is self.ring.keys else replace(self.ring, keys=keys)

    def counted(self, verifier_id: str, node_id: str) -> list[Evidence]:
        """The audits of one node by one verifier that count, in the order of their requests."""
        record = self.nodes.get(node_id)
        line = record.lines.get(verifier_id) if record else None
        return list(line.counted) if line else []

    def is_verifier(self, identity: str) -> bool:
        """True if the market trusts this identity with verdicts."""
        return self.market.has_role(identity, Member.VERIFIER)

    def may_judge(self, verifier_id: str, node_id: str) -> bool:
        """False if verifier and node ever declared a common owner. The market itself may."""
        return verifier_id == self.market.market_id or not self.ring.have_common_owner(
            verifier_id, node_id
        )

    def judges_of(self, node_id: str) -> list[str]:
        """The market's verifiers that may judge this node."""
        members = self.market.members(Member.VERIFIER)
        return [m.identity for m in members if self.may_judge(m.identity, node_id)]

    def asked_by_another(self, verifier_id: str, receipt: ReceiptLeaf) -> bool:
        """True if another verifier asked for this receipt while its commitment could be blind."""
        for judge in self.judges_of(receipt.node_id):
            request = self.requests.get((judge, receipt.receipt_digest))
            late_ms = receipt.merged_at_unix_ms + BLIND_WINDOW_MS
            if judge != verifier_id and request and request.merged_at_unix_ms <= late_ms:
                return True
        return False

    def convicted(self, node_id: str) -> bool:
        """True once as many verifiers convicted as the market asks for."""
        record = self.nodes.get(node_id)
        return record is not None and record.standing.convicted

    # Handlers, one per kind of leaf.

    def _on_key_event(self, entry: LogEntry) -> None:
        before = self.ring
        self.ring = apply_key_event(before, entry.body, self.market.market_id)
        for name, key in self.ring.lost_since(before).items():
            self._revoked.put(name, (entry.index, *key))

    def _on_registry_entry(self, entry: LogEntry) -> None:
        leaf = self._open(entry, RegistryEntry, self.market.market_id)
        self.registry.apply(leaf.message, entry.merged_at_unix_ms)

    def _on_calibration(self, entry: LogEntry) -> None:
        opened = self._open_by_verifier(entry, Calibration)
        if opened.message.manifest_digest not in self.registry.manifests:
            raise TrueweightError("a calibration for weights that nobody registered")
        calibration = read_calibration(opened.message, opened.digest, entry.index)
        if not self.calibrations.add(calibration):
            raise TrueweightError("the calibration's version does not go forward")

    def _on_epoch_open(self, entry: LogEntry) -> None:
        leaf = self._open_by_verifier(entry, EpochOpen)
        who, number = leaf.message.verifier_id, leaf.message.epoch
        if number <= self.epoch_numbers.get(who, -1):
            raise TrueweightError("the epoch's number does not go forward")
        self.epoch_numbers[who] = number
        # By whatever epoch, as the ledger does, which knows no terms.
        self._end_patience(who, entry.index)
        if refusal := epoch_refusal(self.market.descriptor, leaf.message):
            self.refused_epochs.put((who, number), refusal)
            raise TrueweightError(refusal)
        epochs = self.epochs.setdefault(who, [])
        epochs.append(epoch_leaf(entry.index, leaf.message))
        if len(epochs) > MAX_EPOCHS:
            forgotten = epochs.pop(0)
            self.reveals.pop((who, forgotten.message.epoch), None)

    def _end_patience(self, verifier_id: str, index: int) -> None:
        """What the verifier asked for long ago and never answered counts as zero from here on."""
        waiting = self._waiting.get(verifier_id, {})
        for node_id in list(waiting):
            line = self.node(node_id).lines.get(verifier_id)
            if line is not None:
                self._settle(verifier_id, node_id, line.epoch_opened(index))
            if line is None or not line.waiting:
                del waiting[node_id]

    def _on_epoch_reveal(self, entry: LogEntry) -> None:
        leaf = self._open_by_verifier(entry, EpochReveal)
        key = (leaf.message.verifier_id, leaf.message.epoch)
        opened = [e for e in self.epochs.get(key[0], ()) if e.message.epoch == leaf.message.epoch]
        if not opened:
            raise TrueweightError("the revealed epoch was never opened")
        check_reveal(leaf.message.secret, opened[0].message.commitment)
        self.reveals.setdefault(key, leaf.message.secret)

    def _on_receipt(self, entry: LogEntry) -> None:
        # Signatures of receipts and bills were checked at the capture and are checked again by
        # the audit (L0); here they only say what there is to audit.
        receipt = parse_payload(parse_envelope(entry.body), Receipt)
        digest = digest_of(entry.body)
        charge, router_id, client = self._bills.pop(digest) or (None, "", "")
        leaf = ReceiptLeaf(
            index=entry.index,
            merged_at_unix_ms=entry.merged_at_unix_ms,
            receipt_digest=digest,
            assignment_digest=receipt.assignment_digest,
            node_id=receipt.node_id,
            output_tokens=receipt.output_tokens,
            charge_nano=charge,
            router_id=router_id,
            client=client,
        )
        if charge is None:
            self._clients.receipt(entry.index, digest, receipt.node_id)
        if self.receipts.get(digest) is None:
            self.node(receipt.node_id).receipts += 1
            self.receipts.put(digest, leaf)

    def _on_bill(self, entry: LogEntry) -> None:
        bill = parse_payload(parse_envelope(entry.body), Bill)
        # A capture's receipts are the leaves just before its bill, in order.
        first_receipt = entry.index - len(bill.legs)
        # Now, and not when an audit is asked for: by then the hold may be forgotten.
        client = self._clients.bill(bill.hold_id)
        for number, leg in enumerate(bill.legs[:MAX_LEGS]):
            record = self.node(leg.node_id)
            record.unsettled.earned(first_receipt + number, leg.client_charge_nano)
            record.price.earned(leg.client_charge_nano, leg.billed_output_tokens)
            known = self.receipts.get(leg.receipt_digest)
            facts = (leg.client_charge_nano, bill.router_id, client)
            if known is None:
                self._bills.put(leg.receipt_digest, facts)
            elif known.charge_nano is None:
                charge, router_id, payer = facts
                changed = replace(known, charge_nano=charge, router_id=router_id, client=payer)
                self.receipts.put(leg.receipt_digest, changed)

    def _on_transfer(self, entry: LogEntry) -> None:
        batch = TransferBatch()
        try:
            batch.ParseFromString(entry.body)
        except DecodeError:
            raise TrueweightError("not a batch of transfers") from None
        for digest, client in self._clients.transfer(entry.index, batch):
            known = self.receipts.get(digest)
            if known is not None and not known.client:
                self.receipts.put(digest, replace(known, client=client))

    def _on_audit_request(self, entry: LogEntry) -> None:
        leaf = self._open_by_verifier(entry, AuditRequest)
        request = leaf.message
        key = (request.verifier_id, request.receipt_digest)
        receipt = self.receipts.get(request.receipt_digest)
        if receipt is None:
            raise TrueweightError("an audit is requested of a receipt that the log does not have")
        if self.requests.get(key) is not None:
            return
        self.requests.put(key, leaf)
        record = self.node(receipt.node_id)
        if request.for_appeal or not self.may_judge(request.verifier_id, receipt.node_id):
            return
        if receipt.index < record.reinstated:
            return
        asked = Asked(leaf.index, receipt.index, receipt.output_tokens, receipt.client)
        line = record.lines.setdefault(request.verifier_id, AuditLine())
        if line.ask(request.receipt_digest, asked):
            self._waiting.setdefault(request.verifier_id, {})[receipt.node_id] = None

    def _on_verdict(self, entry: LogEntry) -> None:
        leaf = self._open_by_verifier(entry, Verdict)
        verdict = leaf.message
        key = (verdict.verifier_id, verdict.receipt_digest)
        if self.verdicts.get(key) is not None:
            raise TrueweightError("this verifier judged this receipt before")
        if not self.may_judge(verdict.verifier_id, verdict.node_id):
            self.verdicts.put(key, VerdictLeaf(leaf, None, OWN_NODE))
            return
        copied = is_copied(self, leaf)
        if self.first_verdicts.get(verdict.receipt_digest) is None:
            self.first_verdicts.put(verdict.receipt_digest, leaf.index)
        receipt = self.receipts.get(verdict.receipt_digest)
        if receipt is None:
            self.verdicts.put(key, VerdictLeaf(leaf, None, NO_RECEIPT, copied))
            return
        record = self.node(receipt.node_id)
        record.unsettled.judged(verdict.verifier_id, receipt.index)
        line = record.lines.get(verdict.verifier_id)
        asked = line.asked(verdict.receipt_digest) if line else None
        if line is None or asked is None:
            why_not = self._why_not_asked(key)
            self.verdicts.put(key, VerdictLeaf(leaf, None, why_not, copied))
            return
        answer = answer_in(self, leaf, asked, copied=copied)
        self.verdicts.put(key, VerdictLeaf(leaf, None, answer.why_not or WAITS, copied))
        settled = line.answer(verdict.receipt_digest, answer)
        self._settle(verdict.verifier_id, receipt.node_id, settled)

    def _why_not_asked(self, key: tuple[str, bytes]) -> str:
        request, receipt = self.requests.get(key), self.receipts.get(key[1])
        if request is None:
            return "the audit was not requested in the log first"
        if receipt is not None and receipt.index < self.node(receipt.node_id).reinstated:
            return "the node was reinstated after this receipt"
        return APPEAL if request.message.for_appeal else LATE

    def _settle(self, verifier_id: str, node_id: str, settled: list[Settled]) -> None:
        """Keeps how audits count whose turn has come."""
        record = self.node(node_id)
        for each in settled:
            evidence, key = each.evidence, (verifier_id, each.receipt_digest)
            if evidence is None:
                continue
            record.by_verifier[verifier_id] = record.lines[verifier_id].evidence
            known = self.verdicts.get(key)
            if known is not None:
                shown = evidence if each.is_added and evidence.is_scored else None
                self.verdicts.put(key, replace(known, evidence=shown, why_not=each.why_not))
            if self._judged.get(each.receipt_digest) is None:
                record.pooled = record.pooled.add(evidence)
                if evidence.is_scored:
                    self._judged.put(each.receipt_digest, True)

    def _on_margin_commitment(self, entry: LogEntry) -> None:
        leaf = self._open_by_verifier(entry, MarginCommitment)
        key = (leaf.message.verifier_id, leaf.message.receipt_digest)
        if self.commitments.get(key) is None:
            self.commitments.put(
                key, Committed(leaf.index, leaf.merged_at_unix_ms, leaf.message.commitment)
            )

    def _on_conviction(self, entry: LogEntry) -> None:
        leaf = self._open_by_verifier(entry, Conviction)
        if not self.may_judge(leaf.message.verifier_id, leaf.message.node_id):
            raise TrueweightError(OWN_NODE)
        record = self.node(leaf.message.node_id)
        record.convictions.setdefault(leaf.message.verifier_id, leaf)
        record.standing.convict(leaf.message.verifier_id)

    def _on_suspension(self, entry: LogEntry) -> None:
        opened = self._open_any(entry, Suspension)
        message, by_market = opened.message, opened.signer == self.market.market_id
        if not by_market and not self.is_verifier(opened.signer):
            raise TrueweightError("only verifiers and the market suspend")
        if not self.may_judge(opened.signer, message.node_id):
            raise TrueweightError(OWN_NODE)
        record, who = self.node(message.node_id), "" if by_market else opened.signer
        if message.lifted:
            record.standing.lift(who)
        else:
            record.standing.suspend(who)
            record.suspended_for[opened.signer] = message.conviction_digest

    def _on_reinstatement(self, entry: LogEntry) -> None:
        opened = self._open_any(entry, Reinstatement)
        if not self.market.may_reinstate(opened.signer):
            raise TrueweightError("only the market and its administrators reinstate")
        self.node(opened.message.node_id).reinstate(entry.index)

    def _open_any(self, entry: LogEntry, message_type: type[M]) -> Opened[M]:
        return open_envelope(entry.body, message_type, self.ring, self.market.market_id)

    def _open(self, entry: LogEntry, message_type: type[M], signer: str) -> Leaf[M]:
        opened = open_envelope(
            entry.body, message_type, self.ring, self.market.market_id, signer=signer
        )
        return Leaf(entry.index, opened.message, opened.digest, entry.body, entry.merged_at_unix_ms)

    def _open_by_verifier(self, entry: LogEntry, message_type: type[M]) -> Leaf[M]:
        """A leaf signed by the verifier it names, who must be a member of the market."""
        opened = self._open_any(entry, message_type)
        if getattr(opened.message, "verifier_id", None) != opened.signer:
            raise TrueweightError("signed by another than the verifier it names")
        if not self.is_verifier(opened.signer):
            raise TrueweightError("signed by somebody who is no verifier of this market")
        return Leaf(entry.index, opened.message, opened.digest, entry.body, entry.merged_at_unix_ms)
