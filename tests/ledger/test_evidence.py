# ruff: noqa: E501  (one operation per line reads as a table)
"""What a capture, a claim or a publication must carry. Attacks have tests named after them."""

from __future__ import annotations

import os

import pytest

from trueweight.ledger.court import court_of, with_key_events
from trueweight.ledger.prepare import prepare
from trueweight.ledger.values import Leaf
from trueweight.protos.envelope import digest_of, parse_envelope, seal
from trueweight.protos.v1 import audit_pb2, market_pb2, model_pb2
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.simulation.ledger_world import ASK_INPUT, Leg, World, make_signer, smaller

HOLD = b"hhhhhhwhhhhhhhhh"  # of the form of a UUIDv7


@pytest.fixture(scope="module")
def w():
    return World()


@pytest.fixture(scope="module")
def court(w):
    base = court_of(w.market)
    return with_key_events(base, [Leaf("key-event", n.key_event, b"") for n in w.node])


def code(w, court, operation, caller="router"):
    identity = w.signers[caller].identity if caller in w.signers else caller
    error = prepare(operation, identity, court).error
    return error.code if error else ""


def parts(w, *legs):
    """Bill and evidence of a correct capture, to be bent."""
    capture = w.capture(HOLD, *legs)
    bill = market_pb2.Bill.FromString(parse_envelope(capture.capture.bill).payload)
    return bill, list(zip(capture.capture.assignments, capture.capture.receipts, strict=True))


def test_a_correct_capture_passes(w, court):
    assert code(w, court, w.capture(HOLD, Leg(w.node[0]), Leg(w.node[1], choice=1))) == ""


def plus(field, amount=1):
    def change(bill):
        setattr(bill.legs[0], field, getattr(bill.legs[0], field) + amount)

    return change


def put(field, value):
    return lambda bill: setattr(bill.legs[0], field, value)


def dearer(bill):
    bill.legs[0].client_charge_nano += 1
    bill.charge_nano += 1


def other_split(bill):
    bill.legs[0].fee_nano += 1
    bill.legs[0].node_nano -= 1


def other_sum(bill):
    bill.charge_nano += 1


def other_hold(bill):
    bill.hold_id = b"x" * 16


def other_market(bill):
    bill.market_id = "other"


def no_legs(bill):
    del bill.legs[0]
    bill.charge_nano = 0


BENDINGS = {
    "charge": dearer,
    "sum": other_sum,
    "fee": other_split,
    "output": plus("billed_output_tokens"),
    "input": plus("billed_input_tokens"),
    "subsidy": put("pool_subsidy_nano", 1),
    "ask": plus("ask_output_nano_per_mtok"),
    "node": put("node_id", "a" * 32),
    "choice": put("choice_index", 1),
    "hold": other_hold,
    "market": other_market,
    "receipt": put("receipt_digest", b"x" * 32),
    "assignment": put("assignment_digest", b"x" * 32),
    "legs": no_legs,
}


@pytest.mark.parametrize("what", BENDINGS)
def test_attack_a_bill_that_says_more_than_its_evidence(w, court, what):
    bill, pairs = parts(w, Leg(w.node[0]))
    operation = w.capture_of(bill, pairs)
    assert code(w, court, operation) == ""
    BENDINGS[what](bill)
    bent = w.capture_of(bill, pairs)
    bent.capture.hold_id = HOLD
    assert code(w, court, bent) in ("BAD_SIGNATURE", "INVALID_REQUEST")


def test_attack_a_bill_signed_by_somebody_else(w, court):
    bill, pairs = parts(w, Leg(w.node[0]))
    assert code(w, court, w.capture_of(bill, pairs, signer="verifier")) == "BAD_SIGNATURE"


def test_attack_the_bill_of_another_router_cannot_be_submitted(w, court):
    operation = w.capture(HOLD, Leg(w.node[0]))
    assert code(w, court, operation, "verifier") == "PERMISSION_DENIED"
    assert code(w, court, operation, "") == "PERMISSION_DENIED"


def test_attack_one_assignment_charged_twice(w, court):
    bill, pairs = parts(w, Leg(w.node[0]))
    bill.legs.append(bill.legs[0])
    bill.charge_nano *= 2
    assert code(w, court, w.capture_of(bill, pairs * 2)) == "INVALID_REQUEST"


def test_attack_a_receipt_forged_by_the_router(w, court):
    bill, pairs = parts(w, Leg(w.node[0]))
    receipt = market_pb2.Receipt(
        market_id=w.market_id,
        assignment_digest=digest_of(pairs[0][0]),
        node_id=w.node[0].identity,
        output_tokens=10**6,
    )
    forged = seal(receipt, w.signers["router"])
    bill.legs[0].receipt_digest = digest_of(forged)
    assert code(w, court, w.capture_of(bill, [(pairs[0][0], forged)])) == "BAD_SIGNATURE"


