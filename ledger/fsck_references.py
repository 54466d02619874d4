"""Facts that are taken once: references of rails, rewards and convictions."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, field

import sqlalchemy as sa

from trueweight.ledger.accounts import external
from trueweight.ledger.findings import Findings, Tally, count, stream
from trueweight.ledger.leaves import facts_digest
from trueweight.ledger.movements import paid_to
from trueweight.protos.errors import InvalidRequest

# Kinds that are looked at with what they are about.
_ELSEWHERE = ("conviction", "refund")


@dataclass
class Taken:
    """Who must have taken which reference, as transfers say it."""

    # Operations by the kind of fact that each of them took: a deposit over a rail, a reward.
    facts: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    # Operations that settled payouts, and the accounts of their rails.
    settled: dict[bytes, str] = field(default_factory=dict)
    # Operations that paid debts: to whom, and how much.
    debts: dict[bytes, tuple[str, int]] = field(default_factory=dict)


def check_references(connection: sa.Connection, findings: Findings, taken: Taken) -> None:
    """Every deposit, reward and payment of a debt took its reference, and no other operation did;
    what a rail calls a payout belongs to an operation that settled one. (Whether references are
    those that the log has, the log's half finds.)"""
    unknown = """SELECT COUNT(*) FROM reference r LEFT JOIN operation o ON o.id = r.operation_id
        WHERE o.id IS NULL"""
    if count(connection, unknown):
        findings.add("references belong to operations that were never applied")
    settled = taken.settled.copy()
    for kind, key, operation in stream(connection, "SELECT kind, key, operation_id FROM reference"):
        name = f"reward:{key.rpartition(':')[0]}" if kind == "reward" else kind
        rail = kind.removeprefix("payout:")
        if kind == "debt" and not _is_paid(connection, key, taken.debts.get(bytes(operation))):
            findings.add(f"the debt {key} was not paid as its reference says")
        if name in taken.facts:
            taken.facts[name].take(bytes(operation))
        elif rail != kind:
            if settled.pop(bytes(operation), None) != external(rail):
                findings.add(f"the reference {key} of {kind} belongs to no payout")
        elif kind not in _ELSEWHERE:
            findings.add(f"the reference {key} of {kind} belongs to no transfer")
    for name, tally in taken.facts.items():
        if tally.sum:
            findings.add(f"the references of {name} are not those of its transfers")


def _is_paid(connection: sa.Connection, key: str, payment: tuple[str, int] | None) -> bool:
    """True if a debt was paid to its creditor, all of it."""
    text, _, creditor = key.partition(":")
    try:
        operation, account = bytes.fromhex(text), paid_to(creditor)
    except (InvalidRequest, ValueError):
        return False
    amount = connection.execute(
        sa.text("SELECT amount FROM debt WHERE operation_id = :operation AND creditor = :creditor"),
        {"operation": operation, "creditor": creditor},
    ).scalar()
    return amount is not None and payment == (account, amount) and operation.hex() == text


def facts_of_operations(connection: sa.Connection) -> dict[bytes, bytes]:
    """By operation: the digest of the unique facts that it took, as its leaf has it."""
    rows = stream(connection, "SELECT operation_id, kind, key FROM reference ORDER BY operation_id")
    return {
        bytes(operation): facts_digest((kind, key) for _, kind, key in taken)
        for operation, taken in itertools.groupby(rows, lambda row: row[0])
    }


class Rewards:
    """References of rewards, in the log's half: each is for a logged verdict of its verifier."""

    def __init__(self, connection: sa.Connection) -> None:
        rows = stream(connection, "SELECT key FROM reference WHERE kind = 'reward'")
        self._missing = {str(row[0]) for row in rows}

    def verdict(self, verifier_id: str, digest: bytes) -> None:
        """A leaf that is a verdict."""
        if self._missing:
            self._missing.discard(f"{verifier_id}:{digest.hex()}")

    def finish(self, findings: Findings) -> None:
        """After the last leaf."""
        for key in self._missing:
            findings.add(f"the reward {key} is for no verdict of its verifier in the log")
