"""What the verifier's commands share: options, the market, the fold of the log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from trueweight.protos.v1.market_pb2 import MarketDescriptor, Member
from trueweight.runtime import cli
from trueweight.runtime.ledger_port import LedgerPort, connect_ledger
from trueweight.runtime.market import Market, load_market
from trueweight.verifier.state import KINDS, LogView


def ledger_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """--ledger: where the ledger is now."""
    return cli.option("--ledger", default="", help="Ledger HOST:PORT, if not the market file's.")(
        function
    )


def market_of(options: dict[str, Any]) -> Market:
    """The market of a command's options."""
    market = load_market(options["market"])
    if options["ledger"]:
        market = at_endpoint(market, Member.LEDGER, options["ledger"])
    return market


def at_endpoint(market: Market, role: Member.Role, endpoint: str) -> Market:
    """The market with another endpoint for a role; identity and certificate stay pinned."""
    descriptor = MarketDescriptor()
    descriptor.CopyFrom(market.descriptor)
    for member in descriptor.members:
        if member.role == role:
            member.endpoint = endpoint
    return replace(market, descriptor=descriptor)


def read_log(options: dict[str, Any]) -> LogView:
    """The fold of the public log, for a command."""
    return cli.run_async(fetch_view(market_of(options)))


async def fetch_view(market: Market) -> LogView:
    """Connects as nobody, folds the log as it is now, disconnects."""
    ledger = connect_ledger(market)
    try:
        return await read_view(market, ledger)
    finally:
        await ledger.close()


async def read_view(market: Market, ledger: LedgerPort) -> LogView:
    """The fold of the log as it is now."""
    view = LogView(market)
    while True:
        page = await ledger.read_log(view.next_index, 1000, KINDS)
        for entry in page.entries:
            view.apply(entry)
        view.next_index = max(view.next_index, page.next_index)
        if page.next_index >= page.tree_size:
            return view
