"""``trueweight ledger``: serve the books, look at them, move money, check them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from trueweight.ledger import reports
from trueweight.ledger import witness as witnessing
from trueweight.ledger.command_support import (
    archive_option,
    database_option,
    deposit_id,
    ledger_options,
    new_id,
    one_operation,
    rail_options,
    with_ledger,
)
from trueweight.ledger.connect import connected
from trueweight.ledger.money_commands import (
    debts,
    limit,
    pay_debt,
    payout,
    reward,
    settle,
    withdraw_bond,
)
from trueweight.ledger.public_log import MAX_CONNECTIONS, error_response, make_app
from trueweight.ledger.reinstate_command import reinstate
from trueweight.ledger.service import Ledger
from trueweight.ledger.servicer import LedgerServer, check_address
from trueweight.protos.checkpoint import log_origin
from trueweight.protos.money import format_credits, parse_credits
from trueweight.protos.v1 import ledger_pb2 as pb
from trueweight.protos.v1.market_pb2 import Member
from trueweight.runtime.cli import (
    configure_logs,
    json_option,
    keys_option,
    log_options,
    market_option,
    option,
    path_option,
    print_json,
    print_ready,
    print_table,
    run_async,
    serve_until_signal,
)
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.http_server import HttpServer, make_seats
from trueweight.runtime.keys import load_signer
from trueweight.runtime.ledger_port import LedgerPort
from trueweight.runtime.market import load_market
from trueweight.runtime.rpc import Authenticator
from trueweight.runtime.tls import ensure_certificate

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])


@click.group()
def ledger() -> None:
    """The books: serve them, look at them, move money, check them."""


@ledger.command()
@market_option
@keys_option
@database_option
@archive_option
@option("--listen", default="", help="host:port of the gRPC service; default: the market file's.")
@option(
    "--http-listen",
    default="",
    help="host:port at which anybody may read the log over HTTP; none by default.",
)
@option(
    "--verify-workers",
    default=max(0, min(4, (os.cpu_count() or 1) - 1)),
    type=click.IntRange(0, 64),
    help="Processes that check signatures of large batches; started when needed.",
)
@log_options
def serve(
    *,
    market: Path,
    keys: Path,
    database: str,
    archive: Path | None,
    listen: str,
    http_listen: str,
    verify_workers: int,
    log_level: str,
    log_json: bool,
) -> None:
    """Serve the ledger until SIGTERM. Start it twice on one database for a warm standby."""
    configure_logs(log_level, log_json)
    tune_collector()
    clock = SystemClock()
    known, signer = load_market(market), load_signer(keys)
    books = Ledger(known, signer, database, clock, verify_workers=verify_workers, archive=archive)
    ensure_certificate(keys, clock.now_unix_ms())
    gate = Authenticator(signer.identity, known.market_id, lambda: books.court.ring, clock)

    async def run(stop: asyncio.Event) -> None:
        address = listen or known.member(Member.LEDGER).endpoint or "127.0.0.1:0"
        server = LedgerServer(books, gate, check_address(address), keys)
        await _serve(stop, books, server, check_address(http_listen) if http_listen else "")

    run_async(serve_until_signal(run))


def _public_log(books: Ledger) -> HttpServer:
    seats = make_seats(MAX_CONNECTIONS)
    return HttpServer(make_app(books, seats), seats, error_response)


def tune_collector() -> None:
    """Cyclic garbage is rare here, and full collections cost a quarter of the time."""
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


async def _serve(
    stop: asyncio.Event,
    books: Ledger,
    server: LedgerServer,
    http_address: str,
) -> None:
    public = _public_log(books) if http_address else None
    try:
        # A standby serves reads while it waits for the writer's lock.
        await books.start(wait_ms=2_000)
        await server.start()
        if public is not None:
            await public.start(http_address)
        print_ready(
            role="ledger",
            endpoint=server.endpoint,
            http=public.endpoint if public is not None else "",
            identity=books.identity,
            writer=books.is_writer,
        )
        await stop.wait()
    finally:
        if public is not None:
            await public.close()
        await server.stop()
        await books.close()


@ledger.command()
@click.argument("accounts", nargs=-1)
@database_option
@json_option
def balance(*, accounts: tuple[str, ...], database: str, as_json: bool) -> None:
    """Balances of ACCOUNTS, or of all."""
    rows = reports.balances(database, accounts)
    if as_json:
        print_json(rows)
        return
    columns = ("available", "debits_pending", "credits_pending", "debits", "credits")
    table = [(row["account"], *(format_credits(int(row[c])) for c in columns)) for row in rows]
    print_table("Balances in credits", ("account", *(c.replace("_", " ") for c in columns)), table)


@ledger.command()
@click.argument("account")
@database_option
@archive_option
@option("--limit", default=100, type=click.IntRange(1), help="Most rows, newest last.")
@json_option
def statement(
    *, account: str, database: str, archive: Path | None, limit: int, as_json: bool
) -> None:
    """Transfers of ACCOUNT with its running balance."""
    rows = reports.statement(database, account, limit, archive)
    if as_json:
        print_json(rows)
        return
    table = [
        (r["at"], r["reason"], r["phase"], r["other"], r["amount"], r["available"]) for r in rows
    ]
    columns = ("at", "reason", "phase", "with", "amount", "available")
    print_table(f"Statement of {account}, credits", columns, table)


@ledger.command()
@database_option
@archive_option
@path_option(
    "--market",
    default=None,
    envvar="TRUEWEIGHT_MARKET",
    help="Market file: also checks checkpoint signatures.",
)
@json_option
def fsck(*, database: str, archive: Path | None, market: Path | None, as_json: bool) -> None:
    """Recompute all balances, holds and the log; exit status 1 if anything is wrong."""
    findings = reports.fsck(database, market, show_progress=not as_json, archive=archive)
    facts = {
        "clean": findings.clean,
        **findings.counts,
        "problems": findings.problems,
        "more_problems": findings.more,
    }
    if as_json:
        print_json(facts)
    else:
        for problem in findings.problems:
            click.echo(f"WRONG  {problem}")
        print_table(
            "The books are clean" if findings.clean else "The books are WRONG",
            tuple(findings.counts),
            [tuple(findings.counts.values())],
        )
    raise SystemExit(0 if findings.clean else 1)


@ledger.command("archive")
@database_option
@path_option("--to", "directory", required=True, help="Directory for the files; made if missing.")
@option("--older-than-days", default=90.0, type=click.FloatRange(0), help="What may go.")
@json_option
def archive_command(
    *, database: str, directory: Path, older_than_days: float, as_json: bool
) -> None:
    """Move old leaves and transfers out of the database, while the ledger serves."""
    done = reports.archive(database, directory, older_than_days, SystemClock().now_unix_ms())
    facts = {
        "leaves": done.leaves,
        "transfers": done.transfers,
        "archived_below": done.below,
        "file": done.file or "nothing to move",
    }
    if as_json:
        print_json(facts)
    else:
        print_table("Archived", tuple(facts), [tuple(facts.values())])


@ledger.command()
@database_option
@archive_option
@option(
    "--format",
    "form",
    type=click.Choice(["csv", "ledger"]),
    default="csv",
    help="csv, or ledger: plain-text double entry.",
)
@path_option("--out", required=True, help="File to write.")
def export(*, database: str, archive: Path | None, form: str, out: Path) -> None:
    """Write all transfers to a file."""
    count = reports.export(database, form, out, archive)
    print_json({"transfers": count, "file": str(out)})


@ledger.command()
@click.argument("account")
@click.argument("credits")
@rail_options
@one_operation
def deposit(*, account: str, credits: str, rail: str, reference: str) -> pb.Operation:
    """Credit ACCOUNT (client:NAME) with CREDITS."""
    amount = parse_credits(credits)
    id_, reference = deposit_id("deposit", rail, reference)
    return pb.Operation(
        id=id_,
        deposit=pb.Deposit(account=account, amount_nano=amount, rail=rail, reference=reference),
    )


@ledger.command()
@click.argument("node_id")
@click.argument("credits")
@rail_options
@one_operation
def bond(*, node_id: str, credits: str, rail: str, reference: str) -> pb.Operation:
    """Deposit CREDITS as bond of NODE_ID."""
    amount = parse_credits(credits)
    id_, reference = deposit_id("bond-deposit", rail, reference)
    return pb.Operation(
        id=id_,
        bond_deposit=pb.BondDeposit(
            node_id=node_id, amount_nano=amount, rail=rail, reference=reference
        ),
    )


@ledger.command()
@click.argument("node_id")
@click.argument("credits", default="0")
@option("--below-log-index", type=click.IntRange(0), default=None, help="Default: the log's end.")
@one_operation
def release(
    *,
    node_id: str,
    credits: str,
    below_log_index: int | None,
    market: Path,
    keys: Path,
    endpoint: str | None,
) -> pb.Operation:
    """Release CREDITS (default: all that may be) of NODE_ID's locked earnings."""

    async def end(port: LedgerPort) -> int:
        return (await port.checkpoint()).size

    below = below_log_index
    if below is None:
        below = with_ledger(market, keys, endpoint, end)
    body = pb.Release(node_id=node_id, amount_nano=parse_credits(credits), below_log_index=below)
    return pb.Operation(id=new_id(), release=body)


