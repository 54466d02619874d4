"""``trueweight ledger`` commands of the treasurer: payouts' ends, limits, rewards, debts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import click

from trueweight.ledger import reports
from trueweight.ledger.command_support import (
    database_option,
    ledger_options,
    move,
    new_id,
    with_ledger,
)
from trueweight.protos.envelope import digest_of, parse_envelope, parse_payload
from trueweight.protos.errors import InvalidRequest, error_for
from trueweight.protos.ids import ID_BYTES, derived_id
from trueweight.protos.money import format_credits, parse_credits
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1.audit_pb2 import Verdict
from trueweight.runtime.cli import json_option, option, print_json, print_table
from trueweight.runtime.ledger_port import LedgerPort

_BATCH = 256
_HOUR_MS = 3_600_000
# By the ledger's clock, one after the other from 1970 on.
_PERIODS = {
    "hour": _HOUR_MS,
    "day": 24 * _HOUR_MS,
    "week": 7 * 24 * _HOUR_MS,
    "month": 30 * 24 * _HOUR_MS,
}


@click.command()
@click.argument("payout_id")
# Without an environment twin: what one rail answered must not settle the next payout.
@click.option(
    "--paid/--failed",
    required=True,
    allow_from_autoenv=False,
    help="What the rail answered.",
)
@ledger_options
@option("--reference", default="", help="The rail's reference.")
@json_option
def settle(
    *,
    payout_id: str,
    paid: bool,
    market: Path,
    keys: Path,
    endpoint: str | None,
    reference: str,
    as_json: bool,
) -> None:
    """End a pending payout or bond withdrawal PAYOUT_ID: paid, or back to the node."""
    pending = _id(payout_id)
    operation = pb.Operation(
        # Derived: the same answer of the rail twice is a replay.
        id=derived_id("settle", pending, bytes([paid])),
        payout_settle=pb.PayoutSettle(payout_id=pending, paid=paid, reference=reference),
    )
    move(market, keys, endpoint, operation, as_json)


@click.command()
@click.argument("api_key_id")
@click.argument("credits")
@ledger_options
@option("--per", type=click.Choice(tuple(_PERIODS)), help="In each of these (month: 30 days).")
@json_option
def limit(
    *,
    api_key_id: str,
    credits: str,
    per: str | None,
    market: Path,
    keys: Path,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Let API_KEY_ID spend at most CREDITS in total, holds included; 0 removes the limit.

    With --per: in each hour, day, week or month, beside any limit in total.
    """
    operation = pb.Operation(
        id=new_id(),
        set_spending_limit=pb.SetSpendingLimit(
            api_key_id=api_key_id,
            limit_nano=parse_credits(credits),
            period_ms=_PERIODS[per] if per else 0,
        ),
    )
    move(market, keys, endpoint, operation, as_json)


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
    """Pay CREDITS out of the verification pool for every logged verdict not paid for yet."""
    amount = parse_credits(credits)

    async def run(port: LedgerPort) -> dict[str, object]:
        paid = 0
        async for operations in _rewards(port, from_index, amount):
            for result in await port.apply(operations):
                if result.status == pb.Result.APPLIED:
                    paid += 1
                elif result.status == pb.Result.REFUSED and result.code != "CONFLICT":
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
    """What refunds and convictions could not pay and is still owed."""
    rows = reports.debts(database)
    if as_json:
        print_json(rows)
        return
    table = [(r["creditor"], format_credits(int(r["owed"])), r["operation"]) for r in rows]
    print_table("Owed, credits", ("creditor", "owed", "operation"), table)


def _id(text: str) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != ID_BYTES:
        raise InvalidRequest(
            "a payout id has 32 hexadecimal digits", hint="As 'ledger payout' prints it."
        )
    return value
