"""Both ends of a session prove who they are over the other's fresh nonce."""

from __future__ import annotations

from collections.abc import Callable

from trueweight.protos.envelope import open_envelope, parse_envelope, parse_payload, ring_of, seal
from trueweight.protos.errors import BadSignature
from trueweight.protos.identity import KeyRing, Signer
from trueweight.protos.v1.envelope_pb2 import SessionProof

NONCE_BYTES = 32
_MAX_PROOF_BYTES = 8 * 1024


def new_nonce(random: Callable[[int], bytes]) -> bytes:
    """A nonce for the other side to prove itself over."""
    return random(NONCE_BYTES)


def make_proof(signer: Signer, market_id: str, audience: str, their_nonce: bytes) -> bytes:
    """The envelope that proves ``signer`` to ``audience``, who sent ``their_nonce``.

    ``audience`` may be empty when the other side is not known yet (a node that was dialled by
    a router it has not met); the nonce alone then binds the proof to this session.
    """
    if len(their_nonce) != NONCE_BYTES:
        raise BadSignature("a session nonce has 32 bytes")
    proof = SessionProof(
        market_id=market_id,
        subject=signer.identity,
        audience=audience,
        nonce=their_nonce,
        key_event=signer.key_event,
    )
    return seal(proof, signer)


def check_proof(
    data: bytes, *, market_id: str, my_identity: str, my_nonce: bytes, ring: KeyRing
) -> tuple[str, KeyRing]:
    """Who is at the other end, and a ring that knows its operational key.

    The key event in the proof only shows that the operational key belongs to the identity;
    whether that identity may do anything is the caller's decision. Raises BadSignature.
    """
    if len(data) > _MAX_PROOF_BYTES:
        raise BadSignature("the session proof is too long")
    claimed = parse_payload(parse_envelope(data), SessionProof)
    ring = ring_of([claimed.key_event], market_id, ring)
    proof = open_envelope(data, SessionProof, ring, market_id, signer=claimed.subject).message
    if proof.nonce != my_nonce:
        raise BadSignature("the session proof answers another nonce")
    if proof.audience not in ("", my_identity):
        raise BadSignature("the session proof is for somebody else")
    return proof.subject, ring
