"""Asking a node what it serves, and checking that the answer is its own."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass

from trueweight.protos.envelope import open_envelope, parse_envelope, parse_payload, ring_of
from trueweight.protos.errors import BadSignature, InvalidRequest, Unavailable
from trueweight.protos.v1.market_pb2 import Offer
from trueweight.protos.v1.model_pb2 import Manifest
from trueweight.protos.v1.node_pb2 import DescribeRequest, DescribeResponse
from trueweight.protos.v1.node_pb2_grpc import NodeStub
from trueweight.runtime import rpc

MAX_KEY_EVENTS = 16


@dataclass(frozen=True)
class Description:
    """A verified answer: the offer is signed by the node it names, and that node holds the
    certificate that was dialled. Manifests are as the node sent them, unchecked."""

    offer: Offer
    manifests: tuple[Manifest, ...]
    answer: DescribeResponse


async def describe(endpoint: str, market_id: str, timeout_ms: float = 10_000) -> Description:
    """Raises Unavailable, InvalidRequest, or BadSignature if the answer does not hold."""
    pem = await _certificate_of(endpoint, timeout_ms)
    channel = rpc.make_channel(endpoint, pem)
    try:
        answer = await rpc.call(
            NodeStub(channel).Describe, DescribeRequest(), timeout_ms=timeout_ms
        )
    finally:
        await channel.close()
    offer = open_offer(answer.offer, market_id)
    if offer.tls_certificate_pem.split() != pem.split():
        raise BadSignature("the node answered with another node's offer")
    manifests = tuple(parse_payload(parse_envelope(m), Manifest) for m in answer.manifests[:64])
    return Description(offer, manifests, answer)


def open_offer(data: bytes, market_id: str) -> Offer:
    """The offer, signed by the node it names. Raises BadSignature."""
    claimed = parse_payload(parse_envelope(data), Offer)
    if len(claimed.key_events) > MAX_KEY_EVENTS:
        raise BadSignature(f"an offer has at most {MAX_KEY_EVENTS} key events")
    ring = ring_of(claimed.key_events, market_id)
    return open_envelope(data, Offer, ring, market_id, signer=claimed.node_id).message


async def _certificate_of(endpoint: str, timeout_ms: float) -> str:
    host, port = rpc.host_and_port(endpoint) or ("", 0)
    if not host:
        raise InvalidRequest(
            f"{endpoint!r} is not HOST:PORT", hint="Write it as in gpu1.example:7001."
        )
    try:
        return await asyncio.to_thread(
            ssl.get_server_certificate, (host, port), timeout=timeout_ms / 1000
        )
    except OSError as error:
        raise Unavailable(
            f"nothing answers at {endpoint}: {error}", hint="Does the node run, and listen there?"
        ) from error
