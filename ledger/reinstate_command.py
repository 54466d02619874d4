"""``trueweight ledger reinstate``: the market takes a conviction back."""

from __future__ import annotations

from pathlib import Path

import click

from trueweight.ledger.command_support import new_id, one_operation
from trueweight.protos.envelope import seal
from trueweight.protos.money import parse_credits
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1.market_pb2 import Reinstatement
from trueweight.runtime.cli import option
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.keys import load_signer
from trueweight.runtime.market import load_market


@click.command()
@click.argument("node_id")
@option("--reason", required=True, help="What the log says why, for people.")
@option(
    "--pay-back",
    default="0",
    help="Credits from the treasury to the node's bond, at most what convictions took from it.",
)
@one_operation
def reinstate(
    *, node_id: str, reason: str, pay_back: str, market: Path, keys: Path
) -> pb.Operation:
    """Take NODE_ID's conviction back, after an appeal (the market's or an administrator's keys)."""
    known, signer = load_market(market), load_signer(keys)
    statement = Reinstatement(
        market_id=known.market_id,
        node_id=node_id,
        issuer=signer.identity,
        reason=reason[:1000],
        issued_at_unix_ms=SystemClock().now_unix_ms(),
    )
    body = pb.Reinstate(
        reinstatement=seal(statement, signer), pay_back_nano=parse_credits(pay_back)
    )
    return pb.Operation(id=new_id(), reinstate=body)
