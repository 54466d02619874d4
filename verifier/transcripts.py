"""Opening transcripts: the router answers only to a request that is already in the log."""

from __future__ import annotations

from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from google.protobuf.message import DecodeError

from trueweight.protos.envelope import digest_of
from trueweight.protos.errors import BadSignature, NotFound
from trueweight.protos.transcript_box import WrappedKey, open_data, unwrap_key
from trueweight.protos.v1.audit_pb2 import Transcript
from trueweight.protos.v1.market_pb2 import Member
from trueweight.protos.v1.router_pb2 import OpenTranscriptRequest, OpenTranscriptResponse
from trueweight.protos.v1.router_pb2_grpc import RouterStub
from trueweight.runtime import rpc
from trueweight.runtime.market import Market
from trueweight.verifier.selection import ReceiptLeaf

OPEN_TIMEOUT_MS = 15_000


class TranscriptSource(Protocol):
    """Whoever keeps transcripts. ``router_id`` may be empty if the log does not name it."""

    async def open(
        self, router_id: str, request: OpenTranscriptRequest
    ) -> OpenTranscriptResponse: ...

    async def close(self) -> None: ...


class GrpcTranscripts:
    """Asks the market's routers over pinned channels, made on first use."""

    def __init__(self, market: Market, tokens: rpc.AccessTokens) -> None:
        self._routers = {m.identity: m for m in market.members(Member.ROUTER)}
        self._tokens = tokens
        self._open: dict[str, tuple[object, RouterStub]] = {}

    async def open(self, router_id: str, request: OpenTranscriptRequest) -> OpenTranscriptResponse:
        """Raises NotFound, PermissionDenied, Unavailable, DeadlineExceeded."""
        member = self._routers.get(router_id)
        if member is None:
            if router_id or len(self._routers) != 1:
                raise NotFound("the market has no such router", hint="Is its descriptor current?")
            member = next(iter(self._routers.values()))
        return await rpc.call(
            self._stub(member).OpenTranscript,
            request,
            timeout_ms=OPEN_TIMEOUT_MS,
            metadata=self._tokens.metadata(member.identity),
        )

    def _stub(self, member: Member) -> RouterStub:
        known = self._open.get(member.identity)
        if known is None:
            channel = rpc.make_channel(member.endpoint, member.tls_certificate_pem)
            known = (channel, RouterStub(channel))
            self._open[member.identity] = known
        return known[1]

    async def close(self) -> None:
        for channel, _ in self._open.values():
            await channel.close()  # type: ignore[attr-defined]
        self._open.clear()


def unseal(
    answer: OpenTranscriptResponse, private_key: X25519PrivateKey, receipt: ReceiptLeaf
) -> Transcript:
    """The transcript of exactly this receipt. Raises BadSignature for anything else.

    1. The data key unwraps and the ciphertext opens, both bound to the receipt's digest.
    2. It parses. 3. It carries the logged receipt and the assignment that the receipt names.
    """
    digest = receipt.receipt_digest
    wrapped = WrappedKey(answer.ephemeral_public_key, answer.wrapped_key)
    data_key = unwrap_key(wrapped, private_key, digest)  # 1
    data = open_data(data_key, answer.nonce, answer.ciphertext, digest)
    transcript = Transcript()
    try:
        transcript.ParseFromString(data)  # 2
    except DecodeError:
        raise BadSignature("the sealed bytes are no transcript") from None
    if digest_of(transcript.receipt_envelope) != digest:  # 3
        raise BadSignature("the transcript carries another receipt")
    if digest_of(transcript.assignment_envelope) != receipt.assignment_digest:
        raise BadSignature("the transcript carries another assignment")
    return transcript
