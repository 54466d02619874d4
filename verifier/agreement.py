"""Can two verifiers' verdicts on the same receipts both be honest? Pure.

Two honest references differ by rounding, and on one short answer by a lot; over many receipts they
do not differ on average. So a verifier that adds a little to every verdict, or takes it away, stays
inside any tolerance for single receipts and is found by the mean.

For one node and two verifiers let z be what the first found more than the second, per receipt: the
difference of the mean x, less ``TOLERANCE`` of what both found beyond mu0 (references of a cheat's
answers differ in proportion), clipped at C on either side. If the node and both verifiers are
honest, z is at most the first's mean x, whose expectation is at most half of its mu0: that is how
mu0 is made (twice the upper bound). Betting on more than that,

    capital *= 1 + c * w * (z - mu0 / 2) / (C + mu0 / 2),    w = min(n, 256) / 256,

averaged over five clips C and three stakes c, is a non-negative supermartingale that starts at 1,
so it ever reaches 1/alpha with a chance of at most alpha (Ville). It is made for each of the two
directions. Where the node is no honest one, the bound assumes that two honest references differ on
average by at most mu0/2 plus the stated share of what both found beyond mu0.

What passes adds less than mu0/2 on average: with honest noise of at most mu0/2 this stays below
mu0, where the wealth does not grow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from trueweight.protos.evidence import CONVICT, FULL_WEIGHT_TOKENS
from trueweight.protos.receipts import NODE_FAULTS
from trueweight.protos.v1.audit_pb2 import CalibrationEntry, Verdict
from trueweight.verifier.calibration import is_far_outside
from trueweight.verifier.selection import ReceiptLeaf
from trueweight.verifier.state import LogView
from trueweight.verifier.verdicts import TOLERANCE, agree, mean_x

# The same as for convictions: 1/alpha.
CONTRADICTED = CONVICT
# Clips, in units of mu0, and stakes.
CLIPS = (2.0, 8.0, 32.0, 128.0, 512.0)
STAKES = (0.25, 0.5, 0.9)
_MOST = 1e300


@dataclass
class Capital:
    """What was won by betting that one verifier finds more than another."""

    parts: list[float] = field(default_factory=lambda: [1.0] * (len(CLIPS) * len(STAKES)))
    largest: float = 1.0

    def bet(self, more: float, less: float, tokens: int, mu0: float) -> None:
        """One receipt: both verifiers' mean x, scored tokens, and the first one's null mean."""
        weight = min(tokens, FULL_WEIGHT_TOKENS) / FULL_WEIGHT_TOKENS
        excess = more - less - TOLERANCE * max(0.0, min(more, less) - mu0)
        place = 0
        for clip in CLIPS:
            most = clip * mu0
            z = min(max(excess, -most), most)
            gain = weight * (z - mu0 / 2) / (most + mu0 / 2)
            for stake in STAKES:
                self.parts[place] = min(self.parts[place] * (1 + stake * gain), _MOST)
                place += 1
        self.largest = max(self.largest, sum(self.parts) / len(self.parts))


def contradicted(view: LogView, verifier_id: str, until_index: int) -> tuple[str, ...]:
    """Nodes about which another verifier found, on receipts before a log index, what cannot be
    if both are honest: by the mean over all of them, or on a single receipt."""
    found, capitals = set(), dict[tuple[str, str], Capital]()
    for receipt in view.receipts.values():
        mine = _verdict(view, verifier_id, receipt)
        if mine is None or receipt.index >= until_index:
            continue
        for other_id in view.judges_of(receipt.node_id):
            theirs = _verdict(view, other_id, receipt)
            if theirs is None or other_id == verifier_id:
                continue
            if _is_opposite(mine, theirs):
                found.add(receipt.node_id)
            for first, second in ((mine, theirs), (theirs, mine)):
                key = (first.verifier_id + second.verifier_id, receipt.node_id)
                capital = capitals.setdefault(key, Capital())
                entries = [_entry(view, v, receipt) for v in (first, second)]
                if _is_too_much(capital, first, second, entries[0]):
                    found.add(receipt.node_id)
                if _is_bare_framing(first, second, entries):
                    found.add(receipt.node_id)
    return tuple(sorted(found))


def _is_too_much(
    capital: Capital, first: Verdict, second: Verdict, entry: CalibrationEntry | None
) -> bool:
    if entry is None or not (first.scored_tokens and second.scored_tokens):
        return False
    capital.bet(mean_x(first), mean_x(second), first.scored_tokens, entry.mu0_nano / 1e9)
    return capital.largest >= CONTRADICTED or is_beyond_noise(first, second, entry)


def _is_bare_framing(
    first: Verdict, second: Verdict, entries: Sequence[CalibrationEntry | None]
) -> bool:
    """True if the first refunds without citing a calibration what is ordinary by the second's."""
    mine, theirs = entries
    if mine is not None or theirs is None or not second.scored_tokens:
        return False
    return first.outcome == Verdict.REFUND and is_beyond_noise(first, second, theirs)


