"""Values that the state machine reads and writes. All frozen; ids and digests are bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trueweight.ledger.accounts import CLEARING, FEE, POOL, Account
from trueweight.ledger.audits import Case, VerdictRow
from trueweight.ledger.commitments import CommitmentRow
from trueweight.ledger.requests import NONE, RequestRow
from trueweight.protos.errors import TrueweightError

# Phases of a transfer; the numbers of TransferRecord.Phase.
SINGLE, PENDING, POST, VOID, EXPIRE = 1, 2, 3, 4, 5
# What a pending transfer is for.
HOLD, PAYOUT, WITHDRAWAL = 1, 2, 3
# States of a pending transfer; the numbers of HoldRecord.State.
OPEN, CAPTURED, VOIDED, EXPIRED = 1, 2, 3, 4

REASONS = (
    "deposit", "bond-deposit", "hold", "capture", "earning", "fee", "pool", "subsidy", "void",
    "expire", "refund", "forfeit", "challenger", "treasury", "release", "payout", "reward",
    "bond-withdrawal", "claim", "reinstate", "debt",
)  # fmt: skip
REASON_NO = {name: number for number, name in enumerate(REASONS, start=1)}
# Transfers that the index of one side leaves out: that side is one of the market's busy accounts,
# which are in almost every transfer. By side: reasons, and the kinds of account that they name.
NOT_INDEXED = {
    "debit": (("earning", "fee", "pool"), frozenset({CLEARING})),
    "credit": (("hold", "capture", "fee", "pool"), frozenset({CLEARING, FEE, POOL})),
}
BUSY_KINDS = frozenset().union(*(kinds for _, kinds in NOT_INDEXED.values()))


# A row of the transfer table: sequence, operation id, ordinal, numbers of the debited and the
# credited account, amount, phase, pending id or None, number of the reason, time.
TransferRow = tuple[int, bytes, int, int, int, int, int, bytes | None, int, int]


class Transfer(NamedTuple):
    """One immutable movement: the ``ordinal``-th of its operation, the ``sequence``-th of all."""

    sequence: int
    operation_id: bytes
    ordinal: int
    debit: Account
    credit: Account
    amount: int
    phase: int
    pending_id: bytes
    reason: int
    created_at_unix_ms: int

    @property
    def id(self) -> bytes:
        """The operation's id for its first transfer, else one more byte (or two) behind it."""
        return transfer_id(self.operation_id, self.ordinal)


def transfer_id(operation_id: bytes, ordinal: int) -> bytes:
    """Unique because operation ids are, without another hash on the hot path."""
    if ordinal == 0:
        return operation_id
    return operation_id + ordinal.to_bytes(1 if ordinal < 256 else 4, "big")


class Pending(NamedTuple):
    """A two-phase transfer: a hold, a payout or a bond withdrawal."""

    id: bytes
    kind: int
    debit: str
    credit: str
    amount: int
    posted: int
    state: int
    # A hold expires then; a bond withdrawal may be paid from then on.
    due_unix_ms: int
    api_key_id: str
    router_id: str
    # The period of its API key's budget in which it counts; 0: none.
    period_no: int = 0


class Leg(NamedTuple):
    """What one receipt moved: needed to undo it."""

    receipt_digest: bytes
    hold_id: bytes
    node_id: str
    client: str
    charge: int
    fee: int
    pool: int
    node: int
    subsidy: int
    log_index: int
    captured_at_unix_ms: int
    refunded: int = 0
    refunded_node: int = 0
    # What its audits are held against. None: settled before the ledger kept them.
    output_tokens: int | None = None
    manifest_digest: bytes | None = None


