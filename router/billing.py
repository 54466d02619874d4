"""Bills: what a client pays for the legs of a request. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trueweight.protos.envelope import Opened
from trueweight.protos.money import charge_nano, split_charge
from trueweight.protos.receipts import billable_output
from trueweight.protos.v1.market_pb2 import Assignment, Bill, BillLeg, Receipt


@dataclass(frozen=True)
class ServedLeg:
    """A leg with an accepted receipt. ``received`` are all ids that came for it, ``delivered``
    how many of them the client got."""

    assignment: Opened[Assignment]
    receipt: Opened[Receipt]
    prefix: tuple[int, ...]
    received: tuple[int, ...]
    delivered: int


@dataclass(frozen=True, slots=True)
class Terms:
    """The market's shares, in parts per million of a charge."""

    fee_ppm: int
    pool_ppm: int


def bill_legs(legs: Sequence[ServedLeg], terms: Terms) -> list[BillLeg]:
    """One bill leg per receipt. The client pays the prompt once, on the first of them, and the
    output it got; what later nodes read again is paid from the verification pool, as far as this
    bill itself fills it: else nodes could drain it by continuing each other."""
    lines = [_bill_leg(leg, terms, pays_prompt=index == 0) for index, leg in enumerate(legs)]
    left = sum(line.pool_nano for line in lines)
    for line in lines:
        line.pool_subsidy_nano = min(line.pool_subsidy_nano, left)
        left -= line.pool_subsidy_nano
    return lines


def _bill_leg(leg: ServedLeg, terms: Terms, *, pays_prompt: bool) -> BillLeg:
    order, receipt = leg.assignment.message, leg.receipt.message
    billed_input = order.prompt_len if pays_prompt else 0
    billed_output = billable_output(receipt, leg.delivered)
    ask_input, ask_output = order.ask_input_nano_per_mtok, order.ask_output_nano_per_mtok
    charge = charge_nano(billed_input, billed_output, ask_input, ask_output)
    split = split_charge(charge, terms.fee_ppm, terms.pool_ppm)
    read_again = order.prompt_len + order.prefix_len - billed_input
    return BillLeg(
        assignment_digest=leg.assignment.digest,
        receipt_digest=leg.receipt.digest,
        node_id=order.node_id,
        choice_index=order.choice_index,
        leg=order.leg,
        billed_input_tokens=billed_input,
        billed_output_tokens=billed_output,
        ask_input_nano_per_mtok=ask_input,
        ask_output_nano_per_mtok=ask_output,
        client_charge_nano=charge,
        fee_nano=split.fee_nano,
        pool_nano=split.pool_nano,
        node_nano=split.node_nano,
        pool_subsidy_nano=charge_nano(read_again, 0, ask_input, 0) if order.leg else 0,
    )


def make_bill(legs: Sequence[ServedLeg], terms: Terms, *, bill_id: bytes, now_unix_ms: int) -> Bill:
    """The unsigned bill of a request; ``legs`` is not empty and all belong to one request."""
    order = legs[0].assignment.message
    lines = bill_legs(legs, terms)
    return Bill(
        market_id=order.market_id,
        bill_id=bill_id,
        request_id=order.request_id,
        router_id=order.router_id,
        model_id=order.model_id,
        hold_id=order.hold_id,
        legs=lines,
        charge_nano=sum(line.client_charge_nano for line in lines),
        issued_at_unix_ms=now_unix_ms,
    )