def is_beyond_noise(first: Verdict, second: Verdict, entry: CalibrationEntry) -> bool:
    """True if one receipt alone tells: the first found so much more that its client would be
    refunded for the difference, which no honest request shows, and no share of it explains it."""
    difference = first.sum_x_nano - second.sum_x_nano
    is_in_proportion = difference <= TOLERANCE * first.sum_x_nano
    return not is_in_proportion and is_far_outside(difference, first.scored_tokens, entry)


def _is_opposite(mine: Verdict, theirs: Verdict) -> bool:
    """True if one refuses the receipt, and the other not or by another check; or if both scored it,
    but another number of tokens or as another class."""
    if Verdict.INVALID_RECEIPT in (mine.outcome, theirs.outcome):
        return not agree(mine, theirs, 0)
    if not (mine.scored_tokens and theirs.scored_tokens):
        return False
    facts = [(v.scored_tokens, v.parameter_class) for v in (mine, theirs)]
    return facts[0] != facts[1]


def is_void(verdict: Verdict) -> bool:
    """True if the verdict says nothing about the margins, nor names a check that failed."""
    if verdict.outcome == Verdict.INVALID_RECEIPT:
        return verdict.l0_failure not in NODE_FAULTS
    return verdict.outcome not in (Verdict.SCORED, Verdict.REFUND)


def voids_compared(view: LogView, mine: Iterable[Verdict]) -> tuple[int, tuple[bytes, ...]]:
    """How many of a verifier's receipts another scored as well, and which of those it called void
    all the same. Who had no calibration that it could have scored by, says no more than that."""
    compared, refuted = 0, []
    for verdict in mine:
        receipt = view.receipts.get(verdict.receipt_digest)
        others = _scored_by_others(view, verdict, receipt) if receipt else []
        if receipt is None or not others:
            continue
        compared += 1
        if is_void(verdict) and not _is_uncovered(view, verdict, others, receipt):
            refuted.append(verdict.receipt_digest)
    return compared, tuple(refuted)


def _scored_by_others(view: LogView, mine: Verdict, receipt: ReceiptLeaf) -> list[Verdict]:
    """Other verifiers' margins of the same receipt; who copied need not have looked at it."""
    judges = [j for j in view.judges_of(receipt.node_id) if j != mine.verifier_id]
    found = [view.verdicts.get((judge, receipt.receipt_digest)) for judge in judges]
    messages = [v.leaf.message for v in found if v is not None and not v.copied]
    return [m for m in messages if not is_void(m) and m.scored_tokens]


def _is_uncovered(
    view: LogView, mine: Verdict, others: Iterable[Verdict], receipt: ReceiptLeaf
) -> bool:
    """True if the verdict says "not calibrated", another's verdict names the same class, and there
    was no calibration of its signer for it: for the weights that the other cites one for."""
    name, known = mine.parameter_class, view.calibrations
    if mine.outcome != Verdict.UNCALIBRATED or mine.l0_failure:
        return False
    for other in (v for v in others if v.parameter_class == name):
        cited = known.cited(other.verifier_id, other.calibration_digest, receipt.index)
        if cited is None:
            return not known.covers(mine.verifier_id, name, receipt.index)
        own = known.in_force(mine.verifier_id, cited.manifest_digest, receipt.index)
        return own is None or name not in own.entries
    return False


def _entry(view: LogView, verdict: Verdict, receipt: ReceiptLeaf) -> CalibrationEntry | None:
    cited = view.calibrations.cited(verdict.verifier_id, verdict.calibration_digest, receipt.index)
    return cited.entries.get(verdict.parameter_class) if cited else None


def _verdict(view: LogView, verifier_id: str, receipt: ReceiptLeaf) -> Verdict | None:
    known = view.verdicts.get((verifier_id, receipt.receipt_digest))
    return known.leaf.message if known else None