class Restitution(NamedTuple):
    """How far the refunds of a conviction are: its receipts lie in [first_index, end_index)."""

    operation_id: bytes
    node_id: str
    first_index: int
    end_index: int
    # Receipts below it are counted, or refunded.
    next_index: int
    # 1: their charges are being added up.
    is_counting: int
    # What was set aside for the clients, the sum of what they paid, and how much of that is done.
    budget: int
    total: int = 0
    seen: int = 0

    @property
    def is_open(self) -> bool:
        return bool(self.is_counting) or self.next_index < self.end_index

    @property
    def pay(self) -> int:
        """What the clients get in all, once everything is counted."""
        return min(self.budget, self.total)

    @property
    def unpaid(self) -> int:
        """What they are still to get."""
        return self.pay - (self.pay * self.seen // self.total if self.seen else 0)

    def covers(self, leg: Leg) -> bool:
        """True if the receipt is one that it refunds, or has refunded."""
        return leg.charge > 0 and self.first_index <= leg.log_index < self.end_index


class Claim(NamedTuple):
    """A node's own bill for a leg, paid when the hold expires uncaptured."""

    hold_id: bytes
    assignment_digest: bytes
    receipt_digest: bytes
    receipt: bytes
    node_id: str
    charge: int
    output_tokens: int | None = None
    manifest_digest: bytes | None = None


class NodeRow(NamedTuple):
    """What the ledger remembers of a node besides its accounts."""

    node_id: str
    released: int = 0
    convicted: int = 0
    # Evidence about receipts below this log index counts no more: the node was reinstated.
    reinstated: int = 0
    # What convictions took from it and reinstatements have not paid back.
    forfeited: int = 0


def conviction_key(row: NodeRow | None, node_and_verifier: str) -> str:
    """Unique for each time that a node may be convicted: a reinstatement begins anew."""
    since = row.reinstated if row else 0
    return f"{node_and_verifier}:{since}" if since else node_and_verifier


class Spending(NamedTuple):
    """Limits of an API key: in total, and in each period. ``spent`` counts open holds and captures,
    ``period_spent`` those of the period that runs. Limit 0: none."""

    api_key_id: str
    limit: int = 0
    spent: int = 0
    period_ms: int = 0
    period_limit: int = 0
    period_no: int = 0
    period_from_unix_ms: int = 0
    period_spent: int = 0


class Debt(NamedTuple):
    """What remains owed after a refund or conviction that could not be paid in full."""

    operation_id: bytes
    creditor: str
    amount: int


class Applied(NamedTuple):
    """An operation that was applied: what a replay gets."""

    id: bytes
    body_hash: bytes
    amount: int
    log_index: int  # -1: none


class Leaf(NamedTuple):
    """One leaf to be. ``digest`` is the message's if it is found by it in ``evidence``; empty for
    transfers, and for receipts, whose legs say where they are."""

    kind: str
    body: bytes
    digest: bytes


class LegTotal(NamedTuple):
    """Earnings of a node's captures that the release conditions allow to count."""

    earned: int
    # Receipt leaf of the oldest audit that was asked for and not answered; NONE if there is none.
    waits_for: int = NONE
    # False: they are still being added up.
    is_known: bool = True


class Prepared(NamedTuple):
    """An operation with everything checked that needs no state."""

    id: bytes
    body_hash: bytes
    linked: bool
    kind: str
    caller: str
    body: Any
    facts: Any = None
    error: TrueweightError | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything of the database that a group of operations may touch."""

    accounts: Mapping[str, Account] = field(default_factory=dict)
    pendings: Mapping[bytes, Pending] = field(default_factory=dict)
    applied: Mapping[bytes, Applied] = field(default_factory=dict)
    legs: Mapping[bytes, Leg] = field(default_factory=dict)
    claims: Mapping[bytes, Sequence[Claim]] = field(default_factory=dict)
    references: Mapping[tuple[str, str], bytes] = field(default_factory=dict)
    spending: Mapping[str, Spending] = field(default_factory=dict)
    nodes: Mapping[str, NodeRow] = field(default_factory=dict)
    # By node: those that are not through.
    restitutions: Mapping[str, Restitution] = field(default_factory=dict)
    # Message digest -> log index, for evidence that may be published twice.
    published: Mapping[bytes, int] = field(default_factory=dict)
    # By verifier and receipt.
    requests: Mapping[tuple[str, bytes], RequestRow] = field(default_factory=dict)
    commitments: Mapping[tuple[str, bytes], CommitmentRow] = field(default_factory=dict)
    # Who has judged what, of the receipts that verdicts of the group are about.
    judged: Set[tuple[str, bytes]] = frozenset()
    # What is owed of the debts that are to be paid.
    debts: Mapping[tuple[bytes, str], int] = field(default_factory=dict)
    # By bond account: those that are open.
    withdrawals: Mapping[str, Sequence[Pending]] = field(default_factory=dict)
    # Only for a group of one such operation:
    due_holds: Sequence[Pending] = ()
    node_legs: Sequence[Leg] = ()
    leg_total: LegTotal | None = None
    # Charges of the next receipts of a restitution that counts, and where it goes on.
    charges: tuple[int, int] = (0, 0)
    # By verifier: what its audits of the node that is to be convicted add up to.
    cases: Mapping[str, Case] = field(default_factory=dict)
    # Verdicts that are to be rewarded, by log index.
    rewardable: Mapping[int, VerdictRow] = field(default_factory=dict)
    next_sequence: int = 1
    next_index: int = 0
    next_account: int = 1
    now_unix_ms: int = 0


@dataclass(frozen=True, slots=True)
class Terms:
    """The market's terms that settlement needs."""

    market_id: str
    fee_ppm: int
    pool_ppm: int
    window_ms: int
    # Whose convictions count, and of how many different ones.
    verifiers: tuple[str, ...] = ()
    convictions_needed: int = 1
