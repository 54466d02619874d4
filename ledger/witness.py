"""A witness follows the log's checkpoints and tells when its past was changed.

It remembers the largest checkpoint it has seen. Another one must be the same tree, a larger one
with a proof that the remembered tree is its beginning, or an old one that is the beginning of the
remembered tree. Anything else is a fork or a rollback, and the two signed notes are evidence of it
for everyone. It never steps back: what it has seen once must be in every later tree.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from trueweight.protos.checkpoint import LogState, open_note
from trueweight.protos.errors import BadSignature, InvalidRequest
from trueweight.protos.merkle import verify_consistency
from trueweight.runtime.ledger_port import LedgerPort


class LogForked(BadSignature):
    """The log shows a past that it did not have."""

    code = "LOG_FORKED"
    exit_code = 3


@dataclass(frozen=True)
class Seen:
    """A verified checkpoint and the note that says it."""

    state: LogState
    note: str


def judge(previous: Seen | None, current: Seen, path: list[bytes]) -> None:
    """Raises LogForked unless the current tree begins with the previous one."""
    if previous is None or previous.state.size == 0:
        return
    old, new = previous.state, current.state
    if new.size < old.size and new.issued_at_unix_ms > old.issued_at_unix_ms:
        raise LogForked(
            f"the log went back from {old.size} to {new.size} leaves", hint=_both(previous, current)
        )
    smaller, larger = sorted((old, new), key=lambda s: s.size)
    try:
        verify_consistency(smaller.size, smaller.root, larger.size, larger.root, path)
    except BadSignature as error:
        raise LogForked(
            f"the tree of {smaller.size} leaves is not the beginning of that of {larger.size}: "
            f"{error.message}",
            hint=_both(previous, current),
        ) from None


async def look(ledger: LedgerPort, previous: Seen | None, origin: str, keys: list[bytes]) -> Seen:
    """Asks for the newest checkpoint and judges it; what to remember, which is never a smaller tree
    than before. Raises LogForked."""
    note = (await ledger.checkpoint()).note
    current = Seen(_open(note, origin, keys), note)
    path: list[bytes] = []
    if previous is not None and previous.state.size:
        sizes = sorted((previous.state.size, current.state.size))
        if sizes[0] and sizes[0] != sizes[1]:
            try:
                path = list((await ledger.consistency(*sizes)).path)
            except InvalidRequest:
                path = []  # it no longer has the larger tree: judge says rollback
    judge(previous, current, path)
    # An old note is signed as well: taking it would forget what lies between, and a fork of that
    # part would pass as growth.
    return current if previous is None else max(current, previous, key=_how_far)


def load(path: Path, origin: str, keys: list[bytes]) -> Seen | None:
    """What was remembered; None at the first start. Raises BadSignature if it was tampered with."""
    if not path.exists():
        return None
    try:
        note = json.loads(path.read_text())["note"]
    except (ValueError, KeyError, TypeError):
        raise InvalidRequest(f"{path} is not a witness's memory") from None
    return Seen(_open(note, origin, keys), note)


def remember(path: Path, seen: Seen) -> None:
    """Replaces the memory atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"size": seen.state.size, "note": seen.note}) + "\n")
    temporary.replace(path)


def _how_far(seen: Seen) -> tuple[int, int]:
    return seen.state.size, seen.state.issued_at_unix_ms


def _open(note: str, origin: str, keys: list[bytes]) -> LogState:
    for key in keys:
        try:
            return open_note(note, origin, key)
        except BadSignature:
            continue
    raise BadSignature("the checkpoint is not signed by the ledger")


def _both(previous: Seen, current: Seen) -> str:
    return f"Keep both notes:\n{previous.note}\n{current.note}"
