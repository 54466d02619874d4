"""What all sessions of a node share: how much runs, and which assignments were accepted."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from trueweight.node.admission import FRESH_MS
from trueweight.protos.errors import OverCapacity

_MAX_REMEMBERED = 500_000
# So many calls in a row that the engine fails, and it counts as broken.
_MAX_ENGINE_FAILURES = 3


class Workload:
    """Counts running calls and remembers accepted assignments as long as they count as fresh,
    so that none runs twice. ``known_before`` extends the memory past a restart."""

    def __init__(self, known_before: Callable[[bytes], bool] = lambda _digest: False) -> None:
        self.running = 0
        self.engine_broken = asyncio.Event()
        self._engine_failures = 0
        self._seen: OrderedDict[bytes, int] = OrderedDict()
        self._known_before = known_before

    def note_engine(self, *, failed: bool) -> None:
        """Counts what became of a call in the engine; sets ``engine_broken`` when it is clear that
        the node only burns requests."""
        self._engine_failures = self._engine_failures + 1 if failed else 0
        if self._engine_failures >= _MAX_ENGINE_FAILURES:
            self.engine_broken.set()

    def was_seen(self, assignment_digest: bytes) -> bool:
        """True if this assignment was accepted before, also before a restart."""
        return assignment_digest in self._seen or self._known_before(assignment_digest)

    def remember(self, assignment_digest: bytes, issued_at_unix_ms: int, now_unix_ms: int) -> None:
        """Raises OverCapacity rather than forgetting what could still be replayed."""
        while self._seen and next(iter(self._seen.values())) < now_unix_ms:
            self._seen.popitem(last=False)
        if len(self._seen) >= _MAX_REMEMBERED:
            raise OverCapacity("too many assignments in a short time", hint="Slow down.")
        # Entries leave in order of arrival; twice the freshness covers any issue time accepted.
        last_fresh = max(issued_at_unix_ms, now_unix_ms) + 2 * FRESH_MS
        self._seen[assignment_digest] = last_fresh