def test_an_unknown_node_key_says_what_to_do(w):
    error = prepare(w.capture(HOLD, Leg(w.node[0])), w.identity("router"), court_of(w.market)).error
    assert error is not None and "Publish the node's key-event first" in error.hint


def test_attack_two_signers_in_one_envelope_do_not_lend_each_other_names(w, court):
    bill, pairs = parts(w, Leg(w.node[0]))
    bill.router_id = w.identity("verifier")
    assert code(w, court, w.capture_of(bill, pairs, signer="verifier"), "verifier") in (
        "BAD_SIGNATURE",
        "PERMISSION_DENIED",
    )


@pytest.mark.parametrize("field", ["bill", "assignments", "receipts"])
def test_attack_any_flipped_byte_of_the_evidence_is_found(w, court, field):
    whole = w.capture(HOLD, Leg(w.node[0]))
    value = getattr(whole.capture, field)
    data = bytearray(value if field == "bill" else value[0])
    # Every 7th byte: each hits payload, type, key id or signature somewhere.
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1
        operation = pb.Operation()
        operation.CopyFrom(whole)
        if field == "bill":
            operation.capture.bill = bytes(changed)
        else:
            getattr(operation.capture, field)[0] = bytes(changed)
        found = code(w, court, operation)
        # A changed signature beside the assignment's signed bytes proves nothing and harms
        # nothing: the assignment is bound by the digests in bill and receipt.
        if field == "assignments" and not found:
            assert digest_of(bytes(changed)) == digest_of(bytes(data))
            continue
        assert found in ("BAD_SIGNATURE", "INVALID_REQUEST"), place


def test_attack_hostile_bytes_never_crash(w, court):
    for size in (0, 1, 7, 200, 300_000):
        junk = os.urandom(size)
        for operation in (
            pb.Operation(id=HOLD, publish=pb.Publish(envelope=junk)),
            pb.Operation(id=HOLD, capture=pb.Capture(hold_id=HOLD, bill=junk, assignments=[junk], receipts=[junk])),
            pb.Operation(id=HOLD, refund=pb.Refund(receipt_digest=junk, verdict=junk)),
            pb.Operation(id=HOLD, convict=pb.Convict(conviction=junk)),
            pb.Operation(id=HOLD, claim=pb.Claim(hold_id=HOLD, assignment=junk, receipt=junk)),
            pb.Operation(id=junk[:40], hold=pb.Hold(account="client:a", amount_nano=1)),
        ):  # fmt: skip
            for caller in ("router", "verifier", "admin"):
                assert code(w, court, operation, caller)


@pytest.mark.parametrize(
    ("operation", "who"),
    [
        (pb.Operation(deposit=pb.Deposit(account="client:a", amount_nano=1, rail="r", reference="x")), "router"),
        (pb.Operation(deposit=pb.Deposit(account="client:a", amount_nano=1, rail="r", reference="x")), "stranger"),
        (pb.Operation(hold=pb.Hold(account="client:a", amount_nano=1)), "verifier"),
        (pb.Operation(void_hold=pb.VoidHold(hold_id=HOLD)), "admin"),
        (pb.Operation(release=pb.Release(node_id="n", amount_nano=1)), "router"),
        (pb.Operation(payout_start=pb.PayoutStart(node_id="n", amount_nano=1, rail="r")), "m"),
        (pb.Operation(payout_settle=pb.PayoutSettle(payout_id=HOLD, paid=True)), "operator"),
        (pb.Operation(bond_deposit=pb.BondDeposit(node_id="n", amount_nano=1, rail="r", reference="x")), "n"),
        (pb.Operation(set_spending_limit=pb.SetSpendingLimit(api_key_id="k")), "router"),
        (pb.Operation(expire=pb.Expire(limit=1)), "verifier"),
        (pb.Operation(reward=pb.Reward(verifier_id="v", amount_nano=1, verdict_digest=b"d" * 32)), "router"),
    ],
)  # fmt: skip
def test_attack_operations_outside_the_callers_scope(w, court, operation, who):
    operation.id = HOLD
    assert code(w, court, operation, who) == "PERMISSION_DENIED"


