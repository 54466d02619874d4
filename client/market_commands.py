"""``trueweight market``: make a market, look at it, move its servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trueweight.client.market_setup import (
    KEYS,
    MARKET_FILE,
    ROLES,
    Changes,
    MarketPlan,
    create_market,
    reissue_market,
)
from trueweight.protos.errors import InvalidRequest
from trueweight.protos.v1.market_pb2 import Member
from trueweight.runtime.cli import (
    json_option,
    market_option,
    option,
    path_option,
    print_json,
    print_table,
)
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.market import Market, load_market

_PPM_PER_PERCENT = 10_000
_MAX_EVENT_BYTES = 64 * 1024


@click.group()
def market() -> None:
    """Make a market, look at it."""


@market.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@option("--name", default="my-market", help="What people call this market.")
@option("--ledger-endpoint", default="127.0.0.1:7411", help="host:port of the ledger.")
@option("--router-endpoint", default="127.0.0.1:7412", help="host:port of the router (gRPC).")
@option("--verifier-endpoint", default="", help="host:port of the verifier, if it serves any.")
@option("--fee-percent", default=5.0, type=click.FloatRange(0, 100), help="The market's share.")
@option(
    "--pool-percent",
    default=5.0,
    type=click.FloatRange(0, 100),
    help="Share that pays for verification.",
)
@option(
    "--settlement-window-s",
    default=3600,
    type=click.IntRange(0),
    help="Earnings stay locked at least this long.",
)
@json_option
def init(
    *,
    directory: Path,
    name: str,
    ledger_endpoint: str,
    router_endpoint: str,
    verifier_endpoint: str,
    fee_percent: float,
    pool_percent: float,
    settlement_window_s: int,
    as_json: bool,
) -> None:
    """Make DIRECTORY with the keys of every role and the signed market file."""
    plan = MarketPlan(
        name=name,
        endpoints={
            "ledger": ledger_endpoint,
            "router": router_endpoint,
            "verifier": verifier_endpoint,
        },
        fee_ppm=round(fee_percent * _PPM_PER_PERCENT),
        verification_pool_ppm=round(pool_percent * _PPM_PER_PERCENT),
        settlement_window_ms=settlement_window_s * 1000,
    )
    made = create_market(directory, plan, SystemClock())
    _print(made, as_json)
    if not as_json:
        click.echo(f"Public:  {directory / MARKET_FILE}  (give it to every role and operator)")
        click.echo(f"Private: {directory / KEYS}/<role>  (move each root.pem offline)")


@market.command()
@market_option
@json_option
def show(market: Path, as_json: bool) -> None:
    """Show who is who, after checking the signatures."""
    _print(load_market(market), as_json)


@market.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False, exists=True))
@option("--ledger-endpoint", default=None, help="New host:port of the ledger.")
@option("--router-endpoint", default=None, help="New host:port of the router.")
@option("--verifier-endpoint", default=None, help="New host:port of the verifier.")
@path_option("--admit-verifier", multiple=True, help="key-event.bin of a verifier to admit.")
@option("--convictions-needed", default=0, type=click.IntRange(0), help="Verifiers that convict.")
@json_option
def reissue(
    directory: Path,
    as_json: bool,
    admit_verifier: tuple[Path, ...],
    convictions_needed: int,
    **endpoints: str | None,
) -> None:
    """Sign the market file of DIRECTORY again: other endpoints, more verifiers."""
    changed = {
        name.removesuffix("_endpoint"): value
        for name, value in endpoints.items()
        if value is not None
    }
    events = [_read_event(path) for path in admit_verifier]
    changes = Changes(changed, events, convictions_needed)
    _print(reissue_market(directory, changes, SystemClock()), as_json)


def _read_event(path: Path) -> bytes:
    try:
        return path.read_bytes()[:_MAX_EVENT_BYTES]
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None


def _print(shown: Market, as_json: bool) -> None:
    facts = _facts(shown)
    if as_json:
        print_json(facts)
        return
    title = (
        f"{facts['name']} ({facts['market_id']}), issue {facts['sequence']}: "
        f"fee {facts['fee_ppm'] / _PPM_PER_PERCENT:g} %, "
        f"verification {facts['verification_pool_ppm'] / _PPM_PER_PERCENT:g} %"
    )
    rows = [(m["role"], m["identity"], m["endpoint"] or "-") for m in facts["members"]]
    print_table(title, ("role", "identity", "endpoint"), rows)


def _facts(shown: Market) -> dict[str, Any]:
    descriptor = shown.descriptor
    names = {role: name for name, role in ROLES.items()}
    return {
        "market_id": shown.market_id,
        "name": descriptor.name,
        "sequence": descriptor.sequence,
        "fee_ppm": descriptor.fee_ppm,
        "verification_pool_ppm": descriptor.verification_pool_ppm,
        "settlement_window_ms": descriptor.settlement_window_ms,
        "convictions_needed": descriptor.convictions_needed,
        "members": [
            {
                "role": names.get(m.role, Member.Role.Name(m.role).lower()),
                "identity": m.identity,
                "endpoint": m.endpoint,
            }
            for m in descriptor.members
        ],
    }
