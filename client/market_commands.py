"""``trueweight market``: make a market, look at it, sign other terms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from google.protobuf.json_format import MessageToDict, Parse, ParseError
from google.protobuf.message import Message

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
from trueweight.protos.market_terms import (
    DEFAULT_AUDIT_TERMS,
    DEFAULT_ENGINES,
    allow_list_of,
    with_synthetic,
)
from trueweight.protos.v1.market_pb2 import AuditTerms, EngineAllowList, Member
from trueweight.runtime.cli import (
    json_option,
    market_option,
    option,
    path_option,
    print_json,
    print_table,
)
from trueweight.runtime.clock import SystemClock
from trueweight.runtime.files import read_bounded
from trueweight.runtime.market import Market, load_market

_PPM_PER_PERCENT = 10_000
_MAX_FILE_BYTES = 64 * 1024
# Ten years.
_MAX_WINDOW_S = 10 * 365 * 86_400
_TERMS = ("audit_floor_percent", "second_opinions_percent", "max_gain_tokens")
F = TypeVar("F", bound=Callable[..., Any])


def _terms_options(function: F) -> F:
    """What engines may declare, and what audits verifiers owe at least."""
    for add in (
        path_option(
            "--engines", default=None, help="JSON file of what may be paid: docs/models.md."
        ),
        option("--allow-synthetic", is_flag=True, help="Also engines without weights."),
        option(
            "--audit-floor-percent",
            default=None,
            type=click.FloatRange(0, 100),
            help="Lowest audit rate that a verifier may state. New markets: 1.",
        ),
        option(
            "--second-opinions-percent",
            default=None,
            type=click.FloatRange(0, 100),
            help="Least share of second opinions. New markets: 10.",
        ),
        option(
            "--max-gain-tokens",
            default=None,
            type=click.IntRange(1),
            help="Largest gain of a cheat that is believed. New markets: 200000.",
        ),
    ):
        function = add(function)
    return function


def _engines(old: EngineAllowList, path: Path | None, allow_synthetic: bool) -> EngineAllowList:
    if path is not None:
        try:
            old = Parse(read_bounded(path, _MAX_FILE_BYTES), EngineAllowList())
        except (UnicodeDecodeError, ParseError, RecursionError) as error:
            raise InvalidRequest(
                f"{path} is no list of engines: {error}",
                hint="Write it as 'trueweight market show --json' does, under \"engines\".",
            ) from None
    return with_synthetic(old) if allow_synthetic else old


def _audit_terms(old: AuditTerms, options: dict[str, Any]) -> AuditTerms:
    new = AuditTerms()
    new.CopyFrom(old)
    if (floor := options["audit_floor_percent"]) is not None:
        new.floor_ppm = round(floor * _PPM_PER_PERCENT)
    if (share := options["second_opinions_percent"]) is not None:
        new.duplicate_rate_ppm = round(share * _PPM_PER_PERCENT)
    if (gain := options["max_gain_tokens"]) is not None:
        new.max_gain_tokens = gain
    return new


@click.group()
def market() -> None:
    """Make a market, look at it, sign other terms."""


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
    type=click.IntRange(0, _MAX_WINDOW_S),
    help="Earnings stay locked at least this long.",
)
@_terms_options
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
    engines: Path | None,
    allow_synthetic: bool,
    as_json: bool,
    **terms: Any,
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
        engines=_engines(DEFAULT_ENGINES, engines, allow_synthetic),
        audit_terms=_audit_terms(DEFAULT_AUDIT_TERMS, terms),
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
@option(
    "--convictions-needed",
    default=0,
    type=click.IntRange(0),
    help="Verifiers that convict a node; 0: as it is.",
)
@_terms_options
@json_option
def reissue(
    *,
    directory: Path,
    as_json: bool,
    admit_verifier: tuple[Path, ...],
    convictions_needed: int,
    engines: Path | None,
    allow_synthetic: bool,
    **options: Any,
) -> None:
    """Sign the market file of DIRECTORY again: other endpoints, more verifiers, other terms."""
    changed = {
        name.removesuffix("_endpoint"): value
        for name, value in options.items()
        if name.endswith("_endpoint") and value is not None
    }
    old = load_market(directory / MARKET_FILE).descriptor
    allow = terms = None
    if engines is not None or allow_synthetic:
        allow = _engines(allow_list_of(old), engines, allow_synthetic)
    if any(options[name] is not None for name in _TERMS):
        known = old.audit_terms if old.HasField("audit_terms") else DEFAULT_AUDIT_TERMS
        terms = _audit_terms(known, options)
    events = [read_bounded(path, _MAX_FILE_BYTES) for path in admit_verifier]
    changes = Changes(changed, events, convictions_needed, allow, terms)
    _print(reissue_market(directory, changes, SystemClock()), as_json)


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
    allowed = [
        (name, ", ".join(v) if isinstance(v, list) else v) for name, v in facts["engines"].items()
    ]
    print_table("Engines that get paid work", ("what", "allowed"), allowed)
    if facts["audit_terms"]:
        print_table("Audits", ("term", "bound"), list(facts["audit_terms"].items()))


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
        "engines": _readable(allow_list_of(descriptor)),
        "audit_terms": _readable(descriptor.audit_terms),
        "members": [
            {
                "role": names.get(m.role, Member.Role.Name(m.role).lower()),
                "identity": m.identity,
                "endpoint": m.endpoint,
            }
            for m in descriptor.members
        ],
    }


def _readable(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found
