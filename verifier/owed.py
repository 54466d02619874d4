"""Which audits were owed, and what became of them: from public data once a secret is revealed.

Pure. Anyone can run it; a verifier that is lazy, late or picks its own targets shows here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from trueweight.verifier.agreement import contradicted, is_void, voids_compared
from trueweight.verifier.leaves import VerdictLeaf
from trueweight.verifier.selection import EpochLeaf, ReceiptLeaf, epoch_of, owes
from trueweight.verifier.state import LogView
from trueweight.verifier.verdicts import agree

DONE, LATE, MISSING, PENDING = "done", "late", "missing", "pending"
# In time, but without margins or a named failure: nothing was found out, and nothing is paid.
VOID = "void"
STATUSES = (DONE, LATE, MISSING, PENDING, VOID)
# Receipts that a verifier may call void though another scored them: a router may have been down
# for one of the two. More than this share of those that both judged, and more than so many, is no
# accident.
REFUTED_SHARE, REFUTED_ALWAYS = 0.1, 2


@dataclass(frozen=True, slots=True)
class OwedAudit:
    """One owed audit. ``delay_ms`` is from the receipt's leaf to the verdict's (or until now)."""

    receipt_index: int
    node_id: str
    status: str
    verdict_index: int | None
    delay_ms: int


@dataclass(frozen=True)
class EpochAccount:
    """How one verifier kept one epoch's promise.

    ``unasked``: verdicts on receipts that were not owed. ``copied``: verdicts in a market of
    several verifiers without a margin commitment from before the others' margins were known.
    ``disputed``: verdicts with which another verifier's verdict on the same receipt disagrees by
    more than two references usually do; honest noise does that, too, on short answers.
    ``contradicted``: nodes about which another verifier's verdicts on receipts up to the end of
    this epoch differ by what honest noise cannot explain (``verifier.agreement``); one of the two
    is wrong, and replaying the bundles tells which.
    ``refuted``: leaves of verdicts that called void what another verifier scored, of ``compared``
    receipts that another scored. This is held only against the one who called it void: else it
    could cost the other the epoch.
    ``refused``: why the epoch does not count, if it was opened outside the market's terms.
    """

    verifier_id: str
    epoch: int
    revealed: bool
    audits: tuple[OwedAudit, ...] = ()
    unasked: int = 0
    copied: int = 0
    disputed: tuple[int, ...] = ()
    contradicted: tuple[str, ...] = ()
    refuted: tuple[int, ...] = ()
    compared: int = 0
    refused: str = ""

    def count(self, status: str) -> int:
        """Audits of one status."""
        return sum(1 for a in self.audits if a.status == status)

    @property
    def is_refuted(self) -> bool:
        """True if it called void more of what others scored than happens by accident."""
        return len(self.refuted) > max(REFUTED_ALWAYS, REFUTED_SHARE * self.compared)

    @property
    def kept(self) -> bool:
        """True if the secret was revealed and nothing is missing, late, unasked, copied or
        contradicted, nor too much refuted."""
        broken = self.count(MISSING) + self.count(LATE) + self.unasked + self.copied
        broken += len(self.contradicted) + self.is_refuted
        return self.revealed and not broken

    def as_json(self) -> dict[str, object]:
        """For machines."""
        facts = asdict(self)
        facts["kept"] = self.kept
        facts["counts"] = {s: self.count(s) for s in STATUSES}
        return facts


def account(view: LogView, verifier_id: str, epoch: int, now_unix_ms: int) -> EpochAccount:
    """The account of one epoch; empty while its secret is not revealed."""
    secret = view.reveals.get((verifier_id, epoch))
    epochs = view.epochs.get(verifier_id, [])
    found = [e for e in epochs if e.message.epoch == epoch]
    if secret is None or not found:
        return EpochAccount(verifier_id, epoch, revealed=False)
    (leaf,) = found
    audits, unasked, mine = [], 0, []
    for receipt in view.receipts.values():
        if epoch_of(epochs, receipt.index) is not leaf:
            continue
        if not view.may_judge(verifier_id, receipt.node_id):
            continue  # nobody owes audits of his own nodes, and they count for nothing
        # By the epoch that the receipt belongs to: what a verdict says of itself proves nothing.
        verdict = view.verdicts.get((verifier_id, receipt.receipt_digest))
        if verdict is not None:
            mine.append(verdict)
        asked = view.asked_by_another(verifier_id, receipt)
        if owes(leaf, secret, receipt, asked_by_another=asked):
            audits.append(_audit(view, leaf, receipt, now_unix_ms))
        elif verdict is not None:
            unasked += 1
    until = min((e.index for e in epochs if e.index > leaf.index), default=view.next_index)
    compared, refuted = voids_compared(view, (v.leaf.message for v in mine))
    return EpochAccount(
        verifier_id,
        epoch,
        True,
        tuple(audits),
        unasked,
        copied=sum(1 for verdict in mine if verdict.copied),
        disputed=tuple(v.leaf.index for v in mine if _is_disputed(view, v)),
        contradicted=contradicted(view, verifier_id, until),
        refuted=tuple(v.leaf.index for v in mine if v.leaf.message.receipt_digest in refuted),
        compared=compared,
    )


def _is_disputed(view: LogView, mine: VerdictLeaf) -> bool:
    message = mine.leaf.message
    for judge in view.judges_of(message.node_id):
        other = view.verdicts.get((judge, message.receipt_digest))
        if judge == message.verifier_id or other is None:
            continue
        evidence = mine.evidence or other.evidence
        if not agree(message, other.leaf.message, evidence.mu0_nano if evidence else 0):
            return True
    return False


def _audit(view: LogView, epoch: EpochLeaf, receipt: ReceiptLeaf, now_unix_ms: int) -> OwedAudit:
    verdict = view.verdicts.get((epoch.message.verifier_id, receipt.receipt_digest))
    until = verdict.leaf.merged_at_unix_ms if verdict else now_unix_ms
    delay = until - receipt.merged_at_unix_ms
    in_time = delay <= epoch.message.audit_deadline_ms
    good, bad = (PENDING, MISSING) if verdict is None else (DONE, LATE)
    if verdict is not None and is_void(verdict.leaf.message):
        good = VOID
    status = good if in_time else bad
    index = verdict.leaf.index if verdict else None
    return OwedAudit(receipt.index, receipt.node_id, status, index, delay)


def accounts(view: LogView, epoch: int, now_unix_ms: int) -> list[EpochAccount]:
    """One account per verifier that opened this epoch, also outside the market's terms."""
    refused = [
        EpochAccount(verifier_id, epoch, revealed=False, refused=why)
        for (verifier_id, number), why in view.refused_epochs.items()
        if number == epoch
    ]
    return refused + [
        account(view, verifier_id, epoch, now_unix_ms)
        for verifier_id, epochs in sorted(view.epochs.items())
        if any(e.message.epoch == epoch for e in epochs)
    ]
