"""Bytes from strangers: envelopes, receipts, bundles. Our errors, or the exact honest result."""

from __future__ import annotations

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.protos.envelope import (
    MAX_ENVELOPE_BYTES,
    apply_key_event,
    digest_of,
    open_envelope,
    payload_type,
    pre_authentication_encoding,
    ring_of,
    seal,
    seal_key_event,
)
from trueweight.protos.errors import BadSignature, Conflict, ReceiptRefused, TrueweightError
from trueweight.protos.identity import KeyRing, check_signature, key_id, public_bytes
from trueweight.protos.receipt_bundle import (
    Inclusion,
    LeafProof,
    ReceiptBundle,
    bundle_of,
    parse_bundle,
)
from trueweight.protos.receipts import check_receipt
from trueweight.protos.sampling import Sampling
from trueweight.protos.tokens import token_digest
from trueweight.protos.v1.envelope_pb2 import Envelope, KeyEvent, Signature
from trueweight.protos.v1.market_pb2 import Offer, Receipt, SamplingParams

MARKET = "market-under-test"


@pytest.fixture
def ring(node):
    return ring_of([node.key_event], MARKET)


@settings(max_examples=100)
@given(st.binary(max_size=400))
def test_any_bytes_as_envelope(node, data):
    ring = ring_of([node.key_event], MARKET)
    with pytest.raises(TrueweightError):
        open_envelope(data, Receipt, ring, MARKET)
    with pytest.raises(TrueweightError):
        apply_key_event(ring, data, MARKET)


@settings(max_examples=100)
@given(
    st.text(max_size=140),
    st.binary(max_size=60),
    st.lists(st.tuples(st.text(max_size=60), st.binary(max_size=70)), max_size=10),
)
def test_well_formed_envelopes_with_any_content(node, kind, payload, signatures):
    ring = ring_of([node.key_event], MARKET)
    for name in (kind, payload_type(Receipt), payload_type(KeyEvent)):
        envelope = Envelope(
            payload_type=name,
            payload=payload,
            signatures=[Signature(key_id=k, signature=s) for k, s in signatures],
        ).SerializeToString()
        with pytest.raises(TrueweightError):
            open_envelope(envelope, Receipt, ring, MARKET)
        with pytest.raises(TrueweightError):
            apply_key_event(ring, envelope, MARKET)


@settings(max_examples=100)
@given(st.binary(max_size=120))
def test_signed_nonsense_is_refused_or_parsed_never_a_crash(node, payload):
    """A certified key signs arbitrary payloads."""
    ring, uri = ring_of([node.key_event], MARKET), payload_type(Receipt)
    signature = node.key.sign(pre_authentication_encoding(uri, payload))
    envelope = Envelope(
        payload_type=uri,
        payload=payload,
        signatures=[Signature(key_id=node.key_id, signature=signature)],
    ).SerializeToString()
    with pytest.raises(BadSignature):  # nothing random names this market
        open_envelope(envelope, Receipt, ring, MARKET)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_as_receipt(honest_facts, data):
    facts, ring = honest_facts
    with pytest.raises(ReceiptRefused):
        check_receipt(facts(receipt=data), ring, MARKET)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_signed_receipt_fields(honest_facts, node, data):
    """The node itself signs absurd numbers: refused by a named check, never a crash."""
    facts, ring = honest_facts
    u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
    receipt = Receipt(
        market_id=MARKET,
        assignment_digest=data.draw(st.sampled_from([facts().assignment.digest, b"", b"x" * 32])),
        node_id=data.draw(st.sampled_from([node.identity, "", "other"])),
        output_digest=data.draw(st.binary(max_size=33)),
        prompt_tokens=data.draw(u32),
        output_tokens=data.draw(u32),
        finish_reason=data.draw(st.integers(-(2**31), 2**31 - 1)),
        queue_us=data.draw(u64),
        first_token_us=data.draw(u64),
        total_us=data.draw(u64),
    )
    with pytest.raises(ReceiptRefused) as caught:
        check_receipt(facts(receipt=seal(receipt, node)), ring, MARKET)
    assert caught.value.check


