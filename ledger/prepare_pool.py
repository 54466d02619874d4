"""Captures are checked in other processes: two signatures each are most of a request's cost.

What runs there is ``prepare``, the same pure function as here, on the same bytes; back come the
facts. Everything else is checked where it arrives.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor

from trueweight.ledger.evidence import Court
from trueweight.ledger.prepare import prepare
from trueweight.ledger.values import Prepared
from trueweight.protos.v1 import ledger_pb2 as pb

log = logging.getLogger(__name__)

# Fewer captures are checked faster here than sent there.
WORTH_SENDING = 8
_CHUNK = 64
# So long a call is checked at a time before others have their turn.
_TURN_S = 0.005
_TIMEOUT_S = 10.0
# After its processes died it takes a rest, so that a fault does not start processes for ever.
_REST_S = 5.0


class PreparePool:
    """A few processes, started when first needed."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None
        self._court: Court | None = None
        self._court_bytes = b""
        self._version = 0
        self._rests_until = 0.0

    async def prepare(
        self, operations: Sequence[pb.Operation], caller: str, court: Court
    ) -> list[Prepared]:
        """``prepare`` of each, in order."""
        captures = [i for i, op in enumerate(operations) if op.HasField("capture")]
        if not self._workers or len(captures) < WORTH_SENDING:
            return await _prepare_here(operations, caller, court, {})
        parts = [captures[i : i + _CHUNK] for i in range(0, len(captures), _CHUNK)]
        asked = [self._ask([operations[i] for i in part], caller, court) for part in parts]
        answers = await asyncio.gather(*asked)
        found: dict[int, Prepared] = {}
        for part, answer in zip(parts, answers, strict=True):
            found.update(zip(part, answer, strict=False))
        return await _prepare_here(operations, caller, court, found)

    async def _ask(
        self, operations: Sequence[pb.Operation], caller: str, court: Court
    ) -> list[Prepared]:
        """The answer of some process, or nothing if there is none."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._rests_until:
            return []
        if court is not self._court:
            self._court, self._court_bytes = court, pickle.dumps(court)
            self._version += 1
        version, court_bytes = self._version, self._court_bytes
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                self._workers, multiprocessing.get_context("spawn"), _start, (os.getpid(),)
            )
        data = [operation.SerializeToString() for operation in operations]
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                # A process that does not know this court yet says so.
                for known in (b"", court_bytes):
                    answer = await loop.run_in_executor(
                        self._executor, _prepare, version, known, caller, data
                    )
                    if answer is not None:
                        return answer
        except (BrokenExecutor, TimeoutError):
            log.warning("the checking processes are gone; checking here")
            self._rests_until = loop.time() + _REST_S
            self.close()
        return []

    def close(self) -> None:
        """Ends the processes."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None


async def _prepare_here(
    operations: Sequence[pb.Operation], caller: str, court: Court, known: Mapping[int, Prepared]
) -> list[Prepared]:
    """Checks those that are not known yet. A thousand take a quarter of a second, in which nobody
    else would be heard."""
    began, found = time.monotonic(), []
    for place, operation in enumerate(operations):
        found.append(known.get(place) or prepare(operation, caller, court))
        if time.monotonic() - began > _TURN_S:
            await asyncio.sleep(0)
            began = time.monotonic()
    return found


# -- in the other processes -------------------------------------------------------------------

_COURTS: dict[int, Court] = {}


def _prepare(
    version: int, court_bytes: bytes, caller: str, operations: list[bytes]
) -> list[Prepared] | None:
    court = _COURTS.get(version)
    if court is None:
        if not court_bytes:
            return None
        _COURTS.clear()
        court = _COURTS[version] = pickle.loads(court_bytes)  # noqa: S301  (from our parent)
    return [
        # A refusal keeps its body for its message only; it does not travel.
        prepare(pb.Operation.FromString(data), caller, court)._replace(body=None)
        for data in operations
    ]


def _start(parent: int) -> None:
    """Ends with its parent, however that one dies."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=watch, daemon=True).start()
