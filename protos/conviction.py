"""Evidence per verifier and node, in the order in which audits were asked for, and the decision
that follows from it. Pure: verifiers, ``explain`` and the ledger add up with the same code.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from trueweight.protos.calibrations import CalibrationTable
from trueweight.protos.evidence import (
    CONVICT,
    FULL_WEIGHT_TOKENS,
    MU0_FLOOR_NANO,
    NANO,
    SUSPECT,
    Item,
    Wealth,
    change_point,
)
from trueweight.protos.v1.audit_pb2 import Verdict

# Nodes needed, and the wealth their median must reach, before noise is blamed on the calibration.
FREEZE_MIN_NODES = 3
FREEZE_MEDIAN_WEALTH = 20.0
# A client's evidence is capped only beyond this many full requests, and then at half of all; of
# what is beyond that every eighth audit still counts. Without that, an accomplice with an account
# of his own and a single short request would make the evidence of a node's one real customer void.
CLIENT_FREE_WEIGHT = 256.0
CLIENT_MAX_SHARE = 0.5
CAPPED_STRIDE = 8
MAX_CLIENTS_PER_NODE = 10_000
# An audit without a verdict counts as zero once its verifier has opened so many epochs after having
# asked for it: it had at least one whole epoch's time.
PATIENCE_EPOCHS = 2
# Audits of one line that may wait at a time; what is asked for beyond that is no evidence.
MAX_WAITING = 100_000
# Newest counted audits that a line remembers, for the change point.
MAX_COUNTED = 100_000

NOT_ADDED = "after the threshold, or beyond its client's share"


@dataclass(frozen=True, slots=True)
class Evidence:
    """One audit as it counts: with the margins of its verdict, or as zero (``is_scored`` False).
    ``verdict_index`` is the leaf that settled it: its verdict's, or the epoch's that made it late.
    """

    verdict_index: int
    receipt_index: int
    sum_x_nano: int
    tokens: int
    mu0_nano: int
    # What was calibrated: "<calibration digest hex>/<class>".
    pair: str = ""
    # Account that paid, or empty if the log does not tell.
    client: str = ""
    is_scored: bool = True

    @property
    def item(self) -> Item:
        """The numbers that enter the wealth."""
        return Item(self.sum_x_nano, self.tokens, self.mu0_nano)

    @property
    def weight(self) -> float:
        """min(n, 256) / 256."""
        return min(self.tokens, FULL_WEIGHT_TOKENS) / FULL_WEIGHT_TOKENS


@dataclass(frozen=True)
class NodeEvidence:
    """Everything one verifier's verdicts say about one node. A value; ``add`` returns the next."""

    wealth: Wealth = field(default_factory=Wealth)
    largest: float = 1.0
    # Audits among those of the wealth that count as zero, and their tokens.
    unscored: int = 0
    unscored_tokens: int = 0
    capped_audits: int = 0
    first_verdict_index: int = 0
    last_verdict_index: int = 0
    pairs: Mapping[str, Wealth] = field(default_factory=dict)
    client_weights: Mapping[str, float] = field(default_factory=dict)
    # Audits beyond a client's share, by client.
    client_beyond: Mapping[str, int] = field(default_factory=dict)
    # The evidence with which the threshold was first reached.
    crossed_by: Evidence | None = None

    @property
    def state(self) -> str:
        """ "clear", "suspect" or "convict". A conviction is for good, suspicion is for now."""
        if self.crossed_by is not None:
            return "convict"
        return "suspect" if self.wealth.value >= SUSPECT else "clear"

    @property
    def scored(self) -> int:
        """Audits in the wealth whose margins were looked at."""
        return self.wealth.r - self.unscored

    @property
    def scored_tokens(self) -> int:
        """Tokens in the wealth whose margins were looked at."""
        return self.wealth.tokens - self.unscored_tokens

    def accepts(self, evidence: Evidence) -> bool:
        """True if the evidence counts: not after the decision, not beyond its client's share (but
        for every eighth). Decided before the outcome is looked at, so the wealth stays a
        supermartingale under honesty."""
        return self.crossed_by is None and not self._is_capped(evidence)

    def add(self, evidence: Evidence) -> NodeEvidence:
        """With one more audit. After the threshold was reached nothing is added any more: the
        decision is made, and what follows cannot take it back (appeals re-run the audits)."""
        if self.crossed_by is not None:
            return self
        beyond = self._with_beyond(evidence)
        if self._is_capped(evidence):
            return replace(self, capped_audits=self.capped_audits + 1, client_beyond=beyond)
        wealth, index = self.wealth.add(*evidence.item), evidence.verdict_index
        return NodeEvidence(
            wealth=wealth,
            largest=max(self.largest, wealth.value),
            unscored=self.unscored + (not evidence.is_scored),
            unscored_tokens=self.unscored_tokens + evidence.tokens * (not evidence.is_scored),
            capped_audits=self.capped_audits,
            first_verdict_index=min(self.first_verdict_index, index) if self.wealth.r else index,
            last_verdict_index=max(self.last_verdict_index, index),
            pairs=self._with_pair(evidence),
            client_weights=self._with_client(evidence),
            client_beyond=beyond,
            crossed_by=evidence if wealth.value >= CONVICT else None,
        )

    def _is_capped(self, evidence: Evidence) -> bool:
        seen = self.client_beyond.get(evidence.client, 0)
        return self._is_beyond_share(evidence) and seen % CAPPED_STRIDE != CAPPED_STRIDE - 1

    def _with_beyond(self, evidence: Evidence) -> Mapping[str, int]:
        if not self._is_beyond_share(evidence):
            return self.client_beyond
        seen = self.client_beyond.get(evidence.client, 0)
        return {**self.client_beyond, evidence.client: seen + 1}

    def _is_beyond_share(self, evidence: Evidence) -> bool:
        # A node's only client is not capped: there is nobody whom it could drown out, and without
        # its evidence there would be none.
        mine = self.client_weights.get(evidence.client, 0.0) + evidence.weight
        if not evidence.client or mine <= CLIENT_FREE_WEIGHT or len(self.client_weights) < 2:
            return False
        total = sum(self.client_weights.values()) + evidence.weight
        return mine > CLIENT_MAX_SHARE * total

    def _with_pair(self, evidence: Evidence) -> Mapping[str, Wealth]:
        if not evidence.is_scored:
            return self.pairs
        pair = self.pairs.get(evidence.pair, Wealth()).add(*evidence.item)
        return {**self.pairs, evidence.pair: pair}

    def _with_client(self, evidence: Evidence) -> Mapping[str, float]:
        known = evidence.client in self.client_weights
        if not known and len(self.client_weights) >= MAX_CLIENTS_PER_NODE:
            return self.client_weights
        weight = self.client_weights.get(evidence.client, 0.0) + evidence.weight
        return {**self.client_weights, evidence.client: weight}

    @property
    def dominant_pair(self) -> str:
        """The pair whose audits alone say most against the node; empty if there are none."""
        return max(self.pairs, key=lambda p: self.pairs[p].value, default="")


