"""An appeal: every audit that convicted a node, run again on another reference. Publishes nothing.

A verifier can open only the transcripts that it asked for itself, so it re-runs its own verdicts.
"""

from __future__ import annotations

from dataclasses import dataclass

from trueweight.protos.errors import TrueweightError
from trueweight.protos.evidence import Wealth
from trueweight.verifier.audit import Auditor
from trueweight.verifier.state import LogView
from trueweight.verifier.verdicts import EVIDENCE, AuditContext, outcome_name


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


async def rerun(view: LogView, auditor: Auditor, verifier_id: str, node_id: str) -> Appeal:
    """Re-runs one verifier's counted audits of a node, in leaf order."""
    wealth, retried = Wealth(), []
    for then in view.counted(verifier_id, node_id):
        verdict = next(
            v.leaf.message for v in view.verdicts.values() if v.leaf.index == then.verdict_index
        )
        receipt = view.receipts.get(verdict.receipt_digest)
        if receipt is None:
            continue
        context = AuditContext(view.market.market_id, verifier_id, verdict.epoch, receipt, 0)
        mean_then = then.sum_x_nano / then.tokens / 1e9
        try:
            now = await auditor.run(context, last_try=False)
        except TrueweightError as error:
            retried.append(Retried(then.verdict_index, then.tokens, mean_then, 0.0, error.message))
            continue
        if now.outcome not in EVIDENCE:
            reason = f"now {outcome_name(now)}"
            retried.append(Retried(then.verdict_index, then.tokens, mean_then, 0.0, reason))
            continue
        wealth = wealth.add(now.sum_x_nano, now.scored_tokens, then.mu0_nano)
        mean_now = now.sum_x_nano / now.scored_tokens / 1e9
        retried.append(Retried(then.verdict_index, then.tokens, mean_then, mean_now))
    own = view.node(node_id).by_verifier.get(verifier_id)
    return Appeal(node_id, own.wealth.value if own else 1.0, wealth, tuple(retried))
