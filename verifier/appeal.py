"""An appeal: every audit that convicted a node, run again on another reference, also by another
verifier than the one that convicted. Publishes requests for transcripts, never a verdict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from trueweight.protos.conviction import Evidence
from trueweight.protos.errors import TrueweightError
from trueweight.protos.evidence import Wealth
from trueweight.protos.v1.audit_pb2 import AuditRequest, Verdict
from trueweight.verifier.audit import Auditor
from trueweight.verifier.epochs import EpochPlan, audit_request
from trueweight.verifier.selection import ReceiptLeaf
from trueweight.verifier.state import LogView
from trueweight.verifier.verdicts import AuditContext, mean_x, outcome_name


@dataclass(frozen=True, slots=True)
class Retried:
    """One audit, then and now. ``error`` if it could not be run again (text erased, engine)."""

    verdict_index: int
    tokens: int
    mean_then: float
    mean_now: float
    error: str = ""


@dataclass(frozen=True)
class Appeal:
    """What the audits say on another reference. ``wealth`` counts only what could be re-run."""

    node_id: str
    wealth_then: float
    wealth: Wealth
    retried: tuple[Retried, ...]

    @property
    def upheld(self) -> bool:
        """True if the re-run audits alone still reach the threshold."""
        return self.wealth.state == "convict"


def missing_requests(
    view: LogView, of_verifier: str, node_id: str, reader: EpochPlan, secret: bytes
) -> list[AuditRequest]:
    """What the reader must publish before it may open another's transcripts. The requests name
    the epoch of the audits that they repeat."""
    return [
        audit_request(
            replace(reader, epoch=verdict.epoch),
            secret,
            receipt.assignment_digest,
            receipt.receipt_digest,
            for_appeal=True,
        )
        for _, verdict, receipt in _counted(view, of_verifier, node_id)
        if view.requests.get((reader.verifier_id, receipt.receipt_digest)) is None
    ]


async def rerun(
    view: LogView, auditor: Auditor, of_verifier: str, node_id: str, me: str = ""
) -> Appeal:
    """Re-runs one verifier's counted audits of a node, in their order, with the transcripts opened
    to ``me`` (the same verifier if not given)."""
    wealth, retried = Wealth(), []
    for then, verdict, receipt in _counted(view, of_verifier, node_id):
        market_id = view.market.market_id
        context = AuditContext(market_id, me or of_verifier, verdict.epoch, receipt, 0)
        mean_then = then.sum_x_nano / then.tokens / 1e9
        error, now = "", Verdict()
        try:
            now = await auditor.run(context, last_try=False)
            # A re-run is held against the null mean of then, whatever this verifier's own says.
            if not now.scored_tokens:
                error = f"now {outcome_name(now)}"
        except TrueweightError as found:
            error = found.message
        if error:
            retried.append(Retried(then.verdict_index, then.tokens, mean_then, 0.0, error))
            continue
        wealth = wealth.add(now.sum_x_nano, now.scored_tokens, then.mu0_nano)
        retried.append(Retried(then.verdict_index, then.tokens, mean_then, mean_x(now)))
    own = view.node(node_id).by_verifier.get(of_verifier)
    return Appeal(node_id, own.wealth.value if own else 1.0, wealth, tuple(retried))


def _counted(
    view: LogView, verifier_id: str, node_id: str
) -> Iterator[tuple[Evidence, Verdict, ReceiptLeaf]]:
    by_index = {v.leaf.index: v.leaf.message for v in view.verdicts.values()}
    for evidence in view.counted(verifier_id, node_id):
        verdict = by_index.get(evidence.verdict_index)
        receipt = view.receipts.get(verdict.receipt_digest) if verdict else None
        if evidence.is_scored and verdict is not None and receipt is not None:
            yield evidence, verdict, receipt
