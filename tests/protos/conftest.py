"""Identities and a whole honest receipt, to be spoilt one field at a time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import settings

from trueweight.protos.envelope import open_envelope, ring_of, seal, seal_key_event
from trueweight.protos.identity import Signer, key_id, public_bytes
from trueweight.protos.receipts import ReceiptFacts, RouterEvents
from trueweight.protos.sampling import Sampling
from trueweight.protos.tokens import token_digest
from trueweight.protos.v1.envelope_pb2 import KeyEvent
from trueweight.protos.v1.market_pb2 import EOS, Assignment, EngineFingerprint, Receipt

# A loaded machine is not a bug: hypothesis must not fail a slow example.
settings.register_profile("trueweight", deadline=None)
settings.load_profile("trueweight")

MARKET = "market-under-test"
SALT = bytes(range(16))
MANIFEST = b"\x05" * 32
VOCABULARY, STOP = 100, 2


def identity(tag: int, market: str = MARKET) -> Signer:
    """A deterministic identity."""
    root = Ed25519PrivateKey.from_private_bytes(bytes([tag]) * 32)
    key = Ed25519PrivateKey.from_private_bytes(bytes([tag, tag + 1]) * 16)
    event = KeyEvent(
        market_id=market,
        identity=key_id(public_bytes(root)),
        root_public_key=public_bytes(root),
        operational_public_key=public_bytes(key),
        action=KeyEvent.CERTIFY,
        sequence=1,
    )
    return Signer(event.identity, key, seal_key_event(event, root, key))


FINGERPRINT = EngineFingerprint(
    engine="synthetic", sampler_id="tw-gumbel-1", sampler_precision="fp32"
)


@dataclass
class Case:
    """An honest assignment and receipt; ``facts`` builds what L0 looks at."""

    router: Signer
    node: Signer
    prompt: list[int] = field(default_factory=lambda: [5, 6, 7])
    prefix: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=lambda: [10, 11, 12, STOP])
    order: dict = field(default_factory=dict)
    receipt: dict = field(default_factory=dict)
    events: RouterEvents | None = field(default_factory=RouterEvents)
    signer: Signer | None = None

    def spoilt(self, **changes):
        return replace(self, **changes)

    def assignment(self):
        fields = {
            "market_id": MARKET,
            "request_id": b"r" * 16,
            "router_id": self.router.identity,
            "node_id": self.node.identity,
            "manifest_digest": MANIFEST,
            "prompt_digest": token_digest(SALT, self.prompt),
            "prompt_len": len(self.prompt),
            "prefix_len": len(self.prefix),
            "prefix_digest": token_digest(SALT, self.prefix),
            "sampling": Sampling(stop_token_ids=(STOP,)).to_proto(),
            "seed": 7,
            "max_tokens": 8,
            "ask_input_nano_per_mtok": 100_000_000,
            "ask_output_nano_per_mtok": 300_000_000,
            "deadline_ms": 10_000,
            "hold_id": b"h" * 16,
            "model_id": "m",
        }
        order = Assignment(**{**fields, **self.order})
        ring = ring_of([self.router.key_event], MARKET)
        return open_envelope(seal(order, self.router), Assignment, ring, MARKET)

    def facts(self, **changes):
        order = self.assignment()
        fields = {
            "market_id": MARKET,
            "assignment_digest": order.digest,
            "node_id": self.node.identity,
            "output_digest": token_digest(SALT, self.output),
            "prompt_tokens": len(self.prompt),
            "output_tokens": len(self.output),
            "finish_reason": EOS,
            "fingerprint": FINGERPRINT,
            "queue_us": 10,
            "first_token_us": 500,
            "total_us": 5_000,
        }
        receipt = Receipt(**{**fields, **self.receipt})
        facts = ReceiptFacts(
            assignment=order,
            receipt=seal(receipt, self.signer or self.node),
            salt=SALT,
            prompt=self.prompt,
            prefix=self.prefix,
            received=self.output,
            manifest_digest=MANIFEST,
            vocabulary_size=VOCABULARY,
            events=self.events,
            offered=FINGERPRINT,
        )
        return replace(facts, **changes)

    @property
    def ring(self):
        return ring_of([self.node.key_event], MARKET)


@pytest.fixture(scope="session")
def router():
    return identity(1)


@pytest.fixture(scope="session")
def node():
    return identity(3)


@pytest.fixture(scope="session")
def stranger():
    return identity(5)


@pytest.fixture(scope="session")
def honest(router, node):
    return Case(router, node)