@pytest.mark.parametrize(
    "operation",
    [
        pb.Operation(id=b"short", deposit=pb.Deposit(account="client:a", amount_nano=1, rail="r", reference="x")),
        pb.Operation(id=HOLD),
        pb.Operation(id=HOLD, deposit=pb.Deposit(account="client:A", amount_nano=1, rail="r", reference="x")),
        pb.Operation(id=HOLD, deposit=pb.Deposit(account="fee:market", amount_nano=1, rail="r", reference="x")),
        pb.Operation(id=HOLD, deposit=pb.Deposit(account="client:a", amount_nano=0, rail="r", reference="x")),
        pb.Operation(id=HOLD, deposit=pb.Deposit(account="client:a", amount_nano=2**63, rail="r", reference="x")),
        pb.Operation(id=HOLD, deposit=pb.Deposit(account="client:a", amount_nano=1, rail="r", reference="")),
        pb.Operation(id=HOLD, deposit=pb.Deposit(account="client:a", amount_nano=1, rail="r", reference="x\x00y")),
        pb.Operation(id=HOLD, deposit=pb.Deposit(account="client:" + "a" * 200, amount_nano=1, rail="r", reference="x")),
        pb.Operation(id=HOLD, set_spending_limit=pb.SetSpendingLimit(api_key_id="")),
        pb.Operation(id=HOLD, set_spending_limit=pb.SetSpendingLimit(api_key_id="k", period_ms=1)),
        pb.Operation(id=HOLD, expire=pb.Expire(limit=0)),
        pb.Operation(id=HOLD, expire=pb.Expire(limit=5000)),
        pb.Operation(id=HOLD, release=pb.Release(node_id="../x")),
    ],
)  # fmt: skip
def test_malformed_operations_are_refused_by_name(w, court, operation):
    assert code(w, court, operation, "admin") == "INVALID_REQUEST"


def signed(w, message, who):
    signer = w.market_signer if who == "market" else w.signers.get(who) or w.node[0]
    return w.publish(seal(message, signer))


def test_who_may_publish_what(w, court):
    verifier = w.identity("verifier")
    market, entry = w.market_id, model_pb2.RegistryEntry(market_id=w.market_id, model_id="demo")
    assert code(w, court, signed(w, entry, "market")) == ""
    assert code(w, court, signed(w, entry, "router")) == "PERMISSION_DENIED"
    opening = audit_pb2.EpochOpen(market_id=market, verifier_id=verifier)
    assert code(w, court, signed(w, opening, "verifier")) == ""
    assert code(w, court, signed(w, opening, "node")) == "PERMISSION_DENIED"
    stolen = audit_pb2.Verdict(market_id=market, verifier_id="somebody")
    assert code(w, court, signed(w, stolen, "verifier")) == "BAD_SIGNATURE"
    suspension = market_pb2.Suspension(market_id=market, issuer=market, node_id="n")
    assert code(w, court, signed(w, suspension, "market")) == ""
    assert code(w, court, signed(w, suspension, "verifier")) == "BAD_SIGNATURE"
    bill = market_pb2.Bill(market_id=market)
    assert code(w, court, signed(w, bill, "router")) == "PERMISSION_DENIED"
    foreign = make_signer("mallory", market)
    assert code(w, court, w.publish(foreign.key_event)) == ""
    assert code(w, court, w.publish(make_signer("mallory", "elsewhere").key_event)) != ""


def test_a_verdict_that_does_not_refund_does_not_refund(w, court):
    operation = w.refund(b"r" * 32, "n", audit_pb2.Verdict.SCORED)
    assert code(w, court, operation, "verifier") == "INVALID_REQUEST"
    operation = w.refund(b"r" * 32, "n")
    operation.refund.receipt_digest = b"s" * 32
    assert code(w, court, operation, "verifier") == "INVALID_REQUEST"
    assert (
        code(
            w, court, pb.Operation(id=HOLD, refund=pb.Refund(receipt_digest=b"r" * 32)), "verifier"
        )
        == "INVALID_REQUEST"
    )
    greedy = w.convict("n", 0, reward_ppm=100_001)
    assert code(w, court, greedy, "verifier") == "INVALID_REQUEST"


def test_attack_a_claim_for_another_node_or_with_another_receipt(w, court):
    assignment, receipt = w.evidence(HOLD, Leg(w.node[0]), b"r" * 16)
    other_assignment, other = w.evidence(HOLD, smaller(Leg(w.node[0]), prompt=5), b"r" * 16)
    body = pb.Claim(hold_id=HOLD, assignment=assignment, receipt=receipt)
    mine = w.node[0].identity
    assert code(w, court, pb.Operation(id=HOLD, claim=body), mine) == ""
    assert (
        code(w, court, pb.Operation(id=HOLD, claim=body), w.node[1].identity) == "PERMISSION_DENIED"
    )
    body.receipt = other
    assert code(w, court, pb.Operation(id=HOLD, claim=body), mine) == "BAD_SIGNATURE"
    assert other_assignment and ASK_INPUT
