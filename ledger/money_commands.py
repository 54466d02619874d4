"""``trueweight ledger`` commands of the treasurer: payouts' ends, limits, rewards, debts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import click

from trueweight.ledger import reports
from trueweight.ledger.command_support import (
    database_option,
    ledger_options,
    new_id,
    one_operation,
    reference_id,
    with_ledger,
)
from trueweight.protos.envelope import digest_of, parse_envelope, parse_payload
from trueweight.protos.errors import InvalidRequest, error_for
from trueweight.protos.ids import ID_BYTES, derived_id
from trueweight.protos.money import format_credits, parse_credits
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1.audit_pb2 import Verdict
from trueweight.runtime.cli import json_option, option, print_json, print_table
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.ledger_port import LedgerPort
from trueweight.runtime.market import load_market

F = TypeVar("F", bound=Callable[..., object])
_BATCH = 256
# It was rewarded before, at this price or another, or is none that is rewarded.
_NOT_REWARDED = ("CONFLICT", "ID_CONFLICT")
_HOUR_MS = 3_600_000
_DAY_MS = 24 * _HOUR_MS
# By the ledger's clock, one after the other from 1970 on.
_PERIODS = {
    "hour": _HOUR_MS,
    "day": _DAY_MS,
    "week": 7 * _DAY_MS,
    "month": 30 * _DAY_MS,
}


def _own_reference(function: F) -> F:
    """--reference: what makes a second run a replay."""
    # Required: an id that is new in each run would pay again after a lost answer.
    return option(
        "--reference",
        required=True,
        help="Your name for it, such as an invoice's number: the same one never pays twice.",
    )(function)


@click.command()
@click.argument("payee")
@click.argument("credits")
@option("--rail", default="manual", help="Where the money goes.")
@_own_reference
@option("--settle/--start-only", default=False, help="Also mark it as paid.")
@one_operation
def payout(
    *,
    payee: str,
    credits: str,
    rail: str,
    reference: str,
    settle: bool,
    market: Path,
    keys: Path,
) -> list[pb.Operation]:
    """Pay CREDITS to PAYEE; pending until it is settled.

    PAYEE is a node's id (out of its available earnings), verifier:<id>, client:<id> or fee:market.
    Run again with the same --reference after a lost answer: it pays once.
    """
    body = pb.PayoutStart(amount_nano=parse_credits(credits), rail=rail)
    if ":" in payee:
        body.account = payee
    else:
        body.node_id = payee
    start = pb.Operation(
        id=reference_id(market, keys, "payout", rail.encode(), reference.encode()),
        payout_start=body,
    )
    return [start, _settlement(start.id, True, reference)] if settle else [start]


@click.command("withdraw-bond")
@click.argument("node_id")
@click.argument("credits")
@_own_reference
@option(
    "--not-before",
    type=click.DateTime(("%Y-%m-%d", "%Y-%m-%dT%H:%M:%S")),
    help="When it may be paid, UTC; default: the first midnight after the settlement window.",
)
@one_operation
def withdraw_bond(
    *,
    node_id: str,
    credits: str,
    reference: str,
    not_before: datetime | None,
    market: Path,
    keys: Path,
) -> pb.Operation:
    """Take CREDITS out of NODE_ID's bond; pending until it is settled, which takes the settlement
    window at least.

    Run again with the same --reference after a lost answer: it pays once. A run on a later day
    needs the first one's --not-before.
    """
    if not_before is None:
        due = _first_midnight(
            SystemClock().now_unix_ms() + load_market(market).descriptor.settlement_window_ms
        )
    else:
        due = round(not_before.replace(tzinfo=UTC).timestamp() * 1000)
    return pb.Operation(
        id=reference_id(market, keys, "withdraw-bond", reference.encode()),
        bond_withdraw=pb.BondWithdraw(
            node_id=node_id, amount_nano=parse_credits(credits), not_before_unix_ms=due
        ),
    )


@click.command()
@click.argument("payout_id")
# Without an environment twin: what one rail answered must not settle the next payout.
@click.option(
    "--paid/--failed",
    required=True,
    allow_from_autoenv=False,
    help="What the rail answered.",
)
@option("--reference", default="", help="The rail's reference: one settles one payout.")
@one_operation
def settle(*, payout_id: str, paid: bool, reference: str) -> pb.Operation:
    """End a pending payout or bond withdrawal PAYOUT_ID: paid, or back to the node."""
    return _settlement(_id(payout_id), paid, reference)


@click.command()
@click.argument("api_key_id")
@click.argument("credits")
@option("--per", type=click.Choice(tuple(_PERIODS)), help="In each of these (month: 30 days).")
@one_operation
def limit(*, api_key_id: str, credits: str, per: str | None) -> pb.Operation:
    """Let API_KEY_ID spend at most CREDITS in total, holds included; 0 removes the limit.

    With --per: in each hour, day, week or month, beside any limit in total.
    """
    return pb.Operation(
        id=new_id(),
        set_spending_limit=pb.SetSpendingLimit(
            api_key_id=api_key_id,
            limit_nano=parse_credits(credits),
            period_ms=_PERIODS[per] if per else 0,
        ),
    )


@click.command()
@click.argument("credits")
@ledger_options
@option("--from-index", default=0, type=click.IntRange(0), help="First log index to look at.")
@json_option
def reward(
    *,
    credits: str,
    market: Path,
    keys: Path,
    endpoint: str | None,
    from_index: int,
    as_json: bool,
) -> None:
    """Pay CREDITS out of the verification pool for every audit not paid for yet.

    An audit is a verdict on a settled receipt that its verifier had asked for in the log; each
    verifier has one of a receipt, and repeating another's for an appeal is not paid. To pay for
    what an epoch owed and nothing else: 'trueweight verifier reward'.
    """
    amount = parse_credits(credits)

    async def run(port: LedgerPort) -> dict[str, object]:
        paid = 0
        async for operations in _rewards(port, from_index, amount):
            for result in await port.apply(operations):
                if result.status == pb.Result.APPLIED:
                    paid += 1
                elif result.status == pb.Result.REFUSED and result.code not in _NOT_REWARDED:
                    raise error_for(result.code, result.message)
        return {"verdicts": paid, "credits": format_credits(paid * amount)}

    facts = with_ledger(market, keys, endpoint, run)
    if as_json:
        print_json(facts)
    else:
        print_table("Rewards", tuple(facts), [tuple(facts.values())])


async def _rewards(port: LedgerPort, start: int, amount: int) -> AsyncIterator[list[pb.Operation]]:
    place = start
    while True:
        page = await port.read_log(place, _BATCH, ("verdict",))
        operations = [_reward_for(entry.body, amount) for entry in page.entries]
        if operations:
            yield operations
        place = page.next_index
        if place >= page.tree_size:
            return


def _reward_for(envelope: bytes, amount: int) -> pb.Operation:
    verdict = parse_payload(parse_envelope(envelope), Verdict)
    digest = digest_of(envelope)
    # Derived: a run that was cut off is simply run again.
    return pb.Operation(
        id=derived_id("reward", digest),
        reward=pb.Reward(
            verifier_id=verdict.verifier_id, amount_nano=amount, verdict_digest=digest
        ),
    )


@click.command()
@database_option
@json_option
def debts(*, database: str, as_json: bool) -> None:
    """What refunds and convictions could not pay and is still owed; 'pay-debt' pays it."""
    rows = reports.debts(database)
    if as_json:
        print_json(rows)
        return
    table = [(r["creditor"], format_credits(int(r["owed"])), r["operation"]) for r in rows]
    print_table("Owed, credits", ("creditor", "owed", "operation"), table)


@click.command("pay-debt")
@click.argument("operation")
@click.argument("creditor")
@one_operation
def pay_debt(*, operation: str, creditor: str) -> pb.Operation:
    """Pay what OPERATION owes to CREDITOR, as 'debts' lists it, out of the treasury or the fees.

    All of it, and once: run again after a lost answer it is a replay.
    """
    id_ = _id(operation, "an operation id")
    return pb.Operation(
        id=derived_id("pay-debt", id_, creditor.encode()),
        pay_debt=pb.PayDebt(operation_id=id_, creditor=creditor),
    )


def _settlement(payout_id: bytes, paid: bool, reference: str) -> pb.Operation:
    return pb.Operation(
        # Derived: the same answer of the rail twice is a replay.
        id=derived_id("settle", payout_id, bytes([paid])),
        payout_settle=pb.PayoutSettle(payout_id=payout_id, paid=paid, reference=reference),
    )


def _first_midnight(after_unix_ms: int) -> int:
    """The same for all runs of a day; an hour is left for a clock that is not the ledger's."""
    return -(-(after_unix_ms + _HOUR_MS) // _DAY_MS) * _DAY_MS


def _id(text: str, what: str = "a payout id") -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != ID_BYTES:
        raise InvalidRequest(
            f"{what} has 32 hexadecimal digits",
            hint="As 'ledger payout', 'ledger withdraw-bond' and 'ledger debts' print it.",
        )
    return value
