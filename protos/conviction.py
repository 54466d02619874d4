"""Evidence per node, added up in leaf order, and the decision that follows from it. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from trueweight.protos.evidence import (
    CONVICT,
    FULL_WEIGHT_TOKENS,
    SUSPECT,
    Item,
    Wealth,
    change_point,
)

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


@dataclass(frozen=True, slots=True)
class Evidence:
    """One scored audit, as its logged verdict tells it."""

    verdict_index: int
    receipt_index: int
    sum_x_nano: int
    tokens: int
    mu0_nano: int
    # What was calibrated: "<calibration digest hex>/<class>".
    pair: str = ""
    # Account that paid, or empty if the log does not tell.
    client: str = ""

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
    def scored_tokens(self) -> int:
        """Tokens whose margins were looked at."""
        return self.wealth.tokens

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
        wealth = self.wealth.add(*evidence.item)
        pair = self.pairs.get(evidence.pair, Wealth()).add(*evidence.item)
        return NodeEvidence(
            wealth=wealth,
            largest=max(self.largest, wealth.value),
            capped_audits=self.capped_audits,
            first_verdict_index=self.first_verdict_index or evidence.verdict_index,
            last_verdict_index=evidence.verdict_index,
            pairs={**self.pairs, evidence.pair: pair},
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
    """Pairs whose median node looks guilty: then the calibration is wrong, not the nodes."""
    frozen = set()
    for pair in {p for node in nodes for p in node.pairs}:
        values = [node.pairs[pair].value for node in nodes if pair in node.pairs]
        if len(values) >= FREEZE_MIN_NODES and statistics.median(values) >= FREEZE_MEDIAN_WEALTH:
            frozen.add(pair)
    return frozenset(frozen)


def should_convict(node: NodeEvidence, frozen: frozenset[str]) -> bool:
    """True if the threshold was reached and the evidence does not rest on a frozen pair."""
    return node.crossed_by is not None and node.dominant_pair not in frozen


def change_point_index(counted: Sequence[Evidence]) -> int:
    """Log index of the receipt from which on clients are refunded."""
    return counted[change_point([e.item for e in counted])].receipt_index