@pytest.fixture(scope="session")
def honest_facts(honest):
    return honest.facts, honest.ring


@settings(max_examples=150)
@given(st.binary(max_size=200))
def test_any_bytes_as_sampling_parameters(data):
    message = SamplingParams()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return
    try:
        parameters = Sampling.from_proto(message)
    except TrueweightError:
        return
    assert Sampling.from_proto(parameters.to_proto()) == parameters


# --- envelopes and keys ----------------------------------------------------------------------


def test_an_envelope_is_verified_before_it_is_parsed(node, ring):
    envelope = Envelope.FromString(seal(Receipt(market_id=MARKET, node_id="n"), node))
    envelope.payload = b"\xff\xff not a receipt"
    with pytest.raises(BadSignature, match="does not hold"):
        open_envelope(envelope.SerializeToString(), Receipt, ring, MARKET)


def test_a_message_cannot_be_passed_off_as_another_type(node, ring):
    sealed = seal(Receipt(market_id=MARKET), node)
    with pytest.raises(BadSignature, match="expected a offer"):
        open_envelope(sealed, Offer, ring, MARKET)
    envelope = Envelope.FromString(sealed)
    envelope.payload_type = payload_type(Offer)
    with pytest.raises(BadSignature):
        open_envelope(envelope.SerializeToString(), Offer, ring, MARKET)


def test_the_digest_ignores_what_signatures_were_added(node):
    sealed = seal(Receipt(market_id=MARKET), node)
    envelope = Envelope.FromString(sealed)
    envelope.signatures.append(Signature(key_id="someone", signature=b"x"))
    assert digest_of(envelope.SerializeToString()) == digest_of(sealed)


def test_bounds_of_an_envelope(node, ring):
    with pytest.raises(BadSignature, match="too large"):
        open_envelope(bytes(MAX_ENVELOPE_BYTES + 1), Receipt, ring, MARKET)
    envelope = Envelope.FromString(seal(Receipt(market_id=MARKET), node))
    del envelope.signatures[:]
    with pytest.raises(BadSignature, match="1 to 8"):
        open_envelope(envelope.SerializeToString(), Receipt, ring, MARKET)


def test_a_key_event_must_be_signed_by_the_root_it_names(node, stranger):
    event = KeyEvent.FromString(Envelope.FromString(node.key_event).payload)
    forged = seal_key_event(event, stranger.key, node.key)
    with pytest.raises(BadSignature):
        apply_key_event(KeyRing(), forged, MARKET)
    event.identity = stranger.identity
    with pytest.raises(BadSignature):
        apply_key_event(KeyRing(), seal_key_event(event, stranger.key, node.key), MARKET)
    with pytest.raises(BadSignature):
        apply_key_event(KeyRing(), node.key_event, "another market")


def test_key_rotation_and_revocation(node):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    root = Ed25519PrivateKey.from_private_bytes(bytes([3]) * 32)

    def event(key, action, sequence):
        return seal_key_event(
            KeyEvent(
                market_id=MARKET,
                identity=node.identity,
                root_public_key=public_bytes(root),
                operational_public_key=public_bytes(key),
                action=action,
                sequence=sequence,
            ),
            root,
            key,
        )

    fresh = Ed25519PrivateKey.generate()
    ring = apply_key_event(KeyRing(), node.key_event, MARKET)
    ring = apply_key_event(ring, event(fresh, KeyEvent.CERTIFY, 2), MARKET)
    assert ring.identity_of(key_id(public_bytes(fresh))) == node.identity
    assert ring.identity_of(node.key_id) == node.identity
    ring = apply_key_event(ring, event(node.key, KeyEvent.REVOKE, 3), MARKET)
    assert ring.identity_of(node.key_id) is None
    with pytest.raises(BadSignature):
        open_envelope(seal(Receipt(market_id=MARKET), node), Receipt, ring, MARKET)
    # The old certificate does not bring the revoked key back.
    with pytest.raises(Conflict):
        apply_key_event(ring, node.key_event, MARKET)


