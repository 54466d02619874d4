"""Each operation's transfers against the leaf that records them, in the books' half of ``fsck``,
which reads all transfers anyway."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import sqlalchemy as sa

from trueweight.ledger import bundle
from trueweight.ledger.archived import Archive, bundles_of
from trueweight.ledger.findings import NONSENSE, Findings
from trueweight.ledger.fsck_references import facts_of_operations
from trueweight.ledger.leaves import TRANSFER, encode_batches, encode_movement
from trueweight.ledger.values import REASON_NO
from trueweight.protos.errors import StorageError

_REASONS = {number: name for name, number in REASON_NO.items()}


# What the transfers of an operation have in common: its id, the first one's sequence, and its time.
_Head = tuple[bytes, int, int]


class TransferLeaves:
    """Give it every transfer, in order."""

    def __init__(
        self,
        connection: sa.Connection,
        archive: Archive | None,
        findings: Findings,
        names: dict[int, str],
    ) -> None:
        self._findings, self._names = findings, names
        self._facts = facts_of_operations(connection)
        self._leaves = _leaves(bundles_of(connection, archive))
        self._head: _Head | None = None
        self._movements: list[bytes] = []
        # Leaves say which unique facts they took, from some place on.
        self._say_facts = False

    def take(self, rows: Iterable[Any]) -> None:
        """The next transfers."""
        head, movements, names = self._head, self._movements, self._names
        for sequence, operation, ordinal, debit, credit, amount, phase, pending, reason, at in rows:
            if head is None or head[0] != operation:
                self._operation(head, movements)
                head, movements = (operation, sequence, at), []
            if ordinal != len(movements) or at != head[2]:
                self._findings.add(
                    f"transfer {sequence} is not in its place in its operation, or its time"
                )
            try:
                movement = encode_movement(
                    names.get(debit, "?"),
                    names.get(credit, "?"),
                    amount,
                    phase,
                    pending or b"",
                    _REASONS[reason],
                )
            except NONSENSE:
                self._findings.add(f"transfer {sequence} is none that a ledger makes")
                movement = b""
            movements.append(movement)
        self._head, self._movements = head, movements

    def finish(self) -> None:
        """After the last transfer."""
        self._operation(self._head, self._movements)
        self._head = None
        for place, _ in self._leaves:
            self._differs(place)

    def _operation(self, head: _Head | None, movements: list[bytes]) -> None:
        """All transfers of one operation."""
        if head is None:
            return
        took = self._facts.get(head[0], b"")
        try:
            leaves = encode_batches(*head, movements, took)
        except NONSENSE:
            self._findings.add(f"the operation of transfer {head[1]} is none that a ledger applies")
            next(self._leaves, None)
            return
        found = [next(self._leaves, (-1, b"")) for _ in leaves]
        if [body for _, body in found] == leaves:
            self._say_facts = self._say_facts or bool(took)
            return
        # What an older ledger would have written: without the unique facts that it took.
        older = encode_batches(*head, movements) if took and not self._say_facts else leaves
        for (place, stored), body, old in zip(found, leaves, older, strict=True):
            if place < 0:
                self._findings.add(f"transfers have no leaf ({len(body)} bytes)")
            elif stored not in (body, old):
                self._differs(place)

    def _differs(self, place: int) -> None:
        self._findings.add(f"leaf {place} differs from the transfers it records")


def _leaves(bundles: Iterator[Any]) -> Iterator[tuple[int, bytes]]:
    """Index and body of each leaf of transfers. (That none is missing or damaged, the log's half
    finds.)"""
    for first, count, _, _, body in bundles:
        try:
            for place, (kind, leaf) in enumerate(bundle.unpack(count, bytes(body)), first):
                if kind == TRANSFER:
                    yield place, leaf
        except StorageError:
            return
