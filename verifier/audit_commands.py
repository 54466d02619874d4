"""``trueweight verifier owed | reward``: how verifiers kept their word, and what they earned."""

from __future__ import annotations

from typing import Any

import click

from trueweight.protos.errors import error_for
from trueweight.protos.money import format_credits, parse_credits
from trueweight.protos.v1.ledger_pb2 import Result
from trueweight.runtime import cli
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.keys import load_signer
from trueweight.runtime.ledger_port import LedgerPort, connect_ledger
from trueweight.runtime.market import Market
from trueweight.verifier.app import access_tokens
from trueweight.verifier.command_support import ledger_option, market_of, read_log, read_view
from trueweight.verifier.owed import LATE, MISSING, STATUSES, accounts
from trueweight.verifier.rewards import Payable, payable, reward

_BATCH = 256
# Also at another price.
_PAID_BEFORE = ("CONFLICT", "ID_CONFLICT")


@click.command()
@click.argument("epoch", type=click.IntRange(1))
@cli.market_option
@cli.optional_keys_option
@ledger_option
@cli.json_option
def owed(epoch: int, as_json: bool, **options: Any) -> None:
    """Which audits EPOCH owed, which were done, late, missing or void, and by whom."""
    view = read_log(options)
    found = accounts(view, epoch, SystemClock().now_unix_ms())
    if as_json:
        cli.print_json([entry.as_json() for entry in found])
        return
    cli.print_table(
        f"epoch {epoch}",
        (
            *("verifier", "revealed", *STATUSES),
            *("unasked", "copied", "disputed", "refuted", "contradicted", "kept"),
        ),
        [
            (
                entry.verifier_id,
                entry.revealed,
                *(entry.count(status) for status in STATUSES),
                entry.unasked,
                entry.copied,
                len(entry.disputed),
                len(entry.refuted),
                len(entry.contradicted),
                entry.kept,
            )
            for entry in found
        ],
    )
    for entry in found:
        if entry.refused:
            click.echo(f"{entry.verifier_id}: the epoch does not count: {entry.refused}")
    broken = [a for entry in found for a in entry.audits if a.status in (LATE, MISSING)]
    if broken:
        cli.print_table(
            "late or missing",
            ("receipt leaf", "node", "status", "delay s"),
            [(a.receipt_index, a.node_id, a.status, a.delay_ms / 1000) for a in broken[:100]],
        )


@click.command("reward")
@click.argument("epoch", type=click.IntRange(1))
@cli.option("--per-audit", required=True, help="Credits per audit, from the verification pool.")
@cli.option("--dry-run", is_flag=True, help="Only show what would be paid.")
@cli.market_option
@cli.keys_option
@ledger_option
@cli.json_option
def pay(epoch: int, per_audit: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Pay verifiers for the audits of EPOCH that they owed and did (administrator's keys)."""
    price_nano = parse_credits(per_audit)
    rows = cli.run_async(_pay(market_of(options), options, epoch, 0 if dry_run else price_nano))
    facts = [
        {
            "verifier_id": found.verifier_id,
            "audits": len(found.verdict_digests),
            "earned": format_credits(price_nano * len(found.verdict_digests)),
            "paid_now": format_credits(paid_nano),
            "why_not": found.why_not,
        }
        for found, paid_nano in rows
    ]
    if as_json:
        cli.print_json(facts)
        return
    columns = ("verifier_id", "audits", "earned", "paid_now", "why_not")
    cli.print_table(f"epoch {epoch}", columns, [[f[c] for c in columns] for f in facts])


async def _pay(
    market: Market, options: dict[str, Any], epoch: int, price_nano: int
) -> list[tuple[Payable, int]]:
    signer = load_signer(options["keys"])
    ledger = connect_ledger(market, access_tokens(market, signer, SystemClock()))
    try:
        view = await read_view(market, ledger)
        found = [payable(view, a) for a in accounts(view, epoch, SystemClock().now_unix_ms())]
        return [(entry, await pay_one(ledger, entry, price_nano)) for entry in found]
    finally:
        await ledger.close()


async def pay_one(ledger: LedgerPort, found: Payable, price_nano: int) -> int:
    """Nanocredits that moved now; what was paid before is not paid again."""
    digests, moved = found.verdict_digests if price_nano > 0 else (), 0
    for start in range(0, len(digests), _BATCH):
        operations = [
            reward(found.verifier_id, digest, price_nano)
            for digest in digests[start : start + _BATCH]
        ]
        for result in await ledger.apply(operations):
            if result.status == Result.APPLIED:
                moved += result.amount_nano
            elif result.status == Result.REFUSED and result.code not in _PAID_BEFORE:
                raise error_for(result.code, result.message)
    return moved