def frozen_pairs(nodes: Sequence[NodeEvidence]) -> frozenset[str]:
    """Pairs whose median node looks guilty: then the calibration is wrong, not the nodes.

    ``nodes`` are those that are not convicted: what became of a cheat says nothing any more, and
    cheats of the past would outnumber the living. The median is taken twice, by nodes and by
    audited tokens: many small identities do not freeze a pair, nor does one that has most work.
    """
    pairs = {p for node in nodes for p in node.pairs}
    return frozenset(p for p in pairs if _is_frozen([n.pairs[p] for n in nodes if p in n.pairs]))


def _is_frozen(found: Sequence[Wealth]) -> bool:
    if len(found) < FREEZE_MIN_NODES:
        return False
    guilty = [w.tokens for w in found if w.value >= FREEZE_MEDIAN_WEALTH]
    by_nodes = statistics.median(w.value for w in found) >= FREEZE_MEDIAN_WEALTH
    return by_nodes and 2 * sum(guilty) > sum(w.tokens for w in found)


def should_convict(node: NodeEvidence, frozen: frozenset[str]) -> bool:
    """True if the threshold was reached and the evidence does not rest on a frozen pair."""
    return node.crossed_by is not None and node.dominant_pair not in frozen


def change_point_index(counted: Sequence[Evidence]) -> int:
    """Log index of the receipt from which on clients are refunded."""
    return counted[change_point([e.item for e in counted])].receipt_index


