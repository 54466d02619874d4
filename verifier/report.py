"""What people are shown about nodes: tables and words, recomputed from logged verdicts. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from trueweight.protos.conviction import Evidence, NodeEvidence, frozen_pairs
from trueweight.protos.deterrence import kth_largest
from trueweight.protos.evidence import CONVICT, SUSPECT, Wealth
from trueweight.protos.v1.audit_pb2 import Verdict
from trueweight.protos.v1.ledger_pb2 import AccountRecord
from trueweight.verifier.deterrence import Stake, deterrence
from trueweight.verifier.leaves import VerdictLeaf
from trueweight.verifier.selection import PPM
from trueweight.verifier.standing import stakes
from trueweight.verifier.state import LogView
from trueweight.verifier.verdicts import REFUNDING


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One node of the status table. ``rate`` is a fraction, ``mean_x`` is dimensionless."""

    node_id: str
    state: str
    wealth: float
    largest_wealth: float
    rate: float
    receipts: int
    audits: int
    audited_tokens: int
    mean_x: float
    refunds: int
    convicted: bool
    suspended: bool
    # Nanocredits a conviction would take, and what it takes for cheating not to pay at this rate;
    # None where no calibration tells the power of audits, or who asks may not see balances.
    at_stake_nano: int | None
    needed_nano: int | None
    # Charges that no verifier has come to yet, and how many routers let there be at a time.
    unsettled_nano: int
    cap_nano: int | None
    deterred: bool | None
    # Verifiers that may judge the node, and how many of them convict.
    judges: int
    judges_needed: int


def state_of(view: LogView, node_id: str) -> str:
    """ "convicted", "suspended", "frozen", "suspect" or "clear"."""
    record = view.nodes[node_id]
    if view.convicted(node_id):
        return "convicted"
    if record.suspended:
        return "suspended"
    if record.pooled.crossed_by is not None:
        live = [r.pooled for r in view.nodes.values() if not r.standing.convicted]
        frozen = frozen_pairs(live)
        return "frozen" if record.pooled.dominant_pair in frozen else "convict"
    return record.pooled.state


def current_rate_ppm(view: LogView, node_id: str) -> int:
    """The rate at which as many verifiers as convict audit the node now; 0 if too few do."""
    rates = sorted(
        epochs[-1].rate_ppm(node_id)
        for verifier_id, epochs in view.epochs.items()
        if epochs and view.may_judge(verifier_id, node_id)
    )
    return rates[-view.convictions_needed] if len(rates) >= view.convictions_needed else 0


def current_gain_tokens(view: LogView) -> int:
    """What the best detectable cheat gains, as the newest epochs state it; 0 if unknown."""
    gains = [e[-1].message.gain_tokens for e in view.epochs.values() if e]
    return kth_largest(gains, view.convictions_needed)


def verdicts_of(view: LogView, node_id: str) -> list[VerdictLeaf]:
    """Every remembered verdict about a node, in leaf order."""
    found = [v for v in view.verdicts.values() if v.leaf.message.node_id == node_id]
    return sorted(found, key=lambda v: v.leaf.index)


NOTHING_AT_STAKE = Stake(0, 0, 0)


def node_row(
    view: LogView, node_id: str, verdicts: Sequence[VerdictLeaf], stake: Stake = NOTHING_AT_STAKE
) -> NodeRow:
    """The node's row, from the pooled evidence, all verdicts about it and its stake."""
    record = view.nodes[node_id]
    found_in = [v.evidence for v in verdicts if v.evidence is not None]
    counted = [e for e in found_in if e.receipt_index >= record.reinstated]
    tokens = sum(e.tokens for e in counted)
    total = sum(e.sum_x_nano for e in counted)
    rate_ppm, gain_tokens = current_rate_ppm(view, node_id), current_gain_tokens(view)
    found = deterrence(stake, rate_ppm, gain_tokens) if gain_tokens and rate_ppm else None
    return NodeRow(
        node_id=node_id,
        state=state_of(view, node_id),
        wealth=record.pooled.wealth.value,
        largest_wealth=record.pooled.largest,
        rate=rate_ppm / PPM,
        receipts=record.receipts,
        audits=len(verdicts),
        audited_tokens=record.pooled.scored_tokens,
        mean_x=total / tokens / 1e9 if tokens else 0.0,
        refunds=sum(1 for v in verdicts if v.leaf.message.outcome in REFUNDING),
        convicted=view.convicted(node_id),
        suspended=record.suspended,
        at_stake_nano=stake.total_nano,
        needed_nano=found.needed_nano if found else None,
        unsettled_nano=record.unsettled.nano,
        cap_nano=found.cap_nano if found else None,
        deterred=found.holds if found else None,
        judges=len(view.judges_of(node_id)),
        judges_needed=view.convictions_needed,
    )


def row_of(view: LogView, node_id: str) -> NodeRow:
    """One node's row, its stake not looked up."""
    return node_row(view, node_id, verdicts_of(view, node_id))


def status_rows(view: LogView, records: Sequence[AccountRecord] | None = ()) -> list[NodeRow]:
    """All nodes, the most suspicious first. ``records`` are balances of their stakes; None if they
    are not known."""
    held = stakes(view, records or ())
    verdicts: dict[str, list[VerdictLeaf]] = {}
    for verdict in view.verdicts.values():
        verdicts.setdefault(verdict.leaf.message.node_id, []).append(verdict)
    rows = [
        node_row(view, node_id, verdicts.get(node_id, ()), held[node_id]) for node_id in view.nodes
    ]
    if records is None:
        rows = [replace(r, at_stake_nano=None, cap_nano=None, deterred=None) for r in rows]
    return sorted(rows, key=lambda row: (-row.wealth, row.node_id))


