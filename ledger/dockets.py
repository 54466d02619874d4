"""Reading what a conviction follows from: a verifier's leaves about one node, added up in steps.

A long history is not read while everybody waits: each call adds up so many rows more, keeps how far
it came in the writer's cache, and refuses by name until it is through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trueweight.ledger.audits import (
    CALIBRATION,
    EPOCH,
    Audit,
    Case,
    Docket,
    Judged,
    StepRow,
    VerdictRow,
)
from trueweight.ledger.backend import Backend
from trueweight.protos.blind_verdicts import IN_TIME, NEVER

# Rows of each kind that one call adds up, and half-read histories that are remembered.
STEP_ROWS = 20_000
MAX_DOCKETS = 16

# By verifier, node, and the log index since which the node's receipts count (a reinstated one
# begins anew).
Dockets = dict[tuple[str, str, int], Docket]
_STEPS = ", ".join(StepRow._fields)
_VERDICTS = ", ".join(VerdictRow._fields)
# By its own index, so that a verifier that judges a receipt again and again delays nobody.
FIRST_VERDICTS = (
    "SELECT receipt_digest, verifier_id, log_index "
    "FROM (SELECT * FROM verdict WHERE is_first = 1) v"
)


def read_cases(
    backend: Backend, dockets: Dockets, verifiers: Iterable[str], node: tuple[str, int]
) -> dict[str, Case]:
    """By verifier: what its audits of the node add up to, or how far they were added up. ``node``
    is its id and the log index from which on its receipts count. ``verifiers`` are all that the
    market has: every fold of the log leaves out what former ones said, so nobody copied from
    them."""
    known = frozenset(verifiers)
    return {one: _case(backend, dockets, (one, *node), known - {one}) for one in verifiers}


def _case(
    backend: Backend, dockets: Dockets, key: tuple[str, str, int], others: frozenset[str]
) -> Case:
    verifier_id = key[0]
    docket = dockets.pop(key, None) or Docket(verifier_id)
    while len(dockets) >= MAX_DOCKETS:
        del dockets[next(iter(dockets))]
    rows, until, is_cut = _next_rows(backend, key, others, docket.next_index)
    docket.add(rows, until + 1)
    # Newest last, so that the oldest is forgotten first.
    dockets[key] = docket
    return docket.case(is_behind=is_cut)


def _next_rows(
    backend: Backend, key: tuple[str, str, int], others: frozenset[str], start: int
) -> tuple[Sequence[Audit | Judged | StepRow], int, bool]:
    """Rows from a log index on in the order of their leaves, the index up to which none is left
    out, and whether there may be more."""
    verifier_id, node_id, _ = key
    found: list[Sequence[Any]] = [
        _audits(backend, key, start),
        _verdicts(backend, (verifier_id, node_id), others, start),
        *(_steps(backend, verifier_id, kind, start) for kind in (EPOCH, CALIBRATION)),
    ]
    full = [rows[-1].log_index for rows in found if len(rows) >= STEP_ROWS]
    last = max((rows[-1].log_index for rows in found if rows), default=start - 1)
    until = min([last, *full])
    rows = [row for each in found for row in each if row.log_index <= until]
    return sorted(rows, key=lambda row: int(row.log_index)), until, bool(full)


def _audits(backend: Backend, key: tuple[str, str, int], start: int) -> list[Audit]:
    rows = backend.query(
        "SELECT r.log_index, r.receipt_digest, r.for_appeal, l.log_index, l.client, "
        "l.output_tokens, l.manifest_digest FROM audit_request r "
        "JOIN leg l ON l.receipt_digest = r.receipt_digest "
        "WHERE r.verifier_id = ? AND r.node_id = ? AND r.receipt_index >= ? AND r.log_index >= ? "
        "AND l.manifest_digest IS NOT NULL ORDER BY r.log_index LIMIT ?",
        (*key, start, STEP_ROWS),
    )
    return [Audit(*row) for row in rows]


def _verdicts(
    backend: Backend, key: tuple[str, str], others: frozenset[str], start: int
) -> list[Judged]:
    rows = [
        VerdictRow(*row)
        for row in backend.query(
            f"SELECT {_VERDICTS} FROM verdict WHERE verifier_id = ? AND node_id = ? "  # noqa: S608
            "AND log_index >= ? ORDER BY log_index LIMIT ?",
            (*key, start, STEP_ROWS),
        )
    ]
    firsts = _first_of_others(backend, rows, others) if others else {}
    return [Judged(row.log_index, row, firsts.get(row.receipt_digest)) for row in rows]


def _first_of_others(
    backend: Backend, rows: Iterable[VerdictRow], others: frozenset[str]
) -> Mapping[bytes, int]:
    """By receipt: the leaf of the first verdict by one of the others. Looked for only where it
    matters."""
    wanted = {row.receipt_digest for row in rows if IN_TIME < row.bound_since < NEVER}
    found: dict[bytes, int] = {}
    for digest, verifier_id, index in backend.by_keys(FIRST_VERDICTS, "receipt_digest", wanted):
        if verifier_id in others:
            found[digest] = min(index, found.get(digest, NEVER))
    return found


def _steps(backend: Backend, verifier_id: str, kind: int, start: int) -> list[StepRow]:
    rows = backend.query(
        f"SELECT {_STEPS} FROM audit_step WHERE verifier_id = ? AND kind = ? "  # noqa: S608
        " AND log_index >= ? ORDER BY log_index LIMIT ?",
        (verifier_id, kind, start, STEP_ROWS),
    )
    return [StepRow(*row) for row in rows]
