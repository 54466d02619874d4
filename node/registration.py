"""The node's Offer, and keeping it registered at a router."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from trueweight.node.backoff import Backoff
from trueweight.protos.envelope import seal
from trueweight.protos.errors import InvalidRequest, TrueweightError
from trueweight.protos.identity import Signer
from trueweight.protos.v1.market_pb2 import EngineFingerprint, Offer, OfferedModel
from trueweight.protos.v1.router_pb2 import RegisterRequest, RegisterResponse
from trueweight.runtime.clock import Clock

log = logging.getLogger(__name__)

DEFAULT_LEASE_MS = 15_000
# A router's lease shorter than this would only make the node busy registering.
_LEAST_PERIOD_MS = 500.0
_MOST_PERIOD_MS = 60_000.0

RegisterCall = Callable[[RegisterRequest], Awaitable[RegisterResponse]]


@dataclass(frozen=True)
class OfferTerms:
    """What stays the same in every Offer of a run. ``endpoint`` is empty behind NAT."""

    market_id: str
    endpoint: str
    tls_certificate_pem: str
    models: tuple[OfferedModel, ...]
    fingerprint: EngineFingerprint
    capacity: int
    lease_ms: int = DEFAULT_LEASE_MS


def sign_offer(terms: OfferTerms, signer: Signer, now_unix_ms: int) -> bytes:
    """The envelope of the Offer as of now."""
    offer = Offer(
        market_id=terms.market_id,
        node_id=signer.identity,
        key_events=[signer.key_event],
        endpoint=terms.endpoint,
        tls_certificate_pem=terms.tls_certificate_pem,
        models=terms.models,
        fingerprint=terms.fingerprint,
        capacity=terms.capacity,
        lease_ms=terms.lease_ms,
        issued_at_unix_ms=now_unix_ms,
    )
    return seal(offer, signer)


class Registrar:
    """Registers, and again before the lease ends, until cancelled. Failures are retried with
    bounded, jittered waits; each is logged with what to do about it."""

    def __init__(
        self,
        register: RegisterCall,
        offer: Callable[[], bytes],
        clock: Clock,
        random: Callable[[int], bytes],
    ) -> None:
        self._register, self._offer, self._clock = register, offer, clock
        self._backoff = Backoff(random)
        self.last_error: TrueweightError | None = None
        self.registered = 0
        self.eligible = False

    async def run(self) -> None:
        """Registers again and again; ends only when cancelled."""
        while True:
            await self._clock.sleep_ms(await self.register_once())

    async def register_once(self) -> float:
        """Registers now; how many milliseconds to wait before the next time."""
        try:
            answer = await self._register(RegisterRequest(offer=self._offer()))
        except TrueweightError as error:
            return self._failed(error)
        self._succeeded(answer)
        return min(_MOST_PERIOD_MS, max(_LEAST_PERIOD_MS, answer.lease_ms / 3))

    def _succeeded(self, answer: RegisterResponse) -> None:
        if not self.registered or answer.eligible != self.eligible or self.last_error is not None:
            if answer.eligible:
                log.info("registered at the router; work may come")
            else:
                log.warning("registered, but no work will come: %s", answer.reason)
        self.registered += 1
        self.eligible, self.last_error = answer.eligible, None
        self._backoff.reset()

    def _failed(self, error: TrueweightError) -> float:
        wait_ms = self._backoff.next_ms()
        if isinstance(error, InvalidRequest):
            # The router will say the same again; ask rarely, but do ask: it may be upgraded.
            wait_ms = max(wait_ms, 5_000.0)
        if self.last_error is None or str(error) != str(self.last_error):
            log.warning("not registered: %s Trying again.", error)
        self.last_error = error
        return wait_ms