@dataclass(frozen=True, slots=True)
class ExplainedVerdict:
    """One audit on the way to a node's wealth."""

    verdict_index: int
    receipt_index: int
    outcome: str
    parameter_class: str
    tokens: int
    exact: int
    mean_x: float
    mu0: float
    wealth: float
    note: str


@dataclass(frozen=True)
class Explanation:
    """A node's state, why, and every step to it."""

    node_id: str
    state: str
    words: str
    steps: tuple[ExplainedVerdict, ...]

    def as_json(self) -> dict[str, object]:
        """For machines."""
        return asdict(self)


def explain(view: LogView, node_id: str, verifier_id: str = "") -> Explanation:
    """Recomputes one verifier's wealth for a node audit by audit, in the order of their requests
    (the only one's, or the one with most audits if none is named), then lists its verdicts that are
    not added up, and says in words why the state is what it is."""
    record = view.nodes[node_id]
    who = verifier_id or max(
        record.by_verifier, key=lambda v: record.by_verifier[v].wealth.r, default=""
    )
    mine = [v for v in verdicts_of(view, node_id) if who in ("", v.leaf.message.verifier_id)]
    by_index = {v.leaf.index: v for v in mine}
    steps, wealth = [], Wealth()
    for evidence in view.counted(who, node_id):
        wealth = wealth.add(*evidence.item)
        verdict = by_index.pop(evidence.verdict_index, None)
        steps.append(_step(verdict, wealth) if verdict else _silent_step(evidence, wealth))
    steps += [_step(verdict, wealth) for verdict in by_index.values()]
    own = record.by_verifier.get(who, NodeEvidence())
    state = state_of(view, node_id)
    return Explanation(node_id, state, _words(view, node_id, own, steps, state), tuple(steps))


def _step(verdict: VerdictLeaf, wealth: Wealth) -> ExplainedVerdict:
    message = verdict.leaf.message
    tokens = message.scored_tokens
    return ExplainedVerdict(
        verdict_index=verdict.leaf.index,
        receipt_index=message.receipt_log_index,
        outcome=Verdict.Outcome.Name(message.outcome),
        parameter_class=message.parameter_class,
        tokens=tokens,
        exact=message.exact_tokens,
        mean_x=message.sum_x_nano / tokens / 1e9 if tokens else 0.0,
        mu0=verdict.evidence.mu0_nano / 1e9 if verdict.evidence else 0.0,
        wealth=wealth.value,
        note=message.l0_failure or verdict.why_not,
    )


def _silent_step(evidence: Evidence, wealth: Wealth) -> ExplainedVerdict:
    """An audit without a verdict in time."""
    return ExplainedVerdict(
        verdict_index=evidence.verdict_index,
        receipt_index=evidence.receipt_index,
        outcome="NO_VERDICT",
        parameter_class="",
        tokens=evidence.tokens,
        exact=0,
        mean_x=0.0,
        mu0=0.0,
        wealth=wealth.value,
        note="no verdict in time: counts as zero",
    )


_REASONS = {
    "clear": "Nothing speaks against it beyond chance.",
    "suspect": f"An honest node gets to {SUSPECT:,} with a chance of at most 1 in {SUSPECT:,}, so "
    "it is audited in full from the next epoch on.",
    "convict": f"An honest node ever gets to {CONVICT:,} with a chance of at most 1 in "
    f"{CONVICT:,}. The conviction is being published.",
    "convicted": f"An honest node ever gets to {CONVICT:,} with a chance of at most 1 in "
    f"{CONVICT:,} (plus the calibration's own error, at most 1 in 1,000: for all classes "
    "together, or for each if it states no pairs). It gets no more work; its locked earnings and "
    "bond were forfeited and its clients refunded.",
    "frozen": "The median node looks just as guilty under the same calibration, so the "
    "calibration is in doubt and nobody is convicted by it.",
    "suspended": "The market, or as many verifiers as convict, suspended it without a conviction.",
}


def _words(
    view: LogView, node_id: str, own: NodeEvidence, steps: list[ExplainedVerdict], state: str
) -> str:
    tokens = own.scored_tokens
    total = sum(s.mean_x * s.tokens for s in steps if s.mu0)
    mean = total / tokens if tokens else 0.0
    mu0 = max((s.mu0 for s in steps), default=0.0)
    lines = [
        f"{node_id} is {state}.",
        f"{own.wealth.r} audits of {own.wealth.tokens:,} tokens count; the wealth is "
        f"{own.wealth.value:.4g} (10^{math.log10(own.wealth.value):.2f}; suspect from 10^3, "
        "convicted from 10^6).",
    ]
    if tokens:
        lines.append(
            f"Mean clipped margin {mean:.6f} against at most {mu0:.6f} expected of honest work"
            + (f": {mean / mu0:.1f} times as much." if mu0 and mean > mu0 else ".")
        )
    if own.unscored:
        lines.append(f"{own.unscored} of them have no margins and count as zero.")
    lines.append(_REASONS.get(state, ""))
    if since := view.nodes[node_id].reinstated:
        lines.append(
            f"The market reinstated it at leaf {since - 1}: what was found about earlier receipts "
            "counts no more."
        )
    for conviction in view.nodes[node_id].convictions.values():
        message = conviction.message
        lines.append(
            f"Convicted by {message.verifier_id} at leaf {conviction.index}: clients are refunded "
            f"for receipts from leaf {message.change_point_index} on."
        )
    lines.append(
        f"{view.convictions_needed} of the {len(view.judges_of(node_id))} verifier(s) that may "
        "judge it must agree to convict; who has a declared owner in common with it may not."
    )
    return "\n".join(lines)