@ledger.command()
@option("--limit", default=1000, type=click.IntRange(1, 1000), help="Most holds.")
@one_operation
def expire(*, limit: int) -> pb.Operation:
    """Give back every hold whose time has passed (the ledger does so by itself, too)."""
    return pb.Operation(id=new_id(), expire=pb.Expire(limit=limit))


@ledger.command()
@ledger_options
@path_option("--state", required=True, help="File in which the newest checkpoint is remembered.")
@option("--every", default=5.0, type=click.FloatRange(0.1, 3600), help="Seconds between looks.")
@option("--once", is_flag=True, help="Look once and end.")
def witness(
    *, market: Path, keys: Path, endpoint: str | None, state: Path, every: float, once: bool
) -> None:
    """Follow the log's checkpoints; exit status 3 if the log's past was changed."""
    known = load_market(market)
    member = known.member(Member.LEDGER)
    signers = known.ring.keys_of(member.identity)
    origin = log_origin(known.market_id)

    async def follow(stop: asyncio.Event) -> None:
        seen = witnessing.load(state, origin, signers)
        async with connected(market, keys, endpoint) as port:
            while not stop.is_set():
                seen = await witnessing.look(port, seen, origin, signers)
                witnessing.remember(state, seen)
                print_json({"size": seen.state.size, "consistent": True})
                if once:
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(every):
                        await stop.wait()

    run_async(serve_until_signal(follow))


for _command in (payout, withdraw_bond, settle, limit, reward, debts, pay_debt, reinstate):
    ledger.add_command(_command)
