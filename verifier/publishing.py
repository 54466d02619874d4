"""Putting evidence into the log exactly once, under ids derived from what it is about."""

from __future__ import annotations

import logging
from collections.abc import Callable

from google.protobuf.message import Message

from trueweight.protos.envelope import seal
from trueweight.protos.errors import Conflict, IdConflict, NotFound, error_for
from trueweight.protos.identity import Signer
from trueweight.protos.ids import derived_id
from trueweight.protos.v1.ledger_pb2 import Convict, Operation, Publish, Refund, Release, Result
from trueweight.runtime.ledger_port import LedgerPort
from trueweight.verifier.duties import ReleaseEarnings

log = logging.getLogger(__name__)

# Not an envelope, so what is signed here can never pass for one.
_IDS = b"trueweight: ids of my operations"
REWARD_PPM = 50_000
MAX_REWARD_PPM = 100_000


class Publisher:
    """Seals and sends. Every method may be repeated at any time with the same effect."""

    def __init__(self, ledger: LedgerPort, signer: Signer) -> None:
        self._ledger, self._signer = ledger, signer
        # Ed25519 is deterministic, so ids are the same after a crash, but nobody else knows them:
        # whoever could foresee one could take it first, and so silence this verifier.
        self._secret = signer.key.sign(_IDS)

    def _id(self, about: str, *parts: bytes) -> bytes:
        return derived_id(about, self._secret, *parts)

    async def publish(self, message: Message, about: str, *parts: bytes) -> None:
        """Publishes one statement about (``about``, ``parts``); a second one about the same thing
        is dropped by the ledger, so that a repeat after a crash cannot add another leaf."""
        await self.publish_with(lambda: message, about, *parts)

    async def publish_with(self, make: Callable[[], Message], about: str, *parts: bytes) -> None:
        """The same for a statement that is made at the last moment."""
        operation = Operation(
            id=self._id(about, *parts),
            publish=Publish(envelope=seal(make(), self._signer)),
        )
        await self._apply(operation, tolerated=(IdConflict,))

    async def refund(self, receipt_digest: bytes, reason: str, verdict_envelope: bytes) -> int:
        """Refunds one receipt; nanocredits moved, 0 if it was refunded before."""
        body = Refund(receipt_digest=receipt_digest, reason=reason, verdict=verdict_envelope)
        operation = Operation(id=self._id("refund", receipt_digest), refund=body)
        # Conflict: another verifier's refund, or the conviction's, came first. NotFound: the
        # receipt was never charged (a claim that was not captured).
        return await self._apply(operation, tolerated=(Conflict, NotFound))

    async def convict(
        self, conviction_envelope: bytes, about: tuple[bytes, ...], reward_ppm: int
    ) -> int:
        """Forfeits and refunds by one's own conviction; nanocredits moved, 0 if the node was
        convicted before."""
        body = Convict(conviction=conviction_envelope, reward_ppm=min(reward_ppm, MAX_REWARD_PPM))
        operation = Operation(id=self._id("convict", *about), convict=body)
        return await self._apply(operation, tolerated=(Conflict,))

    async def release(self, duty: ReleaseEarnings, amount_nano: int) -> int:
        """Releases at most ``amount_nano``; nanocredits moved. The ledger knows what is out of its
        window: if that is less, all of it goes."""
        for amount in (amount_nano, 0):
            body = Release(
                node_id=duty.node_id, amount_nano=amount, below_log_index=duty.below_index
            )
            about = (duty.node_id.encode(), duty.epoch.to_bytes(8, "big"), bytes([amount > 0]))
            # The same for all verifiers: each would release as much again.
            operation = Operation(id=derived_id("release", *about), release=body)
            try:
                return await self._apply(operation, tolerated=(IdConflict,))
            except Conflict as error:
                log.debug("release of %s: %s", duty.node_id, error.message)
        return 0

    async def _apply(self, operation: Operation, tolerated: tuple[type[Exception], ...]) -> int:
        (result,) = await self._ledger.apply([operation])
        if result.status != Result.REFUSED:
            return result.amount_nano
        error = error_for(result.code, result.message)
        if isinstance(error, tolerated):
            log.debug("already done: %s", error.message)
            return 0
        raise error