class Asked(NamedTuple):
    """An audit as its logged request defines it, before anybody can know the margins."""

    request_index: int
    receipt_index: int
    # Output tokens that the node signed for.
    tokens: int
    client: str
    # Which weights the receipt was for; empty where that is not known (the log does not tell).
    manifest_digest: bytes = b""


class Said(NamedTuple):
    """What a logged verdict says that matters as evidence."""

    verdict_index: int
    calibration_digest: bytes
    parameter_class: str
    sum_x_nano: int
    tokens: int
    outcome: int


class Answer(NamedTuple):
    """How a verdict settles an audit. Without a pair it counts as zero, for the reason named, or
    (``is_left_out``) not at all."""

    settled_by: int
    sum_x_nano: int = 0
    mu0_nano: int = MU0_FLOOR_NANO
    pair: str = ""
    why_not: str = ""
    is_left_out: bool = False


class Settled(NamedTuple):
    """An audit whose turn came: how it counts (None: left out) and whether it was added."""

    receipt_digest: bytes
    evidence: Evidence | None
    is_added: bool
    why_not: str


def as_zero(index: int, why_not: str) -> Answer:
    """An audit that counts with margins of zero, settled by the leaf at this index."""
    return Answer(index, why_not=why_not)


def answer_of(said: Said, asked: Asked, verifier_id: str, calibrations: CalibrationTable) -> Answer:
    """How a verdict settles the audit.

    1. What the verifier has no calibration for is left out, refunded or not: which class a request
    is of says its assignment, not its margins. 2. Every other verdict without margins counts as
    zero, or a verifier could make the audits disappear that speak for a node. So does one that 3.
    cites another calibration than its signer's in force, 4. or one for other weights, 5. scores
    another number of tokens than the node signed for, or 6. states an impossible sum.
    """
    index, name = said.verdict_index, said.parameter_class
    is_uncovered = name and not calibrations.covers(verifier_id, name, asked.receipt_index)
    is_bare = said.outcome == Verdict.REFUND and not said.calibration_digest
    if is_uncovered and (is_bare or said.outcome == Verdict.UNCALIBRATED):  # 1
        return Answer(index, why_not="its class is not calibrated", is_left_out=True)
    if said.outcome not in (Verdict.SCORED, Verdict.REFUND):  # 2
        return as_zero(index, "the outcome is no evidence")
    cited = calibrations.cited(verifier_id, said.calibration_digest, asked.receipt_index)
    entry = cited.entries.get(name) if cited else None
    if cited is None or entry is None:  # 3
        return as_zero(index, "the cited calibration is not its own in force for this receipt")
    if asked.manifest_digest and cited.manifest_digest != asked.manifest_digest:  # 4
        return as_zero(index, "the cited calibration is for other weights")
    if said.tokens != asked.tokens:  # 5
        return as_zero(index, "more or fewer tokens scored than the receipt has")
    if said.sum_x_nano > said.tokens * NANO:  # 6
        return as_zero(index, "the sum is larger than its terms can be")
    return Answer(index, said.sum_x_nano, entry.mu0_nano, f"{cited.digest.hex()}/{name}")


