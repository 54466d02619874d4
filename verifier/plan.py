"""What a verifier has to do next, derived from the log alone. Pure.

Every duty is found by comparing what the log demands with what the log already holds, and every
duty's operation id is derived from the evidence. So a verifier that is killed between any two
steps repeats nothing and forgets nothing: it reads the log and goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise

from trueweight.protos.blind_verdicts import BLIND_WINDOW_MS
from trueweight.protos.calibrations import CalibrationLeaf
from trueweight.protos.conviction import NodeEvidence, frozen_pairs, should_convict
from trueweight.protos.errors import NotFound
from trueweight.protos.v1.market_pb2 import Member
from trueweight.verifier.calibration_file import Measured, weights_sha256
from trueweight.verifier.duties import (
    ApplyConvict,
    ApplyRefund,
    Duty,
    OpenEpoch,
    PerformAudit,
    PublishCalibration,
    PublishCommitment,
    PublishConviction,
    PublishSuspension,
    PublishVerdict,
    ReleaseEarnings,
    RequestAudit,
    RevealEpoch,
)
from trueweight.verifier.epochs import RatePolicy, SecretStore
from trueweight.verifier.outbox import Outbox
from trueweight.verifier.selection import (
    EpochLeaf,
    ReceiptLeaf,
    epoch_of,
    is_decidable,
    owes,
)
from trueweight.verifier.state import MAX_RECEIPTS, LogView
from trueweight.verifier.verdicts import REFUNDING

MAX_OPEN_AUDITS = 100_000
# Owed audits looked at in one round, oldest first.
MAX_CONSIDERED = 2_000


@dataclass
class Agenda:
    """One verifier's open business. Tell it of each receipt and verdict leaf after ``view``."""

    view: LogView
    verifier_id: str
    secrets: SecretStore
    policy: RatePolicy
    outbox: Outbox
    measured: tuple[Measured, ...] = ()
    # Owed audits without a verdict, oldest first.
    owed: dict[bytes, tuple[ReceiptLeaf, int]] = field(default_factory=dict)
    _undecided: dict[bytes, None] = field(default_factory=dict)
    _refunds: dict[bytes, None] = field(default_factory=dict)
    # Convictions whose forfeit this process has applied; after a restart each is applied once more.
    forfeited: set[bytes] = field(default_factory=set)
    # (epoch, node) whose release this process has applied; ids keep a repeat harmless.
    released: set[tuple[int, str]] = field(default_factory=set)
    # Epochs whose secret is lost: nothing of them can be audited or revealed.
    lost_epochs: set[int] = field(default_factory=set)
    # First receipt of each node that fell into such an epoch and has no verdict of this verifier.
    _unauditable: dict[str, int] = field(default_factory=dict)

    def on_receipt(self, receipt_digest: bytes) -> None:
        """A receipt leaf was folded."""
        self._undecided[receipt_digest] = None
        if len(self._undecided) > MAX_RECEIPTS:  # the fold has forgotten it as well
            del self._undecided[next(iter(self._undecided))]

    def on_request(self, receipt_digest: bytes) -> None:
        """An audit request was folded: if it is another's, a second opinion may be owed."""
        mine = self.view.verdicts.get((self.verifier_id, receipt_digest))
        if self.is_blind and mine is None and receipt_digest not in self.owed:
            self.on_receipt(receipt_digest)

    def on_verdict(self, receipt_digest: bytes) -> None:
        """A verdict leaf about this receipt was folded."""
        mine = self.view.verdicts.get((self.verifier_id, receipt_digest))
        if mine is None:
            return
        self.owed.pop(receipt_digest, None)
        self.outbox.remove(receipt_digest)
        self._undecided.pop(receipt_digest, None)
        if mine.leaf.message.outcome in REFUNDING:
            self._refunds[receipt_digest] = None

    def refunded(self, receipt_digest: bytes) -> None:
        """The refund was applied or refused for good."""
        self._refunds.pop(receipt_digest, None)

    def note_released(self, duty: ReleaseEarnings) -> None:
        """The release was applied or refused; older epochs are not asked for again."""
        self.released = {done for done in self.released if done[0] >= duty.epoch}
        self.released.add((duty.epoch, duty.node_id))

    @property
    def is_settled(self) -> bool:
        """True if no receipt waits for a decision, an audit or a refund, and no conviction for
        its leaves."""
        waiting = self.owed or self._undecided or self._refunds
        return not waiting and next(self._conviction_duties(), None) is None

    @property
    def my_epochs(self) -> list[EpochLeaf]:
        """This verifier's epochs in log order."""
        return self.view.epochs.get(self.verifier_id, [])

    def duties(self, now_unix_ms: int) -> Iterator[Duty]:
        """Everything that can be done now, most urgent first. Doing a duty twice is harmless."""
        yield from self.calibration_duties()
        yield from self._epoch_duties(now_unix_ms)
        yield from self._conviction_duties()
        yield from (ApplyRefund(digest) for digest in list(self._refunds))
        self._decide(now_unix_ms)
        yield from self._release_duties()
        for digest, (receipt, epoch) in list(islice(self.owed.items(), MAX_CONSIDERED)):
            yield from self._audit_step(digest, receipt, epoch, now_unix_ms)

    def _audit_step(
        self, digest: bytes, receipt: ReceiptLeaf, epoch: int, now_unix_ms: int
    ) -> Iterator[Duty]:
        mine = (self.verifier_id, digest)
        if self.view.requests.get(mine) is None:
            yield RequestAudit(receipt, epoch)
        elif digest not in self.outbox:
            yield PerformAudit(receipt, epoch)
        elif self.view.commitments.get(mine) is None:
            yield PublishCommitment(digest)
        elif self._others_are_bound(receipt, now_unix_ms):
            yield PublishVerdict(digest)

    @property
    def is_blind(self) -> bool:
        """True if other verifiers audit this market, too: then margins are committed to first."""
        return len(self.view.market.members(Member.VERIFIER)) > 1

    def _others_are_bound(self, receipt: ReceiptLeaf, now_unix_ms: int) -> bool:
        """True if nobody can copy any more: everybody who asked has committed, or the window in
        which the others may still ask and commit is over."""
        if now_unix_ms > receipt.merged_at_unix_ms + BLIND_WINDOW_MS:
            return True
        judges = self.view.judges_of(receipt.node_id)
        keys = [(judge, receipt.receipt_digest) for judge in judges]
        return all(self.view.commitments.get(key) is not None for key in keys)

    def calibration_duties(self) -> Iterator[PublishCalibration]:
        """Calibrations at hand that this verifier has not logged. They apply to its own verdicts
        on later receipts only."""
        for digest, manifest in self.view.registry.manifests.items():
            newest = self._own_calibration(digest)
            for measured in self.measured:
                newer = newest is None or measured.version > newest.version
                if newer and measured.weights == weights_sha256(manifest):
                    yield PublishCalibration(digest, measured)

    @property
    def has_calibrations(self) -> bool:
        """True if all weights on sale have a calibration of this verifier in the log or at hand."""
        at_hand = {m.weights for m in self.measured}
        return all(
            weights_sha256(manifest) in at_hand or self._own_calibration(digest) is not None
            for digest, manifest in self.view.registry.manifests.items()
        )

    def _own_calibration(self, manifest_digest: bytes) -> CalibrationLeaf | None:
        calibrations = self.view.calibrations
        return calibrations.in_force(self.verifier_id, manifest_digest, self.view.next_index)

    def _epoch_duties(self, now_unix_ms: int) -> Iterator[Duty]:
        epochs = self.my_epochs
        last = self.view.epoch_numbers.get(self.verifier_id, 0)
        # An epoch that the market's terms, issued anew, refuse by now is none, but its number is
        # taken; and the secret of the one before it is known to everybody.
        newest = epochs[-1] if epochs and epochs[-1].message.epoch == last else None
        if newest is None:
            # An epoch states the power of the calibrations, so they come first.
            if next(self.calibration_duties(), None) is None:
                yield OpenEpoch(last + 1)
        elif now_unix_ms >= newest.message.opened_at_unix_ms + self.policy.epoch_ms:
            yield OpenEpoch(last + 1)
        for epoch, following in pairwise(epochs):
            opened_ms = following.message.opened_at_unix_ms
            if self.is_blind and now_unix_ms <= opened_ms + BLIND_WINDOW_MS:
                continue  # second opinions on its receipts may still be asked for
            if self._may_reveal(epoch.message.epoch):
                yield RevealEpoch(epoch.message.epoch)

    def _may_reveal(self, epoch: int) -> bool:
        """Once the next epoch is open nothing can join this one; its audits come first."""
        revealed = (self.verifier_id, epoch) in self.view.reveals
        waiting = any(owed_in == epoch for _, owed_in in self.owed.values())
        return (
            not revealed and not waiting and not self._undecided and epoch not in self.lost_epochs
        )

    def _conviction_duties(self) -> Iterator[Duty]:
        records = self.view.nodes
        judged = [
            record.by_verifier.get(self.verifier_id)
            for record in records.values()
            if not record.standing.convicted
        ]
        frozen = frozen_pairs([own for own in judged if own is not None])
        for node_id, record in records.items():
            own = record.by_verifier.get(self.verifier_id)
            mine = record.convictions.get(self.verifier_id)
            if mine is None:
                if own is not None and should_convict(own, frozen):
                    yield PublishConviction(node_id)
                continue
            if not self.view.convicted(node_id):
                continue
            if record.suspended_for.get(self.verifier_id) != mine.digest:
                yield PublishSuspension(node_id)
            if mine.digest not in self.forfeited:
                yield ApplyConvict(node_id)

    def _release_duties(self) -> Iterator[ReleaseEarnings]:
        """Once per epoch and clear node: what this verifier's audits speak for."""
        epochs = self.my_epochs
        if len(epochs) < 2 or self._undecided:
            return
        newest = epochs[-1]
        for node_id, record in self.view.nodes.items():
            if (newest.message.epoch, node_id) in self.released:
                continue
            if not self.view.may_judge(self.verifier_id, node_id):
                continue
            own = record.by_verifier.get(self.verifier_id, NodeEvidence())
            if record.suspended or own.state != "clear":
                continue
            below = self._releasable_below(node_id, record.reinstated)
            if below > 0:
                yield ReleaseEarnings(node_id, newest.message.epoch, below)

    def _releasable_below(self, node_id: str, since: int) -> int:
        """The log index below which a node's earnings may be released; 0: none. Up to the receipt
        of this verifier's last counted verdict: of what came later nobody knows anything. Before
        the newest epoch, the oldest owed audit, and the first receipt that cannot be audited any
        more because the secret of its epoch is lost."""
        spoken_for = self._spoken_for(node_id)
        if spoken_for < since:
            return 0
        open_audits = [r.index for r, _ in self.owed.values() if r.node_id == node_id]
        ends = [self.my_epochs[-1].index, spoken_for + 1, *open_audits]
        if node_id in self._unauditable:
            ends.append(self._unauditable[node_id])
        return min(ends)

    def _spoken_for(self, node_id: str) -> int:
        line = self.view.node(node_id).lines.get(self.verifier_id)
        return line.last_scored if line else -1

    def _decide(self, now_unix_ms: int) -> None:
        for digest in list(self._undecided):
            if len(self.owed) >= MAX_OPEN_AUDITS:
                return
            receipt = self.view.receipts.get(digest)
            epoch = epoch_of(self.my_epochs, receipt.index) if receipt else None
            if receipt is None or epoch is None:
                del self._undecided[digest]  # before this verifier's first epoch, or forgotten
                continue
            if not is_decidable(epoch, receipt, now_unix_ms):
                continue
            del self._undecided[digest]
            if self._owes(epoch, receipt):
                self.owed[digest] = (receipt, epoch.message.epoch)

    def _owes(self, epoch: EpochLeaf, receipt: ReceiptLeaf) -> bool:
        if not self.view.may_judge(self.verifier_id, receipt.node_id):
            return False
        try:
            secret = self.secrets.get(epoch.message.epoch)
            asked = self.view.asked_by_another(self.verifier_id, receipt)
            return owes(epoch, secret, receipt, asked_by_another=asked)
        except NotFound:
            self.lost_epochs.add(epoch.message.epoch)
            self._unauditable.setdefault(receipt.node_id, receipt.index)
            return False
