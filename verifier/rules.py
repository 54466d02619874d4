"""When a logged verdict is evidence. Pure: what the log says in, the evidence or why not out.

The rules are numbered as in docs/verification.md. The fold asks before it knows what a verdict's
margins are worth, so what counts never depends on the outcome.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trueweight.protos.conviction import Evidence
from trueweight.protos.v1.audit_pb2 import Verdict
from trueweight.verifier.duplicates import BLIND_WINDOW_MS, opens
from trueweight.verifier.leaves import Leaf

if TYPE_CHECKING:
    from trueweight.verifier.state import LogView

OWN_NODE = "verifier and node have a declared owner in common"
COPIED = "not committed to before another's margins were known"


def evidence_in(view: LogView, leaf: Leaf[Verdict]) -> tuple[str, Evidence | None]:
    """The evidence in a verdict, or why it is none."""
    verdict = leaf.message
    if verdict.outcome not in (Verdict.SCORED, Verdict.REFUND):  # 1
        return "the outcome is no evidence", None
    receipt = view.receipts.get(verdict.receipt_digest)
    if receipt is None or receipt.node_id != verdict.node_id:  # 2
        return "the log has no such receipt of this node", None
    if receipt.assignment_digest != verdict.assignment_digest:  # 3
        return "the verdict names another assignment", None
    if view.requests.get((verdict.verifier_id, verdict.receipt_digest)) is None:  # 4
        return "the audit was not requested in the log first", None
    cited = view.calibrations.cited(verdict.verifier_id, verdict.calibration_digest, receipt.index)
    entry = cited.entries.get(verdict.parameter_class) if cited else None
    if cited is None or entry is None:  # 5
        return (
            "the cited calibration is not its own in force for this receipt and class",
            None,
        )
    if not 0 < verdict.scored_tokens <= receipt.output_tokens:  # 6
        return "more or fewer tokens scored than the receipt has", None
    if verdict.sum_x_nano > verdict.scored_tokens * 10**9:  # 7
        return "the sum is larger than its terms can be", None
    return "", Evidence(
        verdict_index=leaf.index,
        receipt_index=receipt.index,
        sum_x_nano=verdict.sum_x_nano,
        tokens=verdict.scored_tokens,
        mu0_nano=entry.mu0_nano,
        pair=f"{cited.digest.hex()}/{verdict.parameter_class}",
        client=view.hold_clients.get(receipt.hold_id) or "",
    )


def is_copied(view: LogView, leaf: Leaf[Verdict]) -> bool:
    """True if another verifier's verdict on the receipt was public before this one was committed
    to, or if the commitment does not open."""
    verdict = leaf.message
    first = view.first_verdicts.get(verdict.receipt_digest)
    mine = view.commitments.get((verdict.verifier_id, verdict.receipt_digest))
    if mine is None:
        return first is not None
    if not opens(verdict, mine.commitment):
        return True
    receipt = view.receipts.get(verdict.receipt_digest)
    in_window = receipt is not None and (
        mine.merged_at_unix_ms <= receipt.merged_at_unix_ms + BLIND_WINDOW_MS
    )
    return first is not None and mine.index > first and not in_window
