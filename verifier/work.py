"""Doing duties: each one ends in an idempotent operation at the ledger."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from trueweight.protos.conviction import change_point_index
from trueweight.protos.errors import NotFound
from trueweight.protos.evidence import CONVICT, log10_milli
from trueweight.protos.v1.audit_pb2 import Conviction, EpochReveal
from trueweight.protos.v1.market_pb2 import Suspension
from trueweight.runtime.clock import Clock
from trueweight.runtime.ledger_port import LedgerPort
from trueweight.verifier import duties
from trueweight.verifier.audit import Auditor
from trueweight.verifier.balances import read_stakes
from trueweight.verifier.deterrence import KNOWN_CHEATS, Cheat, releasable_nano
from trueweight.verifier.duplicates import blind_for, commit
from trueweight.verifier.epochs import EpochPlan, audit_request, open_epoch
from trueweight.verifier.leaves import NodeRecord
from trueweight.verifier.plan import Agenda
from trueweight.verifier.publishing import REWARD_PPM, Publisher
from trueweight.verifier.standing import power, stakes, standings
from trueweight.verifier.verdicts import AuditContext, outcome_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Worker:
    """Turns a duty into statements and operations. Holds no state of its own."""

    agenda: Agenda
    auditor: Auditor
    publisher: Publisher
    ledger: LedgerPort
    clock: Clock
    reward_ppm: int = REWARD_PPM
    cheats: Sequence[Cheat] = KNOWN_CHEATS

    async def do(self, duty: duties.Duty) -> None:
        """Does one duty. Raises errors of the one tree; it may then simply be done again."""
        match duty:
            case duties.PublishCalibration():
                await self._calibrate(duty)
            case duties.OpenEpoch():
                await self._open_epoch(duty.epoch)
            case duties.RevealEpoch():
                await self._reveal_epoch(duty.epoch)
            case duties.RequestAudit():
                await self._request(duty)
            case duties.PerformAudit():
                await self._audit(duty)
            case duties.PublishCommitment():
                await self._commit(duty.receipt_digest)
            case duties.PublishVerdict():
                await self._publish_verdict(duty.receipt_digest)
            case duties.ApplyRefund():
                await self._refund(duty.receipt_digest)
            case duties.PublishConviction():
                await self._convict(duty.node_id)
            case duties.PublishSuspension():
                await self._suspend(duty.node_id)
            case duties.ApplyConvict():
                await self._forfeit(duty.node_id)
            case duties.ReleaseEarnings():
                await self._release(duty)

    @property
    def _me(self) -> str:
        return self.agenda.verifier_id

    @property
    def _market_id(self) -> str:
        return self.agenda.view.market.market_id

    async def _calibrate(self, duty: duties.PublishCalibration) -> None:
        message = duty.measured.statement(
            self._market_id, self._me, duty.manifest_digest, self.clock.now_unix_ms()
        )
        version = duty.measured.version.to_bytes(4, "big")
        await self.publisher.publish(message, "calibration", duty.manifest_digest, version)

    async def _open_epoch(self, epoch: int) -> None:
        secret = self.agenda.secrets.get_or_create(epoch)
        now = self.clock.now_unix_ms()
        view = self.agenda.view
        records = await read_stakes(self.ledger, list(view.nodes))
        known = power(view, self._me, self.cheats)
        message = open_epoch(
            EpochPlan(self._market_id, self._me, epoch, now),
            secret,
            self.agenda.policy,
            standings(view, self._me, stakes(view, records), known),
            known.gain_tokens if known else 0,
        )
        await self.publisher.publish(message, "epoch-open", epoch.to_bytes(8, "big"))

    async def _reveal_epoch(self, epoch: int) -> None:
        try:
            secret = self.agenda.secrets.get(epoch)
        except NotFound:
            self.agenda.lost_epochs.add(epoch)  # shown by ``owed``; nothing else can be done
            return
        message = EpochReveal(
            market_id=self._market_id, verifier_id=self._me, epoch=epoch, secret=secret
        )
        await self.publisher.publish(message, "epoch-reveal", epoch.to_bytes(8, "big"))

    async def _request(self, duty: duties.RequestAudit) -> None:
        receipt = duty.receipt
        plan = EpochPlan(self._market_id, self._me, duty.epoch, self.clock.now_unix_ms())
        secret = self.agenda.secrets.wrapping()
        message = audit_request(plan, secret, receipt.assignment_digest, receipt.receipt_digest)
        await self.publisher.publish(message, "audit-request", receipt.receipt_digest)

    async def _audit(self, duty: duties.PerformAudit) -> None:
        now = self.clock.now_unix_ms()
        context = AuditContext(self._market_id, self._me, duty.epoch, duty.receipt, now)
        late_at = duty.receipt.merged_at_unix_ms + self.agenda.policy.transcript_patience_ms
        verdict = await self.auditor.run(context, last_try=now >= late_at)
        verdict.issued_at_unix_ms = self.clock.now_unix_ms()
        log.info("receipt leaf %d: %s", duty.receipt.index, outcome_name(verdict))
        if self.agenda.is_blind:
            secret = self.agenda.secrets.wrapping()
            verdict.commitment_blind = blind_for(secret, verdict.receipt_digest)
            self.agenda.outbox.put(verdict)
            await self._commit(verdict.receipt_digest)
        else:
            await self.publisher.publish(verdict, "verdict", verdict.receipt_digest)

    async def _commit(self, receipt_digest: bytes) -> None:
        verdict = self.agenda.outbox.get(receipt_digest)
        message = commit(verdict, verdict.commitment_blind)
        await self.publisher.publish(message, "margin-commitment", receipt_digest)

    async def _publish_verdict(self, receipt_digest: bytes) -> None:
        verdict = self.agenda.outbox.get(receipt_digest)
        await self.publisher.publish(verdict, "verdict", receipt_digest)

    async def _refund(self, receipt_digest: bytes) -> None:
        mine = self.agenda.view.verdicts.get((self._me, receipt_digest))
        if mine is None:
            return
        reason = outcome_name(mine.leaf.message)
        moved = await self.publisher.refund(receipt_digest, reason, mine.leaf.envelope)
        self.agenda.refunded(receipt_digest)
        log.info("refunded %d nanocredits: %s", moved, reason)

    async def _convict(self, node_id: str) -> None:
        view = self.agenda.view
        own = view.node(node_id).by_verifier[self._me]
        counted = view.counted(self._me, node_id)
        message = Conviction(
            market_id=self._market_id,
            verifier_id=self._me,
            node_id=node_id,
            first_verdict_index=own.first_verdict_index,
            last_verdict_index=own.last_verdict_index,
            verdicts=own.wealth.r,
            audited_tokens=own.wealth.tokens,
            wealth_log10_milli=own.wealth.log10_milli,
            threshold_log10_milli=log10_milli(CONVICT),
            change_point_index=change_point_index(counted),
            calibration_digest=bytes.fromhex(own.dominant_pair.partition("/")[0]),
            issued_at_unix_ms=self.clock.now_unix_ms(),
        )
        await self.publisher.publish(message, "conviction", *_since(view.node(node_id), node_id))
        log.warning("convicted %s after %d tokens", node_id, own.wealth.tokens)

    async def _suspend(self, node_id: str) -> None:
        mine = self.agenda.view.node(node_id).convictions[self._me]
        message = Suspension(
            market_id=self._market_id,
            node_id=node_id,
            issuer=self._me,
            reason="convicted",
            conviction_digest=mine.digest,
            issued_at_unix_ms=self.clock.now_unix_ms(),
        )
        await self.publisher.publish(message, "suspension", mine.digest)

    async def _forfeit(self, node_id: str) -> None:
        mine = self.agenda.view.node(node_id).convictions[self._me]
        about = _since(self.agenda.view.node(node_id), node_id)
        moved = await self.publisher.convict(mine.envelope, about, self.reward_ppm)
        self.agenda.forfeited.add(mine.digest)
        if moved:
            log.warning("forfeited %d nanocredits of %s", moved, node_id)

    async def _release(self, duty: duties.ReleaseEarnings) -> None:
        """Leaves as much at stake as deters at the node's frozen rate."""
        view, known = self.agenda.view, power(self.agenda.view, self._me, self.cheats)
        records = await read_stakes(self.ledger, [duty.node_id])
        stake = stakes(view, records)[duty.node_id]
        rate = self.agenda.my_epochs[-1].rate_ppm(duty.node_id)
        if known is not None and rate > 0:
            amount = releasable_nano(stake, rate, known.gain_tokens)
            if amount > 0:
                await self.publisher.release(duty, amount)
        self.agenda.note_released(duty)


def _since(record: NodeRecord, node_id: str) -> tuple[bytes, ...]:
    """What a conviction is about: a node, and a reinstated one from that leaf on."""
    since = (record.reinstated.to_bytes(8, "big"),) if record.reinstated else ()
    return (node_id.encode(), *since)
