"""Whether an offer can be believed and sold. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.x509 import InvalidVersion

from trueweight.protos.envelope import (
    Opened,
    open_envelope,
    parse_envelope,
    parse_payload,
    payload_type,
    ring_of,
)
from trueweight.protos.errors import BadSignature, InvalidRequest
from trueweight.protos.identity import KeyRing
from trueweight.protos.market_terms import (
    DEFAULT_ENGINES,
    SYNTHETIC,
    engine_refusal,
    with_synthetic,
)
from trueweight.protos.money import MAX_NANO
from trueweight.protos.v1.market_pb2 import EngineAllowList, EngineFingerprint, Offer
from trueweight.runtime.tls import channel_credentials

_MAX_OFFER_BYTES = 128 * 1024
MAX_KEY_EVENTS = 16
MAX_MODELS = 64
_MAX_CAPACITY = 4096
_MIN_LEASE_MS, _MAX_LEASE_MS = 1_000, 10 * 60_000
FRESH_MS = 10 * 60_000
_MAX_ENDPOINT_CHARS = 256
# A thousand credits a token is a typing mistake.
_MAX_ASK_NANO_PER_MTOK = MAX_NANO // 10**7


@dataclass(frozen=True, slots=True)
class AllowList:
    """Engines that get paid work: the market's signed list. A fingerprint is a claim; this bounds
    which claims are heard. The synthetic engine makes no use of weights: it takes this router's own
    word as well, and that is enough, because verifiers go by the market's list."""

    listed: EngineAllowList = field(default_factory=lambda: DEFAULT_ENGINES)
    synthetic: bool = False

    def refusal(self, fingerprint: EngineFingerprint) -> str:
        """Why this engine gets no paid work; empty if it does."""
        if fingerprint.engine != SYNTHETIC:
            return engine_refusal(self.listed, fingerprint)
        if not self.synthetic:
            return "this router gives synthetic engines no work"
        return engine_refusal(with_synthetic(self.listed), fingerprint)


def open_offer(
    data: bytes, market_id: str, base: KeyRing, now_unix_ms: int
) -> tuple[Opened[Offer], KeyRing]:
    """A verified offer and a ring that knows the node's key.

    1. Bounds. 2. The key events in it certify a key of the node it names. 3. That key signed it.
    4. It is fresh. 5. Its numbers make sense. Raises BadSignature or InvalidRequest.
    """
    if len(data) > _MAX_OFFER_BYTES:  # 1
        raise InvalidRequest("the offer is too long")
    envelope = parse_envelope(data)
    if envelope.payload_type != payload_type(Offer):
        raise BadSignature("expected an offer, got something else")
    # Parsed only to find the key events, which carry their own proof.
    claimed = parse_payload(envelope, Offer)
    if not 1 <= len(claimed.key_events) <= MAX_KEY_EVENTS:
        raise InvalidRequest(f"an offer carries 1 to {MAX_KEY_EVENTS} key events")
    ring = ring_of(claimed.key_events, market_id, base)  # 2
    opened = open_envelope(data, Offer, ring, market_id, signer=claimed.node_id)  # 3
    _check_fresh(opened.message, now_unix_ms)  # 4
    _check_numbers(opened.message)  # 5
    return opened, ring


def _check_fresh(offer: Offer, now_unix_ms: int) -> None:
    if abs(now_unix_ms - offer.issued_at_unix_ms) > FRESH_MS:
        raise InvalidRequest("the offer is not fresh", hint="Check the clocks; sign a new one.")


def _check_certificate(pem: str) -> None:
    """Made as for dialling, so that what is taken here can be dialled."""
    try:
        channel_credentials(pem)
    except InvalidVersion:
        raise InvalidRequest("the TLS certificate to pin has no known version") from None


def _check_numbers(offer: Offer) -> None:
    if not 1 <= len(offer.models) <= MAX_MODELS:
        raise InvalidRequest(f"an offer names 1 to {MAX_MODELS} models")
    if not 1 <= offer.capacity <= _MAX_CAPACITY:
        raise InvalidRequest(f"capacity must be from 1 to {_MAX_CAPACITY}")
    if not _MIN_LEASE_MS <= offer.lease_ms <= _MAX_LEASE_MS:
        raise InvalidRequest(f"lease_ms must be from {_MIN_LEASE_MS} to {_MAX_LEASE_MS}")
    if len(offer.endpoint) > _MAX_ENDPOINT_CHARS:
        raise InvalidRequest("the endpoint is too long")
    if offer.endpoint:
        _check_certificate(offer.tls_certificate_pem)
    for model in offer.models:
        asks = (model.ask_input_nano_per_mtok, model.ask_output_nano_per_mtok)
        if max(asks) > _MAX_ASK_NANO_PER_MTOK:
            raise InvalidRequest("an ask is out of range", hint="Nanocredits per million tokens.")
        if len(model.manifest_digest) != 32 or model.max_context_tokens < 1:
            raise InvalidRequest("an offered model needs a manifest digest and a context length")