class AuditLine:
    """One verifier's audits of one node, added up in the order of their logged requests.

    A request is in the log before its transcript is opened, so before its margins are known. If
    audits were added up as verdicts come in, a verifier could publish the largest of many true
    margins and leave the rest for later, and by then the threshold has been crossed. Therefore an
    audit waits until all that were asked for before it are settled: each by its verdict, or as zero
    once its verifier has opened ``PATIENCE_EPOCHS`` epochs after the request (both are in the log,
    whose order everybody sees alike; nobody's clock matters).

    Why Ville's bound holds: call W the wealth with the true margins of all requests, in this
    order. Which audit comes next, its weight, its class and its client are fixed before its margins
    are known, so W is a supermartingale under honesty. What is added here has the same order and
    weights and for each x either the true one or 0; e is positive and grows with x, S grows with
    every e, so the wealth here never exceeds W, whatever the verifier withholds, delays or declares
    void. Audits that wait only shorten the sequence. W ever reaches 1/alpha with a chance of at
    most alpha.
    """

    def __init__(self) -> None:
        self.evidence = NodeEvidence()
        self.counted: deque[Evidence] = deque(maxlen=MAX_COUNTED)
        # The latest receipt whose margins were added up; -1: none.
        self.last_scored = -1
        self._waiting: OrderedDict[bytes, tuple[Asked, Answer | None]] = OrderedDict()
        self._epochs = (-1,) * PATIENCE_EPOCHS

    @property
    def waiting(self) -> int:
        """Audits that were asked for and are not added up yet."""
        return len(self._waiting)

    def asked(self, receipt_digest: bytes) -> Asked | None:
        """The audit of this receipt if it waits for its verdict."""
        asked, answer = self._waiting.get(receipt_digest, (None, None))
        return asked if answer is None else None

    def ask(self, receipt_digest: bytes, asked: Asked) -> bool:
        """Puts an audit in at the end: in the order of the requests' leaves, each receipt once.
        False if too many wait, or if there is no token to score: then it is no evidence."""
        if asked.tokens < 1 or len(self._waiting) >= MAX_WAITING:
            return False
        self._waiting[receipt_digest] = (asked, None)
        return True

    def answer(self, receipt_digest: bytes, answer: Answer) -> list[Settled]:
        """A verdict came. Returns every audit whose turn it is now; nothing happens if the audit
        was not asked for or is settled already."""
        asked = self.asked(receipt_digest)
        if asked is None:
            return []
        self._waiting[receipt_digest] = (asked, answer)
        return self._advance()

    def epoch_opened(self, index: int) -> list[Settled]:
        """The verifier opened an epoch; its older audits without a verdict count as zero now."""
        self._epochs = (*self._epochs[1:], index)
        for receipt_digest, (asked, answer) in self._waiting.items():
            if asked.request_index > self._epochs[0]:
                break
            if answer is None:
                late = as_zero(index, "no verdict in time")
                self._waiting[receipt_digest] = (asked, late)
        return self._advance()

    def _advance(self) -> list[Settled]:
        settled = []
        while self._waiting:
            receipt_digest, (asked, answer) = next(iter(self._waiting.items()))
            if answer is None:
                break
            self._waiting.popitem(last=False)
            settled.append(self._settle(receipt_digest, asked, answer))
        return settled

    def _settle(self, receipt_digest: bytes, asked: Asked, answer: Answer) -> Settled:
        if answer.is_left_out:
            return Settled(receipt_digest, None, False, answer.why_not)
        evidence = Evidence(
            verdict_index=answer.settled_by,
            receipt_index=asked.receipt_index,
            sum_x_nano=answer.sum_x_nano,
            tokens=asked.tokens,
            mu0_nano=answer.mu0_nano,
            pair=answer.pair,
            client=asked.client,
            is_scored=bool(answer.pair),
        )
        is_added = self.evidence.accepts(evidence)
        self.evidence = self.evidence.add(evidence)
        if is_added:
            self.counted.append(evidence)
            if evidence.is_scored:
                self.last_scored = max(self.last_scored, evidence.receipt_index)
        why_not = answer.why_not if is_added else NOT_ADDED
        return Settled(receipt_digest, evidence, is_added, why_not)
