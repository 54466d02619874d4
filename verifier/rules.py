"""How a logged verdict settles an audit, as far as only verifiers check it. Pure.

The rest, which the ledger checks alike, is ``protos.conviction.answer_of``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trueweight.protos import blind_verdicts
from trueweight.protos.blind_verdicts import COPIED
from trueweight.protos.conviction import Answer, Asked, Said, answer_of, as_zero
from trueweight.protos.v1.audit_pb2 import Verdict
from trueweight.verifier.leaves import Leaf

if TYPE_CHECKING:
    from trueweight.verifier.state import LogView

OWN_NODE = "verifier and node have a declared owner in common"
NO_RECEIPT = "the log has no such receipt of this node"
WAITS = "waits for audits that were asked for before it"
LATE = "the audit counted as zero before this came"
APPEAL = "its transcript was opened for an appeal"


def answer_in(view: LogView, leaf: Leaf[Verdict], asked: Asked, *, copied: bool) -> Answer:
    """How the verdict settles an audit that was asked for."""
    verdict = leaf.message
    receipt = view.receipts.get(verdict.receipt_digest)
    if receipt is None or receipt.node_id != verdict.node_id:
        return as_zero(leaf.index, NO_RECEIPT)
    if receipt.assignment_digest != verdict.assignment_digest:
        return as_zero(leaf.index, "the verdict names another assignment")
    if copied:
        return as_zero(leaf.index, COPIED)
    said = Said(
        leaf.index,
        verdict.calibration_digest,
        verdict.parameter_class,
        verdict.sum_x_nano,
        verdict.scored_tokens,
        verdict.outcome,
    )
    return answer_of(said, asked, verdict.verifier_id, view.calibrations)


def is_copied(view: LogView, leaf: Leaf[Verdict]) -> bool:
    """True if another verifier's verdict on the receipt was public before this one was committed
    to, or if the commitment does not open. The verdict is its verifier's first on the receipt."""
    verdict = leaf.message
    receipt = view.receipts.get(verdict.receipt_digest)
    bound = blind_verdicts.bound_since(
        blind_verdicts.opening_of(verdict),
        leaf.index,
        view.commitments.get((verdict.verifier_id, verdict.receipt_digest)),
        receipt.merged_at_unix_ms if receipt else None,
    )
    return blind_verdicts.is_copied(bound, view.first_verdicts.get(verdict.receipt_digest))