@pytest.mark.parametrize("sizes", [(0, 64), (31, 64), (32, 0), (32, 63), (32, 64)])
def test_malformed_keys_and_signatures(sizes):
    with pytest.raises(BadSignature):
        check_signature(bytes(sizes[0]), bytes(sizes[1]), b"message")


ORDER = 2**252 + 27742317777372353535851937790883648493
# Points that make signatures over any message hold with a careless verifier.
SMALL_ORDER = (
    (1).to_bytes(32, "little"),  # the neutral element
    bytes(32),  # order 4
    (2**255 - 20).to_bytes(32, "little"),  # order 2
    (2**255 - 18).to_bytes(32, "little"),  # the neutral element, not canonical
)


@pytest.mark.parametrize("key", SMALL_ORDER)
@pytest.mark.parametrize("r", SMALL_ORDER)
def test_attack_keys_of_small_order_sign_nothing(key, r):
    with pytest.raises(BadSignature):
        check_signature(key, r + bytes(32), b"message")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80), st.binary(min_size=32, max_size=32), st.integers(0, 767))
def test_a_signature_holds_for_its_own_key_and_message_only(message, seed, flipped):
    key = Ed25519PrivateKey.from_private_bytes(seed)
    public, signature = public_bytes(key), key.sign(message)
    check_signature(public, signature, message)
    wrong = bytearray(signature + public)
    wrong[flipped // 8] ^= 1 << flipped % 8
    with pytest.raises(BadSignature):
        check_signature(bytes(wrong[64:]), bytes(wrong[:64]), message)
    # S and S + L are the same scalar: only the smaller is canonical.
    s = int.from_bytes(signature[32:], "little") + ORDER
    with pytest.raises(BadSignature):
        check_signature(public, signature[:32] + s.to_bytes(32, "little"), message)


@pytest.mark.parametrize("ids", [[-1], [2**32], [2**70], [-(2**70)]])
def test_token_ids_out_of_range(ids):
    with pytest.raises(ValueError, match="range"):
        token_digest(bytes(16), ids)


# --- receipt bundles -------------------------------------------------------------------------

BUNDLE = ReceiptBundle(
    request_id=b"r" * 16,
    assignments=(b"a", b"b"),
    receipts=(b"c", b"d"),
    bill=b"bill",
    key_events=(b"k",),
    salt=bytes(16),
    prompt_token_ids=(1, 2),
    prefix_token_ids=((), (3,)),
    output_token_ids=((3,), (4, 5)),
    template_sha256=b"t" * 32,
    date="2026-11-23",
    inclusion=Inclusion("note", LeafProof(5, (bytes(32),)), (LeafProof(6, ()), LeafProof(7, ()))),
)


def test_a_bundle_round_trips():
    assert parse_bundle(json.dumps(BUNDLE.to_json())) == BUNDLE
    assert parse_bundle(json.dumps(BUNDLE.to_json()).encode()) == BUNDLE


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=150)
@given(st.data())
def test_a_bundle_with_anything_in_any_place(data):
    document = json.loads(json.dumps(BUNDLE.to_json()))
    target = data.draw(st.sampled_from([document, document["inclusion"]]))
    key = data.draw(st.sampled_from(sorted(target)))
    target[key] = data.draw(JSON)
    try:
        bundle = bundle_of(document)
    except TrueweightError:
        return
    assert bundle_of(bundle.to_json()) == bundle


@settings(max_examples=100)
@given(st.binary(max_size=200) | st.text(max_size=200))
def test_any_bytes_as_bundle(data):
    with pytest.raises(TrueweightError):
        parse_bundle(data)


@pytest.mark.parametrize(
    "key",
    sorted(set(BUNDLE.to_json()) - {"inclusion", "date", "template_sha256", "prefix_token_ids"}),
)
def test_a_missing_key_is_named(key):
    document = BUNDLE.to_json()
    del document[key]
    with pytest.raises(TrueweightError, match=key):
        bundle_of(document)


def test_an_erased_bundle_says_so():
    with pytest.raises(TrueweightError, match="erased"):
        bundle_of({"request_id": "00" * 16, "assignments": [], "erased": True})
