"""Signature checks in other processes: they are most of a capture's cost, and hold the GIL.

The pool only answers "these signatures hold". Judging who may sign what stays where it was: the
evidence code asks its key ring, and the ring of ``CheckedRing`` remembers what the pool found.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass

from trueweight.protos.envelope import parse_envelope, pre_authentication_encoding
from trueweight.protos.errors import BadSignature
from trueweight.protos.identity import KeyRing, check_signature
from trueweight.protos.v1 import ledger_pb2 as pb

log = logging.getLogger(__name__)

# Fewer are checked faster here than sent there.
WORTH_SENDING = 16
_CHUNK = 64
_TIMEOUT_S = 10.0
# (key id, signature, message): a signature is remembered for exactly what it signed.
Check = tuple[str, bytes, bytes]


@dataclass(frozen=True)
class CheckedRing(KeyRing):
    """A ring that need not check again what the pool has checked under the same keys."""

    checked: frozenset[Check] = frozenset()

    def verify(self, operational_key_id: str, signature: bytes, message: bytes) -> str:
        if (operational_key_id, signature, message) in self.checked:
            return self.keys[operational_key_id][0]
        return super().verify(operational_key_id, signature, message)


class SignaturePool:
    """A few processes, started when first needed."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None

    async def ring_for(self, operations: Iterable[pb.Operation], ring: KeyRing) -> KeyRing:
        """The ring, with the captures' signatures checked if that is worth it."""
        if self._workers < 1:
            return ring
        checks = [check for op in operations for check in _checks_of(op, ring)]
        if len(checks) < WORTH_SENDING:
            return ring
        checked = frozenset(await self._run(checks, ring))
        return CheckedRing(ring.keys, ring.sequences, ring.operators, checked)

    async def _run(self, checks: list[Check], ring: KeyRing) -> list[Check]:
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                self._workers, multiprocessing.get_context("spawn"), _start, (os.getpid(),)
            )
        chunks = [checks[i : i + _CHUNK] for i in range(0, len(checks), _CHUNK)]
        loop = asyncio.get_running_loop()
        jobs = [
            loop.run_in_executor(
                self._executor, _hold, [(ring.keys[k][1], s, m) for k, s, m in chunk]
            )
            for chunk in chunks
        ]
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                answers = await asyncio.gather(*jobs)
        except (BrokenExecutor, TimeoutError):
            log.warning("the signature processes are gone; checking here")
            self.close()
            return []
        return [
            check
            for chunk, held in zip(chunks, answers, strict=True)
            for check, good in zip(chunk, held, strict=True)
            if good
        ]

    def close(self) -> None:
        """Ends the processes."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None


def _checks_of(operation: pb.Operation, ring: KeyRing) -> list[Check]:
    if operation.WhichOneof("body") != "capture":
        return []
    found: list[Check] = []
    for envelope in (operation.capture.bill, *operation.capture.receipts):
        with contextlib.suppress(BadSignature):
            parsed = parse_envelope(envelope)
            signed = pre_authentication_encoding(parsed.payload_type, parsed.payload)
            found += [
                (s.key_id, s.signature, signed) for s in parsed.signatures if s.key_id in ring.keys
            ]
    return found


def _hold(checks: Sequence[tuple[bytes, bytes, bytes]]) -> list[bool]:
    held = []
    for key, signature, message in checks:
        try:
            check_signature(key, signature, message)
            held.append(True)
        except BadSignature:
            held.append(False)
    return held


def _start(parent: int) -> None:
    """Ends with its parent, however that one dies."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=watch, daemon=True).start()
