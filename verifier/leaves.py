"""Leaves and nodes as the fold keeps them, and the bounded memory that it keeps them in."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from google.protobuf.message import Message

from trueweight.protos.conviction import AuditLine, Evidence, NodeEvidence
from trueweight.protos.deterrence import PaidPrice, UnsettledWork
from trueweight.protos.suspension import Suspensions
from trueweight.protos.v1.audit_pb2 import Conviction, Verdict

K = TypeVar("K")
V = TypeVar("V")
M = TypeVar("M", bound=Message)


class Recent(Generic[K, V]):
    """A mapping that forgets its oldest entries beyond a bound."""

    def __init__(self, bound: int) -> None:
        self._items: OrderedDict[K, V] = OrderedDict()
        self._bound = bound

    def put(self, key: K, value: V) -> None:
        """Stores or replaces."""
        self._items[key] = value
        if len(self._items) > self._bound:
            self._items.popitem(last=False)

    def get(self, key: K) -> V | None:
        """The value, or None if unknown or forgotten."""
        return self._items.get(key)

    def pop(self, key: K) -> V | None:
        """Removes and returns."""
        return self._items.pop(key, None)

    def values(self) -> list[V]:
        """Oldest first."""
        return list(self._items.values())

    def items(self) -> list[tuple[K, V]]:
        """Oldest first."""
        return list(self._items.items())

    def __len__(self) -> int:
        return len(self._items)


@dataclass(frozen=True, slots=True)
class Leaf(Generic[M]):
    """A logged, verified message with its log index, digest and envelope."""

    index: int
    message: M
    digest: bytes
    envelope: bytes
    merged_at_unix_ms: int


@dataclass(frozen=True, slots=True)
class VerdictLeaf:
    """A logged verdict, and the evidence that its margins count as (if none, or not yet, why)."""

    leaf: Leaf[Verdict]
    evidence: Evidence | None
    why_not: str = ""
    # Not committed to before another verifier's margins were known.
    copied: bool = False


@dataclass
class NodeRecord:
    """What the log says about one node."""

    # By verifier: its audits in the order of their requests, and what those that are settled add
    # up to. On its own alone a verifier may convict.
    lines: dict[str, AuditLine] = field(default_factory=dict)
    by_verifier: dict[str, NodeEvidence] = field(default_factory=dict)
    # First verdict of each receipt, whoever gave it: the node's one public wealth.
    pooled: NodeEvidence = field(default_factory=NodeEvidence)
    convictions: dict[str, Leaf[Conviction]] = field(default_factory=dict)
    standing: Suspensions = field(default_factory=Suspensions)
    # The conviction that each verifier's newest suspension cites.
    suspended_for: dict[str, bytes] = field(default_factory=dict)
    # Evidence about receipts below this log index counts no more: the node was reinstated.
    reinstated: int = 0
    receipts: int = 0
    price: PaidPrice = field(default_factory=PaidPrice)
    unsettled: UnsettledWork = field(default_factory=UnsettledWork)

    @property
    def suspended(self) -> bool:
        """True if the market or enough verifiers suspended it, whether they convicted it or not."""
        return self.standing.by_word

    def reinstate(self, log_index: int) -> None:
        """The market took its conviction back: it begins anew after this leaf."""
        self.standing.reinstate()
        self.lines, self.by_verifier, self.pooled = {}, {}, NodeEvidence()
        self.convictions, self.suspended_for = {}, {}
        self.reinstated = log_index + 1
